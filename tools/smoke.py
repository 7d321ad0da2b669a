"""Whether a wheel holds the whole package, and the package installed from it works; for `make wheel`.

VENV/bin/python -I tools/smoke.py WHEEL    (a fresh environment with nothing in it but the wheel and its dependencies)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "onnx_woq"
ROOT = Path(__file__).resolve().parent.parent
CLOSE = 0.15
"""RTN in 4 bits is this far off at most, relative to the root mean square of the output."""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    wheel = Path(sys.argv[1]).resolve()
    check_wheel(wheel, ROOT)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # outside the checkout, where nothing but the wheel can be meant
        check_installed(wheel)
        check_command()
    print(f"{wheel.name} on Python {sys.version.split()[0]}: works")


def check_wheel(wheel: Path, root: Path) -> None:
    """Holds what is in the wheel against the checkout: every module of the package, `py.typed`, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {path.relative_to(root).as_posix() for path in (root / PACKAGE).rglob("*.py")} | {f"{PACKAGE}/py.typed"}
    if missing := sorted(wanted - held):
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}")
    if foreign := sorted(held - wanted):
        sys.exit(f"{wheel.name} has too much: {', '.join(foreign)}")


def check_installed(wheel: Path) -> None:
    """The package that is imported is the installed one, of the wheel's version."""
    from importlib.metadata import version

    import onnx_woq

    if Path(sys.prefix).resolve() not in Path(onnx_woq.__file__).resolve().parents:
        sys.exit(f"{onnx_woq.__file__} is not in {sys.prefix}")
    if f"-{version('onnx-woq')}-" not in wheel.name:
        sys.exit(f"onnx-woq {version('onnx-woq')} is installed, not {wheel.name}")


def check_command() -> None:
    """The command quantizes a model of two MatMuls; ONNX Runtime runs it, and it is close to what it was."""
    from importlib.metadata import version

    import numpy as np
    import onnxruntime

    if version("onnx-woq") not in command("--version"):
        sys.exit("--version does not say the installed version")
    if "RTN_G32ASYM" not in command("configs"):
        sys.exit("configs does not list RTN_G32ASYM")
    model, small = write_model(Path("model.onnx")), Path("small.onnx")
    report = json.loads(command("quantize", model, "-o", small, "--config", "RTN_G32ASYM", "--json"))
    if not report["bytes_after"] < report["bytes_before"] / 2:
        sys.exit(f"not much smaller: {report['bytes_after']} bytes of {report['bytes_before']}")
    judged = command("evaluate", small, "--reference", model, "--data", "random", "--samples", 4, "--json")
    print("evaluate:", " ".join(judged.split()))
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    before, after = (onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0] for path in (model, small))
    off = float(np.sqrt(np.mean((after - before) ** 2) / np.mean(before**2)))
    if not 0 < off < CLOSE:
        sys.exit(f"the outputs are {off:.3f} off, relative to their size")


def write_model(path: Path) -> Path:
    """`y = relu(x @ A) @ B`."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {"A": rng.standard_normal((64, 128)) / 8, "B": rng.standard_normal((128, 64)) / 8}
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "B"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "smoke",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def command(*arguments: object) -> str:
    """What the installed command prints; it gets nothing of the environment that would show it the checkout."""
    script = shutil.which("onnx-woq", path=str(Path(sys.executable).parent))
    if script is None:
        sys.exit(f"there is no command onnx-woq beside {sys.executable}")
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([script, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"onnx-woq {' '.join(map(str, arguments))}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
