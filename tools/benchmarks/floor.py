"""The arithmetic that GPTQ cannot do without, in floating-point operations of matrix products.

| part | operations | counted as |
|---|---|---|
| forward | 2·M·K·N per product | every MatMul and Gemm of the graph that some tap's input depends on, attention products included, in the shapes that onnxruntime's profile of one sample reports; the products behind the last tap are not needed |
| Gram | K²·T | XᵀX is symmetric: half of 2·K²·T |
| factor | ⅔·K³ | Cholesky factor K³/3 and inverse of a triangle K³/3 |
| solve | K²·N | row j takes the errors of the j rows before it: half of 2·K²·N |

K inputs and N outputs of a tap, T calibration tokens. Rounding, grids, packing, files and everything that is not a
product count as nothing. The usual estimate, which counts the last three as full products (Gram K²·T, factor K³,
solve 2·K²·N), is given beside it.
"""  # noqa: E501

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any


def needed(model: Path, config: str, changes: dict[str, Any], ids: Path) -> dict[str, Any]:
    """Operations by part for quantizing `model` by the preset `config` on the rows of `ids [samples, T]`."""
    import numpy as np

    import onnx_woq
    from onnx_woq.presets import preset

    groups = onnx_woq.inspect(model, replace(preset(config), **changes)).groups
    tokens = np.load(ids)["input_ids"]
    total = tokens.size
    products = _products(model, tokens[:1])
    wanted = _upstream(model, {linear for group in groups for linear in group.nodes})
    gram = sum(group.k**2 * total for group in groups)
    cubes = sum(group.k**3 for group in groups)
    squares = sum(group.k**2 * group.n for group in groups)
    forward = sum(count for name, count in products.items() if name in wanted) * len(tokens)
    least = {"forward": forward, "gram": gram, "factor": 2 * cubes / 3, "solve": squares}
    usual = {"forward": forward, "gram": gram, "factor": cubes, "solve": 2 * squares}
    return {"least": least, "usual": usual, "taps": len(groups), "tokens": total, "products": len(products)}


def _products(model: Path, row: Any) -> dict[str, int]:
    """Operations of each product of one forward pass, by node name."""
    import onnxruntime as ort

    from onnx_woq.graph.io.model import load
    from onnx_woq.runtime.data.feeds import feeds, model_inputs

    inputs = model_inputs(load(model))
    feed = feeds([{"input_ids": row}], inputs, samples=1, seqlen=row.shape[1], model_dir=model.parent)[0]
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # nodes as they are written
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        session = ort.InferenceSession(str(model), options)
        session.run(["logits"], feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    found = {}
    for event in events:
        said = event.get("args", {})
        if event.get("cat") == "Node" and said.get("op_name") in ("MatMul", "Gemm") and "output_type_shape" in said:
            (left, *_), (out, *_) = (
                [next(iter(typed.values())) for typed in said[key]] for key in ("input_type_shape", "output_type_shape")
            )
            found[event["name"].removesuffix("_kernel_time")] = 2 * prod(out) * left[-1]
    return found


def _upstream(model: Path, linears: set[str]) -> set[str]:
    """The names of the nodes that the inputs of the products which make `sites` depend on."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}
    nodes, pending = set(), [makers[linear].input[0] for linear in linears]
    while pending:
        node = makers.get(pending.pop())
        if node is not None and node.name not in nodes:
            nodes.add(node.name)
            pending += node.input
    return nodes
