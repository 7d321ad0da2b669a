"""Applying a solution: float weights in a model give way to low-bit ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from onnx_woq.engine.metadata import LAYERS, RUNTIME, layers_json, metadata
from onnx_woq.engine.plan import Plan, PlannedWeight, prepared_plan
from onnx_woq.engine.results import WeightReport
from onnx_woq.engine.solve import Solved, folding
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.io.model import Model, clone
from onnx_woq.graph.io.save import planned_bytes
from onnx_woq.graph.rewrite.fold_scale import divide_input
from onnx_woq.recipe import Recipe
from onnx_woq.targets.low_rank import lower_compensated
from onnx_woq.targets.registry import TARGETS, required_runtime


def apply_solution(plan: Plan, weight: PlannedWeight, solved: Solved) -> WeightReport:
    """Replaces a weight in the model of a plan, and the tables that share its codes.

    Returns:
        Its row for a report.
    """
    row = weight.report(solved.error)  # before its float weights go
    target = TARGETS[weight.target]
    if isinstance(weight.source, Embedding):
        target.embeddings.lower(plan.model, weight.source, solved.packed[0])
        return row
    scaling = ""
    if solved.input_scale is not None:
        scaling = divide_input(weight.source, solved.input_scale, allow_mul=not folding(plan.recipe))
    lower_compensated(
        plan.model,
        weight.source,
        solved.packed,
        solved.factors,
        target.linears,
        accuracy_level=plan.recipe.accuracy_level,
        bias=solved.bias,
    )
    for table in plan.borrowers(weight):
        target.embeddings.share(plan.model, table, solved.input_scale)
    return replace(row, scaling=scaling)


def final_metadata(model: Model, rows: list[WeightReport]) -> dict[str, str]:
    """Returns the metadata that is known once a model is written: its weights and the runtime that it needs."""
    return {RUNTIME: required_runtime(model), LAYERS: layers_json(row for row in rows if row.kind == "linear")}


def planned_file_bytes(source: Model, recipe: Recipe, out: Path, source_hash: str, calibration: str) -> int:
    """Returns about the bytes of the files that quantizing a model writes, without solving anything.

    Only what depends on the numbers is not counted: the Mul that an input scale of AWQ may need.

    Args:
        source: the float model; it stays as it is.
        recipe: what to do.
        out: where the result goes.
        source_hash, calibration: as its metadata will have them.
    """
    plan = prepared_plan(clone(source), recipe)
    rows = [apply_solution(plan, weight, _empty(weight)) for weight in plan.solved]
    properties = metadata(recipe, source_hash, calibration) | final_metadata(plan.model, rows)
    return planned_bytes(plan.model, out, metadata=properties)


def _empty(weight: PlannedWeight) -> Solved:
    """Returns a solution of the right size without content."""
    arrays = [[np.broadcast_to(np.zeros((), dtype), shape) for shape, dtype in shapes] for shapes in weight.shapes()]
    error = 0.123456789012345678 if weight.kind == "linear" else None
    packed, factors = weight.packed_from(arrays)
    biases = [np.zeros(part.n, np.float32) for part in weight.weight_sources()] if weight.corrected else []
    return Solved(packed, error=error, factors=factors, bias=tuple(biases))
