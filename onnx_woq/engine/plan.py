"""The plan of a quantization: a model and a recipe, resolved once.

`make_plan` finds what a recipe quantizes and decides how each weight is stored. `inspect` prints a plan; `quantize`,
`tune`, mixed precision, memory plans and resumed runs work from one. Nothing else looks for weights in a model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnx_woq.core.refine.low_rank import GRID
from onnx_woq.core.spec import Spec
from onnx_woq.engine.results import WeightReport
from onnx_woq.errors import AlreadyQuantized, ModelError, NothingToQuantize
from onnx_woq.graph.find.embeddings import Embedding, find_embeddings
from onnx_woq.graph.find.float_copies import float_copy_bytes
from onnx_woq.graph.find.linears import Linear, LinearGroup, Skipped, WeightSource, find_linear_groups
from onnx_woq.graph.find.quantized import low_bit_nodes
from onnx_woq.graph.io.model import Model, clone, file_bytes
from onnx_woq.graph.rewrite.raise_opset import raise_opset
from onnx_woq.graph.rewrite.rotate import rotate
from onnx_woq.recipe import RANKS, Recipe
from onnx_woq.targets.base import EmbeddingOperator, LinearOperator, Packed, Shapes, Speed, Storage, stored_bytes
from onnx_woq.targets.low_rank import factor_dims
from onnx_woq.targets.registry import TARGETS, choose, operator_of

logger = logging.getLogger(__name__)

Kind = Literal["linear", "embedding"]

_SPEEDS: Mapping[Speed, str] = {
    "slow": "decoded at every inference, which is slower than float",
    "decoded at load": "float in memory, decoded when a session loads the model",
}


@dataclass(frozen=True, eq=False)
class PlannedWeight:
    """One weight `[K, N]` that becomes codes, whatever reads it: linear layers, or Gathers of an embedding.

    The weights of a linear group are one, side by side. A table `[V, D]` is the weight `[K = D, N = V]`.

    Attributes:
        source: the linear group or the embedding, in the model of the plan.
        target: name of the target it is written with.
        storage: how its scales and codes are stored.
        rank: of the low-rank factors beside it; 0 for none.
        corrected: a constant is added to its outputs that puts their mean right.
    """

    source: LinearGroup | Embedding
    target: str
    storage: Storage
    rank: int = 0
    corrected: bool = False

    @property
    def kind(self) -> Kind:
        """Returns what reads the weight."""
        return "linear" if isinstance(self.source, LinearGroup) else "embedding"

    @property
    def name(self) -> str:
        """Returns the output value name of the first node that reads it; unique."""
        return self.source.name

    @property
    def spec(self) -> Spec:
        """Returns its number format."""
        return self.source.spec

    @property
    def k(self) -> int:
        """Returns its input channels."""
        return self.source.k

    @property
    def n(self) -> int:
        """Returns its output channels."""
        return self.source.n

    @property
    def weight_bytes(self) -> int:
        """Returns the bytes of the float weight."""
        return self.source.weight_bytes

    @property
    def operator(self) -> LinearOperator | EmbeddingOperator:
        """Returns what it is written with."""
        return operator_of(self.target, self.kind)

    @property
    def lender(self) -> Linear | None:
        """Returns the head whose codes a table reads instead of codes of its own, None otherwise."""
        shares = isinstance(self.source, Embedding) and self.source.shared and TARGETS[self.target].embeddings.SHARES
        return self.source.head if shares and isinstance(self.source, Embedding) else None

    def weight_sources(self) -> list[WeightSource]:
        """Returns its distinct float weights, read when they are asked for."""
        return self.source.weight_sources()

    def on(self, spec: Spec) -> PlannedWeight:
        """Returns the same weight in another number format."""
        return replace(self, source=replace(self.source, spec=spec))

    @property
    def factor_dims(self) -> list[tuple[int, int]]:
        """Returns the shapes of its low-rank factors, none at rank 0."""
        return factor_dims(self.source, self.rank) if isinstance(self.source, LinearGroup) else []

    def shapes(self) -> list[Shapes]:
        """Returns the arrays that are stored of each distinct weight, then of each factor."""
        weights = [(part.k, part.n, self.spec) for part in self.weight_sources()]
        factors = [(k, n, GRID) for k, n in self.factor_dims]
        return [self.operator.shapes(k, n, spec, self.storage) for k, n, spec in (*weights, *factors)]

    def packed_from(self, arrays: Sequence[Sequence[np.ndarray]]) -> tuple[tuple[Packed, ...], tuple[Packed, ...]]:
        """Returns its weights and its factors from the arrays of each, of the shapes that `shapes` gives."""
        made = [(part.k, part.n, self.spec) for part in self.weight_sources()]
        count = len(made)
        made += [(k, n, GRID) for k, n in self.factor_dims]
        found = [
            self.operator.packed_from(one, k, n, spec, self.storage)
            for one, (k, n, spec) in zip(arrays, made, strict=True)
        ]
        return tuple(found[:count]), tuple(found[count:])

    @cached_property
    def own_bytes(self) -> int:
        """Returns the bytes of codes, scales and zero points of its own, whether or not a head lends it some."""
        return stored_bytes(self.operator.shapes(self.k, self.n, self.spec, self.storage))

    @property
    def code_bytes(self) -> int:
        """Returns the bytes of its codes, scales and zero points; what a head lends is not its own."""
        return 0 if self.lender else self.own_bytes

    @cached_property
    def bytes(self) -> int:
        """Returns the bytes that it takes once quantized, with its factors and what is added to its outputs."""
        factors = sum(stored_bytes(self.operator.shapes(k, n, GRID, self.storage)) for k, n in self.factor_dims)
        kernel = self.source.kernel_dtype if isinstance(self.source, LinearGroup) else np.float32
        bias = self.n * np.dtype(kernel).itemsize if self.corrected else 0
        return self.code_bytes + factors + bias

    def report(self, error: float | None = None, scaling: str = "") -> WeightReport:
        """Returns its row in a report.

        Args:
            error: of its outputs on the calibration data, None where it is not known.
            scaling: where its input scale went, see `WeightReport`.
        """
        group = self.source if isinstance(self.source, LinearGroup) else None
        table = self.source if isinstance(self.source, Embedding) else None
        nodes = [linear.name for linear in group.linears] if group else []
        nodes += [node.outputs[0].name or "" for node in table.nodes] if table else []
        return WeightReport(
            name=self.name,
            kind=self.kind,
            nodes=tuple(nodes),
            spec=self.spec,
            k=self.k,
            n=self.n,
            bytes_before=0 if table and table.counted else self.weight_bytes,
            bytes_after=self.bytes,
            error=error,
            scaling=scaling,
            rank=self.rank,
            weight_name=table.weight_name if table else "",
            shared_with=self.lender.name if self.lender else "",
            target=self.target,
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """A recipe resolved on a model: every weight that becomes codes, and everything that stays float.

    Attributes:
        model: the float model; executing the plan rewrites it.
        recipe: what was asked for.
        groups: linear groups that become codes, in graph order.
        embeddings: tables that become codes, in graph order.
        skipped: every matrix product and large table that stays float, with the reason.
        copies: bytes of float weights that stay in the file because something else reads them, by name.
        bytes_before: bytes of the model's files.
    """

    model: Model
    recipe: Recipe
    groups: tuple[PlannedWeight, ...]
    embeddings: tuple[PlannedWeight, ...]
    skipped: tuple[Skipped, ...]
    copies: Mapping[str, int]
    bytes_before: int

    @property
    def solved(self) -> tuple[PlannedWeight, ...]:
        """Returns the weights that get codes of their own, in the order in which they are solved."""
        return (*self.groups, *(table for table in self.embeddings if table.lender is None))

    @property
    def opset(self) -> int:
        """Returns the version of the ONNX operators that the written model needs: that of the model, or a newer one."""
        needed = (one.operator.minimum_opset(one.spec, one.storage.scale_dtype) for one in self.solved)
        return max(opset_of(self.model), *needed, 0)

    def raised(self) -> Plan:
        """Returns the plan of a model whose opset is new enough for what will be written; this one if it is already.

        Raises:
            ModelError: the model cannot be converted.
        """
        before = opset_of(self.model)
        if self.opset == before:
            return self
        logger.warning("the opset is raised from %d to %d for %s", before, self.opset, self.recipe.target)
        raised = raise_opset(self.model, self.opset)
        _require_session(self.model, raised, self.opset)
        return make_plan(raised, self.recipe)

    @property
    def notes(self) -> list[str]:
        """Returns what people should know of the speed of the result before the work begins, a line each."""
        speeds: dict[tuple[str, Speed], int] = {}
        for weight in self.solved:
            speed = weight.operator.speed(weight.spec)
            speeds[weight.target, speed] = speeds.get((weight.target, speed), 0) + 1
        return [
            f"{count} of {len(self.solved)} weights will be {_SPEEDS[speed]} ({target} with these groups)"
            for (target, speed), count in speeds.items()
            if speed in _SPEEDS
        ]

    @property
    def linear_groups(self) -> list[LinearGroup]:
        """Returns the linear groups as calibration knows them."""
        return [group.source for group in self.groups if isinstance(group.source, LinearGroup)]

    def borrowers(self, group: PlannedWeight) -> list[Embedding]:
        """Returns the tables that read the codes of a linear group."""
        linears = group.source.linears if isinstance(group.source, LinearGroup) else ()
        tables = (table.source for table in self.embeddings if table.lender in linears)
        return [table for table in tables if isinstance(table, Embedding)]

    def require_work(self) -> None:
        """Refuses a plan that would not change its model.

        Raises:
            AlreadyQuantized: the model carries low-bit weights already.
            NothingToQuantize: no linear layer is eligible; the message gives the reasons.
        """
        if nodes := low_bit_nodes(self.model):
            raise AlreadyQuantized(
                f"{self.model.path} is already quantized ({nodes} low-bit nodes): nothing to do, and nothing was "
                "written. Start from the float model to quantize it differently"
            )
        if not self.groups:
            reasons = sorted({node.reason for node in self.skipped if node.op_type != "Gather"})
            raise NothingToQuantize(
                f"{self.model.path} has no MatMul or Gemm to quantize under this recipe"
                + (f" ({'; '.join(reasons)}): see `onnx-woq inspect`" if reasons else ": it has none at all")
            )

    def prepare(self) -> None:
        """Applies to the float model what comes before calibration: the rotation, if the recipe asks for one.

        Raises:
            RotationError: the model is to be rotated and cannot be.
        """
        if self.recipe.rotation:
            prepare(self.model, [self])

    @property
    def preparation(self) -> tuple[str, ...]:
        """Returns a key that is equal for plans of one model which `prepare` alike: groups have the same statistics.

        It stays the same when the model is prepared, which renames outputs of nodes.
        """
        shared = (name for table in self.embeddings if table.lender for name in (table.lender.name, table.name))
        return ("rotated", *shared) if self.recipe.rotation else ()


def make_plan(model: Model, recipe: Recipe) -> Plan:
    """Resolves a recipe on a model; the model is not changed.

    Args:
        model: the float model.
        recipe: what to do with it.

    Raises:
        RecipeError: the target of the recipe cannot hold a number format that it asks for.
    """
    found, skipped = find_linear_groups(model, recipe)
    tables, left_float = find_embeddings(model, recipe, found)
    copies = float_copy_bytes(model, found, tables)
    groups = tuple(_planned_group(model, recipe, group) for group in found)
    embeddings = tuple(_planned_table(model, recipe, table) for table in tables)
    return Plan(model, recipe, groups, embeddings, (*skipped, *left_float), copies, file_bytes(model))


def prepared_plan(source: Model, recipe: Recipe) -> Plan:
    """Returns the plan of a model as the recipe calibrates it: of a rotated copy, if the recipe asks for a rotation.

    Raises:
        RotationError: see `Plan.prepare`.
    """
    plan = make_plan(clone(source) if recipe.rotation else source, recipe).raised()
    plan.prepare()
    return plan


def prepare(model: Model, plans: Sequence[Plan]) -> None:
    """Rotates a model for several plans of it at once; their groups and tables stay those of the model.

    Args:
        model: that all plans are of.
        plans: with equal `Plan.preparation`.

    Raises:
        RotationError: the model cannot be rotated.
    """
    linears = {linear.node for plan in plans for group in plan.linear_groups for linear in group.linears}
    tables = [table for plan in plans for table in plan.embeddings if isinstance(table.source, Embedding)]
    gathers = {
        node
        for table in tables
        if table.lender is None and isinstance(table.source, Embedding)
        for node in table.source.nodes
    }
    rotate(model, linears | gathers, _sharing(tables))


def _require_session(source: Model, raised: Model, opset: int) -> None:
    """Opens a model whose opset was raised, before any work: a newer operator may have no kernel.

    Raises:
        ModelError: the installed onnxruntime runs the model as it was and not as it is now.
    """
    from onnx_woq.runtime.session import make_session  # brings onnxruntime

    try:
        make_session(raised, for_calibration=True)
    except ModelError as error:
        try:
            make_session(source, for_calibration=True)
        except ModelError:  # nor does the model as it was: bfloat16 has too few kernels without optimizations
            return
        raise ModelError(
            f"{source.path} does not run at opset {opset}, which its codes need ({error}): upgrade onnxruntime, "
            "or choose --target matmulnbits"
        ) from error


def opset_of(model: Model) -> int:
    """Returns the version of the ONNX operators that a model uses."""
    return model.ir.opset_imports.get("") or 0


def _planned_group(model: Model, recipe: Recipe, group: LinearGroup) -> PlannedWeight:
    target = choose(recipe.target, group.spec, "linear")
    storage = Storage(np.float16 if recipe.half_scales else group.kernel_dtype, opset_of(model))
    rank = min(recipe.lowrank, -(-min(group.k, group.n) // RANKS) * RANKS)
    return PlannedWeight(group, target, storage, rank, recipe.bias_correction)


def _planned_table(model: Model, recipe: Recipe, table: Embedding) -> PlannedWeight:
    target = choose(recipe.target, table.spec, "embedding")
    half = recipe.half_scales or table.dtype.numpy() == np.float16
    return PlannedWeight(table, target, Storage(np.float16 if half else np.float32, opset_of(model)))


def _sharing(tables: Sequence[PlannedWeight]) -> set[ir.Node]:
    """Returns the nodes that will read the codes of one table, heads and Gathers."""
    heads = {table.lender.node for table in tables if table.lender}
    shared = [table.source for table in tables if table.lender and isinstance(table.source, Embedding)]
    return heads | {node for table in shared for node in table.nodes}
