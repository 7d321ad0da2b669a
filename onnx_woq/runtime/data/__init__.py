"""Data: calibration and evaluation data in any form, turned into feeds for a model.

A feed is one sample: a dictionary from input names to arrays. `feeds` reads the sources, `inputs` knows what a model
takes and fills in what follows from the tokens, `text` turns text into token ids. Modules here may import `graph.io` to
look at a model's inputs, but never onnxruntime: they never run a model.
"""
