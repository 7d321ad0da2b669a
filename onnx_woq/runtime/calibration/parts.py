"""Parts of a model: the nodes between values that are known and values that are wanted, as a model of their own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnx_woq.graph.io.model import Model
from onnx_woq.graph.rewrite.expose_values import expose
from onnx_woq.graph.rewrite.sum_over_heads import sum_over_heads
from onnx_woq.graph.rewrite.upcast import upcast
from onnx_woq.runtime.calibration.structure import Structure
from onnx_woq.targets.constant_fold import fold_constants


@dataclass(frozen=True)
class Part:
    """A part of a model that runs on every sample.

    Attributes:
        model: the nodes between `inputs` and `outputs`, in float32; None if there are none.
        inputs: names of the values to feed: inputs of the model, and remembered values.
        outputs: names of the values to fetch.
        names: name of a wanted value -> the name of its array.
        remembered: names of the values to keep for later parts.
    """

    model: Model | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    names: dict[str, str]
    remembered: tuple[str, ...]


def plan_part(
    model: Model,
    structure: Structure,
    values: Collection[str],
    remembered: Sequence[str],
    dtypes: dict[str, np.dtype],
    fed: set[str],
    keep_used: bool,
    attention: Collection[str],
) -> Part:
    """Returns the smallest part that computes `values`.

    Args:
        model: the model; not changed.
        structure: its structure.
        values: names of the values that are wanted.
        remembered: names of the values to keep for later parts.
        dtypes: type of each remembered value that the part may start from, by name.
        fed: names of the model's inputs.
        keep_used: keep the values that the part starts from too.
        attention: names among `values` of attention probabilities, whose squares summed over heads are enough.
    """
    exposed, names = model, {value: value for value in values}
    if not structure.named.keys() >= set(values):
        exposed, names = expose(model, values)
        structure = Structure(exposed)
    have = fed.union(dtypes)
    outputs = tuple(dict.fromkeys(n for n in (*names.values(), *remembered) if n not in have))
    if not outputs:
        return Part(None, (), (), names, tuple(n for n in remembered if n in dtypes))
    part, inputs = cut_out(exposed, structure, have, outputs, dtypes)
    shown = [n for n in attention if n not in remembered]  # a remembered value is fetched as it is
    if squared := sum_over_heads(part, shown):
        outputs = tuple(squared.get(n, n) for n in outputs)
        names |= squared
    used = tuple(n for n in inputs if n in dtypes and keep_used and n not in remembered)
    return Part(part, inputs, outputs, names, (*(n for n in remembered if n not in fed), *used))


def cut_out(
    model: Model, structure: Structure, have: Collection[str], outputs: Sequence[str], dtypes: dict[str, np.dtype]
) -> tuple[Model, tuple[str, ...]]:
    """Cuts out the part of `model` that computes `outputs` from values in `have`, in float32.

    Args:
        model: the model; not changed.
        structure: its structure.
        have: names of values that can be fed.
        outputs: names of values of the main graph.
        dtypes: types of those among `have` that are not inputs of the model.

    Returns:
        The part, and the names of its inputs.
    """
    cut = structure.between(have, outputs)
    for value in cut.inputs:
        if value.name in dtypes:  # its type as computed, not as the exporter guessed
            value.type = ir.TensorType(ir.DataType.from_numpy(dtypes[value.name]))
            value.shape = None
    whole = model.ir
    small = ir.Model(cut, ir_version=whole.ir_version, functions=tuple(f.clone() for f in whole.functions.values()))
    if small.functions:
        InlinePass()(small)
    part = replace(model, ir=small)
    fold_constants(part)
    upcast(part)
    return part, tuple(value.name or "" for value in small.graph.inputs)


def single_precision(array: np.ndarray) -> np.ndarray:
    """Converts half precision to float32; returns any other array as it is."""
    half = array.dtype == np.float16 or array.dtype.name == "bfloat16"
    return array.astype(np.float32) if half else array
