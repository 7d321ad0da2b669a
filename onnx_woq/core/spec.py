"""The number format of a weight."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_woq.errors import RecipeError


@dataclass(frozen=True)
class Spec:
    """The integer grid of one weight.

    Attributes:
        bits: 1 to 8. The kernels know 2, 4 and 8; other widths are run in the next wider one, values unchanged, and
            take no more than their bits in the file where the model's opset is 18 or newer (docs/storage.md).
        group_size: how many consecutive input channels (rows of `weight [K, N]`) share one scale;
            -1 for all of them (per output channel), otherwise a multiple of 16.
        symmetric: zero point fixed at `2**(bits-1)` instead of one per group.
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("bits", int), ("group_size", int), ("symmetric", bool)):
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise RecipeError(f"{name} must be {kind.__name__}, not {value!r}")
        if not 1 <= self.bits <= 8:
            raise RecipeError(f"bits={self.bits} is out of range: choose 1 to 8 (2, 4 and 8 are native)")
        if self.group_size != -1 and (self.group_size < 16 or self.group_size % 16):
            raise RecipeError(
                f"group_size={self.group_size} is out of range: choose -1 (one group per output channel) "
                "or a multiple of 16 (16, 32, 64, 128 and 256 are native)"
            )

    def resolved_group(self, k: int) -> int:
        """Rows per group for a weight with `k` input channels: never more than `k`."""
        return k if self.group_size == -1 else min(self.group_size, k)
