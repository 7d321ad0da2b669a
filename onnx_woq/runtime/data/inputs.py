"""Inputs of a model, and arrays for those that follow from the tokens: masks, positions, an empty past.

The past of a decoder is the keys and values of earlier tokens, which it takes as inputs named past…
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_woq.errors import DataError
from onnx_woq.graph.io.model import Model
from onnx_woq.runtime.data.settings import read_settings

MASKS = ("attention_mask", "input_mask")
"""Names of attention masks `[B, T]`: 1 where a token counts, 0 where it does not."""

POSITIONS = "position_ids"
"""The input that holds the position of each token, `[B, T]`."""

TOKEN_TYPES = ("token_type_ids", "segment_ids")
"""Names of inputs that hold the segment of each token, `[B, T]`."""

_TOKENS = ("input_ids", "decoder_input_ids", "inputs_embeds", "input")
_MASK_OF = re.compile(r"(.+_)attention_mask")
_PAST = re.compile(r"past")
_ZEROS = ("num_logits_to_keep", "logits_to_keep")  # 0 means the logits of every token
_SAME_NUMBERS = {"Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Expand", "Transpose"}  # keep them


@dataclass(frozen=True)
class InputInfo:
    """One input of a model.

    Attributes:
        name: its name in the model.
        dtype: its NumPy dtype; bfloat16 is that of ml_dtypes.
        shape: numbers for fixed dimensions, names for symbolic ones, None for unknown ones; None for an unknown rank.
        limit: rows of the table that its integers index, which they must be below; None where there is no table.
        capacity: tokens that a past must have room for, however few there are in it.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...] | None
    limit: int | None = None
    capacity: int = 0

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name} {self.dtype.name} [{dims}]"


def model_inputs(model: Model) -> list[InputInfo]:
    """Returns the inputs that must be fed, in the model's order.

    Newer versions of the onnxruntime-genai builder leave the head size of the past open. It is then read from the
    configuration beside the model.

    Raises:
        DataError: an input is a sequence, an optional or text.
    """
    graph = model.ir.graph
    infos = [_describe(value) for value in graph.inputs if value.name not in graph.initializers]
    if any(_has_open_head(info) for info in infos) and (size := _head_size(model.path.parent)):
        infos = [
            replace(info, shape=(*(info.shape or ())[:-1], size)) if _has_open_head(info) else info for info in infos
        ]
    return infos


def _has_open_head(info: InputInfo) -> bool:
    """Tells whether an input is a past `[batch, heads, sequence, head size]` whose head size is open."""
    shape = info.shape or ()
    return is_past(info) and len(shape) == 4 and isinstance(shape[1], int) and not isinstance(shape[3], int)


def _head_size(folder: Path) -> int | None:
    """Reads the channels of an attention head from genai_config.json or config.json; None if neither tells."""
    for name, path in (("genai_config.json", ("model", "decoder")), ("config.json", ())):
        config = read_settings(folder / name)
        try:
            for key in path:
                config = config[key]
            size = config.get("head_size") or config.get("head_dim")
            size = size or config["hidden_size"] // config["num_attention_heads"]
        except (KeyError, TypeError, AttributeError, ZeroDivisionError):
            continue
        if isinstance(size, int) and size > 0:
            return size
    return None


def can_fill(info: InputInfo, inputs: Sequence[InputInfo]) -> bool:
    """Tells whether `fill` can make this input from another one, the tokens for example."""
    if info.name in _TOKENS or _source(info.name, [other.name for other in inputs]) is None:
        return False
    rank = None if info.shape is None else len(info.shape)
    if _MASK_OF.fullmatch(info.name) or info.name in (*MASKS, *TOKEN_TYPES, POSITIONS):
        return rank in (2, None)
    if info.name in ("use_cache_branch", "cache_position", *_ZEROS):
        return rank in (0, 1, None)
    return is_past(info) and info.shape is not None


def _source(name: str, names: Collection[str]) -> str | None:
    """Returns the input that another one follows from, or None.

    That is the tokens; for the mask of an encoder or decoder the input whose name begins alike: `encoder_hidden_states`
    for `encoder_attention_mask`.
    """
    if prefix := _MASK_OF.fullmatch(name):
        alike = [name for name in names if name.startswith(prefix[1]) and not name.endswith("_mask")]
        return next((other for other in alike if not _PAST.match(other)), None)
    return next((token for token in _TOKENS if token in names), None)


def is_decoder(inputs: Sequence[InputInfo]) -> bool:
    """Tells whether the model keeps a past; its text is then one stream of tokens."""
    return any(is_past(info) for info in inputs)


def fill(feed: Mapping[str, np.ndarray], inputs: Sequence[InputInfo], label: str) -> dict[str, np.ndarray]:
    """Returns `feed` with its missing inputs made from its tokens, in the model's order.

    Made are attention masks of ones, positions counted along the mask, token types 0, an empty past (zeros where it
    must have room for a window), and the cache branch of a merged decoder switched off.

    Args:
        feed: some inputs of a sample.
        inputs: the model's inputs, from `model_inputs`.
        label: name of the sample in messages.

    Raises:
        DataError: an input is missing that does not follow from the tokens.
    """
    missing = [info for info in inputs if info.name not in feed]
    sizes = {name: np.shape(array)[:2] for name, array in feed.items() if np.ndim(array) >= 2}
    sources = {info.name: _source(info.name, sizes) for info in missing}
    hopeless = [info for info in missing if sources[info.name] is None or not can_fill(info, inputs)]
    if hopeless:
        raise DataError(
            f"{label} has no {' and no '.join(map(str, hopeless))}: the model needs "
            f"{'it' if len(hopeless) == 1 else 'them'} and nothing else tells what to feed. Give samples as "
            f"dictionaries with the keys {', '.join(i.name for i in inputs if not can_fill(i, inputs))} "
            "(in a .npz file: arrays of these names)"
        )
    full = dict(feed)
    mask = next((feed[name] for name in MASKS if name in feed and np.ndim(feed[name]) == 2), None)
    for info in missing:
        full[info.name] = _made(info, sizes[sources[info.name] or ""], mask)
    return {info.name: full[info.name] for info in inputs}


def _made(info: InputInfo, size: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray:
    """Makes the array of one input that follows from tokens of `size` (B, T) and their attention mask [B, T]."""
    batch, length = size
    if info.name in MASKS or _MASK_OF.fullmatch(info.name):
        return np.ones((batch, length), info.dtype)
    if info.name in TOKEN_TYPES:
        return np.zeros((batch, length), info.dtype)
    if info.name == POSITIONS:
        steps = np.ones((batch, length), np.int64) if mask is None or mask.shape != size else mask != 0
        return np.maximum(np.cumsum(steps, axis=1) - 1, 0).astype(info.dtype)
    if info.name == "cache_position":
        return np.arange(length, dtype=info.dtype)
    if is_past(info):
        return np.zeros([_past_dim(info, axis, batch) for axis in range(len(info.shape or ()))], info.dtype)
    return np.zeros([1] * len(info.shape or ()), info.dtype)  # use_cache_branch, num_logits_to_keep


def _past_dim(info: InputInfo, axis: int, batch: int) -> int:
    """Returns one dimension of an empty past: a fixed one, the batch as fed, or for the sequence its capacity."""
    shape = info.shape or ()
    dim = shape[axis]
    if isinstance(dim, int):
        return dim
    named = any(isinstance(d, str) and "batch" in d for d in shape)
    is_batch = (isinstance(dim, str) and "batch" in dim) if named else axis == 0
    return batch if is_batch else info.capacity


def is_past(info: InputInfo) -> bool:
    """Tells whether an input holds keys and values of earlier tokens."""
    return bool(_PAST.match(info.name)) and info.dtype.kind not in "iub"


def _describe(value: ir.Value) -> InputInfo:
    """Describes a graph input."""
    name = value.name or ""
    kind = value.dtype
    if kind in (None, ir.DataType.STRING, ir.DataType.UNDEFINED) or not isinstance(value.type, ir.TensorType):
        raise DataError(f"input {name!r} of the model is not a tensor of numbers ({value.type}): it cannot be fed")
    shape = None if value.shape is None else tuple(_dim(dim) for dim in value.shape)
    dtype = np.dtype(value.type.dtype.numpy())
    return InputInfo(name, dtype, shape, _rows_indexed(value) if dtype.kind in "iu" else None, _window(value))


def _window(value: ir.Value) -> int:
    """Returns the tokens that a past must have room for: the window of an attention whose cache holds no more."""
    windows = [
        node.attributes.get_int("local_window_size", 0)
        for node, position in value.uses()
        if node.op_type == "GroupQueryAttention" and position in (3, 4)
        if node.attributes.get_int("sliding_window_cache", 0)
    ]
    return max([0, *windows])


def _dim(dim: int | ir.SymbolicDim) -> int | str | None:
    """Returns a dimension as a number, or as a name, None where it has neither: some exports write -1 for that."""
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    return dim.value


def _rows_indexed(value: ir.Value) -> int | None:
    """Returns the fewest rows of the constant tables that `value` indexes in Gather nodes, None if it indexes none.

    It may do so directly or after nodes that keep its numbers, such as Reshape.
    """
    rows: list[int] = []
    for node, position in value.uses():
        if node.op_type == "Gather" and position == 1:
            table = node.inputs[0]
            axis = node.attributes.get_int("axis", 0)
            if table is not None and table.const_value is not None and table.const_value.shape.rank() > axis:
                rows.append(int(table.const_value.shape.numpy()[axis]))
        elif node.op_type in _SAME_NUMBERS and position == 0:
            deeper = _rows_indexed(node.outputs[0])
            rows += [] if deeper is None else [deeper]
    return min(rows, default=None)
