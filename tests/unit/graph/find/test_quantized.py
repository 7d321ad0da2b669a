"""Low-bit weights are recognised whatever operator wrote them, and activations of 8 bits are no weights."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_woq.graph.edit import add_initializer, fresh_name
from onnx_woq.graph.find.constants import resolve
from onnx_woq.graph.find.dependencies import is_costly, product_bytes, weight_shapes
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.find.quantized import low_bit_dtype, low_bit_nodes, low_bit_shape
from onnx_woq.graph.io.model import Model
from onnx_woq.graph.rewrite.expose_values import expose
from onnx_woq.recipe import Recipe

K, N, BLOCK = 64, 8, 32
TYPES = {"int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4, "int8": np.int8, "uint8": np.uint8}


class Maker:
    """A graph of opset 21 under construction, with the activation `x [M, K]` as its input."""

    def __init__(self) -> None:
        self.x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["M", K]))
        self.graph = ir.Graph([self.x], [], nodes=[], name="g", opset_imports={"": 21, "com.microsoft": 1})

    def constant(self, array: np.ndarray) -> ir.Value:
        return add_initializer(self.graph, "c", array)

    def node(self, op: str, inputs: list[ir.Value | None], domain: str = "", **attributes) -> ir.Node:
        output = ir.Value(name=fresh_name(self.graph, "v"))
        made = ir.node(op, inputs, attributes=attributes, domain=domain, outputs=[output])
        self.graph.append(made)
        return made

    def codes(self, kind: str, shape: tuple[int, ...]) -> ir.Value:
        return self.constant(np.ones(shape, TYPES[kind]))

    def dequantized(self, kind: str, shape: tuple[int, ...], *, block: int = 0, zeros: bool = False) -> ir.Value:
        """The output of a DequantizeLinear over constants, with a scale per block along the first of two axes."""
        axis = len(shape) - 2
        parts = (*shape[:axis], shape[axis] // block, shape[-1]) if block else (shape[-1],)
        inputs = [self.codes(kind, shape), self.constant(np.ones(parts, np.float32))]
        inputs += [self.codes(kind, parts)] if zeros else []
        how = {"axis": axis, "block_size": block} if block else {"axis": axis + 1}
        return self.node("DequantizeLinear", inputs, **how).outputs[0]

    def model(self) -> Model:
        self.graph.outputs.extend(value for node in self.graph for value in node.outputs if not value.uses())
        return Model(ir.Model(self.graph, ir_version=10), Path("m.onnx"), Path("m.onnx"))


@pytest.fixture
def make() -> Maker:
    return Maker()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("block", [0, BLOCK])
def test_the_shape_of_a_dequantized_factor_is_that_of_its_codes(make, kind, zeros, block):
    product = make.node("MatMul", [make.x, make.dequantized(kind, (K, N), block=block, zeros=zeros)])
    assert low_bit_shape(product) == (K, N)
    assert low_bit_dtype(product) == ir.DataType.FLOAT
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(make.model().ir), check_type=True, strict_mode=True)
    assert proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value == N


@pytest.mark.parametrize(("stored", "attributes"), [((K, N), {}), ((K, N), {"transB": 0}), ((N, K), {"transB": 1})])
@pytest.mark.parametrize("kind", TYPES)
def test_a_gemm_may_transpose_its_codes(make, kind, stored, attributes):
    gemm = make.node("Gemm", [make.x, make.dequantized(kind, stored)], **attributes)
    assert low_bit_shape(gemm) == (K, N)


def test_a_matrix_may_have_leading_ones_but_is_no_stack(make):
    assert low_bit_shape(make.node("MatMul", [make.x, make.dequantized("int4", (1, K, N), block=BLOCK)])) == (K, N)
    assert low_bit_shape(make.node("MatMul", [make.x, make.dequantized("int4", (2, K, N), block=BLOCK)])) is None
    assert low_bit_shape(make.node("MatMul", [make.x, make.dequantized("int4", (2, 1, K, N), block=BLOCK)])) is None


@pytest.mark.parametrize("op", ["MatMulNBits", "MatMulBnb4"])
def test_operators_that_say_their_sizes(make, op):
    codes, scales = make.constant(np.ones(K * N // 2, np.uint8)), make.constant(np.ones(K * N // BLOCK, np.float16))
    product = make.node(op, [make.x, codes, scales], "com.microsoft", K=K, N=N, block_size=BLOCK)
    assert low_bit_shape(product) == (K, N)
    assert low_bit_dtype(product) == ir.DataType.FLOAT16
    assert low_bit_nodes(make.model()) == 1


def test_other_nodes_multiply_by_no_low_bit_weight(make):
    weight = make.constant(np.ones((K, N), np.float32))
    activation = make.node("DynamicQuantizeLinear", [make.x]).outputs[0]
    scale = make.constant(np.ones((), np.float32))
    computed = make.node("DequantizeLinear", [activation, scale]).outputs[0]
    scaled = make.node("ReduceMax", [make.x]).outputs[0]
    for product in (
        make.node("MatMul", [make.x, weight]),
        make.node("MatMul", [make.dequantized("int4", (8, K)), weight]),  # a left factor
        make.node("MatMul", [make.x, computed]),
        make.node("MatMul", [make.x, make.node("DequantizeLinear", [make.codes("int8", (K, N)), scaled]).outputs[0]]),
        make.node("Add", [make.x, make.dequantized("int8", (1, K))]),
        make.node("Einsum", [make.x, make.dequantized("int8", (K, N))], equation="mk,kn->mn"),
        make.node("QMoE", [make.x], "com.microsoft", k=2),
        make.node("Something", [make.x], "com.microsoft", K=2.0, N=2.0),
    ):
        assert low_bit_shape(product) is None, product


def test_a_dequantized_value_is_not_a_constant_and_its_product_is_no_linear(make):
    for op in ("MatMul", "Gemm"):
        weight = make.dequantized("int4", (K, N), block=BLOCK)
        assert resolve(weight) is None
        make.node(op, [make.x, weight])
    groups, skipped = find_linear_groups(make.model(), Recipe())
    assert groups == []
    assert [s.reason for s in skipped] == ["the weight is quantized already (DequantizeLinear)"] * 2


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Gather"])
def test_weights_of_8_and_fewer_bits_are_low_bit(make, kind, op):
    weight = make.dequantized(kind, (K, N))
    indices = make.constant(np.zeros(3, np.int64))
    make.node(op, [weight, indices] if op == "Gather" else [make.x, weight])
    assert low_bit_nodes(make.model()) == 1


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_activations_of_8_bits_and_constants_that_are_no_weights_are_not(make, kind):
    scale, zero = make.constant(np.ones((), np.float32)), make.codes(kind, ())
    quantized = make.node("QuantizeLinear", [make.x, scale, zero]).outputs[0]
    activation = make.node("DequantizeLinear", [quantized, scale, zero]).outputs[0]
    make.node("MatMul", [activation, make.constant(np.ones((K, N), np.float32))])
    make.node("MatMul", [make.constant(np.ones((N, K), np.float32)), activation])
    make.node("Add", [make.x, make.dequantized(kind, (1, K))])
    make.node("MatMul", [make.x, make.node("DequantizeLinear", [make.codes(kind, (K,)), scale]).outputs[0]])
    make.node("Gather", [make.x, make.node("DequantizeLinear", [make.codes(kind, (K, N)), scale]).outputs[0]])
    assert low_bit_nodes(make.model()) == 0


def test_a_quantized_weight_counts_as_much_as_the_float_one(make):
    codes, scales = make.constant(np.ones((N, 2, 16), np.uint8)), make.constant(np.ones((N, 2), np.float32))
    products = [
        make.node("MatMul", [make.x, make.constant(np.ones((K, N), np.float32))]),
        make.node("Gemm", [make.x, make.constant(np.ones((N, K), np.float32))], transB=1),
        make.node("MatMulNBits", [make.x, codes, scales], "com.microsoft", K=K, N=N, bits=4, block_size=BLOCK),
        make.node("MatMul", [make.x, make.dequantized("int4", (K, N), block=BLOCK)]),
        make.node("Gemm", [make.x, make.dequantized("int8", (N, K))], transB=1),
    ]
    assert {weight_shapes(node) for node in products} == {((K, N),)}
    assert {product_bytes(node) for node in products} == {4 * K * N}
    assert all(map(is_costly, products))


def test_the_input_of_a_dequantized_product_leaves_a_body(make):
    """Nothing but the weight says how wide the value is."""
    weight = make.dequantized("int4", (K, N), block=BLOCK)

    def branch(name: str) -> ir.Graph:
        inner = ir.node("Tanh", [make.x], outputs=[ir.Value(name=f"{name}_inner")])
        product = ir.node("MatMul", [inner.outputs[0], weight], outputs=[ir.Value(name=f"{name}_out")])
        return ir.Graph([], product.outputs, nodes=[inner, product], name=name)

    flag = make.constant(np.array(True))
    make.node("If", [flag], then_branch=branch("one"), else_branch=branch("other"))
    copy, names = expose(make.model(), ["one_inner"])
    assert names["one_inner"] in [value.name for value in copy.ir.graph.outputs]
