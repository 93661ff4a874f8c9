"""Drawn frequencies against exact probabilities.

The exact distributions are computed here, in float64 and by sorting, without headway. Seeds are fixed: a test passes or
fails for good, and its level of 1e-4 says how unlucky a correct sampler may have been when they were chosen. Each test
states its power, the chance to reject the wrong sampler that it is there for, and where it can it shows that the draws
do not fit that one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import headway as hw

LEVEL = 1e-4
NORMAL = NormalDist()


def critical(df: float, level: float = LEVEL) -> float:
    """What chi-square with df degrees of freedom exceeds with this probability (Wilson and Hilferty, 1931)."""
    return df * (1 - 2 / (9 * df) + NORMAL.inv_cdf(1 - level) * math.sqrt(2 / (9 * df))) ** 3


def power(n: int, p: np.ndarray, q: np.ndarray) -> float:
    """The chance to reject p in n draws from q: a noncentral chi-square, matched by a scaled one (Patnaik, 1949)."""
    p, q = merged(n * p, n * p) / n, merged(n * p, n * q) / n
    df, shift = p.size - 1, n * float(((q - p) ** 2 / p).sum())
    scale = (df + 2 * shift) / (df + shift)
    like = (df + shift) ** 2 / (df + 2 * shift)
    x = critical(df) / scale / like
    return 1 - NORMAL.cdf((x ** (1 / 3) - (1 - 2 / (9 * like))) / math.sqrt(2 / (9 * like)))


def merged(expected: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The cells that expect 10 draws or more, and one for all others together if that one does."""
    large = expected >= 10
    rest = values[~large].sum()
    return np.append(values[large], rest) if expected[~large].sum() >= 10 else values[large]


def chi_square(counts: np.ndarray, p: np.ndarray) -> tuple[float, float]:
    """The statistic, and the value that it exceeds by chance with probability LEVEL."""
    expected = counts.sum() * p
    cells, seen = merged(expected, expected), merged(expected, counts)
    return float(((seen - cells) ** 2 / cells).sum()), critical(cells.size - 1)


def test_the_critical_values_are_those_of_the_tables() -> None:
    for df, level, table in [(5, 0.05, 11.070), (10, 0.01, 23.209), (50, 0.001, 86.661), (100, 0.05, 124.342)]:
        assert critical(df, level) == pytest.approx(table, rel=3e-3)


# The exact distributions --------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    z = np.asarray(logits, np.float64) / temperature
    e = np.exp(z - z.max())
    return e / e.sum()


def exact(
    logits: np.ndarray,
    temperature: float = 1.0,
    dynamic_temperature_range: float = 0.0,
    top_n_sigma: float = math.inf,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    epsilon_cutoff: float = 0.0,
    eta_cutoff: float = 0.0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    nucleus: str = "after_top_k",
) -> np.ndarray:
    z = np.asarray(logits, np.float64)
    if dynamic_temperature_range:
        share = entropy(softmax(z, 1.0)) / math.log(z.size)
        temperature += dynamic_temperature_range * (2 * share - 1)
    p = softmax(z, temperature)
    order = sorted(range(z.size), key=lambda i: (-z[i], i))
    order = [i for i in order if z[i] >= z.max() - top_n_sigma * z.std()]
    kept = order[:top_k]
    nucleus_ids = prefix(p, kept if nucleus == "after_top_k" else order, top_p)
    kept = [i for i in kept if i in set(nucleus_ids) and p[i] >= min_p * p.max()]
    if typical_p < 1:
        left = p[kept] / p[kept].sum()
        nearest = np.argsort(np.abs(-np.log(left) - entropy(left)), kind="stable")
        kept = sorted(prefix(p, np.array(kept)[nearest].tolist(), typical_p), key=order.index)
    kept = [i for i in kept if p[i] >= epsilon_cutoff * p[kept].sum()]
    left = p[kept] / p[kept].sum()
    kept = [
        i for i in kept if p[i] >= p[kept].sum() * min(eta_cutoff, math.sqrt(eta_cutoff) * math.exp(-entropy(left)))
    ]
    top = [i for i in kept if p[i] >= xtc_threshold * p[kept].sum()]
    rest = [i for i in kept if i not in top[:-1]]
    return (1 - xtc_probability) * normal(p, kept) + xtc_probability * normal(p, rest)


def entropy(p: np.ndarray) -> float:
    return float(-(p * np.log(p)).sum())


def prefix(p: np.ndarray, order: list[int], share: float) -> list[int]:
    """The tokens before which there is less than this share of the mass."""
    total, before, out = sum(p[i] for i in order), 0.0, []
    for i in order:
        if before < share * total:
            out.append(i)
        before += p[i]
    return out


def normal(p: np.ndarray, kept: list[int]) -> np.ndarray:
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


rng = np.random.default_rng(1234)
FLAT = rng.standard_normal(60).astype(np.float32)
STEEP = (rng.standard_normal(200) * 3).astype(np.float32)
TIED = (np.round(rng.standard_normal(300) * 4) / 4).astype(ml_dtypes.bfloat16)
LONG = rng.standard_normal(5000).astype(np.float32)
CASES: list[tuple[str, np.ndarray, dict[str, Any], int]] = [
    ("flat", FLAT, {}, 200_000),
    ("flat, cold", FLAT, {"temperature": 0.5}, 200_000),
    ("flat, hot", FLAT, {"temperature": 3.0}, 200_000),
    ("steep", STEEP, {}, 200_000),
    ("steep, warm", STEEP, {"temperature": 1.4}, 200_000),
    ("top_k", STEEP, {"temperature": 1.4, "top_k": 20}, 200_000),
    ("top_p", FLAT, {"temperature": 0.8, "top_p": 0.7}, 200_000),
    ("min_p", FLAT, {"temperature": 1.2, "min_p": 0.15}, 200_000),
    ("all", FLAT, {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05}, 200_000),
    ("joint", FLAT, {"temperature": 0.8, "top_k": 25, "top_p": 0.8, "nucleus": "joint"}, 200_000),
    ("top_n_sigma", FLAT, {"temperature": 1.2, "top_n_sigma": 2.5}, 200_000),
    ("typical_p", FLAT, {"temperature": 0.8, "typical_p": 0.7}, 200_000),
    ("epsilon_cutoff", FLAT, {"temperature": 1.2, "epsilon_cutoff": 0.01}, 200_000),
    ("eta_cutoff", FLAT, {"temperature": 1.2, "eta_cutoff": 0.05}, 200_000),
    ("xtc", FLAT, {"temperature": 0.7, "xtc_probability": 0.5, "xtc_threshold": 0.05}, 200_000),
    ("dynamic", FLAT, {"temperature": 0.8, "dynamic_temperature_range": 0.5}, 200_000),
    (
        "everything",
        FLAT,
        {"temperature": 0.9, "top_n_sigma": 3.5, "top_k": 50, "top_p": 0.95, "typical_p": 0.95},
        200_000,
    ),
    ("tied bfloat16", TIED, {"temperature": 0.9, "top_k": 100}, 200_000),
    ("long", LONG, {"temperature": 0.8}, 60_000),
]


def draw_by_stream(logits: np.ndarray, n: int, **options: Any) -> np.ndarray:
    return hw.sample(np.broadcast_to(logits, (n, logits.size)), seed=2024, **options)


def draw_by_position(logits: np.ndarray, n: int, **options: Any) -> np.ndarray:
    seeds = np.full(n, 2024, np.uint64)
    return hw.sample(np.broadcast_to(logits, (n, logits.size)), seed=seeds, position=np.arange(n), **options)


def draw_by_seed(logits: np.ndarray, n: int, **options: Any) -> np.ndarray:
    return hw.sample(np.broadcast_to(logits, (n, logits.size)), seed=np.arange(n, dtype=np.uint64), **options)


@pytest.mark.parametrize("draw", [draw_by_stream, draw_by_position, draw_by_seed])
@pytest.mark.parametrize(("name", "logits", "options", "n"), CASES, ids=[case[0] for case in CASES])
def test_frequencies(
    name: str, logits: np.ndarray, options: dict[str, Any], n: int, draw: Callable[..., np.ndarray]
) -> None:
    """Power above 0.999 against a temperature that is off by 4 % (10 % in long and in hot rows)."""
    p = exact(logits, **options)
    off = 1.1 if name in ("long", "flat, hot") else 1.04
    wrong = (
        p * softmax(logits, options.get("temperature", 1.0) * off) / softmax(logits, options.get("temperature", 1.0))
    )
    wrong /= wrong.sum()
    assert power(n, p, wrong) > 0.999
    counts = np.bincount(draw(logits, n, **options), minlength=logits.size)
    assert counts[p == 0].sum() == 0
    statistic, limit = chi_square(counts, p)
    assert statistic < limit
    statistic, limit = chi_square(counts, wrong)  # by symmetry: these draws are not from the wrong one
    assert statistic > limit


def test_the_stated_distribution_is_the_exact_one() -> None:
    for name, logits, options, _ in CASES:
        if name == "xtc":  # a distribution is that of one coin
            one, other = (exact(logits, **{**options, "xtc_probability": q}) for q in (0.0, 1.0))
            assert np.abs(one - other).max() > 0.02
            for q, want in ((0.0, one), (1.0, other)):
                got = hw.probabilities(logits.astype(np.float64), **{**options, "xtc_probability": q})
                assert np.abs(got - want).max() < 2e-6
            continue
        got = hw.probabilities(logits.astype(np.float64), **options)
        assert np.abs(got - exact(logits, **options)).max() < 2e-6, name


def test_ids_have_no_bias_within_a_tie() -> None:
    """Power above 0.999 against every tenth of 1000 equal tokens being 10 % too likely."""
    n, V = 500_000, 1000
    p = np.full(V, 1 / V)
    wrong = p.copy()
    wrong[::10] *= 1.1
    wrong /= wrong.sum()
    assert power(n, p, wrong) > 0.999
    counts = np.bincount(draw_by_stream(np.zeros(V, np.float32), n), minlength=V)
    statistic, limit = chi_square(counts, p)
    assert statistic < limit


@pytest.mark.parametrize("draw", [draw_by_stream, draw_by_position, draw_by_seed])
def test_neighbouring_draws_are_independent(draw: Callable[..., np.ndarray]) -> None:
    """Pairs of draws in a row over 8 tokens. Power above 0.999 against repeating the last token in 2 % of draws."""
    n, V = 200_000, 8
    logits = np.linspace(0, 1.5, V).astype(np.float32)
    p = exact(logits)
    pairs = np.outer(p, p)
    wrong = 0.98 * pairs + 0.02 * np.diag(p)
    assert power(n // 2, pairs.ravel(), wrong.ravel()) > 0.999
    first, second = draw(logits, n).reshape(-1, 2).T
    counts = np.bincount(first * V + second, minlength=V * V)
    statistic, limit = chi_square(counts, pairs.ravel())
    assert statistic < limit
    statistic, limit = chi_square(counts, wrong.ravel())
    assert statistic > limit


@pytest.mark.parametrize("at_the_end", [True, False])
@pytest.mark.parametrize("mass", [1e-6, 1e-9])
def test_tails_to_1e_9(mass: float, at_the_end: bool) -> None:
    """Nine tokens share a mass of 1e-9 beside one that has the rest: the draws that fall there, by a grid of uniforms.

    No number of random draws would show such a tail; a grid over its interval alone shows each token's share exactly,
    up to one step of the grid at each end and the resolution of weights and doubles there. A sampler whose uniforms or
    running sums are float32 (steps of 2^-24) or float64 sums from the wrong end would miss tokens or misplace them.
    """
    n = 20_000
    shares = np.arange(1.0, 10.0) / 45
    logits = np.log(np.append(shares * mass, 1 - mass)).astype(np.float32)
    tail = slice(0, 9)
    if at_the_end:
        logits = np.roll(logits, 1)
        tail = slice(1, 10)
    p = hw.probabilities(logits.astype(np.float64))
    assert p[tail] == pytest.approx(shares * mass, rel=5e-4 if mass < 1e-8 else 5e-5)  # weights resolve 2^-44
    width = float(p[tail].sum())
    steps = (np.arange(n) + 0.5) / n * width
    u = 1 - steps if at_the_end else steps
    tokens = hw.sample(np.broadcast_to(logits, (n, 10)), uniform=u)
    counts = np.bincount(tokens, minlength=10)
    assert np.abs(counts - n * p / width)[tail].max() <= 1.5
    assert counts[tail].sum() >= n - 1


def test_rare_tokens_come_as_often_as_they_should() -> None:
    """A thousand tokens of 3e-6 each: about 900 of 300,000 draws.

    The count is binomial; power above 0.999 against a tail that is 25 % too light or too heavy.
    """
    n = 300_000
    logits = np.zeros(1001, np.float32)
    logits[:1000] = math.log(3e-6 / (1 - 3e-3))
    p = exact(logits)
    tail = p[:1000].sum()
    spread = math.sqrt(n * tail * (1 - tail))
    limit = NORMAL.inv_cdf(1 - LEVEL / 2) * spread
    assert NORMAL.cdf((0.25 * n * tail - limit) / (spread * math.sqrt(1.25))) > 0.999
    tokens = draw_by_position(logits, n)
    assert abs((tokens < 1000).sum() - n * tail) < limit
