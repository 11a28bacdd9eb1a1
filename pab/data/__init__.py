"""Readers of annotations, images, tables and training sets; loading of images in batches.

`annotations` reads any annotation as the `records` of a retrieval task, with one module per kind:
`masked_queries`, `labelled_images`, `tables`. `pairs` parses training pairs, `training_set` reads
them from disk, and `splits` holds out source videos. `image_paths` and `tree` find image files and
PAB's files, and `id_lists` reads lists of ids. `images` and `photos` list, check and decode images.
`loader` and `image_loader` load batches in worker processes, and `pixels` normalizes them on the
device. `json_lines`, `fields`, `captions` and `bad_lines` check lines. `wordpiece` tokenizes
captions for BERT, and `vocabulary` is the command line that builds small vocabularies. This package
imports only `pab.core`.
"""
