"""Targets: the low-bit operators that a quantized model is written with, one file for each.

A target lays the codes, scales and zero points of a weight out as its operators read them (`pack`), counts their bytes,
and rewrites the nodes of the float model (`lower`). `base.py` has the protocol, `registry.py` the list. This room may
import `graph`, `recipe`, `core` and `errors`. It never runs a model, imports onnxruntime, or decides what a code is:
values are the same whatever target stores them.
"""
