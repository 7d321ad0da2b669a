"""Models as graphs, built on onnx_ir: how to read and write them, find what can be quantized, and rewrite them.

`io/` reads and writes files, `find/` answers questions about a graph, `rewrite/` changes a graph without changing what
it computes, and `edit.py` holds the primitive edits they share. This room may import `recipe`, `core`, `errors` and
`progress`. It never imports onnxruntime, runs a model, solves for codes, or knows how a target stores them.
"""
