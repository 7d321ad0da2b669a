"""Numbers: number formats, grids, statistics of inputs, the solvers and what refines their results.

Arrays go in and arrays come out. Modules here may import NumPy, SciPy and, of this package, only `errors`, `progress`
and `version` besides each other. They never import onnx, onnx_ir or onnxruntime and never read or write a file: a
solver can be understood and tested without knowing what a model is.
"""
