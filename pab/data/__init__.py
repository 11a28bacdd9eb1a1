"""Readers of annotations, images, tables and training sets, and the records that they return.

`annotations` reads any annotation as the `records` of a retrieval task, with one module per kind:
`masked_queries`, `labelled_images`, `tables`. `pairs` parses training pairs, `training_set` reads
them from disk, and `splits` holds out source videos. `image_paths` and `tree` find image files and
PAB's files, and `id_lists` reads lists of ids. `images` and `photos` list, check and decode images.
`wordpiece` tokenizes captions for BERT. Imports only `pab.core`.
"""
