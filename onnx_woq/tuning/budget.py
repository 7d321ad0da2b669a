"""The budget of a mix: bits per weight, bytes, nats per token, or loss of a metric."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from onnx_woq.errors import RecipeError
from onnx_woq.tuning.options import Search

Kind = Literal["bpw", "size", "kl", "loss", "pareto"]


@dataclass(frozen=True)
class Budget:
    """The budget that a mix is made for: bits per weight, bytes of files, nats per token, loss of a metric; or all."""

    kind: Kind
    value: float = math.nan

    def __str__(self) -> str:
        return {
            "bpw": f"at most {self.value:g} bits per weight",
            "size": f"at most {self.value:,.0f} bytes",
            "kl": f"a mean KL divergence of at most {self.value:g} nats per token",
            "loss": f"at most {self.value:g} lost of the metric",
            "pareto": "the frontier",
        }[self.kind]


def budget_of(search: Search, *, has_metric: bool) -> Budget | None:
    """Returns the one budget that a search asks for, None if it asks for none.

    Args:
        search: as given to `tune`.
        has_metric: the user gave an evaluation function.

    Raises:
        RecipeError: several, or one that is no positive number or does not go with the judge.
    """
    given: dict[str, tuple[Kind, float | None]] = {
        "target_bpw": ("bpw", search.target_bpw),
        "target_size": ("size", search.target_size),
        "max_kl": ("kl", search.max_kl),
        "max_loss": ("loss", search.max_loss),
    }
    named = {name: Budget(kind, value) for name, (kind, value) in given.items() if value is not None}
    if search.objective == "pareto":
        named["objective='pareto'"] = Budget("pareto")
    if len(named) > 1:
        raise RecipeError(f"{' and '.join(named)} are different targets: choose one of them")
    for name, target in named.items():
        if target.kind != "pareto" and not (math.isfinite(target.value) and target.value > 0):
            raise RecipeError(f"{name}={target.value!r} must be a number above 0")
    if search.max_kl is not None and has_metric:
        raise RecipeError("max_kl is judged by the built-in judge: leave out eval_fn, or give max_loss for its metric")
    if search.max_loss is not None and not has_metric:
        raise RecipeError("max_loss is a loss of eval_fn's metric: give eval_fn, or max_kl for the built-in judge")
    return next(iter(named.values()), None)
