"""Inspection: a report on what a recipe would do to a model."""

from __future__ import annotations

from onnx_woq.engine.apply import planned_file_bytes
from onnx_woq.engine.convert import converted
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.results import Inspection
from onnx_woq.graph.find.blocks import cuts
from onnx_woq.graph.io.find_model import ModelSource, model_file
from onnx_woq.graph.io.model import load
from onnx_woq.presets import preset
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.session import blames_models


@blames_models("model")
def inspect(model: ModelSource, recipe: Recipe | str = "RTN_G32ASYM", *, convert: bool = False) -> Inspection:
    """Tells what a recipe would quantize in a model, what it would leave float and why, and the bytes of both.

    Args:
        model: an .onnx file, a folder that holds one, or a model in memory (`onnx.ModelProto`, `onnx_ir.Model`).
        recipe: the recipe, or the name of a preset.
        convert: begin with what `onnx_woq.convert` makes of the model, as `quantize` does with the same argument.

    Raises:
        OnnxWoqError: the model or the recipe cannot be used.
    """
    recipe = preset(recipe) if isinstance(recipe, str) else recipe
    with model_file(model) as given, converted(given, convert) as path:
        plan = make_plan(load(path), recipe)
        rows = tuple(weight.report() for weight in (*plan.groups, *plan.embeddings))
        after = planned_file_bytes(plan.model, recipe, plan.model.path, "0" * 32, "0" * 32)
        before = plan.bytes_before
        return Inspection(given, recipe, rows, plan.skipped, plan.copies, before, after, tuple(cuts(plan.model)))
