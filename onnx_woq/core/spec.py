"""The number format of a weight: `Spec` says how many bits its codes have and which weights share a scale.

A spec is what users write in a recipe. It holds no numbers of a weight: `core.grids` fits the scales and zero points of
a weight to it, and a `QuantizedTensor` carries the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx_woq.errors import RecipeError


@dataclass(frozen=True)
class Spec:
    """The integer grid of one weight.

    Attributes:
        bits: bits per code, 1 to 8. Kernels exist for 2, 4 and 8. Codes of another width run in the next wider kernel
            with the same values; in a model of opset 18 or newer they still take only their bits in the file
            (docs/storage.md).
        group_size: consecutive input channels (rows of `weight [K, N]`) that share one scale: a multiple of 16, or -1
            for all of them (one scale per output channel).
        symmetric: True fixes the zero point at `2**(bits-1)`; False gives each group its own.

    Raises:
        RecipeError: a value has another type or is out of range.
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
        """Returns the rows per group of a weight with `k` input channels: `group_size`, but never more than `k`."""
        return k if self.group_size == -1 else min(self.group_size, k)
