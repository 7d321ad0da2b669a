"""Evaluation: how far the outputs of a quantized model are from those of its float original.

`metrics` compares two model files, `perturb` predicts the effect of replacing single weights, `effective_weight` reads
back the matrix that a written layer multiplies by. Modules here may import `runtime.calibration`, `runtime.data`,
`runtime.session`, `graph` and `core`. They never keep the outputs of more samples than they compare at the moment.
"""
