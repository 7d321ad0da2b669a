"""Results of the engine: reports of a quantization and of an inspection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onnx_woq.core.spec import Spec
from onnx_woq.recipe import Recipe

if TYPE_CHECKING:
    from onnx_woq.graph.find.blocks import Cut
    from onnx_woq.graph.find.linears import Skipped


@dataclass(frozen=True)
class WeightReport:
    """The row of one weight `[K, N]` in a report: what became of it, or what will.

    Attributes:
        name: output value name of the first node that reads it; unique.
        kind: "linear" for the weights of a linear group side by side, "embedding" for a table, one column a row of it.
        nodes: output value names of the nodes that are replaced.
        spec: the number format.
        k: input channels; of a table, columns.
        n: output channels over all weights of the group; of a table, rows.
        bytes_before: bytes of the float weight; 0 for a table that a linear group counts among its weights.
        bytes_after: bytes once quantized; 0 for a table whose codes are those of a head.
        error: `‖X·ΔW‖² / ‖X·W‖²` on the calibration data, over at most 256 of the output channels; None without data.
        scaling: where an input scale went: "" (none), "norm", "linear" or "mul".
        rank: of the factors that make up for rounding errors; 0 for none.
        weight_name: initializer name, of a table.
        target: name of the target it is written with.
        shared_with: the linear layer that lends a table its codes, by its output value; "" for none.
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
        target = {} if self.target == "matmulnbits" else {"target": self.target}  # which came after version 0.1
        size = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        if self.kind == "linear":
            row = {"name": self.name, "sites": self.nodes, "spec": self.spec.to_dict(), "k": self.k, "n": self.n}
            return row | size | {"error": self.error, "scaling": self.scaling, "rank": self.rank} | target
        row = {"name": self.name, "gathers": self.nodes, "weight_name": self.weight_name, "spec": self.spec.to_dict()}
        return row | {"rows": self.n, "columns": self.k} | size | {"shared_with": self.shared_with} | target


class _Weights:
    """The rows of a report by kind."""

    weights: tuple[WeightReport, ...]

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
    """The report of a quantization. Bytes are of files on disk; `copies` are float weights that others still read."""

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
    """The report of a plan: what becomes of each weight, and how a calibration cuts the graph."""

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
    """Returns the blocks of a graph, without the names of everything in them."""
    blocks = [{"outputs": b.outputs, "weight_bytes": b.weight_bytes} for b in cut.blocks]
    return {"graph": cut.graph, "kind": cut.kind, "reason": cut.reason, "blocks": blocks}


def _plan(result: QuantizeReport | Inspection) -> dict[str, Any]:
    """Returns what the reports of a quantization and of an inspection have in common."""
    return {
        "model": str(result.model),
        "taps": [group.to_dict() for group in result.groups],
        "embeddings": [table.to_dict() for table in result.embeddings],
        "skipped": [asdict(skipped) for skipped in result.skipped],
        "copies": dict(result.copies),
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
    }
