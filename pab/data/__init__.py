"""Annotations, images, tables and training sets: readers, and the records that they return.

`annotations` reads any annotation as the `records` of a retrieval task, with one module per kind:
`masked_queries`, `labelled_images`, `tables`. `pairs` reads training pairs, `training_set` keeps
many of them on disk, and `splits` holds out source videos. `images` and `photos` list, check and
decode pictures. `wordpiece` and `vocabulary` make the caption tokens of BERT. Imports `pab.core`
only.
"""
