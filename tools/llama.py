"""Write a Llama-shaped decoder with random weights as ONNX with sharded external data, never holding the weights.

    python tools/llama.py OUT_DIR --shape 7b|1.1b|tiny [--layers N] [--dtype float16|float32] [--style optimum|genai]

The result is what an exporter writes, one operator at a time (`optimum`) or with fused attention and norms (`genai`):
model.onnx, its weights in model.onnx_data, model.onnx_data_1 … of at most --shard-size, and a config.json. There is no
tokenizer: calibrate on token ids. It serves to measure time and memory, and says nothing about accuracy.

Weights are normal numbers of the usual deviations: .02, and .02/√(2L) where a layer writes to the residual stream, so
that activations stay of order 1 in float16. Norm weights are log-normal, so that channels differ in size. To write at
the speed of the disk, they are stretches of one tile of normals, each from a random place of it. The lengths of tile
and stretches are prime, so no two rows of a weight are equal and every weight has full rank.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from llama_graph import Decoder, Shape, Tensor, decoder
from onnx import TensorProto, helper

SHAPES = {
    "7b": Shape(layers=32, hidden=4096, ff=11008, heads=32, kv_heads=32, vocab=32000),
    "1.1b": Shape(layers=22, hidden=2048, ff=5632, heads=32, kv_heads=4, vocab=32000),  # TinyLlama
    "tiny": Shape(layers=2, hidden=64, ff=192, heads=4, kv_heads=2, vocab=512),
}
DTYPES = {"float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
TILE = 2_097_143  # numbers; prime
STRETCH = 786_433  # numbers taken from the tile at a time; prime
PAGE = 4096  # bytes; weights start on page boundaries so that a runtime can map them
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass
class Tile:
    """One tile of normal numbers, kept scaled for each deviation that was asked for."""

    dtype: np.dtype
    rng: np.random.Generator
    normals: np.ndarray = field(init=False)
    scaled: dict[float, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.normals = self.rng.standard_normal(TILE, np.float32)

    def stretches(self, count: int, deviation: float) -> Iterator[np.ndarray]:
        """`count` normal numbers in pieces, each a view of the tile from a random place on."""
        if deviation not in self.scaled:
            self.scaled[deviation] = (self.normals * np.float32(deviation)).astype(self.dtype)
        tile = self.scaled[deviation]
        while count > 0:
            start = int(self.rng.integers(0, TILE - min(count, STRETCH) + 1))
            piece = tile[start : start + min(count, STRETCH)]
            count -= len(piece)
            yield piece


@dataclass
class Shards:
    """The data files of a model, one open at a time."""

    folder: Path
    limit: int  # bytes; a tensor larger than that gets a file of its own
    names: list[str] = field(default_factory=list)
    stream: BinaryIO | None = None
    position: int = 0

    def place(self, size: int) -> tuple[BinaryIO, str, int]:
        """The file, its name and the offset in bytes where a tensor of `size` bytes goes."""
        start = -(-self.position // PAGE) * PAGE
        if self.stream is None or (start and start + size > self.limit):
            self.close()
            number = len(self.names)
            self.names.append("model.onnx_data" + (f"_{number}" if number else ""))
            self.stream, start = (self.folder / self.names[-1]).open("wb"), 0
        self.stream.seek(start)
        self.position = start + size
        return self.stream, self.names[-1], start

    def close(self) -> None:
        """Ends the file that is being written."""
        if self.stream is not None:
            self.stream.close()


def write_llama(
    folder: str | Path,
    shape: Shape,
    *,
    dtype: str = "float16",
    style: str = "optimum",
    shard_size: int = 2 * 10**9,
    seed: int = 0,
) -> Path:
    """Writes the model into `folder`, which must not hold one yet, and returns the path of its model.onnx.

    Peak memory is the tile and the graph, whatever the size of the model. model.onnx is written last: a folder that
    has it is complete.

    Raises:
        FileExistsError: there is a model in the folder already.
    """
    folder = Path(folder)
    path = folder / "model.onnx"
    if path.exists():
        raise FileExistsError(f"{path} exists: name another folder, or remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    graph = decoder(shape, DTYPES[dtype], style)
    rng = np.random.default_rng(seed)
    tile, shards = Tile(DTYPES[dtype], rng), Shards(folder, shard_size)
    initializers = [_stored(tensor, tile, shards, rng) for tensor in graph.tensors.values()]
    shards.close()
    (folder / "config.json").write_text(json.dumps(_config(shape, dtype), indent=2))
    open_store = folder / ".model.onnx.tmp"
    open_store.write_bytes(_proto(graph, initializers, style).SerializeToString())
    os.replace(open_store, path)
    return path


def _stored(tensor: Tensor, tile: Tile, shards: Shards, rng: np.random.Generator) -> TensorProto:
    """Writes a tensor and returns what the graph says of it; constants stay in the graph."""
    if tensor.value is not None:
        return onnx.numpy_helper.from_array(tensor.value, tensor.name)
    if tensor.kind == "norm":
        gamma = np.exp(0.3 * rng.standard_normal(tensor.dims)).astype(tile.dtype)
        return onnx.numpy_helper.from_array(gamma, tensor.name)
    count = int(np.prod(tensor.dims))
    stream, name, offset = shards.place(count * tile.dtype.itemsize)
    for piece in tile.stretches(count, tensor.deviation):
        stream.write(piece.data)
    proto = TensorProto(name=tensor.name, dims=tensor.dims, data_type=helper.np_dtype_to_tensor_dtype(tile.dtype))
    proto.data_location = TensorProto.EXTERNAL
    length = count * tile.dtype.itemsize
    for key, value in {"location": name, "offset": offset, "length": length}.items():
        proto.external_data.add(key=key, value=str(value))
    return proto


def _proto(graph: Decoder, initializers: list[TensorProto], style: str) -> onnx.ModelProto:
    main = helper.make_graph(graph.nodes, "main_graph", graph.inputs, graph.outputs, initializers)
    domains = {"": 21, "com.microsoft": 1} if style == "genai" else {"": 17}
    imports = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    return helper.make_model(main, opset_imports=imports, ir_version=10 if style == "genai" else 8)


def _config(shape: Shape, dtype: str) -> dict[str, object]:
    """What a Llama checkpoint's config.json says."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ff,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def byte_size(text: str) -> int:
    """Bytes that "2GB", "300MB" or "4096" say."""
    for unit, factor in UNITS.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    return int(text)


def main() -> None:
    """Reads the command line and writes the model it describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--style", choices=("optimum", "genai"), default="optimum")
    parser.add_argument("--shard-size", type=byte_size, default="2GB", help="bytes per data file at most (2GB)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        shape = replace(shape, layers=arguments.layers)
    path = write_llama(
        arguments.out,
        shape,
        dtype=arguments.dtype,
        style=arguments.style,
        shard_size=arguments.shard_size,
        seed=arguments.seed,
    )
    files = sorted(path.parent.glob("model.onnx*"))
    size = sum(file.stat().st_size for file in files)
    print(f"{path}: {asdict(shape)}, {arguments.dtype}, {len(files) - 1} data files, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
