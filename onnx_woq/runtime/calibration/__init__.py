"""Calibration runs: the float model runs on the samples, and statistics of the inputs of its weights are summed up.

`collect` is the entry. It decides which linear groups (the MatMul and Gemm nodes that read one activation) are
collected together. `windows` says how many of them fit the memory, `replay` runs a part of the model on all samples,
`accumulate` adds the activations to the statistics, and `hidden_states` keeps the values that the next part starts
from. Modules here may import `runtime.data`, `runtime.session`, `targets`, `graph` and `core`. They never import
`runtime.evaluation` and never keep activations: memory does not grow with the number of tokens.
"""
