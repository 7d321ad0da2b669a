"""The formulas, one scalar or one row at a time, in float64: what the fast code is held against.

Nothing here may import from `onnx_woq.core`.
"""

from __future__ import annotations

import math

import numpy as np


def group_grid(group, bits, symmetric=False, full_range=False, scale_dtype=np.float32):
    """Scale and zero point of one group (a list of weights), by the definitions alone."""
    lo, hi = min(0.0, *map(float, group)), max(0.0, *map(float, group))
    top, half = 2**bits - 1, 2 ** (bits - 1)
    extreme = lo if -lo >= hi else hi
    if lo == hi == 0:
        return 1.0, half if symmetric else 0
    if symmetric:
        scale = -extreme / half if full_range or bits == 1 else max(-lo, hi) / (half - 1)
        return float(scale_dtype(scale)), half
    if bits == 1:
        return float(scale_dtype(abs(extreme))), int(extreme < 0)
    scale = float(scale_dtype((hi - lo) / top))
    return scale, min(max(round(-lo / scale), 0), top)


def code(weight, scale, zero, bits):
    return min(max(round(float(weight) / scale) + zero, 0), 2**bits - 1)  # round() rounds halves to even


def rtn(weight, bits, group_size, **kinds):
    """Codes [K, N], scales [G, N], zeros [G, N] of rounding to nearest."""
    k, n = weight.shape
    codes = np.zeros((k, n), int)
    scales, zeros = np.zeros((-(-k // group_size), n)), np.zeros((-(-k // group_size), n), int)
    for group in range(len(scales)):
        rows = range(group * group_size, min(k, (group + 1) * group_size))
        for column in range(n):
            scale, zero = group_grid([weight[row, column] for row in rows], bits, **kinds)
            scales[group, column], zeros[group, column] = scale, zero
            for row in rows:
                codes[row, column] = code(weight[row, column], scale, zero, bits)
    return codes, scales, zeros


def row_order(diagonal, group_size, actorder, group_order):
    """The rows by falling diagonal; with groups kept together, by the largest entry of each, a short last one last."""
    k = len(diagonal)
    key = lambda rows: (len(rows) < group_size, -max(diagonal[r] for r in rows))  # noqa: E731
    groups = [list(range(r, min(k, r + group_size))) for r in range(0, k, group_size)]
    if actorder or group_order:
        groups = [list(range(k))] if actorder else sorted(groups, key=key)
        groups = [sorted(rows, key=lambda r: -diagonal[r]) for rows in groups]
    return np.array([r for rows in groups for r in rows])


def gptq(
    weight, gram, bits, group_size, *, percdamp=0.01, actorder=False, static_groups=False, group_order=False, **kinds
):
    """Frantar et al. 2022, Algorithm 1, unblocked: codes [K, N], scales [G, N], zeros [G, N], rows as given.

    Written from the paper: the inverse is an inverse, its factor numpy's, every row updates all later ones at once.
    """
    W, H = np.array(weight, float), np.array(gram, float)
    k, n = W.shape
    damp, dead = percdamp * np.diag(H).mean(), np.diag(H) == 0
    H[dead, dead] = 1
    W[dead] = 0
    order = row_order(np.diag(gram), group_size, actorder, group_order)
    groups = -(-k // group_size)
    static = groups > 1 and (actorder or static_groups)
    group_of = order // group_size if static else np.arange(k) // group_size
    scales, zeros, codes = np.zeros((groups, n)), np.zeros((groups, n), int), np.zeros((k, n), int)

    def fit(group, rows):
        for c in range(n):
            scales[group, c], zeros[group, c] = group_grid(rows[:, c], bits, **kinds)

    if static:
        for group in range(groups):
            fit(group, W[group * group_size : (group + 1) * group_size])
    W, H = W[order], H[np.ix_(order, order)]
    U = np.linalg.cholesky(np.linalg.inv(H + damp * np.eye(k))).T
    for i in range(k):
        if not static and i % group_size == 0:
            group_of[i : i + group_size] = order[i] // group_size
            fit(group_of[i], W[i : i + group_size])
        s, z = scales[group_of[i]], zeros[group_of[i]]
        q = np.clip(np.round(W[i] / s) + z, 0, 2**bits - 1)
        error = (W[i] - (q - z) * s) / U[i, i]
        W[i + 1 :] -= np.outer(U[i, i + 1 :], error)
        codes[order[i]] = q
    return codes, scales, zeros


def awq_scale(mean_abs_x, weight, group_size, ratio):
    """Lin et al. 2023: s = mean|x|^r / w^(1−r), w the mean of |W| / group max over output channels."""
    k, n = weight.shape
    share = np.zeros(k)
    for row in range(k):
        start = row // group_size * group_size
        for column in range(n):
            peak = max(abs(float(v)) for v in weight[start : start + group_size, column])
            share[row] += abs(float(weight[row, column])) / peak / n
    s = np.array([math.pow(mean_abs_x[i], ratio) / math.pow(share[i], 1 - ratio) for i in range(k)])
    return s / math.sqrt(s.max() * s.min())


def loss(delta, inputs):
    """The squared error of the output, token by token."""
    return sum(float(((x @ delta) ** 2).sum()) for x in np.asarray(inputs, float))
