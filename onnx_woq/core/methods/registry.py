"""The registry of methods: every solver by name, its options and the memory it takes.

A method is one file with a function `solve`; the keyword-only arguments of `solve` are the options of the method. To
add one, write the file and add a line to `METHODS`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from onnx_woq.core.grids.integer import QuantizedTensor
from onnx_woq.core.methods import awq, gptq, hqq, rtn, teq
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats
from onnx_woq.errors import RecipeError, nearest

_NOT_OPTIONS = ("scale_dtype", "parallel_map")  # arguments of `solve` that the engine gives, not the user

WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType({"scaling": gptq.SCALINGS})
"""The allowed values of each option whose value is a word."""

MOST_CANDIDATES = 1000  # shrink factors of a clip search: more are a slip of the step, and would run for hours


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
        name: its name in recipes.
        solve: `(weight [K, N], stats, spec, *, scale_dtype, parallel_map, **options) -> QuantizedTensor`; `stats` may
            be None where `needs_data` is false.
        needs_data: True if the method reads calibration statistics. (A recipe may need them for other reasons, see
            `Recipe.needs_data`.)
        working_bytes: `(k, n, spec, **options) -> int`, an estimate of the bytes that solving a weight [k, n] holds at
            once beyond the weight, its statistics and the result.
    """

    name: str
    solve: Callable[..., Any]
    needs_data: bool
    working_bytes: Callable[..., int]

    @property
    def options(self) -> dict[str, Any]:
        """Returns the options that users may set, with their defaults, read from the signature of `solve`."""
        parameters = inspect.signature(self.solve).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_OPTIONS}


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "rtn": Method("rtn", rtn.solve, needs_data=False, working_bytes=rtn.working_bytes),
        "gptq": Method("gptq", gptq.solve, needs_data=True, working_bytes=gptq.working_bytes),
        "awq": Method("awq", awq.solve, needs_data=True, working_bytes=awq.working_bytes),
        "teq": Method("teq", teq.solve, needs_data=True, working_bytes=teq.working_bytes),
        "hqq": Method("hqq", hqq.solve, needs_data=False, working_bytes=hqq.working_bytes),
    }
)


def solve(method: str, weight: NDArray[Any], stats: Stats | None, spec: Spec, **arguments: Any) -> QuantizedTensor:
    """Solves a weight by a method.

    Groups of output channels (`group_dim=0`) are groups of input channels of the transposed weight: methods that need
    no statistics solve that.

    Args:
        method: its name.
        weight: `[K, N]`.
        stats: of its input; None for methods that need no data.
        spec: its number format.
        arguments: further arguments of the method's `solve`.

    Raises:
        FloatingPointError: the weight holds NaN or infinite numbers.
    """
    found = METHODS[method]
    if spec.group_dim == 1:
        solved: QuantizedTensor = found.solve(weight, stats, spec, **arguments)
        return solved
    if found.needs_data:
        raise ValueError(f"{method} solves groups of input channels only")
    turned: QuantizedTensor = found.solve(weight.T, None, replace(spec, group_dim=1), **arguments)
    return turned.turned()


@lru_cache(maxsize=256)
def solve_bytes(method: str, k: int, n: int, spec: Spec, options: tuple[tuple[str, Any], ...] = ()) -> int:
    """Estimates the bytes that solving a weight [k, n] takes beyond the weight and its statistics, result included.

    Args:
        method: name of the method.
        k, n: input and output channels of the weight.
        spec: bits, group size and scheme.
        options: names and values of the options that are not left at their defaults.
    """
    return METHODS[method].working_bytes(k, n, spec, **dict(options)) + result_bytes(k, n, spec)


def result_bytes(k: int, n: int, spec: Spec) -> int:
    """Returns the bytes of the `QuantizedTensor` of a weight [k, n]."""
    return k * n + 5 * -(-k // spec.resolved_group(k)) * n


def check_options(method: Method, options: Mapping[str, Any]) -> None:
    """Checks `options` for `method.solve`, so that a mistake is found before any work is done.

    The default of each option tells its type; a list, as JSON gives it, may stand for a tuple.

    Raises:
        RecipeError: an unknown option (the nearest one is named), a value of the wrong type or out of range.
    """
    if options.get("actorder") and options.get("group_order"):
        raise RecipeError("actorder and group_order are two orders of the rows: choose one of them")
    known = method.options
    for name, value in options.items():
        if name not in known:
            raise RecipeError(f"unknown {method.name} option {name!r}: {nearest(str(name), sorted(known))}")
        default = known[name]
        if isinstance(default, bool):
            _require(isinstance(value, bool), name, value, "true or false")
        elif isinstance(default, int):
            whole = isinstance(value, int) and not isinstance(value, bool)
            least = min(default, 1)
            _require(whole and value >= least, name, value, f"a whole number of at least {least}")
        elif isinstance(default, float):
            _require(_is_number(value) and value > 0, name, value, "a number above 0")
        elif isinstance(default, str):
            choices = WORDS[name]
            if value not in choices:
                raise RecipeError(f"{name}={value!r}: {nearest(str(value), choices)}")
        else:
            wanted = "three numbers (start, stop, step), 0 < start <= stop <= 1, step > 0"
            _require(_is_range(value), name, value, wanted)
            start, stop, step = value
            _require(stop - start <= MOST_CANDIDATES * step, name, value, f"at most {MOST_CANDIDATES} candidates")


def _require(fine: bool, name: str, value: object, wanted: str) -> None:
    """Raises a RecipeError that says what was wanted of an option, unless its value is fine."""
    if not fine:
        raise RecipeError(f"{name}={value!r} must be {wanted}")


def _is_number(value: object) -> bool:
    """Tells whether `value` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_range(value: object) -> bool:
    """Tells whether `value` is (start, stop, step) of shrink factors."""
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(map(_is_number, value)):
        return False
    start, stop, step = value
    return bool(0 < start <= stop <= 1 and step > 0)
