"""The registry of targets: every target by name, and the choice of one for a weight."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from onnx_woq.core.spec import Spec
from onnx_woq.errors import RecipeError, nearest
from onnx_woq.graph.io.model import Model
from onnx_woq.targets import gather_block_quantized, matmulnbits, qdq, qdq_gather
from onnx_woq.targets.base import EmbeddingOperator, LinearOperator, Target

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "matmulnbits": Target(matmulnbits, gather_block_quantized),
        "qdq": Target(qdq, qdq_gather),
    }
)
"""Every target, the preferred one first."""

AUTO = "auto"
"""Stands for the first target that holds the number format of a weight exactly."""


def choose(name: str, spec: Spec, kind: str) -> str:
    """Returns the name of the target that a weight is written with.

    Args:
        name: the target that the recipe names, or `AUTO`.
        spec: the number format of the weight.
        kind: "linear" or "embedding".

    Raises:
        RecipeError: no target has this name, or it cannot hold the number format; the message names one that can.
    """
    refusals = {target: operator_of(target, kind).refusal(spec) for target in TARGETS}
    if name not in TARGETS and name != AUTO:
        raise RecipeError(f"unknown target {name!r}: {nearest(name, [*TARGETS, AUTO])}")
    fitting = [target for target, refusal in refusals.items() if not refusal]
    if name == AUTO and fitting:
        return fitting[0]
    refusal = refusals.get(name, next(iter(refusals.values())))
    if refusal:
        raise RecipeError(refusal + (f", or --target {fitting[0]}" if fitting else ""))
    return name


def operator_of(target: str, kind: str) -> LinearOperator | EmbeddingOperator:
    """Returns the operator of a target for weights of a kind, "linear" or "embedding"."""
    return TARGETS[target].embeddings if kind == "embedding" else TARGETS[target].linears


def required_runtime(model: Model) -> str:
    """Returns the oldest onnxruntime whose CPU kernels run every low-bit node of a model, "" if it has none."""
    operators = {id(one): one for target in TARGETS.values() for one in (target.linears, target.embeddings)}
    found = [
        version
        for node in model.ir.graph.all_nodes()
        for operator in operators.values()
        if (version := operator.runtime(node, in_body=node.graph is not model.ir.graph))
    ]
    return ".".join(map(str, max(found))) if found else ""
