"""What a written weight does to its input, whatever it is stored as."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnx_woq.errors import OnnxWoqError
from onnx_woq.graph.io.model import Model
from onnx_woq.runtime.calibration.replay import cut_out
from onnx_woq.runtime.calibration.structure import Structure
from onnx_woq.runtime.session import make_session, run

Rows = Callable[[Sequence[int]], np.ndarray]
"""Gives rows of a matrix `[K, N]` by their numbers."""


def acting_rows(model: Model, structure: Structure, entry: str, output: str, k: int) -> Rows | None:
    """The rows of the matrix [K, N] that takes the value `entry` to the value `output`, bias left out.

    What lies between the two is run on rows of the identity: codes, factors beside them, a scale of the input.

    Args:
        model: holds both values in its main graph.
        structure: of it.
        entry: an activation [..., K].
        output: a linear function of it, [..., N].
        k: input channels.

    Returns:
        None where it cannot be cut out: in a body, or when something else is read on the way.
    """
    if not {entry, output} <= structure.named.keys():
        return None
    try:
        part, inputs = cut_out(model, structure, {entry}, [output], {entry: np.dtype(np.float32)})
        if inputs != (entry,):
            return None
        session = make_session(part, for_calibration=True)
        zero = run(session, [output], {entry: np.zeros((1, 1, k), np.float32)}, "zero")[0]
    except (OnnxWoqError, RuntimeError):  # the latter is how copying a part says that it reads something outside
        return None

    def rows(numbers: Sequence[int]) -> np.ndarray:
        hot = np.zeros((1, len(numbers), k), np.float32)
        hot[0, np.arange(len(numbers)), numbers] = 1
        return (run(session, [output], {entry: hot}, "an identity matrix")[0] - zero)[0]

    return rows
