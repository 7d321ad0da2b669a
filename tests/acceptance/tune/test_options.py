"""The ways of calling `tune()` are one: positional, by keyword, by option class."""

from __future__ import annotations

from onnx_woq import Recipe, Spec, tune
from onnx_woq.tuning.options import CalibrationData, Evaluation, Search

CONFIGS = {"coarse": Recipe("rtn", Spec(2, 32)), "fine": Recipe("gptq", Spec(8, 32))}


def size(path) -> float:
    return float(sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*") if file.suffix != ".sha"))


def test_the_ways_of_calling_are_one(enc, enc_data, tmp_path):
    plain = {"configs": CONFIGS, "tolerance": 10.0, "higher_is_better": False, "objective": "smallest", "samples": 4}
    by_class = {
        "data": CalibrationData(enc_data, samples=4),
        "evaluation": Evaluation(tolerance=10.0, higher_is_better=False),
        "search": Search(CONFIGS, objective="smallest"),
    }
    results = [
        tune(enc, size, enc_data, output=tmp_path / "a.onnx", **plain),
        tune(enc, size, data=enc_data, output=tmp_path / "b.onnx", **plain),
        tune(enc, size, output=tmp_path / "c.onnx", **by_class),
    ]
    assert {result.best.name for result in results} == {"coarse"}
    assert len({tuple(trial.metric for trial in result.trials) for result in results}) == 1
    assert len({(tmp_path / f"{name}.onnx.data").read_bytes() for name in "abc"}) == 1
