"""Models that tests are run on, made of `onnx.helper` calls alone.

`nodes`: single nodes, and the shortest way to quantize and run a graph of them. `codes`: quantized weights of every
number format. `chains`: products in a row, with what flows into each in numpy. `small`: a language model, an encoder,
and models that stress one thing each. `layers` and `architectures`: models of several layers as exporters write them.
"""
