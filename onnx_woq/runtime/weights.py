"""What a written weight does to its input, whatever it is stored as."""

from __future__ import annotations

import numpy as np

from onnx_woq.graph.model import Model
from onnx_woq.runtime.replay import cut_out
from onnx_woq.runtime.session import make_session, run
from onnx_woq.runtime.structure import Structure

ROWS = 1024  # of the identity matrix at a time


def acting_weight(model: Model, output: str, k: int) -> np.ndarray | None:
    """The matrix [K, N] that the product called `output` multiplies by: its part of the graph, run on an identity.

    None where it cannot be cut out: in a body, or with an input that is not one activation.
    """
    structure = Structure(model)
    value = structure.named.get(output)
    node = value.producer() if value is not None else None
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    entry = node.inputs[0].name or ""
    part, inputs = cut_out(model, structure, {entry}, [output], {entry: np.dtype(np.float32)})
    if inputs != (entry,):
        return None
    session = make_session(part, for_calibration=True)
    rows = []
    zero = run(session, [output], {entry: np.zeros((1, 1, k), np.float32)}, "zero")[0]
    for start in range(0, k, ROWS):
        identity = np.eye(min(ROWS, k - start), k, start, np.float32)[None]
        rows.append((run(session, [output], {entry: identity}, "an identity matrix")[0] - zero)[0])
    return np.concatenate(rows)
