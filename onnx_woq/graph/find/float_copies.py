"""Float weights that stay in a model although everything that multiplies by them is quantized."""

from __future__ import annotations

from collections.abc import Iterable

from onnx_woq.graph.find.constants import readers, resolve
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model


def float_copy_bytes(
    model: Model, groups: Iterable[LinearGroup], embeddings: Iterable[Embedding] = ()
) -> dict[str, int]:
    """Bytes of float weights that stay in the model although all `taps` and `embeddings` are quantized, by name.

    They stay because something else reads them: the Gather of a tied embedding, a skipped site, a graph output.
    The answer is the same before and after lowering.
    """
    linears = [linear for group in groups for linear in group.linears]
    quantized = {(linear.node, 1) for linear in linears} | {(node, 0) for one in embeddings for node in one.nodes}
    present = {value for graph in model.ir.graphs() for value in graph.initializers.values()}
    copies: dict[str, int] = {}
    for root in dict.fromkeys(linear.root for linear in linears):
        constant = resolve(root)
        if constant is None or (root.producer() is None and root not in present):
            continue  # already removed
        if root.is_graph_output() or any(reader not in quantized for reader in readers(root)):
            copies[root.name or ""] = constant.tensor.nbytes
    return copies
