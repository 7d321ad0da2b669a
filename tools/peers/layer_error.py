"""Output error of each layer on the calibration tokens, relative to RTN's, for the weights several tools end with.

    python tools/peers/layer_error.py MODEL.onnx STATS.npz WEIGHTS.npz …

STATS is what `onnxsim_solvers.py stats` writes; only the layers whose Gram matrices it has are compared. RTN is our
asymmetric grid of 4 bits and groups of 32. Prints the geometric mean over the layers of each kind, the most levels that
a group of 32 was found to use, and the same for our GPTQ on the same Gram matrices.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np
from judge_weights import module_of

from onnx_woq import Recipe, Spec
from onnx_woq.core.methods import gptq, rtn
from onnx_woq.core.stats import Stats, output_error
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load

OURS = {
    "GPTQ": {},
    "GPTQ, act-order": {"actorder": True},
    "GPTQ, clip search, group order": {"enable_mse_search": True, "group_order": True},
}


def levels(w: np.ndarray) -> int:
    """The most values that any group of 32 rows of one column of `w [K, N]` has, equal up to rounding."""
    groups = np.sort(w[: len(w) // 32 * 32].reshape(-1, 32, w.shape[1]), axis=1)
    step = (groups[:, -1] - groups[:, 0]) / 255  # finer than any step of 15
    return int((np.diff(groups, axis=1) > step[:, None]).sum(1).max()) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("stats", type=Path)
    parser.add_argument("weights", type=Path, nargs="+")
    given = parser.parse_args()
    groups, _ = find_linear_groups(load(given.model), Recipe("rtn", lm_head=False))
    spec = Spec(4, 32)
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    most: dict[str, int] = defaultdict(int)
    files = {path.stem: np.load(path, allow_pickle=False) for path in given.weights}
    with np.load(given.stats, allow_pickle=False) as known:
        for group in groups:
            wanted = [s for s in group.linears if any(module_of(s.node_name) in f.files for f in files.values())]
            key = f"gram:{group.values[0]}".replace("/", "|")
            if not wanted or key not in known.files:
                continue
            gram = known[key]
            stats = Stats(gram, np.ones(len(gram)), np.ones(len(gram), np.float32), int(known["tokens"]))
            for linear in wanted:
                w, module = linear.view().astype(np.float32), module_of(linear.node_name)
                kind = module.split(".")[-1]
                plain = output_error(rtn.solve(w, None, spec).effective() - w, gram)
                for name, options in OURS.items():
                    made = gptq.solve(w, stats, spec, **options).effective()
                    errors[name, kind].append(output_error(made - w, gram) / plain)
                for name, file in files.items():
                    if module in file.files:
                        new = file[module].astype(np.float32)
                        errors[name, kind].append(output_error(new - w, gram) / plain)
                        most[name] = max(most[name], levels(new))
    kinds = list(dict.fromkeys(kind for _, kind in errors))
    print(f"{'output error ÷ that of RTN':<32}" + "".join(f"{k:>11}" for k in [*kinds, "all"]) + "   layers  levels")
    for name in [*OURS, *files]:
        logs = [np.log(errors[name, kind]) for kind in kinds]
        means = [*(np.exp(x.mean()) for x in logs), np.exp(np.concatenate(logs).mean())]
        count = sum(map(len, logs))
        print(f"{name:<32}" + "".join(f"{m:>11.4f}" for m in means) + f"{count:>9}  {most.get(name, '')}", flush=True)


if __name__ == "__main__":
    main()
