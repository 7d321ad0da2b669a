"""What a mix can be made for, and whether there is such a one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from onnx_woq.errors import RecipeError
from onnx_woq.graph.io.model import Model
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.tuning.mixed.candidates import MixCandidates

Kind = Literal["bpw", "size", "kl", "loss", "pareto"]


@dataclass(frozen=True)
class Budget:
    """What a mix is made for: bits per weight, bytes of the files, nats per token, loss of a metric; or all of them."""

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


def budget_of(
    objective: str,
    target_bpw: float | None,
    target_size: int | None,
    max_kl: float | None,
    max_loss: float | None,
    *,
    has_metric: bool,
) -> Budget | None:
    """The one target among the arguments of `tune`, or None.

    Raises:
        RecipeError: several, or one that is no positive number or does not go with the judge.
    """
    given: dict[str, tuple[Kind, float | None]] = {
        "target_bpw": ("bpw", target_bpw),
        "target_size": ("size", target_size),
        "max_kl": ("kl", max_kl),
        "max_loss": ("loss", max_loss),
    }
    named = {name: Budget(kind, value) for name, (kind, value) in given.items() if value is not None}
    if objective == "pareto":
        named["objective='pareto'"] = Budget("pareto")
    if len(named) > 1:
        raise RecipeError(f"{' and '.join(named)} are different targets: choose one of them")
    for name, target in named.items():
        if target.kind != "pareto" and not (math.isfinite(target.value) and target.value > 0):
            raise RecipeError(f"{name}={target.value!r} must be a number above 0")
    if max_kl is not None and has_metric:
        raise RecipeError("max_kl is judged by the built-in judge: leave out eval_fn, or give max_loss for its metric")
    if max_loss is not None and not has_metric:
        raise RecipeError("max_loss is a loss of eval_fn's metric: give eval_fn, or max_kl for the built-in judge")
    return next(iter(named.values()), None)


def check_reachable(mixer: MixCandidates, target: Budget, source: Model, samples: Sequence[Feed]) -> None:
    """Refuses a size that no mix has, and the divergence of a model without logits, before any work.

    Raises:
        RecipeError: it names the sizes that can be reached, or what to ask for instead.
    """
    if target.kind == "kl":
        from onnx_woq.runtime.evaluation.metrics import is_language_model

        if not is_language_model(source, samples[0]):
            raise RecipeError(
                f"{source.path.name} has no logits, so no KL divergence: "
                "ask for a size, or for a loss of your own metric"
            )
    check_sizes(mixer, target)


def check_sizes(mixer: MixCandidates, target: Budget) -> None:
    """Refuses a size that no mix has.

    Raises:
        RecipeError: it names the sizes that can be reached.
    """
    everything = [max(range(len(u.specs)), key=u.written.__getitem__) for u in mixer.units]
    if target.kind == "bpw":
        low, high = (mixer.bits_per_weight(picks) for picks in (mixer.smallest("stored").picks, everything))
        if not low <= target.value <= high:
            raise RecipeError(
                f"{target.value:g} bits per weight cannot be reached: "
                f"the mixes of this model have {low:.3f} to {high:.3f}"
            )
    if target.kind == "size":
        low, high = mixer.planned(mixer.recipe(mixer.smallest("written").picks)), mixer.written(everything)
        if not low <= target.value <= high:
            raise RecipeError(
                f"{target.value:,.0f} bytes cannot be reached: the mixes of this model take {low:,} to {high:,} bytes "
                f"({low / 1e6:.2f} to {high / 1e6:.2f} MB)"
            )
