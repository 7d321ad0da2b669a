"""Methods: one file per quantization method, each with one function `solve(weight, stats, spec, …)`.

`registry` lists them and checks their options. A method may import everything else in `core`: grids, statistics and
refinements. It may build on another method, as GPTQ does on the input scale of TEQ, but two never import each other. A
method never packs its codes: it returns a `QuantizedTensor`, which `targets` stores.
"""
