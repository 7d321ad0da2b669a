"""A language model inside a node that generates: `GreedySearch` looks its body's inputs and outputs up by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

HEADS, WIDTH, VOCAB = 4, 32, 320
HIDDEN = HEADS * WIDTH
I32, F32 = TensorProto.INT32, TensorProto.FLOAT
INPUTS = ("input_ids", "max_length", "min_length", "repetition_penalty")


def greedy_search(path: Path, *, opset: int = 14, beside: bool = False) -> Path:
    """Ids in, ids out: all the weights lie in the body of the one node.

    Args:
        path: the file to write.
        opset: of ONNX's own operators.
        beside: the main graph has a product as well.
    """
    rng = np.random.default_rng(0)
    node, info = helper.make_node, helper.make_tensor_value_info

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) * np.float32(0.2), name)

    def const(name: str, *numbers: int) -> TensorProto:
        return numpy_helper.from_array(np.array(numbers), name)

    body = helper.make_graph(
        [
            node("Gather", ["emb", "input_ids"], ["e"]),
            node("MatMul", ["e", "wk"], ["k"], name="key"),
            node("Reshape", ["k", "split"], ["k4"]),
            node("Transpose", ["k4"], ["kt"], perm=[0, 2, 1, 3]),
            node("Unsqueeze", ["kt", "zero"], ["ku"]),
            node("Concat", ["ku", "ku"], ["kv"], axis=0),
            node("Concat", ["past_0", "kv"], ["present_0"], axis=3),
            node("ReduceSum", ["present_0", "axes"], ["mean"], keepdims=0),
            node("Reshape", ["mean", "join"], ["context"]),
            node("Add", ["e", "context"], ["h"]),
            node("MatMul", ["h", "head"], ["logits"], name="head"),
        ],
        "decoder",
        [
            *(info(name, I32, ["b", "s"]) for name in ("input_ids", "position_ids")),
            info("attention_mask", I32, ["b", "t"]),
            info("past_0", F32, [2, "b", HEADS, "p", WIDTH]),
        ],
        [info("logits", F32, ["b", "s", VOCAB]), info("present_0", F32, [2, "b", HEADS, "t", WIDTH])],
        [
            weight("emb", VOCAB, HIDDEN),
            weight("wk", HIDDEN, HIDDEN),
            weight("head", HIDDEN, VOCAB),
            const("split", 0, 0, HEADS, WIDTH),
            const("join", 0, 1, HIDDEN),
            const("zero", 0),
            const("axes", 0, 3),
        ],
    )
    search = node(
        "GreedySearch",
        list(INPUTS),
        ["sequences"],
        name="search",
        domain="com.microsoft",
        decoder=body,
        eos_token_id=VOCAB - 1,
        pad_token_id=VOCAB - 1,
        model_type=0,
    )
    inputs = [info("input_ids", I32, ["b", "s"]), *(info(name, I32, [1]) for name in INPUTS[1:3])]
    inputs += [info("repetition_penalty", F32, [1])]
    nodes, outputs, weights = [search], [info("sequences", I32, ["b", "m"])], []
    if beside:
        nodes.append(node("MatMul", ["x", "W"], ["y"], name="beside"))
        inputs.append(info("x", F32, ["n", 64]))
        outputs.append(info("y", F32, ["n", 48]))
        weights.append(weight("W", 64, 48))
    main = helper.make_graph(nodes, "generation", inputs, outputs, weights)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(helper.make_model(main, opset_imports=imports, ir_version=8).SerializeToString())
    return path


def feed(*, beside: bool = False) -> dict[str, np.ndarray]:
    """One prompt, to be continued up to nine tokens."""
    arrays = (np.array([[5, 7, 9]], np.int32), np.array([9], np.int32), np.array([1], np.int32), np.ones(1, np.float32))
    found = dict(zip(INPUTS, arrays, strict=True))
    rows = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    return found | ({"x": rows} if beside else {})
