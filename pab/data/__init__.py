"""Annotations, images, tables and training sets: readers, and the records that they return.

`annotations` reads PAB's files, `tables` the user's own, both as the `records` of a retrieval task
or a training pair. `training_set` keeps a large set on disk, and `splits` holds out source videos.
`images` and `photos` list, check and decode pictures. `wordpiece` and `vocabulary` make the caption
tokens of BERT. Imports `pab.core` only.
"""
