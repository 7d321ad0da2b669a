"""What the tests hold the package against: an unpacker, a forward pass and losses of their own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

STORED = {"BitShift", "BitwiseXor", "BitwiseAnd", "Concat", "Cast", "Identity"}

Feeds = Sequence[Mapping[str, np.ndarray]]


def session(model: Path | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: Path | bytes, feeds: Feeds) -> dict[str, np.ndarray]:
    """All outputs over all feeds, by name, flattened to rows [rows, width] in float64."""
    s = session(model)
    names = [output.name for output in s.get_outputs()]
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for feed in feeds:
        for name, value in zip(names, s.run(names, dict(feed)), strict=True):
            rows[name].append(value.reshape(-1, value.shape[-1]).astype(np.float64))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every body inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in graphs(model.graph):
        yield from graph.node


def tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Every initializer and Constant by name, and what follows from them alone by the operators of `STORED`."""
    found = {t.name: numpy_helper.to_array(t) for g in graphs(model.graph) for t in g.initializer}
    for node in nodes(model):
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    for node in model.graph.node:  # what is stored otherwise than the kernel reads it
        if node.op_type in STORED and all(name in found for name in node.input):
            evaluator = ReferenceEvaluator(node)
            (found[node.output[0]],) = evaluator.run(None, {name: found[name] for name in node.input})
    return found


def attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {"bits": 4, "accuracy_level": 0} | {a.name: a.i for a in node.attribute}


def fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., bytes] -> codes [..., bytes * 8 / bits], lowest bits first."""
    flat = np.unpackbits(packed, axis=-1, bitorder="little")
    return flat.reshape(*packed.shape[:-1], -1, bits) @ (1 << np.arange(bits))


def grid(node: onnx.NodeProto, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A MatMulNBits node's codes [K, N], and for every entry its scale and zero point, float64."""
    a = attributes(node)
    k, n, bits, block = a["K"], a["N"], a["bits"], a["block_size"]
    blocks = -(-k // block)
    codes = fields(values[node.input[1]].reshape(n, -1), bits)
    scales = values[node.input[2]].reshape(n, blocks).astype(np.float64)
    if len(node.input) > 3 and node.input[3]:
        zeros = fields(values[node.input[3]].reshape(n, -1), bits)[:, :blocks]
    else:
        zeros = np.full((n, blocks), 2 ** (bits - 1))
    wide = [np.repeat(part, block, axis=1)[:, :k].T for part in (scales, zeros.astype(np.float64))]
    return codes[:, :k].T.astype(np.float64), wide[0], wide[1]


def dequantize(node: onnx.NodeProto, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """A MatMulNBits node's weight [K, N] in float64."""
    codes, scales, zeros = grid(node, values)
    return (codes - zeros) * scales


def low_bit(path: Path) -> dict[str, onnx.NodeProto]:
    """The MatMulNBits nodes of a file by the name of their output."""
    model = onnx.load(path, load_external_data=False)
    return {node.output[0]: node for node in nodes(model) if node.op_type == "MatMulNBits"}


def decoded(path: Path) -> dict[str, np.ndarray]:
    """The dequantized weights [K, N] of a file by the output name of their node."""
    model = onnx.load(path)
    values = tensors(model)
    return {node.output[0]: dequantize(node, values) for node in nodes(model) if node.op_type == "MatMulNBits"}


def decoded_twin(path: Path) -> bytes:
    """The same model with every MatMulNBits written as MatMul by the dequantized weight (and Add of the bias)."""
    model = onnx.load(path)
    values = tensors(model)
    for graph in graphs(model.graph):
        new = []
        for node in graph.node:
            if node.op_type != "MatMulNBits":
                new.append(node)
                continue
            out, bias = node.output[0], node.input[5] if len(node.input) > 5 else ""
            w = dequantize(node, values).astype(values[node.input[2]].dtype)
            graph.initializer.append(numpy_helper.from_array(w, f"{out}/decoded"))
            product = f"{out}/product" if bias else out
            new.append(helper.make_node("MatMul", [node.input[0], f"{out}/decoded"], [product]))
            if bias:
                new.append(helper.make_node("Add", [product, bias], [out]))
        del graph.node[:]
        graph.node.extend(new)
    return model.SerializeToString()


def exposed(path: Path, names: Sequence[str]) -> bytes:
    """The model with the values `names` of its main graph as further outputs."""
    model = onnx.load(path)
    known = {output.name for output in model.graph.output}
    kinds = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    for name in names:
        if name not in known and name not in {value.name for value in model.graph.input}:
            model.graph.output.append(
                helper.make_tensor_value_info(name, kinds.get(name, onnx.TensorProto.FLOAT), None)
            )
    return model.SerializeToString()


def activations(path: Path, feeds: Feeds) -> dict[str, np.ndarray]:
    """What every MatMul of the main graph with a constant weight reads: [tokens, K] by the node's output name."""
    model = onnx.load(path)
    constant = {t.name for t in model.graph.initializer}
    readers = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in constant}
    values = run(exposed(path, sorted(set(readers.values()))), feeds)
    for name in {value.name for value in model.graph.input} & set(readers.values()):
        values[name] = np.concatenate([f[name].reshape(-1, f[name].shape[-1]) for f in feeds]).astype(np.float64)
    return {out: values[value] for out, value in readers.items()}


def float_weights(path: Path) -> dict[str, np.ndarray]:
    """The weight initializers [K, N] of the main graph's MatMuls by the node's output name, float64."""
    model = onnx.load(path)
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    matmuls = (n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in values)
    return {n.output[0]: values[n.input[1]].astype(np.float64) for n in matmuls}


def losses(original: Path, quantized: Path, feeds: Feeds) -> dict[str, float]:
    """Calibrated loss |X·(Ŵ − W)|² of every quantized MatMul, X being the float model's activations."""
    inputs, before, after = activations(original, feeds), float_weights(original), decoded(quantized)
    return {name: float(np.square(inputs[name] @ (after[name] - before[name])).sum()) for name in after}


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to noise ratio in dB; infinite for equal arrays."""
    noise = np.square(reference - other).sum()
    return float(10 * np.log10(np.square(reference).sum() / noise)) if noise else float("inf")


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share of entries that are the same but for float rounding; one code more or less is far outside."""
    return float(np.mean(np.isclose(a, b, rtol=1e-4, atol=1e-6)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits - logits.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listing(folder: Path) -> dict[str, str]:
    """Everything below `folder` with a hash of its content: equal listings mean that nothing happened there."""
    return {
        str(p.relative_to(folder)): digest(p) if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
        if "__pycache__" not in p.parts
    }


def recipe_of(path: Path) -> dict:
    """The recipe a quantized file carries in its metadata; {} for a float model."""
    import json

    model = onnx.load(path, load_external_data=False)
    return next((json.loads(p.value) for p in model.metadata_props if p.key.endswith("recipe")), {})


def stable_id(value: object) -> str:
    """A parameter's name that is the same in every process: pytest-xdist compares them."""
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(str, value))) + "}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
