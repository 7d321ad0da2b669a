"""The predefined recipes, by name.

Five names are published ones, such as `GPTQ_G32ASYM`: method, group size, asymmetric. The others form a family named
for effort and width: `FAST`, `BALANCED` and `BEST` with 4, 3 and 2 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from onnx_woq.core.spec import Spec
from onnx_woq.errors import RecipeError, nearest
from onnx_woq.recipe import Recipe

_G32 = Spec(bits=4, group_size=32, symmetric=False)
_G128 = Spec(bits=4, group_size=128, symmetric=False)
_GRIDS = {4: _G32, 3: Spec(bits=3, group_size=64), 2: Spec(bits=2, group_size=32)}

# The fewer levels a grid has, the more of its range is worth giving up for finer steps. The errors of 2 bits are so
# large that feeding them back along directions seen in few tokens does harm: hence the stronger damping.
_CLIP: Mapping[int, dict[str, Any]] = {
    4: {"mse_range": (0.6, 1.0, 0.01)},
    3: {"mse_range": (0.5, 1.0, 0.02)},
    2: {"mse_range": (0.4, 1.0, 0.02), "percdamp": 0.05},
}


def _family(bits: int) -> dict[str, Recipe]:
    """Returns the presets of three efforts on the grid of `bits` bits."""
    order: dict[str, Any] = {"group_order": True}
    search = order | {"enable_mse_search": True} | _CLIP[bits]
    return {
        f"FAST_{bits}BIT": Recipe(
            "gptq", _GRIDS[bits], options=order, attention_weighted=True, nsamples=16, pad_max_length=512
        ),
        f"BALANCED_{bits}BIT": Recipe(
            "gptq", _GRIDS[bits], options=search, attention_weighted=True, nsamples=64, pad_max_length=512
        ),
        f"BEST_{bits}BIT": Recipe(
            "gptq", _GRIDS[bits], options=search | {"descent_passes": 2}, attention_weighted=True, pad_max_length=1024
        ),
    }


PRESETS: Mapping[str, Recipe] = MappingProxyType(
    {
        "RTN_G32ASYM": Recipe("rtn", _G32),
        "GPTQ_G32ASYM": Recipe("gptq", _G32),
        "GPTQ_G32ASYM_DISABLE_LAST_MATMUL": Recipe("gptq", _G32, lm_head=False),
        "GPTQ_G128ASYM": Recipe("gptq", _G128),
        "AWQ_G32ASYM": Recipe("awq", _G32),
        **_family(4),
        **_family(3),
        **_family(2),
    }
)
"""Preset name -> recipe."""

TUNED = (*list(PRESETS)[:5], "BEST_4BIT")
"""Names of the presets that `tune()` tries by default, in this order."""

MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "RTN_G32ASYM": "round to nearest, 4 bits, groups of 32, asymmetric; needs no calibration data",
        "GPTQ_G32ASYM": "GPTQ, 4 bits, groups of 32, asymmetric",
        "GPTQ_G32ASYM_DISABLE_LAST_MATMUL": "GPTQ as above, the last MatMul (language-model head) stays float",
        "GPTQ_G128ASYM": "GPTQ, 4 bits, groups of 128, asymmetric; fewer scales",
        "AWQ_G32ASYM": "AWQ, 4 bits, groups of 32, asymmetric",
        "FAST_4BIT": "4 bits, groups of 32: GPTQ by attention and group order on 16 samples",
        "BALANCED_4BIT": "4 bits, groups of 32: with a clip search, on 64 samples",
        "BEST_4BIT": "4 bits, groups of 32: all that has proved worth it, on 128 samples",
        "FAST_3BIT": "3 bits, groups of 64: as FAST_4BIT",
        "BALANCED_3BIT": "3 bits, groups of 64: as BALANCED_4BIT",
        "BEST_3BIT": "3 bits, groups of 64: as BEST_4BIT",
        "FAST_2BIT": "2 bits, groups of 32: as FAST_4BIT",
        "BALANCED_2BIT": "2 bits, groups of 32: as BALANCED_4BIT",
        "BEST_2BIT": "2 bits, groups of 32: as BEST_4BIT",
    }
)
"""Preset name -> one line for people."""


def preset(name: str) -> Recipe:
    """Returns the recipe of a preset; upper and lower case of the name count as the same.

    Raises:
        RecipeError: no preset has this name; the message gives the closest ones.
    """
    if found := PRESETS.get(name.upper()):
        return found
    raise RecipeError(f"unknown config {name!r}: {nearest(name, PRESETS)}")
