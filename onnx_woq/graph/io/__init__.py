"""Model files: loading with the weights left on disk, copying the structure, and saving.

`model.py` loads, `save.py` writes; the others serve these two: `wire.py` and `proto.py` the protobuf format,
`external_data.py` the safety of data files, `find_model.py` the path that a user named. This package may import
`graph.edit`, `core.cpu` and `errors`. It never imports `find/` or `rewrite/`, and never looks at what a node computes.
"""
