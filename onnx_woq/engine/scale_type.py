"""The type that the scales of a weight are stored in: float16 where a recipe asks for it and every scale fits."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import numpy as np
import onnx_ir as ir

from onnx_woq.core.grids.scale_range import holds
from onnx_woq.graph.find.constants import resolve
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.find.linears import LinearGroup, WeightSource
from onnx_woq.targets.base import EmbeddingOperator, LinearOperator, Storage

ScaleType = type[np.float32] | type[np.float16]

_KNOWN: WeakKeyDictionary[ir.TensorProtocol, dict[object, bool]] = WeakKeyDictionary()
"""Answers by tensor and format: plans are made many times, weights are read once."""


def scale_type(
    source: LinearGroup | Embedding, operator: LinearOperator | EmbeddingOperator, opset: int, *, half: bool
) -> ScaleType:
    """Returns the type that the scales of a weight are stored in.

    That is the type of its kernel. If `half`, it is float16, unless a scale would become zero or infinite in it.

    Args:
        source: the linear group, or the embedding.
        operator: that stores it.
        opset: of the written model.
        half: store scales in float16 also where the model computes in float32.
    """
    kernel = source.kernel_dtype if isinstance(source, LinearGroup) else _table_type(source)
    if kernel is np.float16 or not half:
        return kernel
    factor = operator.scale_factor(source.spec, Storage(np.float16, opset))
    return np.float16 if all(_fits(*one, source, factor) for one in _tensors(source)) else kernel


def _table_type(table: Embedding) -> ScaleType:
    return np.float16 if table.dtype.numpy() == np.float16 else np.float32


def _tensors(source: LinearGroup | Embedding) -> Iterator[tuple[ir.TensorProtocol, object, WeightSource]]:
    """Yields the tensor of each distinct weight, what is made of it, and the weight."""
    weights = source.weight_sources()
    if isinstance(source, Embedding):
        constant = resolve(source.nodes[0].inputs[0])
        if constant is not None:
            yield constant.tensor, constant.shape, weights[0]
        return
    linears = dict(zip(reversed(source.weight_indices()), reversed(source.linears), strict=True))
    for index, weight in enumerate(weights):
        linear = linears[index]
        yield linear.constant().tensor, (linear.transposed(), linear.scale, weight.k, weight.n), weight


def _fits(
    tensor: ir.TensorProtocol, form: object, weight: WeightSource, source: LinearGroup | Embedding, factor: float
) -> bool:
    known = _KNOWN.setdefault(tensor, {})
    key = (form, source.spec, factor)
    if key not in known:
        known[key] = holds(weight.read(), source.spec, np.float16, factor)
    return known[key]
