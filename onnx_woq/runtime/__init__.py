"""Running models: sessions, data to feed them with, calibration runs and evaluation.

This is the only package that may import onnxruntime. Besides, it may import `targets`, `graph` and `core`. It runs
models and parts of models and collects numbers from them. It never solves a weight and never writes a model; where it
needs a changed model, it changes a copy.
"""
