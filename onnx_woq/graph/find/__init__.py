"""Questions about a graph: what can be quantized, what a value is computed from, where the graph can be cut.

Weights: `linears.py`, `embeddings.py`, `heads.py`, `quantized.py`, `constants.py`, `float_copies.py`. Structure:
`blocks.py`, `dependencies.py`, `attention.py`, `residual.py`, `ranks.py`. This package may import `graph.io`,
`graph.edit`, `recipe`, `core` and `errors`. It never imports `rewrite/`, and never changes a model it is asked about.
"""
