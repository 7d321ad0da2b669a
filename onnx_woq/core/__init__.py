"""Numbers: grids, statistics, solvers. Arrays in, arrays out; nothing here knows what ONNX is."""
