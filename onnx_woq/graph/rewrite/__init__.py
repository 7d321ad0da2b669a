"""Rewrites of a graph that keep what it computes, one per file.

A rewrite either edits the model it is given in place (`fold_scale.py`, `rotate.py`, `upcast.py`, `sum_over_heads.py`)
or returns an edited copy (`expose_values.py`, `inline_branch.py`, `raise_opset.py`); its docstring says which. This
package may import `graph.find`, `graph.io`, `graph.edit`, `core` and `errors`. It never imports a target, and never
writes low-bit weights: that is the work of `targets/`.
"""
