from __future__ import annotations

import logging

import numpy as np
import pytest

from onnx_woq.core.grids.clip_search import search
from onnx_woq.core.grids.integer import fit
from onnx_woq.core.methods import gptq, gptq_sweep, rtn
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats, column_errors, output_error
from onnx_woq.errors import RecipeError
from onnx_woq.recipe import Recipe
from tests.support import reference
from tests.support.memory import peak_bytes
from tests.zoo import small as zoo


def problem(k, n, seed=0, tokens=None, dead=()):
    """A weight and the statistics of correlated inputs, some channels larger than others."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) / np.sqrt(k) + np.eye(k)
    x = (rng.standard_normal((tokens or 3 * k, k)) @ mix * np.exp(rng.standard_normal(k))).astype(np.float32)
    x[:, list(dead)] = 0
    stats = Stats.empty(k)
    stats.update(x)
    return rng.standard_normal((k, n), dtype=np.float32), stats


def loss(q, weight, stats):
    return output_error(q.effective() - weight, stats.gram)


def few(inputs, tokens):
    """What is added to the damping for fewer tokens than inputs."""
    return max(0.0, inputs - tokens) / tokens / 10


def naive_factor(gram, percdamp, order):
    H = np.array(gram, float)[np.ix_(order, order)]
    return np.linalg.cholesky(np.linalg.inv(H + percdamp * np.diag(H).mean() * np.eye(len(H)))).T


# --- code for code against the paper's algorithm

ORDERS = [
    {},
    {"actorder": True},
    {"static_groups": True},
    {"actorder": True, "static_groups": True},
    {"group_order": True},
    {"group_order": True, "static_groups": True},
]


@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 100, 128, 1000])
@pytest.mark.parametrize("options", ORDERS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("group_size", [16, 32, 64, -1])
def test_codes_are_the_papers_at_every_block_size(group_size, options, block_size):
    weight, stats = problem(152, 9, seed=group_size + block_size)  # no group size but -1 divides 152
    q = gptq.solve(weight, stats, Spec(4, group_size), block_size=block_size, **options)
    codes, scales, zeros = reference.gptq(weight, stats.gram, 4, q.group_size, **options)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.zeros, zeros)
    np.testing.assert_allclose(q.scales, scales, rtol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("symmetric", "full_range"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
def test_codes_are_the_papers_on_every_grid(bits, symmetric, full_range, scale_dtype):
    weight, stats = problem(48, 7, seed=bits)
    spec = Spec(bits, 16, symmetric)
    q = gptq.solve(weight, stats, spec, scale_dtype=scale_dtype, enable_full_range=full_range, block_size=20)
    kinds = {"symmetric": symmetric, "full_range": full_range, "scale_dtype": scale_dtype}
    codes, scales, zeros = reference.gptq(weight, stats.gram, bits, 16, **kinds)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.zeros, zeros)
    np.testing.assert_allclose(q.scales, scales, rtol=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_codes_are_the_papers_on_many_problems(seed):
    rng = np.random.default_rng(seed)
    k, n = int(rng.integers(1, 120)), int(rng.integers(1, 12))
    dead = rng.choice(k, k // 8, replace=False)
    weight, stats = problem(k, n, seed, tokens=int(rng.integers(2, 300)), dead=dead)
    spec = Spec(int(rng.integers(1, 9)), int(rng.choice([16, 32, 48, -1])), bool(rng.integers(2)))
    options = {"percdamp": float(rng.choice([0.001, 0.01, 0.3]))} | ORDERS[rng.integers(len(ORDERS))]
    q = gptq.solve(weight, stats, spec, block_size=int(rng.integers(1, 150)), **options)
    options["percdamp"] += few(k - k // 8, stats.tokens)
    codes, _, zeros = reference.gptq(weight, stats.gram, spec.bits, q.group_size, symmetric=spec.symmetric, **options)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.zeros, zeros)


def replay(weight, gram, q, grid, *, percdamp=0.01, actorder=False, static_groups=False, group_order=False):
    """Follows the paper's algorithm along the codes a solver chose.

    At every row the weights are what the solver's *own* earlier codes make them, so one code at a tie does not
    excuse the ones after it. Returns how far each weight, in units of its scale, is from the middle of its code's
    interval (beyond one half: not the nearest code), and asserts that every group was given the grid of its rows.
    """
    k, n = weight.shape
    W = weight.astype(float)
    order = reference.row_order(np.diag(gram), q.group_size, actorder, group_order)
    g, top = q.group_size, 2**q.bits - 1
    static = g < k and (actorder or static_groups)
    group_of = np.array(order) // g if static else np.arange(k) // g
    U = naive_factor(gram, percdamp, order)
    importance = 1 / np.diag(U) ** 2
    off = np.zeros((k, n))

    def check(group, rows, weights):
        scales, zeros = grid(rows, weights)
        np.testing.assert_allclose(q.scales[group], scales[0], rtol=2e-4)
        assert (q.zeros[group] == zeros[0]).mean() > 0.99

    if static:
        for group in range(-(-k // g)):
            rows = slice(group * g, group * g + g)
            check(group, W[rows], importance[np.argsort(order)][rows])
    W = W[order]
    for i in range(k):
        if not static and i % g == 0:
            group_of[i : i + g] = order[i] // g
            check(group_of[i], W[i : i + g], importance[i : i + g])
        s, z = q.scales[group_of[i]].astype(float), q.zeros[group_of[i]].astype(float)
        exact = np.clip(W[i] / s + z, 0, top)
        off[i] = np.abs(exact - q.codes[order[i]])
        error = (W[i] - (q.codes[order[i]] - z) * s) / U[i, i]
        W[i + 1 :] -= np.outer(U[i, i + 1 :], error)
    return off


@pytest.mark.parametrize("options", [{}, {"actorder": True}, {"static_groups": True, "block_size": 96}])
@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_large_weights_follow_the_paper_up_to_ties(monkeypatch, options, exact, group_size):
    """Solved in float32 as large weights are: a code may differ only where the weight is halfway between two."""
    monkeypatch.setattr(gptq, "EXACT_PRODUCTS", 1 << 40 if exact else 0)
    monkeypatch.setattr(gptq_sweep, "FACTOR_EXACTLY", 1 << 40 if exact else 0)
    weight, stats = problem(400, 150, seed=5)
    spec = Spec(4, group_size)
    q = gptq.solve(weight, stats, spec, **options)
    kinds = {name: value for name, value in options.items() if name != "block_size"}
    off = replay(weight, stats.gram, q, lambda rows, _: fit(rows.astype(np.float32), spec), **kinds)
    tolerance = 1e-9 if exact else 1e-4
    assert off.max() <= 0.5 + tolerance
    assert (off > 0.5 + 1e-9).mean() < 1e-4
    codes, scales, zeros = reference.gptq(weight, stats.gram, 4, q.group_size, **kinds)
    wanted = (codes - np.repeat(zeros, q.group_size, 0)[:400]) * np.repeat(scales, q.group_size, 0)[:400]
    same = (q.codes == codes).all(axis=0)  # a column that meets a tie goes its own way from there
    assert same.mean() > 0.95
    want = column_errors((wanted - weight).astype(np.float32), stats.gram)
    np.testing.assert_allclose(column_errors(q.dequantize() - weight, stats.gram)[same], want[same], rtol=1e-4)
    assert loss(q, weight, stats) == pytest.approx(want.sum(), rel=1e-2)


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: "+".join(o) or "plain")
def test_searched_grids_weigh_rows_by_what_their_errors_cost(options):
    """Importance 1 / U_ii²: the loss is the sum of e_i² / U_ii² (paper, section 3.2)."""
    weight, stats = problem(80, 12)
    spec, shrink = Spec(3, 32), (0.7, 1, 0.05)
    q = gptq.solve(weight, stats, spec, enable_mse_search=True, mse_range=shrink, **options)
    off = replay(weight, stats.gram, q, lambda rows, h: search(rows, spec, shrink, row_weights=h), **options)
    assert off.max() <= 0.5 + 1e-6
    assert loss(q, weight, stats) < loss(gptq.solve(weight, stats, spec, **options), weight, stats)


def test_two_orders_at_once_are_refused():
    weight, stats = problem(32, 2)
    with pytest.raises(ValueError, match="choose one"):
        gptq.solve(weight, stats, Spec(4, 16), actorder=True, group_order=True)
    with pytest.raises(RecipeError, match="choose one"):
        Recipe("gptq", options={"actorder": True, "group_order": True})


# --- what must hold of any result


@pytest.mark.parametrize("bits", range(3, 9))  # at fewer, feedback may run away on inputs as correlated as these
@pytest.mark.parametrize(("group_size", "symmetric"), [(32, False), (32, True), (-1, False)])
def test_loss_is_strictly_below_rounding_to_nearest(bits, group_size, symmetric):
    weight, stats = problem(96, 40, seed=bits)
    spec = Spec(bits, group_size, symmetric)
    nearest = loss(rtn.solve(weight, None, spec), weight, stats)
    for options in ({}, {"actorder": True}, {"static_groups": True}):
        assert loss(gptq.solve(weight, stats, spec, **options), weight, stats) < 0.9 * nearest


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: "+".join(o) or "plain")
def test_siblings_side_by_side_are_siblings_alone(options):
    weight, stats = problem(80, 30)
    together = gptq.solve(weight, stats, Spec(4, 32), enable_mse_search=True, **options)
    for columns in (slice(0, 17), slice(17, 30)):
        alone = gptq.solve(weight[:, columns], stats, Spec(4, 32), enable_mse_search=True, **options)
        np.testing.assert_array_equal(together.columns(columns).codes, alone.codes)
        np.testing.assert_allclose(together.columns(columns).scales, alone.scales, rtol=1e-6)


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: "+".join(o) or "plain")
def test_wide_weights_are_solved_in_tiles_without_a_seam(monkeypatch, options):
    weight, stats = problem(80, 200)
    whole = gptq.solve(weight, stats, Spec(4, 32), **options)
    monkeypatch.setattr(gptq, "TILE_BYTES", 1)
    tiled = gptq.solve(weight, stats, Spec(4, 32), **options)
    np.testing.assert_array_equal(tiled.codes, whole.codes)
    np.testing.assert_array_equal(tiled.scales, whole.scales)


def test_weights_on_a_grid_come_back_exactly():
    _, stats = problem(64, 1)
    codes = np.random.default_rng(0).integers(0, 16, (64, 30))
    codes[::16], codes[1::16] = 0, 15
    weight = ((codes - 6) * np.float32(0.375)).astype(np.float32)
    for options in ORDERS:
        q = gptq.solve(weight, stats, Spec(4, 16), enable_mse_search=True, **options)
        np.testing.assert_array_equal(q.dequantize(), weight)
        np.testing.assert_array_equal(q.codes, codes)


def test_uncorrelated_inputs_are_rounded_to_nearest():
    weight, _ = problem(64, 10)
    stats = Stats(np.diag(np.linspace(1, 9, 64)), np.ones(64), np.ones(64), 64)
    for options in ORDERS:
        q = gptq.solve(weight, stats, Spec(4, 16), **options)
        np.testing.assert_array_equal(q.codes, rtn.solve(weight, None, Spec(4, 16)).codes)


def test_more_damping_is_closer_to_rounding_to_nearest():
    weight, stats = problem(64, 20)
    nearest = rtn.solve(weight, None, Spec(4, 16)).codes
    same = [(gptq.solve(weight, stats, Spec(4, 16), percdamp=d).codes == nearest).mean() for d in (0.01, 1, 100, 1e9)]
    assert same == sorted(same)
    assert same[0] < 0.8
    assert same[-1] == 1


# --- inputs that say little


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: "+".join(o) or "plain")
def test_dead_inputs_get_zero_weights_and_harm_nobody(options):
    dead = [0, 5, 31, 47]
    weight, stats = problem(48, 10, dead=dead)
    weight[dead] *= 50  # would ruin the range of their groups
    q = gptq.solve(weight, stats, Spec(4, 16), **options)
    codes, _, _ = reference.gptq(weight, stats.gram, 4, 16, **options)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.dequantize()[dead], 0)
    assert loss(q, weight, stats) < loss(rtn.solve(weight, None, Spec(4, 16)), weight, stats) / 100


def test_fewer_tokens_than_inputs():
    weight, stats = problem(96, 10, tokens=5)
    q = gptq.solve(weight, stats, Spec(4, 32))
    codes, _, _ = reference.gptq(weight, stats.gram, 4, 32, percdamp=0.01 + few(96, 5))
    np.testing.assert_array_equal(q.codes, codes)


@pytest.mark.parametrize("tokens", [0, 10])
def test_inputs_that_were_never_anything_but_zero(tokens, caplog):
    weight, _ = problem(48, 10)
    stats = Stats.empty(48)
    stats.update(np.zeros((tokens, 48), np.float32))
    q = gptq.solve(weight, stats, Spec(4, 16))
    np.testing.assert_array_equal(q.codes, rtn.solve(weight, None, Spec(4, 16)).codes)
    assert "no input was ever nonzero" in caplog.text


def test_damping_is_raised_until_the_factorization_succeeds(caplog):
    weight, stats = problem(48, 10)
    gram = stats.gram - 0.05 * stats.gram.diagonal().mean() * np.eye(48, dtype=np.float32)
    assert np.linalg.eigvalsh(gram).min() < -0.01 * gram.diagonal().mean()
    with caplog.at_level(logging.INFO):
        q = gptq.solve(weight, Stats(gram, stats.abs_mean, stats.abs_max, 144), Spec(4, 16))
    assert "not positive definite" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    np.testing.assert_array_equal(q.codes, reference.gptq(weight, gram, 4, 16, percdamp=0.1)[0])


@pytest.mark.parametrize("factor_exactly", [0, 4096])
@pytest.mark.parametrize("bad", [-1e9, np.nan])
def test_a_hopeless_gram_matrix_means_rounding_to_nearest(caplog, monkeypatch, factor_exactly, bad):
    monkeypatch.setattr(gptq_sweep, "FACTOR_EXACTLY", factor_exactly)
    weight, stats = problem(48, 10)
    gram = stats.gram.copy()
    gram[3, 4] = gram[4, 3] = bad
    q = gptq.solve(weight, Stats(gram, stats.abs_mean, stats.abs_max, 9), Spec(4, 16))
    np.testing.assert_array_equal(q.codes, rtn.solve(weight, None, Spec(4, 16)).codes)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("size", [1e-18, 1e-6, 1e6, 1e17])
def test_the_size_of_activations_and_weights_does_not_matter(size):
    weight, stats = problem(48, 10)
    scaled = Stats(stats.gram * np.float32(size), stats.abs_mean, stats.abs_max, stats.tokens)
    q = gptq.solve(weight, stats, Spec(4, 16), enable_mse_search=True)
    for w, s in ((weight, scaled), (weight * np.float32(2.0**40), stats)):
        again = gptq.solve(w, s, Spec(4, 16), enable_mse_search=True)
        assert (again.codes == q.codes).mean() > 0.99


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("factor_exactly", [0, 1 << 20])
def test_one_factor_is_the_only_matrix_of_its_size(options, factor_exactly, monkeypatch):
    monkeypatch.setattr(gptq_sweep, "FACTOR_EXACTLY", factor_exactly)
    weight, stats = problem(1200, 64, tokens=1300)
    gptq.solve(weight, stats, Spec(4, 32), **options)  # scipy is imported by now
    monkeypatch.setattr(gptq, "EXACT_PRODUCTS", 0 if factor_exactly == 0 else 1 << 40)
    factor = 1200**2 * (8 if factor_exactly else 4)
    assert peak_bytes(lambda: gptq.solve(weight, stats, Spec(4, 32), **options)) < 1.5 * factor


def test_wide_weights_are_widened_a_tile_at_a_time(monkeypatch):
    monkeypatch.setattr(gptq, "TILE_BYTES", 1 << 18)
    monkeypatch.setattr(gptq, "EXACT_PRODUCTS", 0)
    weight, stats = problem(128, 16384)
    half = np.asfortranarray(weight.astype(np.float16))
    gptq.solve(weight[:, :9], stats, Spec(4, 32))  # scipy is imported by now
    peak = peak_bytes(lambda: gptq.solve(half, stats, Spec(4, 32)))
    assert peak < half.size * 1.5 + (1 << 21)  # codes, scales and zeros are 1.16 bytes per weight


def test_statistics_that_keep_their_factors_give_the_same_codes_and_factorize_once(monkeypatch):
    rng = np.random.default_rng(5)
    stats = Stats.empty(64)
    stats.update(rng.normal(size=(200, 64)) * np.linspace(0.2, 3, 64))
    weight = rng.normal(size=(64, 24)).astype(np.float32)
    calls = []
    original = gptq.factorize
    monkeypatch.setattr(gptq, "factorize", lambda *args: calls.append(1) or original(*args))
    keeping = stats.keeping()
    for options in ({}, {"group_order": True}, {"actorder": True}):
        for bits in (2, 4):
            expected = gptq.solve(weight, stats, Spec(bits, 32), **options)
            found = gptq.solve(weight, keeping, Spec(bits, 32), **options)
            assert np.array_equal(found.codes, expected.codes)
            assert np.array_equal(found.scales, expected.scales)
    assert len(calls) == 6 + 3


def test_few_tokens_are_damped_more_and_enough_are_not():
    assert [gptq.damping(0.01, tokens, 64) for tokens in (64, 65, 10**6)] == [0.01] * 3
    assert gptq.damping(0.01, 32, 64) == pytest.approx(0.11)
    assert gptq.damping(0.01, 4, 64) == pytest.approx(1.51)
    assert gptq.damping(0.01, 0, 0) == 0.01


@pytest.mark.parametrize("tokens", [4, 16, 48])
@pytest.mark.parametrize("group_order", [True, False])
def test_few_tokens_lose_nothing_to_rounding_on_others(tokens, group_order):
    """With as little damping as for many they lose up to two thirds."""
    k, spec = 256, Spec(4, 32, symmetric=False)
    weight = zoo.weight(1, k, 64)
    stats = Stats.empty(k)
    stats.update(zoo.correlated(5, tokens, k, rank=24, noise=0.3))
    others = zoo.correlated(99, 1000, k, rank=24, noise=0.3).astype(np.float64)
    found = gptq.solve(weight, stats, spec, group_order=group_order).effective()
    plain = rtn.solve(weight, None, spec).effective()
    assert np.linalg.norm(others @ (found - weight)) < np.linalg.norm(others @ (plain - weight))
