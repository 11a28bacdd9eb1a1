"""Readers of annotations, images, tables and training sets; loading of images in batches.

`annotations` reads any annotation as a retrieval task, with one module per kind: `masked_queries`,
`labelled_images`, `tables`. `records` defines the results, and `label_config` the flags. `pairs`
parses training pairs. `training_set` reads pairs from disk by an index (`training_index`,
`training_index_writer`), and `splits` holds out source videos. `image_paths` finds image files, and
`tree` finds PAB's annotations. `id_lists` reads lists of ids, and `names` matches image names.
`images` and `photos` list and decode images, and `thumbnails` encodes them for HTML pages.
`loader` and `image_loader` load batches in worker processes, and `pixels` normalizes them on the
device. `json_lines`, `record_lines`, `fields`, `captions` and `bad_lines` read and check lines.
`wordpiece` tokenizes captions for BERT, and `vocabulary` is the command line of the commands that
build small vocabularies. This package imports only `pab.core`.
"""
