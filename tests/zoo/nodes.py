"""Small ONNX models for tests, and the shortest way to quantize and run them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, FLOAT16, BFLOAT16, INT64, BOOL = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT64, TensorProto.BOOL,
)  # fmt: skip

node = helper.make_node


def value(name: str, shape: Sequence[int | str | None] | None = None, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    """A typed input, output or inner value."""
    return helper.make_tensor_value_info(name, dtype, shape)


def graph(
    nodes: Iterable[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
    weights: Mapping[str, np.ndarray | onnx.TensorProto] | None = None,
    inner: Iterable[onnx.ValueInfoProto] = (),
    name: str = "graph",
) -> onnx.GraphProto:
    """A graph whose `weights` are initializers; also the body of an If or Loop."""
    tensors = [
        w if isinstance(w, onnx.TensorProto) else numpy_helper.from_array(w, key) for key, w in (weights or {}).items()
    ]
    return helper.make_graph(list(nodes), name, list(inputs), list(outputs), tensors, value_info=list(inner))


def write(
    path: Path,
    main: onnx.GraphProto,
    *,
    opset: int = 21,
    external: bool = False,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Mapping[str, int] | None = None,
) -> Path:
    """Writes a model file; `external` puts every weight into `<path>.data`."""
    imports = [helper.make_opsetid(d, v) for d, v in {"": opset, **(domains or {})}.items() if v]
    model = helper.make_model(main, opset_imports=imports, functions=functions)
    model.ir_version = helper.find_min_ir_version_for(imports, ignore_unknown=True)
    if functions:
        model.ir_version = max(model.ir_version, 8)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def linear(path: Path, weight: np.ndarray, *, opset: int = 21, external: bool = False, name: str = "mm") -> Path:
    """`y = x @ W` with the node `name` and the weight `W`."""
    dtype = helper.np_dtype_to_tensor_dtype(weight.dtype)
    nodes = [node("MatMul", ["x", "W"], ["y"], name=name)]
    k, n = weight.shape
    main = graph(nodes, [value("x", ["m", k], dtype)], [value("y", ["m", n], dtype)], {"W": weight})
    return write(path, main, opset=opset, external=external)


def random(*shape: int, seed: int = 0, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """Gaussian numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def rtn(group, scale_dtype=None):
    """The weight of a linear group rounded to nearest on its own grid, a QuantizedTensor."""
    from onnx_woq.core.grids import integer as grid

    weight = group.weight()
    scales, zeros = grid.fit(weight, group.spec, scale_dtype=scale_dtype or group.kernel_dtype)
    size = group.spec.resolved_group(group.k)
    codes = grid.encode(weight, scales, zeros, group.spec.bits, size)
    return grid.QuantizedTensor(codes, scales, zeros, group.spec.bits, size, group.spec.symmetric)


def pack_group(group, q, scale_dtype=None, *, opset: int = 21):
    """Each distinct weight of a linear group packed from its columns of `q`, as `matmulnbits.lower` takes them."""
    from onnx_woq.targets import matmulnbits
    from onnx_woq.targets.base import Storage

    storage = Storage(scale_dtype or group.kernel_dtype, opset)
    columns = dict.fromkeys((part.start, part.stop) for _, part in group.slices())
    return [matmulnbits.pack(q.columns(slice(*place)), storage) for place in columns]


def lower(model, recipe=None, *, accuracy_level: int = 0):
    """Quantizes every linear of a loaded model by rounding; returns groups, what they became, what was skipped."""
    from onnx_woq.graph.find.linears import find_linear_groups
    from onnx_woq.recipe import Recipe
    from onnx_woq.targets import matmulnbits

    recipe = recipe or Recipe()
    groups, skipped = find_linear_groups(model, recipe)
    dtypes = [np.float16 if recipe.half_scales else group.kernel_dtype for group in groups]
    solved = [rtn(group, dtype) for group, dtype in zip(groups, dtypes, strict=True)]
    opset = model.ir.opset_imports[""]
    for group, q, dtype in zip(groups, solved, dtypes, strict=True):
        matmulnbits.lower(model, group, pack_group(group, q, dtype, opset=opset), accuracy_level=accuracy_level)
    return groups, solved, skipped


def run(source, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> list[np.ndarray]:
    """Runs a model file, or a loaded Model through its serialized structure, on one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if isinstance(source, Path):
        return ort.InferenceSession(str(source), options).run(outputs, dict(feeds))
    from onnx_woq.graph.io.model import memory_tensors, serialize

    arrays = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in memory_tensors(source).items()}
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(source.path.parent))
    if arrays:
        options.add_external_initializers(list(arrays), list(arrays.values()))
    return ort.InferenceSession(serialize(source), options).run(outputs, dict(feeds))
