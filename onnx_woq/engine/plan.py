"""The plan of a quantization: a recipe resolved on a model, once.

`make_plan` finds the weights that a recipe quantizes and decides how each is stored. Everything else works from the
plan and never looks for weights itself: `inspect` reports on it; `quantize` and `tune` execute it; mixed precision,
memory plans and resumed runs count with it.
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
from onnx_woq.engine.scale_type import scale_type
from onnx_woq.errors import AlreadyQuantized, ModelError, NothingToQuantize
from onnx_woq.graph.find.embeddings import Embedding, find_embeddings
from onnx_woq.graph.find.float_copies import float_copy_bytes
from onnx_woq.graph.find.linears import Linear, LinearGroup, Skipped, WeightSource, find_linear_groups
from onnx_woq.graph.find.quantized import low_bit_nodes
from onnx_woq.graph.find.remaining import account
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
    """One weight `[K, N]` that becomes codes: that of a linear group, or an embedding table.

    The distinct weights of a linear group count as one, side by side. A table `[V, D]` is the weight `[K = D, N = V]`.

    Attributes:
        source: the linear group or the embedding, in the model of the plan.
        target: the name of the target that it is written with.
        storage: the type of its scales, and the opset of the written model.
        rank: the rank of the low-rank factors beside it; 0 for none.
        corrected: True if a bias is added to its outputs that corrects their mean.
    """

    source: LinearGroup | Embedding
    target: str
    storage: Storage
    rank: int = 0
    corrected: bool = False

    @property
    def kind(self) -> Kind:
        """Returns "linear" for the weight of a linear group, "embedding" for a table."""
        return "linear" if isinstance(self.source, LinearGroup) else "embedding"

    @property
    def name(self) -> str:
        """Returns the unique name of the weight: the name of the output of the first node that reads it."""
        return self.source.name

    @property
    def spec(self) -> Spec:
        """Returns the number format of the weight."""
        return self.source.spec

    @property
    def k(self) -> int:
        """Returns K, the number of input channels; of a table, of columns."""
        return self.source.k

    @property
    def n(self) -> int:
        """Returns N, the number of output channels over all weights of a group; of a table, of rows."""
        return self.source.n

    @property
    def weight_bytes(self) -> int:
        """Returns the bytes of the float weight."""
        return self.source.weight_bytes

    @property
    def operator(self) -> LinearOperator | EmbeddingOperator:
        """Returns the operator that the weight is written with."""
        return operator_of(self.target, self.kind)

    @property
    def lender(self) -> Linear | None:
        """Returns the head whose codes a table reads instead of codes of its own; None for any other weight."""
        shares = isinstance(self.source, Embedding) and self.source.shared and TARGETS[self.target].embeddings.SHARES
        return self.source.head if shares and isinstance(self.source, Embedding) else None

    def weight_sources(self) -> list[WeightSource]:
        """Returns the distinct float weights, in order; each is read when it is asked for."""
        return self.source.weight_sources()

    def on(self, spec: Spec) -> PlannedWeight:
        """Returns the same weight in another number format."""
        return replace(self, source=replace(self.source, spec=spec))

    @property
    def factor_dims(self) -> list[tuple[int, int]]:
        """Returns (K, r) of the first low-rank factor, then (r, n) of the second of each weight; none at rank 0."""
        return factor_dims(self.source, self.rank) if isinstance(self.source, LinearGroup) else []

    def shapes(self) -> list[Shapes]:
        """Returns the shapes and types of the arrays that are stored of each distinct weight, then of each factor."""
        weights = [(one.k, one.n, self.spec) for one in self.weight_sources()]
        factors = [(k, n, GRID) for k, n in self.factor_dims]
        return [self.operator.shapes(k, n, spec, self.storage) for k, n, spec in (*weights, *factors)]

    def packed_from(self, arrays: Sequence[Sequence[np.ndarray]]) -> tuple[tuple[Packed, ...], tuple[Packed, ...]]:
        """Returns the packed weights, and the packed factors, that have these arrays; `shapes` gives their shapes."""
        formats = [(one.k, one.n, self.spec) for one in self.weight_sources()]
        count = len(formats)
        formats += [(k, n, GRID) for k, n in self.factor_dims]
        packed = [
            self.operator.packed_from(one, k, n, spec, self.storage)
            for one, (k, n, spec) in zip(arrays, formats, strict=True)
        ]
        return tuple(packed[:count]), tuple(packed[count:])

    @cached_property
    def own_bytes(self) -> int:
        """Returns the bytes that codes, scales and zero points take if they are not shared with a head."""
        return stored_bytes(self.operator.shapes(self.k, self.n, self.spec, self.storage))

    @property
    def code_bytes(self) -> int:
        """Returns the bytes that codes, scales and zero points add to the file; 0 if a table reads those of a head."""
        return 0 if self.lender else self.own_bytes

    @cached_property
    def bytes(self) -> int:
        """Returns the bytes that the quantized weight adds to the file, its low-rank factors and bias included."""
        factors = sum(stored_bytes(self.operator.shapes(k, n, GRID, self.storage)) for k, n in self.factor_dims)
        kernel = self.source.kernel_dtype if isinstance(self.source, LinearGroup) else np.float32
        bias = self.n * np.dtype(kernel).itemsize if self.corrected else 0
        return self.code_bytes + factors + bias

    def report(self, error: float | None = None, scaling: str = "") -> WeightReport:
        """Returns the row of the weight in a report.

        Args:
            error: the relative error of its outputs on the calibration data, None if it is not known.
            scaling: the place that its input scale was folded into, see `WeightReport`.
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
        recipe: the recipe.
        groups: the linear groups that become codes, in graph order.
        embeddings: the tables that become codes, in graph order.
        skipped: the matrix products, tables and other readers of large constants that stay float, with the reason.
        copies: name -> bytes of each float weight that stays in the file because another node reads it.
        bytes_before: the size of the model's files.
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
        """Returns the weights with codes of their own, in the order in which they are solved: groups, then tables."""
        return (*self.groups, *(table for table in self.embeddings if table.lender is None))

    @property
    def opset(self) -> int:
        """Returns the opset that the written model needs: that of the model, or a newer one."""
        needed = (one.operator.minimum_opset(one.spec, one.storage.scale_dtype) for one in self.solved)
        return max(opset_of(self.model), *needed, 0)

    def raised(self) -> Plan:
        """Returns a plan of the same model at the opset that it needs; this plan if the model has it already.

        Raises:
            ModelError: the model cannot be converted, or the installed onnxruntime does not run it at that opset.
        """
        before = opset_of(self.model)
        if self.opset == before:
            return self
        logger.warning("the opset is raised from %d to %d for %s", before, self.opset, self.recipe.target)
        raised = raise_opset(self.model, self.opset, otherwise="choose --target matmulnbits")
        _require_session(self.model, raised, self.opset)
        return make_plan(raised, self.recipe)

    @property
    def notes(self) -> list[str]:
        """Returns lines for people, to be told before the work: on weights that will run slowly, or on no work."""
        if not self.solved:
            return ["nothing is quantized: the recipe leaves every weight float, and the result is a copy"]
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
        """Returns the linear groups, which calibration collects statistics of."""
        return [group.source for group in self.groups if isinstance(group.source, LinearGroup)]

    def borrowers(self, group: PlannedWeight) -> list[Embedding]:
        """Returns the tables that read the codes of a linear group."""
        linears = group.source.linears if isinstance(group.source, LinearGroup) else ()
        tables = (table.source for table in self.embeddings if table.lender in linears)
        return [table for table in tables if isinstance(table, Embedding)]

    def require_work(self, *, linears: bool = False) -> None:
        """Refuses a plan that would not change its model.

        Args:
            linears: tables alone are not enough, as for a mix of precisions, which is made of MatMuls and Gemms.

        Raises:
            AlreadyQuantized: nothing that is still float is eligible, and the model carries low-bit weights.
            NothingToQuantize: nothing is eligible; the message gives the reasons.
        """
        if self.groups or (self.embeddings and not linears):
            return
        if nodes := low_bit_nodes(self.model):
            raise AlreadyQuantized(
                f"{self.model.path} is already quantized ({nodes} low-bit nodes): nothing to do, and nothing was "
                "written. Start from the float model to quantize it differently"
            )
        reasons = sorted({node.reason for node in self.skipped})
        raise NothingToQuantize(
            f"{self.model.path} has no MatMul or Gemm to quantize under this recipe"
            + (f" ({'; '.join(reasons)}): see `onnx-woq inspect`" if reasons else ": it has none at all")
        )

    @property
    def left_out(self) -> bool:
        """Tells whether nothing is quantized only because the recipe leaves every weight float by its name."""
        if self.solved or not (self.recipe.exclude or self.recipe.overrides):
            return False
        return bool(make_plan(self.model, replace(self.recipe, exclude=(), overrides={})).solved)

    def prepare(self) -> None:
        """Changes the float model as the recipe asks for before calibration: rotates it, or does nothing.

        Raises:
            RotationError: the recipe asks for a rotation, and the model cannot be rotated.
        """
        if self.recipe.rotation:
            prepare(self.model, [self])

    @property
    def preparation(self) -> tuple[str, ...]:
        """Returns a key that is equal for plans of one model that `prepare` changes alike.

        Equal linear groups of such plans have equal statistics. The key stays the same when the model is prepared,
        which renames outputs of nodes.
        """
        shared = (name for table in self.embeddings if table.lender for name in (table.lender.name, table.name))
        return ("rotated", *shared) if self.recipe.rotation else ()


def make_plan(model: Model, recipe: Recipe) -> Plan:
    """Returns the plan of a recipe on a model; the model is not changed.

    Args:
        model: the float model.
        recipe: the recipe.

    Raises:
        RecipeError: the target of the recipe cannot hold a number format that the recipe asks for.
    """
    found, skipped = find_linear_groups(model, recipe)
    tables, left_float = find_embeddings(model, recipe, found)
    copies = float_copy_bytes(model, found, tables)
    groups = tuple(_planned_group(model, recipe, group) for group in found)
    embeddings = tuple(_planned_table(model, recipe, table) for table in tables)
    size = file_bytes(model)
    stays = account(model, found, tables, [*skipped, *left_float], size)
    return Plan(model, recipe, groups, embeddings, tuple(stays), copies, size)


def prepared_plan(source: Model, recipe: Recipe) -> Plan:
    """Returns the plan of a recipe on the model as it is calibrated: rotated, and raised to the opset that is needed.

    Args:
        source: the float model, which is not changed: it is copied if need be.
        recipe: the recipe.

    Raises:
        ModelError: the model cannot be raised to the opset.
        RotationError: the recipe asks for a rotation, and the model cannot be rotated.
    """
    plan = make_plan(clone(source) if recipe.rotation else source, recipe).raised()
    plan.prepare()
    return plan


def prepare(model: Model, plans: Sequence[Plan]) -> None:
    """Rotates a model for several plans of it at once, whose groups and tables stay valid.

    Args:
        model: the float model of all plans.
        plans: plans with equal `Plan.preparation`.

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
    """Checks that onnxruntime can open a model whose opset was raised: a newer operator may have no kernel.

    Args:
        source: the model as it was.
        raised: the model at the newer opset.
        opset: that opset.

    Raises:
        ModelError: the installed onnxruntime opens the model as it was, but not at the newer opset.
    """
    from onnx_woq.runtime.session import make_session  # brings onnxruntime

    try:
        make_session(raised, for_calibration=True)
    except ModelError as error:
        try:
            make_session(source, for_calibration=True)
        except ModelError:  # nor as it was, as in bfloat16, which has few kernels without optimizations
            return
        raise ModelError(
            f"{source.path} does not run at opset {opset}, which its codes need ({error}): upgrade onnxruntime, "
            "or choose --target matmulnbits"
        ) from error


def opset_of(model: Model) -> int:
    """Returns the opset of a model: the version of ONNX's own operators that it uses, 0 if it names none."""
    return model.ir.opset_imports.get("") or 0


def _planned_group(model: Model, recipe: Recipe, group: LinearGroup) -> PlannedWeight:
    target = choose(recipe.target, group.spec, "linear")
    opset = opset_of(model)
    scales = scale_type(group, operator_of(target, "linear"), opset, half=recipe.half_scales)
    rank = min(recipe.lowrank, -(-min(group.k, group.n) // RANKS) * RANKS)
    return PlannedWeight(group, target, Storage(scales, opset), rank, recipe.bias_correction)


def _planned_table(model: Model, recipe: Recipe, table: Embedding) -> PlannedWeight:
    target = choose(recipe.target, table.spec, "embedding")
    opset = opset_of(model)
    scales = scale_type(table, operator_of(target, "embedding"), opset, half=recipe.half_scales)
    return PlannedWeight(table, target, Storage(scales, opset))


def _sharing(tables: Sequence[PlannedWeight]) -> set[ir.Node]:
    """Returns the nodes that will share codes, heads and the Gathers of their tables."""
    heads = {table.lender.node for table in tables if table.lender}
    shared = [table.source for table in tables if table.lender and isinstance(table.source, Embedding)]
    return heads | {node for table in shared for node in table.nodes}
