"""One quantization: a plan of what to do, its execution, and the output that is written as it is made.

`quantize.py` is the entry, and reads like the method: plan, read data, calibrate, execute. `inspection.py` reports on a
plan without executing it. The room may import everything below it: runtime, targets, graph, presets, recipe and core.
It never compares models or tries a second recipe, which is left to tuning/, and never prints.
"""
