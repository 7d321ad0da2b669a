"""Applying a solution: low-bit weights replace the float ones in a model."""

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
    """Replaces a weight in the model of a plan by its solution, and makes the tables that share its codes read them.

    Args:
        plan: the plan, whose model is rewritten.
        weight: one of the plan's weights that have codes of their own.
        solved: its solution.

    Returns:
        The row of the weight in a report.
    """
    row = weight.report(solved.error)  # asked for while the float weights are still there
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
    """Returns the metadata that is known once all weights are replaced: the runtime that is needed, and the layers."""
    return {RUNTIME: required_runtime(model), LAYERS: layers_json(row for row in rows if row.kind == "linear")}


def planned_file_bytes(source: Model, recipe: Recipe, out: Path, source_hash: str, calibration: str) -> int:
    """Returns about how many bytes the files of a quantized model will have, without solving any weight.

    It writes weights of the right size and no content. Only the Mul that an input scale of AWQ may need is not counted,
    since it depends on the numbers.

    Args:
        source: the float model; it stays as it is.
        recipe: the recipe.
        out: the .onnx file that the result would be.
        source_hash: the hash of the model, which the metadata has.
        calibration: the hash of the calibration data, likewise.
    """
    plan = prepared_plan(clone(source), recipe)
    rows = [apply_solution(plan, weight, _empty(weight)) for weight in plan.solved]
    properties = metadata(recipe, source_hash, calibration) | final_metadata(plan.model, rows)
    return planned_bytes(plan.model, out, metadata=properties)


def _empty(weight: PlannedWeight) -> Solved:
    """Returns a solution of the right size, whose arrays are zeros that take no memory."""
    arrays = [[np.broadcast_to(np.zeros((), dtype), shape) for shape, dtype in shapes] for shapes in weight.shapes()]
    error = 0.123456789012345678 if weight.kind == "linear" else None
    packed, factors = weight.packed_from(arrays)
    biases = [np.zeros(one.n, np.float32) for one in weight.weight_sources()] if weight.corrected else []
    return Solved(packed, error=error, factors=factors, bias=tuple(biases))
