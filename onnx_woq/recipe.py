"""Recipes: everything that `quantize` is asked to do to a model.

`Spec` (in `onnx_woq.core.spec`) is the number format of one weight. A `Recipe` says which weights get which format, by
which method their codes are found, and what calibrates them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from onnx_woq.core.methods.registry import METHODS, check_options
from onnx_woq.core.spec import Spec
from onnx_woq.errors import RecipeError, nearest

ACCURACY_LEVELS = (0, 1, 2, 3, 4)
SEQUENTIAL_UNITS = ("tap", "block")
_WRITTEN = {"asymmetric_calibration": "both_streams", "asymmetric_strength": "stream_share"}
"""Fields that files call by another name: the names of version 0.1, so that its files keep their meaning."""

RANKS, MOST_RANK = 16, 1024  # ranks of low-rank factors are multiples of 16, the smallest block of a kernel


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what `quantize` does to a model, apart from the calibration data.

    A **linear** is a MatMul or Gemm with a constant weight; a **linear group** is the linears that read one activation,
    such as q/k/v.

    Attributes:
        method: "rtn", "gptq", "awq", "teq" or "hqq" (`onnx_woq.core.methods.registry.METHODS`).
        spec: the number format of every weight that no override names.
        options: keyword arguments of the method's solver.
        include: regular expressions; if any are given, only linears and tables that one of them finds are quantized.
        exclude: regular expressions; linears and tables that one of them finds stay float. Every expression is searched
            in the node name, the output value name and the weight name.
        overrides: regular expression -> Spec for the linears and tables that it finds, or None to leave them float; the
            last match wins.
        embedding: the number format of embedding tables `[V, D]`, grouped along D (see
            `onnx_woq.graph.find.embeddings`); None leaves them float. `include`, `exclude` and `overrides` hold for
            them as well. A head that is the same table in the same format shares its codes.
        target: the operators that the written model multiplies with, a name in `onnx_woq.targets.registry`, or "auto"
            for the first of them that holds the number format of a weight.
        lm_head: quantize the MatMul that makes the model's first output (the "last MatMul").
        accuracy_level: attribute of MatMulNBits; 4 computes with int8 activations (fast), 0 in float.
        half_scales: store scales in float16 also where the model computes in float32, and cast them to float32 when the
            model is loaded: 16 bits less for each group. They are rounded before codes are chosen. The int8 kernel runs
            only in sessions that optimize their graph (docs/storage.md).
        attention_weighted: calibrate the linears that make keys and values with each token weighted by the attention it
            receives (see `onnx_woq.graph.find.attention`); needs a method with data.
        bias_correction: add to each output what rounding takes off its mean on the calibration data (see
            `onnx_woq.core.refine.bias`); every method then needs data.
        lowrank: the rank of factors that make up for rounding errors (see `onnx_woq.core.refine.low_rank`), a multiple
            of 16 or 0 for none; every method then needs data.
        rotation: rotate the residual stream of a model with RMSNorm first, which spreads outlying channels and does not
            change what the model computes (see `onnx_woq.graph.rewrite.rotate`).
        true_sequential: collect the statistics of each linear group while what comes before it is already quantized.
        sequential_unit: what comes before it: "tap", every earlier linear group, or "block", every earlier block of the
            graph (see `onnx_woq.graph.find.blocks`).
        asymmetric_calibration: solve each linear group for the outputs of the float model, given the inputs of the
            quantized one, so that it makes up for earlier errors (see `onnx_woq.core.refine.asymmetric`). Every method
            then needs data, and `true_sequential` is implied.
        asymmetric_strength: how much of those errors to make up for, above 0 and at most 1. 1 is the least error on the
            calibration data; on tens of thousands of tokens a good part of that is chance, which adds up from layer to
            layer (docs/experiments.md).
        nsamples: the most calibration samples to use.
        pad_max_length: the longest calibration sample, in tokens.
        use_max_length: use only samples of exactly `pad_max_length` tokens.

    Raises:
        RecipeError: a field is unknown to its method, has the wrong type or is out of range.
    """

    method: str = "rtn"
    spec: Spec = field(default_factory=Spec)
    options: Mapping[str, Any] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, Spec | None] = field(default_factory=dict)
    embedding: Spec | None = None
    lm_head: bool = True
    accuracy_level: int = 4
    half_scales: bool = False
    attention_weighted: bool = False
    bias_correction: bool = False
    lowrank: int = 0
    rotation: bool = False
    true_sequential: bool = False
    sequential_unit: str = "tap"
    asymmetric_calibration: bool = False
    asymmetric_strength: float = 0.25
    nsamples: int = 128
    pad_max_length: int = 2048
    use_max_length: bool = False
    target: str = "matmulnbits"
    both_streams: InitVar[bool | None] = None
    stream_share: InitVar[float | None] = None

    def __post_init__(self, both_streams: bool | None, stream_share: float | None) -> None:
        old_names = {"asymmetric_calibration": both_streams, "asymmetric_strength": stream_share}
        for name, value in old_names.items():
            if value is not None:
                object.__setattr__(self, name, value)
        if self.method not in METHODS:
            raise RecipeError(f"unknown method {self.method!r}: {nearest(str(self.method), METHODS)}")
        check_options(METHODS[self.method], self.options)
        self._check_values()
        if self.asymmetric_calibration:
            object.__setattr__(self, "true_sequential", True)
        self._check_groups()
        self._check_names()
        self._freeze()

    def _check_values(self) -> None:
        for name, (is_valid, wanted) in _VALUES.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise RecipeError(f"{name}={value!r} {wanted}")

    def _check_groups(self) -> None:
        """Refuses groups of output channels under a method that needs data: its statistics are of input channels."""
        specs = [self.spec, self.embedding, *self.overrides.values()]
        if self.needs_data and any(spec is not None and spec.group_dim == 0 for spec in specs):
            raise RecipeError(
                f"group_dim=0 is not for {self.method} or for compensation, which need data: choose rtn or hqq alone"
            )

    def _check_names(self) -> None:
        if not isinstance(self.target, str) or not self.target:
            raise RecipeError(f"target={self.target!r} must be the name of a target, such as matmulnbits or qdq")
        if self.sequential_unit not in SEQUENTIAL_UNITS:
            raise RecipeError(f"unknown sequential_unit: {nearest(str(self.sequential_unit), SEQUENTIAL_UNITS)}")

    def _freeze(self) -> None:
        """Makes equal recipes have equal fields, and no field one that a caller can change."""
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in sorted(self.options.items())}
        include, exclude = _expressions("include", self.include), _expressions("exclude", self.exclude)
        _expressions("overrides", tuple(self.overrides))
        frozen = {
            "target": self.target.lower(),
            "include": include,
            "exclude": exclude,
            "options": MappingProxyType(options),
            "overrides": MappingProxyType(dict(self.overrides)),
        }
        for name, value in frozen.items():
            object.__setattr__(self, name, value)

    @property
    def needs_data(self) -> bool:
        """Tells whether the recipe takes calibration data, for its method or for what it adds to the weights."""
        added = self.bias_correction or self.lowrank > 0 or self.asymmetric_calibration
        return METHODS[self.method].needs_data or added

    def spec_for(self, *names: str, default: Spec | None = None) -> tuple[Spec | None, str]:
        """Returns the number format of a linear or table, or None and the reason why it stays float.

        Args:
            names: the names that it is known by: of its node, its output value and its weight.
            default: its format if no override names it; None for `spec`.
        """
        found = lambda expression: any(re.search(expression, name) for name in names if name)  # noqa: E731
        if self.include and not any(map(found, self.include)):
            return None, "not named by --include"
        if (hit := next(filter(found, self.exclude), None)) is not None:
            return None, f"excluded by {hit!r}"
        spec: Spec | None = default or self.spec
        for expression, override in self.overrides.items():
            if found(expression):
                spec = override
        return spec, "" if spec else "left float by an override"

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary, from which `from_dict` builds an equal recipe."""
        out = {_WRITTEN.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        if self.target == "matmulnbits":  # files of version 0.1 have no target: hashes of their recipes must not change
            del out["target"]
        return out | {
            "spec": self.spec.to_dict(),
            "embedding": self.embedding and self.embedding.to_dict(),
            "options": dict(self.options),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "overrides": {k: v and v.to_dict() for k, v in self.overrides.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from JSON or TOML; recipe fields written among the options are lifted out of them.

        Raises:
            RecipeError: a field or option is unknown (the message names the nearest), or a value is out of range.
        """
        data = dict(_table("recipe", data))
        options = dict(_table("options", data.pop("options", {})))
        known = ({f.name for f in fields(cls)} | set(_WRITTEN.values())) - {"options"}
        data |= {name: options.pop(name) for name in list(options) if name in known}
        if unknown := next((name for name in data if name not in known), None):
            raise RecipeError(f"unknown recipe field {unknown!r}: {nearest(unknown, sorted(known | {'options'}))}")
        if "spec" in data:
            data["spec"] = _spec(data["spec"])
        if data.get("embedding") is not None:
            data["embedding"] = _spec(data["embedding"], "embedding")
        if "overrides" in data:
            data["overrides"] = {k: v and _spec(v) for k, v in _table("overrides", data["overrides"]).items()}
        return cls(**data, options=options)

    def fingerprint(self) -> str:
        """Returns a hash of everything in the recipe, 16 hexadecimal digits, for journals and metadata."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def with_spec(self, **changes: Any) -> Recipe:
        """Returns the recipe with some fields of `spec` replaced, such as `with_spec(bits=8)`."""
        return replace(self, spec=replace(self.spec, **changes))


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_rank(value: Any) -> bool:
    return _is_whole(value, 0) and value % RANKS == 0 and value <= MOST_RANK


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


_SWITCH = (lambda value: isinstance(value, bool), "must be true or false")
_COUNT = (lambda value: _is_whole(value, 1), "must be a whole number of at least 1")
_VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    {
        "embedding": (
            lambda value: isinstance(value, Spec | None),
            "must be a Spec, or None to leave embeddings float",
        ),
        "accuracy_level": (lambda value: value in ACCURACY_LEVELS, "is out of range: choose 0 to 4"),
        "nsamples": _COUNT,
        "pad_max_length": _COUNT,
        "lm_head": _SWITCH,
        "half_scales": _SWITCH,
        "attention_weighted": _SWITCH,
        "bias_correction": _SWITCH,
        "rotation": _SWITCH,
        "true_sequential": _SWITCH,
        "asymmetric_calibration": _SWITCH,
        "use_max_length": _SWITCH,
        "lowrank": (_is_rank, f"must be 0 or a multiple of {RANKS} up to {MOST_RANK}: 16 is a start"),
        "asymmetric_strength": (_is_fraction, "must be above 0 and at most 1"),
    }
)
"""The test that each field of a recipe must pass, and the end of the message if it does not."""


def _spec(data: Any, name: str = "spec") -> Spec:
    return data if isinstance(data, Spec) else Spec.from_dict(_table(name, data), name)


def _table(name: str, data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{name} must be a table of names and values, not {data!r}")
    return data


def _expressions(name: str, expressions: Sequence[str]) -> tuple[str, ...]:
    if isinstance(expressions, str):
        expressions = (expressions,)
    if not isinstance(expressions, list | tuple):
        raise RecipeError(f"{name} must be a list of regular expressions, not {expressions!r}")
    for expression in expressions:
        try:
            re.compile(expression)
        except (re.error, TypeError) as error:
            raise RecipeError(f"{name}: {expression!r} is not a regular expression ({error})") from error
    return tuple(expressions)
