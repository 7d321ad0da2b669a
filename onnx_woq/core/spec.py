"""The number format of a weight: `Spec` says how many bits its codes have and which weights share a scale.

A spec is what users write in a recipe. It holds no numbers of a weight: `core.grids` fits the scales and zero points of
a weight to it, and a `QuantizedTensor` carries the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from onnx_woq.errors import RecipeError, nearest


@dataclass(frozen=True, repr=False)
class Spec:
    """The integer grid of a weight `[K, N]`.

    Attributes:
        bits: bits of a code, 1 to 8. MatMulNBits has kernels for 2, 4 and 8; other widths are run in the next wider
            one, values unchanged, and take no more than their bits in the file where the model's opset is 18 or newer
            (docs/storage.md).
        group_size: how many consecutive channels share one scale; -1 for all of them. What a target cannot store it
            refuses by name; MatMulNBits takes multiples of 16.
        symmetric: the zero point is fixed at `2**(bits-1)` instead of one per group.
        group_dim: 1 groups input channels (rows of the weight), so that each output channel has scales of its own; 0
            groups output channels (columns), so that each input channel has.

    Raises:
        RecipeError: a value has another type or is out of range.
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    group_dim: int = 1

    def __post_init__(self) -> None:
        for name, kind in (("bits", int), ("group_size", int), ("symmetric", bool), ("group_dim", int)):
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise RecipeError(f"{name} must be {kind.__name__}, not {value!r}")
        if not 1 <= self.bits <= 8:
            raise RecipeError(f"bits={self.bits} is out of range: choose 1 to 8 (2, 4 and 8 are native)")
        if self.group_size != -1 and self.group_size < 1:
            raise RecipeError(
                f"group_size={self.group_size} is out of range: choose -1 (one group per output channel), "
                "or how many channels share a scale (16, 32, 64, 128 and 256 are native)"
            )
        if self.group_dim not in (0, 1):
            raise RecipeError(f"group_dim={self.group_dim} is out of range: choose 1 (groups of input channels) or 0")

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"Spec({shown})"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str = "spec") -> Spec:
        """Builds a spec from JSON or TOML.

        Args:
            data: names and values.
            name: of the table, for messages.

        Raises:
            RecipeError: a field is unknown or out of range.
        """
        known = [field.name for field in fields(cls)]
        if unknown := next((field for field in data if field not in known), None):
            raise RecipeError(f"unknown {name} field {unknown!r}: {nearest(unknown, known)}")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary; fields that came after version 0.1 are left out at their defaults."""
        out: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return out if self.group_dim == 1 else out | {"group_dim": self.group_dim}

    def resolved_group(self, channels: int) -> int:
        """Returns the channels per group of a weight with so many channels: never more than there are."""
        return channels if self.group_size == -1 else min(self.group_size, channels)
