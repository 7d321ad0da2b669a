"""The outputs that two models are compared by: which of them, on which tokens, and the sessions that compute them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import InlinePass

from onnx_woq.errors import DataError
from onnx_woq.graph.io.model import Model, load
from onnx_woq.graph.rewrite.upcast import upcast
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.runtime.data.inputs import MASKS
from onnx_woq.runtime.session import make_session

_DECODER_IDS, _DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def float_outputs(model: Model) -> list[str]:
    """Returns the names of the outputs that are float tensors; sequences of tensors are left out.

    Raises:
        DataError: there is none, so two models cannot be compared by what they compute.
    """
    outputs = model.ir.graph.outputs
    found = [
        value.name or ""
        for value in outputs
        if value.type is None or (isinstance(value.type, ir.TensorType) and value.dtype in _FLOATS)
    ]
    if not found:
        listed = ", ".join(f"{value.name} {value.type}" for value in outputs)
        raise DataError(
            f"{model.path} has no float tensor among its outputs ({listed}), so there is nothing to compare it by: "
            "judge it by a metric of your own (--eval MODULE:FUNCTION, in Python eval_fn), or quantize without --auto"
        )
    return found


def judging_session(path: str | Path) -> ort.InferenceSession:
    """Makes a session of a model that is judged. bfloat16, which the CPU has next to no kernels for, becomes float32.

    Raises:
        ModelError: ONNX Runtime cannot use the model.
    """
    model = load(path, convert=True)
    if not _computes_bfloat16(model):
        return make_session(path)
    if model.ir.functions:
        InlinePass()(model.ir)
    upcast(model)
    return make_session(model)


def _computes_bfloat16(model: Model) -> bool:
    """Tells whether an input, constant or target of a Cast is bfloat16: no other value can then be."""
    for graph in model.ir.graphs():
        if any(value.dtype == ir.DataType.BFLOAT16 for value in (*graph.inputs, *graph.initializers.values())):
            return True
        for node in graph:
            for name in ("to", "dtype", "value"):
                attribute = node.attributes.get(name)
                found = None if attribute is None else attribute.value
                if found == ir.DataType.BFLOAT16 or getattr(found, "dtype", None) == ir.DataType.BFLOAT16:
                    return True
    return False


def is_language_model(model: Model, feed: Feed) -> bool:
    """Tells whether `model` gives `logits [B, S, V]` for its tokens `[B, T]`, V being above all ids in `feed`."""
    ids = token_ids(feed)
    output = next(iter(model.ir.graph.outputs), None)
    if ids is None or ids.ndim != 2 or output is None or output.name != "logits":
        return False
    if output.shape is None:
        return True
    size = output.shape[-1] if len(output.shape) == 3 else 0
    return not isinstance(size, int) or size > ids.max(initial=0)


def token_ids(feed: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Returns the tokens whose next ones a language model predicts: those of the decoder, if there are two kinds."""
    return feed.get(_DECODER_IDS, feed.get("input_ids"))


def mask_of(feed: Mapping[str, np.ndarray], size: tuple[int, ...]) -> np.ndarray:
    """Returns a mask of the shape `size` (B, T), True for tokens that count."""
    given = next((feed[name] for name in MASKS if name in feed and feed[name].shape == size), None)
    return np.ones(size, bool) if given is None else given != 0


def logits_mask(feed: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Returns which logits count, as a mask [B, S] for logits of `shape` (B, S, V).

    A model may give the logits of the last S tokens only. The logits of a single token are those of the last one that
    the model sees, wherever a row is padded.

    Raises:
        DataError: the logits have another shape than the tokens.
    """
    ids = token_ids(feed)
    size = () if ids is None else ids.shape
    if len(shape) != 3 or len(size) != 2 or shape[0] != size[0] or not 1 <= shape[1] <= size[1]:
        raise DataError(f"the logits have shape {list(shape)}, for tokens of shape {list(size)}")
    decoder = feed.get(_DECODER_MASK)
    if _DECODER_IDS not in feed:
        mask = mask_of(feed, size)
    else:  # an attention mask is that of the encoder
        mask = np.ones(size, bool) if decoder is None or decoder.shape != size else decoder != 0
    return np.asarray(mask.any(axis=1))[:, None] if shape[1] == 1 else mask[:, -shape[1] :]


def signals(want: np.ndarray, have: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the same output of two models in float64, without what says "never" in both.

    Where both hold the same infinite or largest number of their type, a mask forbids something: that is neither signal
    nor noise, and becomes 0.
    """
    a, b = want.astype(np.float64), have.astype(np.float64)
    never = (a == b) & (np.abs(a) >= float(np.finfo(want.dtype).max))
    if never.any():
        a[never] = b[never] = 0
    return a, b
