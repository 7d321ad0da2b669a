"""Float weights that stay in a quantized model, because a node that is not quantized reads them, too."""

from __future__ import annotations

from collections.abc import Iterable

from onnx_woq.graph.find.constants import readers, resolve
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model


def float_copy_bytes(
    model: Model, groups: Iterable[LinearGroup], embeddings: Iterable[Embedding] = ()
) -> dict[str, int]:
    """Returns the float weights that stay in the model although `groups` and `embeddings` are quantized: name -> bytes.

    Such a weight has another reader: the Gather of a tied embedding that stays float, a linear that is skipped, or an
    output of the graph. The answer is the same before and after the nodes are rewritten to low-bit operators.
    """
    linears = [linear for group in groups for linear in group.linears]
    quantized = {(linear.node, 1) for linear in linears} | {(node, 0) for one in embeddings for node in one.nodes}
    present = {value for graph in model.ir.graphs() for value in graph.initializers.values()}
    copies: dict[str, int] = {}
    for root in dict.fromkeys(linear.root for linear in linears):
        constant = resolve(root)
        if constant is None or (root.producer() is None and root not in present):
            continue  # removed with its last reader
        if root.is_graph_output() or any(reader not in quantized for reader in readers(root)):
            copies[root.name or ""] = constant.tensor.nbytes
    return copies
