"""Effective weights: the matrix that a layer of a written model multiplies its input by, however it is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnx_woq.errors import OnnxWoqError
from onnx_woq.graph.io.model import Model
from onnx_woq.runtime.calibration.parts import cut_out
from onnx_woq.runtime.calibration.structure import Structure
from onnx_woq.runtime.session import make_session, run

Rows = Callable[[Sequence[int]], np.ndarray]
"""`(row numbers) -> those rows` of a matrix `[K, N]`."""


def acting_rows(model: Model, structure: Structure, entry: str, output: str, k: int) -> Rows | None:
    """Returns a function that gives rows of the matrix [K, N] between two values of a model, bias left out.

    The nodes between the values are cut out and run on rows of the identity matrix. So the result includes everything
    that acts on the input: codes, low-rank factors, an input scale.

    Args:
        model: a model with both values in its main graph.
        structure: its structure.
        entry: name of an activation [..., K].
        output: name of a value [..., N] that depends on it linearly.
        k: input channels.

    Returns:
        The function; None where the nodes cannot be cut out, because they are in a body (such as an If branch) or read
        something else on the way.
    """
    if not {entry, output} <= structure.named.keys():
        return None
    try:
        part, inputs = cut_out(model, structure, {entry}, [output], {entry: np.dtype(np.float32)})
        if inputs != (entry,):
            return None
        session = make_session(part, for_calibration=True)
        zero = run(session, [output], {entry: np.zeros((1, 1, k), np.float32)}, "zero")[0]
    except (OnnxWoqError, RuntimeError):  # copying a part raises RuntimeError if it reads something outside
        return None

    def rows(numbers: Sequence[int]) -> np.ndarray:
        hot = np.zeros((1, len(numbers), k), np.float32)
        hot[0, np.arange(len(numbers)), numbers] = 1
        return (run(session, [output], {entry: hot}, "an identity matrix")[0] - zero)[0]

    return rows
