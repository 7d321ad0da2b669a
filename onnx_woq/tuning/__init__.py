"""Many quantizations of one model: trials, the judge, and the search for a configuration or a mix of precisions.

`tune()` is the entry. The room may import everything below it: engine, runtime, targets, graph, presets, recipe and
core. It never solves a weight or writes a node itself, and never talks to people: that is left to report/ and cli/.
"""
