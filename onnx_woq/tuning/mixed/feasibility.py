"""The feasibility of a budget, asked before the work begins."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_woq.errors import RecipeError
from onnx_woq.graph.io.model import Model
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.tuning.budget import Budget
from onnx_woq.tuning.mixed.candidates import MixCandidates


def check_reachable(mixer: MixCandidates, target: Budget, source: Model, samples: Sequence[Feed]) -> None:
    """Refuses a size that no mix has, and the divergence of a model without logits, before any work.

    Raises:
        RecipeError: it names the sizes that can be reached, or what to ask for instead.
    """
    if target.kind == "kl":
        from onnx_woq.runtime.evaluation.outputs import is_language_model

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
    everything = [max(range(len(u.specs)), key=u.written.__getitem__) for u in mixer.layers]
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
