"""Readers of annotations, images, tables and training sets; loading of images in batches.

`annotations` reads any annotation as the `records` of a retrieval task, with one module per kind:
`masked_queries`, `labelled_images`, `tables`; `label_config` defines their flags. `pairs` parses
training pairs, `training_set` reads them from disk through `training_index`, which
`training_index_writer` builds, and `splits` holds out source videos. `image_paths` and `tree` find
image files and PAB's files, `id_lists` reads lists of ids, and `names` matches their spellings.
`images` and `photos` list, check and decode images, and `thumbnails` encodes them for HTML pages.
`loader` and `image_loader` load batches in worker processes, and `pixels` normalizes them on the
device. `json_lines`, `record_lines`, `fields`, `captions` and `bad_lines` read and check lines.
`wordpiece` tokenizes captions for BERT, and `vocabulary` is the shared command line of the commands
that build small vocabularies. Of the project's packages, this one imports only `pab.core`.
"""
