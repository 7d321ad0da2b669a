"""Grids: the levels that the weights of a group may take, how they are fitted and how weights are rounded to them.

`integer` fits evenly spaced levels to the range of each group, encodes and decodes; `clip_search` shrinks that range to
where the error is least. Modules here may import `core.spec` and each other. They never import a method, and they never
see calibration data: at most a weight per row, given by the caller.
"""
