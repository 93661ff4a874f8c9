"""Dialects against the libraries that they are named after: which tokens are left, on thousands of random rows.

transformers and mlx-lm run where they are installed (mlx-lm: `pip install mlx[cpu] mlx-lm`, which runs on Linux). Their
sorts are not stable, so of equal logits only the number that is left is compared. vLLM, SGLang, FlashInfer and
llama.cpp do not come for any CPU without much ado: their paths are written down here once more, from what their
sources do, in NumPy and float32 as they compute.

Libraries compare float32 sums, headway exact ones. A difference is therefore allowed for a token whose boundary lies
within rounding, and for nothing else: for each difference the test asks whether a parameter moved by a relative 3e-5
(of p and of 1 - p, whichever moves more) would have made headway decide the other way, and counts how many such rows
there were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import headway as hw
from headway._dialects import DIALECTS

Array = np.ndarray
Options = dict[str, Any]
Library = Callable[[Array, Options], Array]

SLACK = 3e-5
INF = float("inf")

# The libraries ------------------------------------------------------------------------------------------------------


def hf() -> Library:
    torch = pytest.importorskip("torch", reason="transformers needs torch")
    warpers = pytest.importorskip("transformers.generation.logits_process", reason="the hf dialect is transformers'")

    def run(logits: Array, options: Options) -> Array:
        """The processors that generate() would make, in its order."""
        scores, least = torch.from_numpy(logits.copy()), options.get("min_tokens_to_keep", 1)
        get = options.get
        chain: list[Any] = []
        if get("temperature", 1.0) != 1.0:
            chain.append(warpers.TemperatureLogitsWarper(float(get("temperature"))))
        if get("top_k"):
            chain.append(warpers.TopKLogitsWarper(get("top_k"), min_tokens_to_keep=least))
        if get("top_p", 1.0) < 1.0:
            chain.append(warpers.TopPLogitsWarper(get("top_p"), min_tokens_to_keep=least))
        if get("min_p") is not None:
            chain.append(warpers.MinPLogitsWarper(get("min_p"), min_tokens_to_keep=least))
        if get("typical_p", 1.0) < 1.0:
            chain.append(warpers.TypicalLogitsWarper(get("typical_p"), min_tokens_to_keep=least))
        if 0 < get("epsilon_cutoff", 0) < 1:
            chain.append(warpers.EpsilonLogitsWarper(get("epsilon_cutoff"), min_tokens_to_keep=least))
        if 0 < get("eta_cutoff", 0) < 1:
            chain.append(warpers.EtaLogitsWarper(get("eta_cutoff"), min_tokens_to_keep=least))
        for warper in chain:
            scores = warper(None, scores)
        return np.isfinite(scores.numpy())

    return run


def mlx() -> Library:
    mx = pytest.importorskip("mlx.core", reason="the mlx dialect is mlx-lm's")
    utils = pytest.importorskip("mlx_lm.sample_utils", reason="the mlx dialect is mlx-lm's")

    def one(row: Array, options: Options) -> Array:
        """What make_sampler chains, before the draw."""
        x = mx.array(row)
        x = (x - mx.logsumexp(x, axis=-1, keepdims=True))[None]
        if options.get("temperature", 1.0) == 0:
            return np.arange(row.size) == int(utils.greedy_sampler(x)[0])
        if 0 < options.get("top_p", 0) < 1:
            x = utils.apply_top_p(x, options["top_p"])
        if options.get("min_p", 0) != 0:
            x = utils.apply_min_p(x, options["min_p"], min(options.get("min_tokens_to_keep", 1), row.size))
        if options.get("xtc_probability", 0) > 0:
            x = utils.apply_xtc(x, options["xtc_probability"], options["xtc_threshold"], [])
        if 0 < options.get("top_k", 0) < row.size:
            x = utils.apply_top_k(x, options["top_k"])
        return np.isfinite(np.array(x)[0])

    return lambda logits, options: np.stack([one(row, options) for row in logits])


# Written down from the sources. float32 throughout, sums in the order of the tokens.


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum(dtype=np.float32)


def vllm() -> Library:
    """SamplingParams, MinPLogitsProcessor, and apply_top_k_top_p_pytorch."""

    def one(row: Array, options: Options) -> Array:
        t = options.get("temperature", 1.0)
        if t == 0:
            return np.arange(row.size) == row.argmax()
        z = row / np.float32(max(t, 0.01))
        if options.get("min_p", 0) > 0:
            p = softmax(z)
            z = np.where(p < p.max() * np.float32(options["min_p"]), -INF, z).astype(np.float32)
        order = np.argsort(z, kind="stable")
        z = z[order]
        k = options.get("top_k", 0)
        if 0 < k < z.size:
            z = np.where(z < z[-k], -INF, z).astype(np.float32)
        if options.get("top_p", 1) < 1:
            out = np.cumsum(softmax(z), dtype=np.float32) <= np.float32(1) - np.float32(options["top_p"])
            out[-1] = False
            z[out] = -INF
        kept = np.zeros(z.size, bool)
        kept[order[np.isfinite(z)]] = True
        return kept

    return lambda logits, options: np.stack([one(row, options) for row in logits])


def sglang() -> Library:
    """top_k_top_p_min_p_sampling_from_probs_torch."""

    def one(row: Array, options: Options) -> Array:
        t, k = options.get("temperature", 1.0), options.get("top_k", -1)
        if t < 1e-6:
            t, k = 1.0, 1
        p = softmax(row / np.float32(t))
        order = np.argsort(-p, kind="stable")
        p = p[order]
        out = np.zeros(p.size, bool)
        if options.get("top_p", 1.0) < 1:
            out = np.cumsum(p, dtype=np.float32) - p > np.float32(options["top_p"])
        out |= np.arange(p.size) >= (k if k != -1 else 1 << 30)
        out |= p < p[0] * np.float32(options.get("min_p", 0.0))
        kept = np.zeros(p.size, bool)
        kept[order[~out]] = True
        return kept & np.isfinite(row)

    return lambda logits, options: np.stack([one(row, options) for row in logits])


def flashinfer() -> Library:
    """What its rejection loops accept: a token if those strictly above it are fewer than k, and hold less than p."""

    def above(p: Array) -> Array:
        return p[None, :] > p[:, None]  # [i, j]: j is strictly above i

    def one(row: Array, options: Options) -> Array:
        t = options.get("temperature", 1.0)
        if t == 0:
            return np.arange(row.size) == row.argmax()
        p = softmax(row / np.float32(t))
        kept = np.isfinite(row)
        by_k = above(p).sum(-1) < options.get("top_k", p.size)
        q = p if options.get("nucleus") == "joint" else p * by_k / (p * by_k).sum(dtype=np.float32)
        if options.get("top_p", 1.0) < 1:
            kept &= (above(q) * q).sum(-1, dtype=np.float32) < np.float32(options["top_p"])
        return kept & by_k & (p >= np.float32(options.get("min_p", 0.0)) * p.max())

    return lambda logits, options: np.stack([one(row, options) for row in logits])


def llama_cpp() -> Library:
    """The default chain of common/sampling.cpp over src/llama-sampling.cpp, with sorts that are stable."""

    def one(row: Array, options: Options) -> Array:
        get, least = options.get, options.get("min_tokens_to_keep", 0)
        ids = np.flatnonzero(np.isfinite(row))
        ids = ids[np.argsort(-row[ids], kind="stable")]
        if get("top_n_sigma", -1.0) > 0 and ids.size > 1:
            z = row[ids].astype(np.float64)
            ids = ids[z >= z.max() - get("top_n_sigma") * z.std()]
        if get("top_k", 0) > 0:
            ids = ids[: get("top_k")]
        if get("typical_p", 1.0) < 1:
            p = softmax(row[ids])
            with np.errstate(divide="ignore", invalid="ignore"):
                surprise = -np.log(p)
                entropy = np.nansum(p * surprise, dtype=np.float32)
            order = np.argsort(np.abs(surprise - entropy), kind="stable")
            running = np.cumsum(p[order], dtype=np.float32)
            enough = (running > np.float32(get("typical_p"))) & (np.arange(p.size) + 1 >= least)
            last = int(enough.argmax()) if enough.any() else p.size - 1
            ids = ids[np.sort(order[: last + 1])]
        if get("top_p", 1.0) < 1:
            running = np.cumsum(softmax(row[ids]), dtype=np.float32)
            enough = (running >= np.float32(get("top_p"))) & (np.arange(ids.size) + 1 >= least)
            ids = ids[: int(enough.argmax()) + 1 if enough.any() else ids.size]
        if get("min_p", 0.0) > 0:
            reach = row[ids] >= row[ids].max() + np.log(np.float32(get("min_p")))
            ids = ids[reach] if reach.sum() >= max(least, 1) else ids[: max(least, 1)]
        if get("xtc_probability", 0.0) > 0 and get("xtc_threshold") <= 0.5 and ids.size > 1:
            top = int((softmax(row[ids]) >= np.float32(get("xtc_threshold"))).sum())
            if top > 1 and ids.size - (top - 1) >= least:
                ids = ids[top - 1 :]
        return np.isin(np.arange(row.size), ids)

    return lambda logits, options: np.stack([one(row, options) for row in logits])


LIBRARIES: dict[str, Callable[[], Library]] = {
    "hf": hf,
    "vllm": vllm,
    "llama.cpp": llama_cpp,
    "flashinfer": flashinfer,
    "sglang": sglang,
    "mlx": mlx,
}


# Rows and options ---------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, V: rng.standard_normal(V) * 3,
    "flat": lambda rng, V: rng.standard_normal(V) * 0.3,
    "bfloat16": lambda rng, V: (rng.standard_normal(V) * 2).astype(ml_dtypes.bfloat16),
    "few values": lambda rng, V: np.round(rng.standard_normal(V) * 2) / 2,
    "all equal": lambda rng, V: np.full(V, rng.choice([0.0, -7.5, 3.25])),
    "bans": lambda rng, V: np.where((rng.random(V) < 0.3) & (np.arange(V) > 0), -np.inf, rng.standard_normal(V) * 2),
    "peaked": lambda rng, V: rng.standard_normal(V) + 8 * (rng.random(V) < 2 / V),
}
SIZES = (1, 2, 3, 8, 33, 64, 150)


def random_options(dialect: str, rng: np.random.Generator, V: int) -> Options:
    """Each filter of the dialect or not, with values on boundaries that a row of equal logits makes."""
    steps = {step.option for step in DIALECTS[dialect].steps}
    shares = [float(rng.random()), float(rng.integers(1, 9)) / 8, float(rng.integers(1, V + 1)) / V, 0.9, 0.05]
    values: dict[str, list[Any]] = {
        "temperature": [0.5, 0.7, 1.0, 1.5, 2.0],
        "top_n_sigma": [0.5, 1.0, 2.0, 3.0],
        "top_k": [1, 2, 5, 40, max(1, V - 1), V],
        "top_p": shares,
        "min_p": [0.0, 0.02, 0.1, 0.5, 1.0, float(rng.random())],
        "typical_p": shares,
        "epsilon_cutoff": [1e-3, 0.02, 0.2, float(rng.random())],
        "eta_cutoff": [1e-3, 0.02, 0.2, float(rng.random())],
        "xtc_probability": [1.0],
    }
    if dialect in ("hf", "llama.cpp", "mlx"):
        values["min_tokens_to_keep"] = [1, 1, 2, 5]
    out = {
        name: choice[int(rng.integers(len(choice)))]
        for name, choice in values.items()
        if (name in steps or name == "min_tokens_to_keep") and rng.random() < 0.4
    }
    if "xtc_probability" in out:
        out["xtc_threshold"] = float(rng.choice([0.0625, 0.1, 0.2, 0.02]))
    if dialect == "flashinfer" and rng.random() < 0.5:
        out["nucleus"] = "joint"
    return out


def kept(dialect: str, logits: Array, options: Options) -> Array:
    return hw.filter_logits(logits, dialect=dialect, **options) > -INF


UNSTABLE = ("hf", "mlx")


def left(dialect: str, row: Array, mask: Array) -> Array:
    """How many tokens are left of each value; where the library's sort is stable, of each id."""
    group = np.unique(row, return_inverse=True)[1] if dialect in UNSTABLE else np.arange(row.size)
    return np.bincount(group, mask)


def nearby(dialect: str, row: Array, options: Options) -> Iterator[Array]:
    """What headway keeps where logits and parameters are off by rounding. Equal logits stay equal."""
    rng = np.random.default_rng(0)
    values, inverse = np.unique(row, return_inverse=True)
    for round_ in range(48):
        noise = rng.uniform(-1, 1, values.size) * (np.abs(np.where(np.isfinite(values), values, 0)) + 1) * 2e-6
        moved = dict(options)
        for name, value in options.items():
            if isinstance(value, float) and name not in ("temperature", "xtc_probability") and value > 0:
                off = SLACK * max(value, 1 - value) * rng.choice([-1, 1])
                moved[name] = value + off if name == "top_n_sigma" else min(max(value + off, 5e-324), 1.0)
        yield kept(dialect, (values + noise * (round_ > 3))[inverse].astype(np.float32), moved)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dialect", list(LIBRARIES))
def test_the_same_tokens_are_left(dialect: str, kind: str) -> None:
    library = LIBRARIES[dialect]()
    rng = np.random.default_rng([list(LIBRARIES).index(dialect), list(KINDS).index(kind)])
    rows = differ = 0
    for _ in range(150):
        V = int(rng.choice(SIZES))
        options = random_options(dialect, rng, V)
        logits = np.stack([KINDS[kind](rng, V) for _ in range(4)]).astype(np.float32)
        got, want = kept(dialect, logits, options), library(logits, options)
        rows += len(got)
        for row, ours, theirs in zip(logits, got, want):
            ours, theirs = left(dialect, row, ours), left(dialect, row, theirs)
            if np.array_equal(ours, theirs):
                continue
            differ += 1
            could = np.stack([left(dialect, row, mask) for mask in nearby(dialect, row, options)])
            wrong = (theirs < could.min(0)) | (theirs > could.max(0))
            assert not wrong.any(), (options, row.tolist(), ours, theirs)
    assert rows == 600
    print(f"{dialect}, {kind}: {differ} of {rows} rows within rounding of a boundary")
    assert differ <= (60 if kind == "all equal" else 12)


@pytest.mark.parametrize("dialect", [name for name in LIBRARIES if name != "mlx"])  # it computes exp(log(share))
def test_exact_boundaries(dialect: str) -> None:
    """Rows of 2^n equal logits: every share is exact in float32 too, so that every boundary must be met exactly."""
    library = LIBRARIES[dialect]()
    for V in (2, 8, 64):
        logits = np.full((1, V), 1.5, np.float32)
        for k in range(1, V + 1):
            for options in ({"top_p": k / V}, {"top_k": k}, {"top_k": k, "top_p": 0.5}):
                if options.get("top_p") == 1.0 or ("top_k" in options and k & (k - 1)):
                    continue
                got, want = kept(dialect, logits, options), library(logits, options)
                if dialect in UNSTABLE:
                    got, want = got.sum(), want.sum()
                assert np.array_equal(got, want), options


def test_the_test_sees_a_wrong_dialect() -> None:
    """SGLang's rule for a mass that equals p is not vLLM's; nor are their ties."""
    logits = np.full((1, 8), 1.5, np.float32)
    assert not np.array_equal(kept("sglang", logits, {"top_p": 0.5}), vllm()(logits, {"top_p": 0.5}))
    tied = np.float32([[2.0, 1.0, 1.0, 0.0]])
    assert not np.array_equal(kept("sglang", tied, {"top_k": 2}), vllm()(tied, {"top_k": 2}))
