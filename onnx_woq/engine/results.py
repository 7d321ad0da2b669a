"""Results of the engine: the report of a quantization, that of an inspection, and the row of a weight in both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onnx_woq.core.spec import Spec
from onnx_woq.graph.find.remaining import ALREADY
from onnx_woq.recipe import Recipe

if TYPE_CHECKING:
    from onnx_woq.graph.find.blocks import Cut
    from onnx_woq.graph.find.linears import Skipped


@dataclass(frozen=True)
class WeightReport:
    """The row of one weight `[K, N]` in a report, after it was quantized or before.

    Attributes:
        name: the unique name of the weight: that of the output of the first node that reads it.
        kind: "linear" for the weights of a linear group, side by side; "embedding" for a table.
        nodes: the names of the outputs of the nodes that are replaced.
        spec: the number format.
        k: input channels; of a table, columns.
        n: output channels over all weights of the group; of a table, rows.
        bytes_before: bytes of the float weight; 0 for a table that is counted with a linear group already.
        bytes_after: bytes of the quantized weight; 0 for a table that reads the codes of its head.
        error: `‖X·ΔW‖² / ‖X·W‖²` on the calibration data, over at most 256 output channels; None without data.
        scaling: the node that an input scale was folded into: "norm", "linear", "mul" (a new one), "" for no scale.
        rank: the rank of the low-rank factors; 0 for none.
        weight_name: the name of the initializer of a table; "" for a linear group.
        shared_with: the name of the output of the head whose codes a table reads; "" for none.
        target: the name of the target that it is written with.
    """

    name: str
    kind: Literal["linear", "embedding"]
    nodes: tuple[str, ...]
    spec: Spec
    k: int
    n: int
    bytes_before: int
    bytes_after: int
    error: float | None = None
    scaling: str = ""
    rank: int = 0
    weight_name: str = ""
    shared_with: str = ""
    target: str = "matmulnbits"

    @property
    def sites(self) -> tuple[str, ...]:
        """Returns `nodes`, by the name that version 0.1 gave them in rows of linear groups."""
        return self.nodes

    @property
    def gathers(self) -> tuple[str, ...]:
        """Returns `nodes`, by the name that version 0.1 gave them in rows of embeddings."""
        return self.nodes

    @property
    def rows(self) -> int:
        """Returns the rows of a table: `n`, by its name in version 0.1."""
        return self.n

    @property
    def columns(self) -> int:
        """Returns the columns of a table: `k`, by its name in version 0.1."""
        return self.k

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary."""
        target = {} if self.target == "matmulnbits" else {"target": self.target}  # files of version 0.1 have no target
        size = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        if self.kind == "linear":
            row = {"name": self.name, "sites": self.nodes, "spec": self.spec.to_dict(), "k": self.k, "n": self.n}
            return row | size | {"error": self.error, "scaling": self.scaling, "rank": self.rank} | target
        row = {"name": self.name, "gathers": self.nodes, "weight_name": self.weight_name, "spec": self.spec.to_dict()}
        return row | {"rows": self.n, "columns": self.k} | size | {"shared_with": self.shared_with} | target


class _Weights:
    """The rows of a report, by kind of weight, and what they leave of the bytes."""

    weights: tuple[WeightReport, ...]
    skipped: tuple[Skipped, ...]
    copies: Mapping[str, int]
    bytes_before: int

    @property
    def rest(self) -> int:
        """Returns the bytes of the float model that no row has: its structure and small constants."""
        rows = sum(row.bytes_before for row in self.weights)
        return self.bytes_before - rows - sum(row.weight_bytes - row.again for row in self.skipped)

    @property
    def float_bytes(self) -> dict[str, int]:
        """Returns the bytes that stay float, by the operator that reads them, the largest first."""
        found: Counter[str] = Counter()
        for row in self.skipped:
            if ALREADY not in row.reason and row.weight_bytes > row.again:
                found[row.op_type or "unread"] += row.weight_bytes - row.again
        if self.copies:
            found["weights that are quantized as well"] += sum(self.copies.values())
        return dict(found.most_common())

    @property
    def groups(self) -> tuple[WeightReport, ...]:
        """Returns the rows of linear groups, in graph order."""
        return tuple(row for row in self.weights if row.kind == "linear")

    @property
    def embeddings(self) -> tuple[WeightReport, ...]:
        """Returns the rows of embeddings, in graph order."""
        return tuple(row for row in self.weights if row.kind == "embedding")

    @property
    def taps(self) -> tuple[WeightReport, ...]:
        """Returns the rows of linear groups, by the name that version 0.1 gave them."""
        return self.groups


@dataclass(frozen=True)
class QuantizeReport(_Weights):
    """The report of a quantization.

    Attributes:
        model: the .onnx file of the float model.
        output: the .onnx file that was written.
        recipe: the recipe.
        weights: the rows, linear groups before tables.
        skipped: the products, tables and other readers of large constants that stay float, with the reason.
        copies: name -> bytes of each float weight that stays in the file because another node reads it.
        bytes_before: the size of the model's files.
        bytes_after: the size of the output's files.
        calibration: the hash of the calibration data, "" for none.
        seconds: the time that the run took.
    """

    model: Path
    output: Path
    recipe: Recipe
    weights: tuple[WeightReport, ...]
    skipped: tuple[Skipped, ...]
    copies: Mapping[str, int]
    bytes_before: int
    bytes_after: int
    calibration: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary."""
        return {
            **_plan(self),
            "output": str(self.output),
            "recipe": self.recipe.to_dict(),
            "calibration": self.calibration,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Inspection(_Weights):
    """The report of an inspection: a plan, and the blocks that calibration would cut the graph into.

    Attributes:
        model: the .onnx file of the float model.
        recipe: the recipe.
        weights: the rows, linear groups before tables.
        skipped: the products, tables and other readers of large constants that would stay float, with the reason.
        copies: name -> bytes of each float weight that would stay because another node reads it.
        bytes_before: the size of the model's files.
        bytes_after: about the size of the output's files.
        cuts: the blocks of each graph, see `onnx_woq.graph.find.blocks`.
    """

    model: Path
    recipe: Recipe
    weights: tuple[WeightReport, ...]
    skipped: tuple[Skipped, ...]
    copies: Mapping[str, int]
    bytes_before: int
    bytes_after: int
    cuts: tuple[Cut, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary."""
        return _plan(self) | {"cuts": [_cut(cut) for cut in self.cuts]}


def _cut(cut: Cut) -> dict[str, Any]:
    """Returns the blocks of a graph as JSON has them, without the names of all values in them."""
    blocks = [{"outputs": b.outputs, "weight_bytes": b.weight_bytes} for b in cut.blocks]
    return {"graph": cut.graph, "kind": cut.kind, "reason": cut.reason, "blocks": blocks}


def _plan(result: QuantizeReport | Inspection) -> dict[str, Any]:
    """Returns the part of the JSON that both reports have in common."""
    return {
        "model": str(result.model),
        "taps": [group.to_dict() for group in result.groups],
        "embeddings": [table.to_dict() for table in result.embeddings],
        "skipped": [skipped.to_dict() for skipped in result.skipped],
        "copies": dict(result.copies),
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
    }
