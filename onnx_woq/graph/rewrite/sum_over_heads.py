"""Reduction of the attention that a model outputs: how much each token receives, in place of all probabilities.

The weight of a token in calibration needs only the squares of its attention probabilities, summed over heads
(`onnx_woq.runtime.calibration.token_weights`). Summing in the graph makes the output smaller by the number of heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from onnx_woq.graph.edit import add_initializer, add_node
from onnx_woq.graph.io.model import Model

HEADS_AXIS = -3
"""The axis of the heads in attention probabilities `[B, H, T, S]`, from the end: the batch axis may be missing."""


def sum_over_heads(part: Model, names: Iterable[str]) -> dict[str, str]:
    """Replaces outputs of `part` by their squares summed over heads, in place.

    Attention probabilities `[B, H, T, S]` become `[B, T, S]`; those of exporters without a batch axis, `[H, T, S]`,
    become `[T, S]`.

    Args:
        part: the model to edit.
        names: of attention probabilities; those that are no outputs of `part` are passed over.

    Returns:
        Name of the replaced output -> name of the new one.
    """
    graph = part.ir.graph
    outputs = {value.name: index for index, value in enumerate(graph.outputs)}
    renamed: dict[str, str] = {}
    for name in dict.fromkeys(names):
        if name not in outputs:
            continue
        value = graph.outputs[outputs[name]]
        operands = [value]
        attributes: dict[str, Any] = {"keepdims": 0}
        if graph.opset_imports.get("", 1) >= 18:  # since then the axes are an input
            operands.append(add_initializer(graph, f"{name}_heads", np.array([HEADS_AXIS], np.int64)))
        else:
            attributes["axes"] = [HEADS_AXIS]
        total = add_node("ReduceSumSquare", operands, f"{name}_squares", end_of=graph, **attributes)
        total.type = value.type
        graph.outputs[outputs[name]] = total
        renamed[name] = total.name or ""
    return renamed
