"""Nodes that exporters write for transformers: `Layers` adds them to a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.zoo.small import BF16, F16, F32, Net, weight

D, HEADS, HEAD, WIDE, VOCAB, LONGEST = 64, 2, 32, 96, 128, 64
I32 = TensorProto.INT32
MS = "com.microsoft"
HALF = (F16, BF16)


class Layers(Net):
    """A net whose constants are made once per name, floating ones in the model's data type."""

    def __init__(self, dtype: int = F32, opset: int = 17, prefix: str = "") -> None:
        super().__init__()
        self.dtype, self.opset, self.prefix = dtype, opset, prefix

    def const(self, name: str, array: np.ndarray, dtype: int | None = None) -> str:
        if name not in {tensor.name for tensor in self.tensors}:
            floating = np.asarray(array).dtype.kind == "f"
            super().const(name, np.asarray(array), dtype or (self.dtype if floating else None))
        return name

    def ints(self, *values: int) -> str:
        return self.const("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, out: str, domain: str = "", **attributes: Any) -> str:
        return super().op(kind, *inputs, out=self.prefix + out, domain=domain, **attributes)

    def several(self, kind: str, inputs: Sequence[str], outs: Sequence[str], domain: str = "", **attributes: Any):
        """A node with several outputs, "" for one that is left out; names are taken as they are."""
        self.nodes.append(helper.make_node(kind, inputs, outs, name=f"node/{outs[0]}", domain=domain, **attributes))
        return outs

    def linear(self, x: str, name: str, k: int, n: int, seed: int, bias: bool = False) -> str:
        """x @ weight [k, n] (+ bias); the product is called `name`."""
        w = self.const(f"{name}.weight", weight(seed, k, n))
        product = self.op("MatMul", x, w, out=name)
        if not bias:
            return product
        return self.op("Add", product, self.const(f"{name}.bias", 0.1 * weight(seed + 50, 1, n)[0]), out=f"{name}_b")

    def mean(self, x: str, out: str) -> str:
        """Over the last axis; the axes moved from an attribute to an input in opset 18."""
        if self.opset < 18:
            return self.op("ReduceMean", x, out=out, axes=[-1], keepdims=1)
        return self.op("ReduceMean", x, self.ints(-1), out=out, keepdims=1)

    def rms_norm(self, x: str, name: str) -> str:
        """As PyTorch exports it: in float32, whatever the data type."""
        half = self.dtype in HALF
        x = self.op("Cast", x, out=f"{name}_wide", to=F32) if half else x
        square = self.op("Pow", x, self.const("two", np.float32(2), F32), out=f"{name}_square")
        mean = self.mean(square, f"{name}_mean")
        root = self.op("Sqrt", self.op("Add", mean, self.const("eps", np.float32(1e-5), F32), out=f"{name}_eps"),
                       out=f"{name}_root")  # fmt: skip
        unit = self.op("Div", x, root, out=f"{name}_unit")
        unit = self.op("Cast", unit, out=f"{name}_back", to=self.dtype) if half else unit
        return self.op("Mul", unit, self.gamma(name), out=name)

    def layer_norm(self, x: str, name: str) -> str:
        """LayerNorm written out."""
        centred = self.op("Sub", x, self.mean(x, f"{name}_mean"), out=f"{name}_centred")
        square = self.op("Mul", centred, centred, out=f"{name}_square")
        shifted = self.op("Add", self.mean(square, f"{name}_var"), self.const("ln_eps", np.float32(1e-5)),
                          out=f"{name}_eps")  # fmt: skip
        unit = self.op("Div", centred, self.op("Sqrt", shifted, out=f"{name}_root"), out=f"{name}_unit")
        scaled = self.op("Mul", unit, self.gamma(name), out=f"{name}_scaled")
        return self.op("Add", scaled, self.beta(name), out=name)

    def gamma(self, name: str) -> str:
        return self.const(f"{name}.gamma", np.linspace(0.5, 1.5, D).astype(np.float32))

    def beta(self, name: str) -> str:
        return self.const(f"{name}.beta", np.linspace(-0.1, 0.1, D).astype(np.float32))

    def embed(self, ids: str = "input_ids") -> str:
        return self.op("Gather", self.const("embedding", weight(7, VOCAB, D) * 8), ids, out="tokens")

    def heads(self, x: str, out: str, shape: str) -> str:
        """[B, T, D] -> [B, heads, T, head]; `shape` is a value computed from the inputs."""
        return self.op("Transpose", self.op("Reshape", x, shape, out=f"{out}_4d"), out=out, perm=[0, 2, 1, 3])

    def attend(self, q: str, k: str, v: str, mask: str, p: str) -> str:
        """Softmax(q·kᵀ + mask)·v, q [B, heads, T, head] -> [B, T, D]."""
        scores = self.op("MatMul", q, self.op("Transpose", k, out=f"{p}kt", perm=[0, 1, 3, 2]), out=f"{p}scores")
        scores = self.op("Mul", scores, self.const("scale", np.float32(HEAD**-0.5)), out=f"{p}scaled")
        if mask:
            scores = self.op("Add", scores, mask, out=f"{p}masked")
        mixed = self.op("MatMul", self.op("Softmax", scores, out=f"{p}share", axis=-1), v, out=f"{p}mixed")
        return self.op("Reshape", self.op("Transpose", mixed, out=f"{p}merged", perm=[0, 2, 1, 3]),
                       self.ints(0, 0, D), out=f"{p}context")  # fmt: skip

    def gated(self, x: str, p: str, seed: int) -> str:
        """down(silu(gate(x)) * up(x))."""
        gate, up = self.linear(x, f"{p}gate", D, WIDE, seed + 4), self.linear(x, f"{p}up", D, WIDE, seed + 5)
        silu = self.op("Mul", gate, self.op("Sigmoid", gate, out=f"{p}sigmoid"), out=f"{p}silu")
        return self.linear(self.op("Mul", silu, up, out=f"{p}wide"), f"{p}down", WIDE, D, seed + 6)

    def head_shape(self) -> str:
        """[batch, seq, heads, head], from input_ids."""
        shape = self.op("Shape", "input_ids", out="ids_shape")
        return self.op("Concat", shape, self.ints(HEADS, HEAD), out="head_shape", axis=0)

    def positions(self, x: str) -> str:
        """Adds learned positions 0 … T-1."""
        length = self.op("Gather", self.op("Shape", "input_ids", out="pos_shape"), self.ints(1), out="pos_length")
        table = self.const("places", weight(8, LONGEST, D) * 4)
        part = self.op("Slice", table, self.ints(0), length, self.ints(0), out="pos_rows")
        return self.op("Add", x, part, out="embedded")
