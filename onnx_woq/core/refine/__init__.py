"""Refinements: what makes a quantized weight better before or after a method has chosen its codes.

`asymmetric` moves the weight that is solved for, `descent` improves codes and scales, `low_rank` and `bias` give back a
part of the error by added terms. Each works with every method. Modules here may import `core.grids`, `core.stats`,
`core.lapack` and `core.spec`, and never a method.
"""
