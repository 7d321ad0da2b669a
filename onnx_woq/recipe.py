"""What to do to a model: `Spec` says what the numbers look like, `Recipe` which method makes them and where."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from onnx_woq.core.methods.registry import METHODS, check_options
from onnx_woq.core.spec import Spec
from onnx_woq.errors import RecipeError, nearest

ACCURACY_LEVELS = (0, 1, 2, 3, 4)
SEQUENTIAL_UNITS = ("tap", "block")
_SWITCHES = (
    "lm_head", "half_scales", "attention_weighted", "bias_correction", "rotation", "true_sequential",
    "asymmetric_calibration",
    "use_max_length",
)  # fmt: skip
_WRITTEN = {"asymmetric_calibration": "both_streams", "asymmetric_strength": "stream_share"}
"""What fields are called in files, where that is another name: files of the first version are read as they are."""

RANKS, MOST_RANK = 16, 1024  # of low-rank factors: the smallest block a kernel knows


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what `quantize` does to a model, apart from the calibration data.

    Attributes:
        method: "rtn", "gptq", "awq", "teq" or "hqq" (`onnx_woq.core.methods.registry.METHODS`).
        spec: the grid of every weight that no override names.
        options: keyword arguments of the method's solver; unknown ones are refused before any work.
        include: regular expressions; when given, only sites where one is found are quantized.
        exclude: regular expressions; sites where one is found stay float.
            All expressions are searched in the node name, output value name and weight name of a site.
        overrides: expression -> Spec for the sites it finds, or None to leave them float; the last match wins.
        embedding: grid of the tables that Gather reads rows of (see `onnx_woq.graph.find.embeddings`), along their columns;
            None leaves them float. `include`, `exclude` and `overrides` hold for them as well. A head that is the same
            table on the same grid shares its codes.
        target: the operators that the written model multiplies with, a name in `onnx_woq.targets.registry` or "auto" for
            the first of them that holds the number format of a weight.
        lm_head: quantize the MatMul that makes the model's first output (the "last MatMul").
        accuracy_level: MatMulNBits attribute; 4 computes with int8 activations (fast), 0 in float.
        half_scales: store scales in float16 also where the model computes in float32, which is what they are cast to
            when the model is loaded: 16 bits less for each group. They are rounded before codes are chosen. The int8
            kernel runs only in sessions that optimize their graph (docs/storage.md).
        attention_weighted: what makes keys and values is calibrated with each token weighted by the attention it
            receives (see `onnx_woq.graph.find.attention`); needs a method with data.
        bias_correction: add to each output what rounding has taken off its mean on the calibration data (see
            `onnx_woq.core.refine.bias`); every method then needs data.
        lowrank: rank of the factors that make up for rounding errors (see `onnx_woq.core.refine.low_rank`), a multiple of 16
            or 0 for none; every method then needs data.
        rotation: first rotate the residual stream of a model with RMSNorm, which leaves what it computes as it is and
            spreads channels that stick out (see `onnx_woq.graph.rewrite.rotate`).
        true_sequential: collect each tap's statistics with what comes before it already quantized.
        sequential_unit: what that is: "tap", every earlier tap, or "block", every earlier block of the graph (see
            `onnx_woq.graph.find.blocks`).
        asymmetric_calibration: make up for the errors of what is quantized already (see `onnx_woq.core.refine.asymmetric`): each tap is
            solved for the outputs that the float model has, given the inputs of the quantized one. Every method then
            needs data, and `true_sequential` is implied.
        asymmetric_strength: how far, from above 0 to 1. All the way is the least error on the calibration data; on tens of
            thousands of tokens a good part of it is chance, which adds up from layer to layer (docs/experiments.md).
        nsamples: calibration samples used at most.
        pad_max_length: longest calibration sample, in tokens.
        use_max_length: use only samples of exactly `pad_max_length` tokens.
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
        if both_streams is not None:
            object.__setattr__(self, "asymmetric_calibration", both_streams)
        if stream_share is not None:
            object.__setattr__(self, "asymmetric_strength", stream_share)
        if self.method not in METHODS:
            raise RecipeError(f"unknown method {self.method!r}: {nearest(str(self.method), METHODS)}")
        check_options(METHODS[self.method], self.options)
        if not isinstance(self.embedding, Spec | None):
            raise RecipeError(f"embedding={self.embedding!r} must be a Spec, or None to leave embeddings float")
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise RecipeError(f"accuracy_level={self.accuracy_level!r} is out of range: choose 0 to 4")
        for name in ("nsamples", "pad_max_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RecipeError(f"{name}={value!r} must be a whole number of at least 1")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name}={getattr(self, name)!r} must be true or false")
        rank = self.lowrank
        if not isinstance(rank, int) or isinstance(rank, bool) or rank % RANKS or not 0 <= rank <= MOST_RANK:
            raise RecipeError(f"lowrank={rank!r} must be 0 or a multiple of {RANKS} up to {MOST_RANK}: 16 is a start")
        share = self.asymmetric_strength
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise RecipeError(f"asymmetric_strength={share!r} must be above 0 and at most 1")
        if self.asymmetric_calibration:
            object.__setattr__(self, "true_sequential", True)
        specs = [self.spec, self.embedding, *self.overrides.values()]
        if self.needs_data and any(spec is not None and spec.group_dim == 0 for spec in specs):
            raise RecipeError(
                f"group_dim=0 is not for {self.method} or for compensation, which need data: choose rtn or hqq alone"
            )
        if not isinstance(self.target, str) or not self.target:
            raise RecipeError(f"target={self.target!r} must be the name of a target, such as matmulnbits or qdq")
        object.__setattr__(self, "target", self.target.lower())
        if self.sequential_unit not in SEQUENTIAL_UNITS:
            raise RecipeError(f"unknown sequential_unit: {nearest(str(self.sequential_unit), SEQUENTIAL_UNITS)}")
        object.__setattr__(self, "include", _expressions("include", self.include))
        object.__setattr__(self, "exclude", _expressions("exclude", self.exclude))
        _expressions("overrides", tuple(self.overrides))
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in sorted(self.options.items())}
        object.__setattr__(self, "options", MappingProxyType(options))
        object.__setattr__(self, "overrides", MappingProxyType(dict(self.overrides)))

    @property
    def needs_data(self) -> bool:
        """Tells whether carrying it out takes calibration data: for its method, or for what is added to the weights."""
        added = self.bias_correction or self.lowrank > 0 or self.asymmetric_calibration
        return METHODS[self.method].needs_data or added

    def spec_for(self, *names: str, default: Spec | None = None) -> tuple[Spec | None, str]:
        """The spec of what is known by `names` (`default`, or `spec`, where no override names it), or None with the
        reason why it stays float."""
        found = lambda expression: any(re.search(expression, name) for name in names if name)  # noqa: E731
        if self.include and not any(map(found, self.include)):
            return None, "not named by --include"
        if hit := next(filter(found, self.exclude), None):
            return None, f"excluded by {hit!r}"
        spec: Spec | None = default or self.spec
        for expression, override in self.overrides.items():
            if found(expression):
                spec = override
        return spec, "" if spec else "left float by an override"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` gives the same recipe back."""
        out = {_WRITTEN.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        if (
            self.target == "matmulnbits"
        ):  # as files of version 0.1 have it, so that hashes of recipes stay what they were
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
            RecipeError: an unknown field or option, naming the nearest known one.
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
        """A short hash of everything in the recipe, for journals and metadata."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def with_spec(self, **changes: Any) -> Recipe:
        """The same recipe on another grid: `with_spec(bits=8)`."""
        return replace(self, spec=replace(self.spec, **changes))


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
