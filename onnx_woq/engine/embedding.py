"""Embeddings of a recipe: codes of their own where no head lends them its, put in behind all taps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from functools import partial as curry
from typing import TYPE_CHECKING

import numpy as np

from onnx_woq.core.cpu import one_blas_thread
from onnx_woq.core.methods.registry import solve_bytes
from onnx_woq.core.methods.rtn import PIECE
from onnx_woq.engine.results import WeightReport
from onnx_woq.engine.solve import Solved, Task, solve_all
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.io.model import Model
from onnx_woq.recipe import Recipe
from onnx_woq.targets.gather_block_quantized import embedding_bytes, lower_embedding

if TYPE_CHECKING:
    from onnx_woq.engine.memory import MemoryPlan

_RTN = "rtn"


def standalone_tables(embeddings: Sequence[Embedding]) -> list[Embedding]:
    """Those that no head shares its codes with."""
    return [embedding for embedding in embeddings if not embedding.shared]


def table_task(recipe: Recipe, embedding: Embedding) -> Task:
    """The task of solving a table: rounded to nearest, for a row is looked up and not multiplied.

    On a grid found by clip search, but of RTN as its own options say.
    """
    options = {"enable_mse_search": True} | {k: v for k, v in recipe.options.items() if k == "enable_full_range"}
    if recipe.method == _RTN:
        options = dict(recipe.options)
    scale_dtype = np.dtype(embedding.scale_dtype).name
    what = (embedding.spec, scale_dtype, tuple(embedding.weight_sources()), None)
    return Task(embedding.name, _RTN, tuple(options.items()), *what, dense=embedding.dense)


def table_bytes(embedding: Embedding, workers: int) -> int:
    """Bytes that solving a table takes, its result included: a piece of its rows for each of so many workers."""
    k, rows = embedding.k, min(embedding.n, max(1, PIECE // embedding.k))
    stored = embedding.weight_bytes // max(1, embedding.k * embedding.n)
    piece = stored * k * rows + solve_bytes(_RTN, k, rows, embedding.spec)
    result = embedding_bytes(embedding, embedding.spec, None)
    return result + piece * min(workers, -(-embedding.n // rows))


def solve_tables(
    recipe: Recipe, embeddings: Sequence[Embedding], executor: Executor, memory: MemoryPlan, *, helping: bool
) -> Iterator[tuple[Embedding, Solved]]:
    """Each table with what becomes of it, in order; `helping` as of `solve_all`."""
    tasks = ((one, table_bytes(one, memory.workers), curry(table_task, recipe, one)) for one in embeddings)
    with one_blas_thread():
        yield from solve_all(tasks, executor, workers=memory.workers, most_bytes=memory.solving, helping=helping)


def put_in_table(model: Model, embedding: Embedding, solved: Solved) -> WeightReport:
    """Replaces a table in `model` by what it was solved to."""
    lower_embedding(model, embedding, solved.packed[0])
    return table_report(embedding)


def table_report(embedding: Embedding) -> WeightReport:
    """The report of a table that was quantized, or is going to be."""
    return WeightReport(
        name=embedding.name,
        kind="embedding",
        nodes=tuple(node.outputs[0].name or "" for node in embedding.nodes),
        spec=embedding.spec,
        k=embedding.k,
        n=embedding.n,
        bytes_before=0 if embedding.counted else embedding.weight_bytes,
        bytes_after=embedding_bytes(embedding, embedding.spec, embedding.spec if embedding.shared else None),
        weight_name=embedding.weight_name,
        shared_with=embedding.head.name if embedding.shared and embedding.head else "",
    )
