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


def storage(model, group, *, half: bool = False, opset: int | None = None):
    """How a group of a loaded model is stored, with scales in float16 whatever it computes in if `half`.

    `opset` stands for that of the model: at 17 codes lie as the kernel reads them.
    """
    from onnx_woq.targets.base import Storage

    opset = model.ir.opset_imports.get("") or 0 if opset is None else opset
    return Storage(np.float16 if half else group.kernel_dtype, opset)


def rtn(group, *, half: bool = False):
    """The group's weight rounded to nearest on its own grid, a QuantizedTensor."""
    from onnx_woq.core.grids import integer as grid

    weight = group.weight()
    scale_dtype = np.float16 if half else group.kernel_dtype
    scales, zeros = grid.fit(weight, group.spec, scale_dtype=scale_dtype)
    size = group.spec.resolved_group(group.k)
    codes = grid.encode(weight, scales, zeros, group.spec.bits, size)
    return grid.QuantizedTensor(codes, scales, zeros, group.spec.bits, size, group.spec.symmetric)


def pack_group(model, group, q, *, half: bool = False, opset: int | None = None):
    """Each distinct weight of a group packed from its columns of `q`, as `lower_group` takes them."""
    from onnx_woq.targets.matmulnbits import pack

    columns = dict.fromkeys((part.start, part.stop) for _, part in group.slices())
    stored = storage(model, group, half=half, opset=opset)
    return [pack(q.columns(slice(*place)), stored) for place in columns]


def lower_group(model, group, q, *, accuracy_level: int = 0, bias=(), half: bool = False, opset: int | None = None):
    """Rewrites a group as MatMulNBits with the codes of `q`."""
    from onnx_woq.targets import matmulnbits

    packed = pack_group(model, group, q, half=half, opset=opset)
    return matmulnbits.lower(model, group, packed, accuracy_level=accuracy_level, bias=bias)


def lower(model, recipe=None, *, accuracy_level: int = 0):
    """Quantizes every group of a loaded model by rounding; returns groups, QuantizedTensors and what was skipped."""
    from onnx_woq.graph.find.linears import find_linear_groups
    from onnx_woq.recipe import Recipe

    recipe = recipe or Recipe()
    groups, skipped = find_linear_groups(model, recipe)
    solved = [rtn(group, half=recipe.half_scales) for group in groups]
    for group, q in zip(groups, solved, strict=True):
        lower_group(model, group, q, accuracy_level=accuracy_level, half=recipe.half_scales)
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
