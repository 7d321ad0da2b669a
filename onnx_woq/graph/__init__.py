"""Models: load, find what to quantize, fold, lower, save. Built on onnx_ir; never runs a model."""
