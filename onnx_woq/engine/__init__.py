"""One quantization: a plan, resources, statistics, solutions, and the output that is written as it is made.

`quantize()` is the entry. The room may import everything below it: runtime, targets, graph, presets, recipe and core.
It never compares models or tries a second recipe, which is left to tuning/, and never talks to people.
"""
