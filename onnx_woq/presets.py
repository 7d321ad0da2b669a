"""The predefined configurations, in tuning order."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from onnx_woq.errors import RecipeError, nearest
from onnx_woq.recipe import Recipe, Spec

_G32 = Spec(bits=4, group_size=32, symmetric=False)
_G128 = Spec(bits=4, group_size=128, symmetric=False)

PRESETS: Mapping[str, Recipe] = MappingProxyType(
    {
        "RTN_G32ASYM": Recipe("rtn", _G32),
        "GPTQ_G32ASYM": Recipe("gptq", _G32),
        "GPTQ_G32ASYM_DISABLE_LAST_MATMUL": Recipe("gptq", _G32, lm_head=False),
        "GPTQ_G128ASYM": Recipe("gptq", _G128),
        "AWQ_G32ASYM": Recipe("awq", _G32),
    }
)

MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "RTN_G32ASYM": "round to nearest, 4 bits, groups of 32, asymmetric; needs no calibration data",
        "GPTQ_G32ASYM": "GPTQ, 4 bits, groups of 32, asymmetric",
        "GPTQ_G32ASYM_DISABLE_LAST_MATMUL": "GPTQ as above, the last MatMul (language-model head) stays float",
        "GPTQ_G128ASYM": "GPTQ, 4 bits, groups of 128, asymmetric; fewer scales",
        "AWQ_G32ASYM": "AWQ, 4 bits, groups of 32, asymmetric",
    }
)


def preset(name: str) -> Recipe:
    """The recipe a preset name stands for, whatever its case; RecipeError names the nearest when unknown."""
    if found := PRESETS.get(name.upper()):
        return found
    raise RecipeError(f"unknown config {name!r}: {nearest(name, PRESETS)}")
