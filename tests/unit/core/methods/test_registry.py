"""The table of methods and the checks on their options."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from onnx_woq.core import input_scale
from onnx_woq.core.methods import gptq, hqq, rtn
from onnx_woq.core.methods.registry import METHODS, check_options, solve_bytes
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats
from onnx_woq.errors import RecipeError
from onnx_woq.recipe import Recipe
from tests.support.memory import peak_bytes

DEFAULTS = {
    "rtn": {"enable_full_range": False, "enable_mse_search": False, "mse_range": (0.805, 1.0, 0.005)},
    "gptq": {
        "actorder": False,
        "percdamp": 0.01,
        "block_size": 128,
        "static_groups": False,
        "group_order": False,
        "enable_mse_search": False,
        "mse_range": (0.805, 1.0, 0.005),
        "enable_full_range": False,
        "descent_passes": 0,
        "scaling": "none",
        "folding": False,
    },
    "awq": {
        "enable_auto_scale": True,
        "enable_mse_search": True,
        "mse_range": (0.91, 1.0, 0.01),
        "folding": False,
        "enable_full_range": False,
    },
    "teq": {
        "steps": 60,
        "learning_rate": 0.05,
        "enable_mse_search": True,
        "mse_range": (0.91, 1.0, 0.01),
        "enable_auto_scale": True,
        "folding": False,
        "enable_full_range": False,
    },
    "hqq": {"norm": 0.7, "beta": 10.0, "kappa": 1.01, "iterations": 20, "enable_full_range": False},
}


def test_options_and_defaults_are_those_documented():
    assert {name: method.options for name, method in METHODS.items()} == DEFAULTS
    assert [name for name, method in METHODS.items() if method.needs_data] == ["gptq", "awq", "teq"]
    assert all(method.name == name for name, method in METHODS.items())


def test_what_is_added_to_weights_needs_data_whatever_the_method():
    assert not Recipe("rtn").needs_data
    assert Recipe("gptq").needs_data
    assert Recipe("rtn", bias_correction=True).needs_data
    assert Recipe("rtn", lowrank=16).needs_data


@pytest.mark.parametrize("name", METHODS)
def test_defaults_pass_their_own_check_and_survive_json(name):
    check_options(METHODS[name], METHODS[name].options)
    check_options(METHODS[name], json.loads(json.dumps(METHODS[name].options)))
    assert Recipe(name, options=DEFAULTS[name]).fingerprint()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gptq", {"act_order": True}, "did you mean actorder"),
        ("gptq", {"blocksize": 1}, "did you mean block_size"),
        ("rtn", {"percdamp": 0.1}, "unknown rtn option 'percdamp'"),
        ("gptq", {"scale_dtype": "float16"}, "unknown gptq option"),
        ("gptq", {"actorder": 1}, "true or false"),
        ("gptq", {"actorder": "yes"}, "true or false"),
        ("gptq", {"block_size": True}, "whole number"),
        ("gptq", {"block_size": 0}, "whole number"),
        ("gptq", {"block_size": 64.0}, "whole number"),
        ("gptq", {"percdamp": 0}, "number above 0"),
        ("gptq", {"percdamp": -0.1}, "number above 0"),
        ("gptq", {"percdamp": True}, "number above 0"),
        ("gptq", {"percdamp": "1%"}, "number above 0"),
        ("gptq", {"percdamp": float("nan")}, "number above 0"),
        ("gptq", {"percdamp": float("inf")}, "number above 0"),
        ("rtn", {"mse_range": 0.8}, "three numbers"),
        ("rtn", {"mse_range": (0.8, 1)}, "three numbers"),
        ("rtn", {"mse_range": (0, 1, 0.1)}, "three numbers"),
        ("rtn", {"mse_range": (0.9, 0.8, 0.1)}, "three numbers"),
        ("rtn", {"mse_range": (0.9, 1.1, 0.1)}, "three numbers"),
        ("rtn", {"mse_range": (0.9, 1.0, 0)}, "three numbers"),
        ("rtn", {"mse_range": (0.9, 1.0, "0.1")}, "three numbers"),
        ("awq", {"mse_range": [0.9, 1.0, float("nan")]}, "three numbers"),
        ("awq", {"mse_range": "abc"}, "three numbers"),
        ("gptq", {"scaling": "akw"}, "did you mean awq"),
        ("gptq", {"scaling": 1}, "none"),
        ("awq", {"mse_range": (0.1, 1.0, 1e-6)}, "1000 candidates"),
    ],
)
def test_what_a_method_does_not_understand_is_refused(name, options, message):
    with pytest.raises(RecipeError, match=message):
        check_options(METHODS[name], options)
    with pytest.raises(RecipeError, match=message):
        Recipe(name, options=options)


@pytest.mark.parametrize("options", [{"percdamp": 1}, {"block_size": 1}, {"mse_range": [1, 1, 1]}])
def test_borderline_options_are_accepted(options):
    check_options(METHODS["gptq"], options)


@pytest.mark.parametrize("name", METHODS)
def test_a_solver_changes_nothing_it_was_given(name):
    rng = np.random.default_rng(0)
    weight, stats = rng.standard_normal((32, 6), dtype=np.float32), Stats.empty(32)
    stats.update(rng.standard_normal((100, 32), dtype=np.float32) * np.linspace(0.1, 5, 32, dtype=np.float32))
    before = weight.copy(), stats.gram.copy(), stats.abs_mean.copy()
    METHODS[name].solve(weight, stats, Spec(4, 16))
    for given, kept in zip((weight, stats.gram, stats.abs_mean), before, strict=True):
        np.testing.assert_array_equal(given, kept)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
def test_what_a_solver_returns_is_well_formed(name, scale_dtype):
    rng = np.random.default_rng(0)
    weight, stats = rng.standard_normal((40, 6), dtype=np.float32), Stats.empty(40)
    stats.update(rng.standard_normal((100, 40), dtype=np.float32) * np.linspace(0.1, 5, 40, dtype=np.float32))
    for bits in range(1, 9):
        for group_size, symmetric in ((16, False), (32, True), (-1, False), (128, True)):
            spec = Spec(bits, group_size, symmetric)
            q = METHODS[name].solve(np.asfortranarray(weight), stats, spec, scale_dtype=scale_dtype)
            groups = -(-40 // spec.resolved_group(40))
            assert (q.codes.shape, q.codes.dtype) == ((40, 6), np.uint8)
            assert (q.scales.shape, q.scales.dtype) == ((groups, 6), np.float32)
            assert (q.zeros.shape, q.zeros.dtype) == ((groups, 6), np.uint8)
            assert (q.bits, q.group_size, q.symmetric) == (bits, spec.resolved_group(40), symmetric)
            assert max(q.codes.max(), q.zeros.max()) < 2**bits
            np.testing.assert_array_equal(q.scales, q.scales.astype(scale_dtype))
            assert not symmetric or (q.zeros == 2 ** (bits - 1)).all()
            assert np.isfinite(q.effective()).all()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs_data])
def test_missing_or_foreign_statistics_are_refused(name):
    weight = np.ones((32, 2), np.float32)
    for stats in (None, Stats.empty(31)):
        with pytest.raises(ValueError, match="statistics"):
            METHODS[name].solve(weight, stats, Spec())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("order", ["C", "F"])
def test_weights_are_taken_in_any_dtype_and_order(name, dtype, order):
    rng = np.random.default_rng(0)
    weight, stats = np.array(rng.standard_normal((96, 20)).astype(dtype), order=order), Stats.empty(96)
    stats.update(rng.standard_normal((300, 96), dtype=np.float32) * np.linspace(0.1, 5, 96, dtype=np.float32))
    weight.flags.writeable = False
    q, same = (METHODS[name].solve(w, stats, Spec(4, 32)) for w in (weight, np.array(weight, np.float32, order="C")))
    np.testing.assert_array_equal(q.codes, same.codes)
    np.testing.assert_array_equal(q.scales, same.scales)
    bad = weight.copy()
    bad[50, 3] = np.nan
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        METHODS[name].solve(bad, stats, Spec(4, 32))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rtn", {}),
        ("gptq", {}),
        ("gptq", {"actorder": True}),
        ("gptq", {"enable_mse_search": True, "mse_range": (0.9, 1, 0.1)}),
        ("gptq", {"descent_passes": 1}),
        ("gptq", {"scaling": "awq"}),
        ("gptq", {"scaling": "teq", "descent_passes": 2}),
        ("awq", {"mse_range": (0.9, 1, 0.1)}),
        ("teq", {}),
        ("hqq", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize(("k", "n"), [(576, 960), (1024, 300), (300, 4000), (440, 1200)])
@pytest.mark.slow
def test_the_memory_a_solver_says_it_takes_is_what_it_takes(name, options, group_size, k, n):
    rng = np.random.default_rng(0)
    weight, stats = rng.standard_normal((k, n), dtype=np.float32), Stats.empty(k)
    size = np.linspace(0.1, 5, k, dtype=np.float32)
    stats.update(rng.standard_normal((k + 9, k), dtype=np.float32) * np.where(np.arange(k) % 50, size, 50))
    METHODS[name].solve(weight[:, :9], stats, Spec(4, group_size), **options)  # libraries are loaded by now
    peak = peak_bytes(lambda: METHODS[name].solve(weight, stats, Spec(4, group_size), **options))
    told = solve_bytes(name, k, n, Spec(4, group_size), tuple(options.items()))
    assert 0.8 * peak <= told <= 1.25 * peak


def backwards(fn, pieces):
    """A `map` that takes the last piece first, each on a thread of its own."""
    pieces = list(pieces)
    with ThreadPoolExecutor(len(pieces) or 1) as pool:
        futures = [pool.submit(fn, piece) for piece in reversed(pieces)]
        return [future.result() for future in reversed(futures)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name, method in METHODS.items()
        for options in ({}, {"enable_mse_search": True})
        if options.keys() <= method.options.keys()
    ],
)
def test_who_goes_through_the_pieces_and_when_is_of_no_account(name, options, monkeypatch):
    monkeypatch.setattr(rtn, "PIECE", 80 * 48)
    monkeypatch.setattr(hqq, "PIECE", 80 * 48)
    monkeypatch.setattr(gptq, "TILE_BYTES", 80 * 64 * 8)
    monkeypatch.setattr(input_scale, "TILE", 48)
    rng = np.random.default_rng(3)
    weight, stats, pieces = rng.standard_normal((80, 200), dtype=np.float32), Stats.empty(80), []
    stats.update(rng.standard_normal((300, 80), dtype=np.float32) * np.linspace(0.1, 4, 80, dtype=np.float32))

    def counted(fn, some):
        some = list(some)
        pieces.append(len(some))
        return backwards(fn, some)

    want = METHODS[name].solve(weight, stats, Spec(3, 32), **options)
    got = METHODS[name].solve(weight, stats, Spec(3, 32), parallel_map=counted, **options)
    # AWQ: exponents on a few columns, the best of them on more, then all tiles, with the scale and without
    assert pieces[:4] == {"rtn": [5], "gptq": [4], "awq": [21, 5, 5, 5], "teq": [21, 5, 5, 5], "hqq": [5]}[name]
    for field in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
