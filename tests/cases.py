"""A fixed set of calls that goes through every kernel, and the digests of their results.

The contract of bits says that the digests are the same for every instruction set, number of threads, process and
floating-point mode. As a program it prints them: ``HEADWAY_ISA=portable python tests/cases.py``; with ``--record 2`` it
writes them down as those of version 2 of the contract.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from oracles import CHUNK, DTYPES, digest, normal

import headway as hw
from headway import _native

rng = np.random.default_rng(20)


def attention_inputs(dtype: str) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """Two batch items, 4 heads over 2, lengths and widths off every multiple, and all options at once."""
    L, S = 29, 2 * CHUNK + 77
    q, k, v = normal(rng, 2, 4, L, 23), normal(rng, 2, 2, S, 23), normal(rng, 2, 2, S, 21)
    bias = normal(rng, 4, L, S)
    bias[rng.random(bias.shape) < 0.05] = -np.inf
    options = {
        "causal": "bottom_right",
        "window": (900, None),
        "softcap": 4.0,
        "mask": rng.random((2, 1, L, S)) < 0.8,
        "bias": bias.astype("float64" if dtype == "float64" else "float32"),
        "sinks": normal(rng, 4, dtype=dtype),
        "kv_lengths": np.array([S, S - 300]),
    }
    return tuple(x.astype(DTYPES[dtype]) for x in (q, k, v)), options


def awkward(dtype: str) -> tuple[np.ndarray, ...]:
    """Subnormal numbers, huge scores, infinities and NaN: what flushing, estimates and libraries differ in."""
    q, k, v = (normal(rng, 1, n, 16).astype(np.float64) for n in (9, 600, 600))
    tiny = {"float64": 1e-310, "float32": 1e-40, "float16": 1e-6, "bfloat16": 1e-39}[dtype]
    v *= tiny
    q[0, 0] *= 30
    q[0, 1] *= tiny
    k[0, 5, 3] = np.inf
    v[0, 500, 2] = np.nan
    q[0, 2, 3] = 0  # 0 * inf: this row is NaN
    q[0, 3:6, 3] = -1  # -inf: weight 0, but 0 * NaN in v
    return tuple(x.astype(DTYPES[dtype]) for x in (q, k, v))


INPUTS = {dtype: attention_inputs(dtype) for dtype in DTYPES}
AWKWARD = {dtype: awkward(dtype) for dtype in DTYPES}
PLAIN = {D: tuple(normal(rng, 2, n, D) for n in (45, 700, 700)) for D in (64, 3)}
# Few heads and long keys, which threads share by spans of chunks; few rows, and more than a band of them.
LONG = tuple(normal(rng, *shape) for shape in ((4, 11, 64), (1, 9 * CHUNK + 5, 64), (1, 9 * CHUNK + 5, 64)))
WIDE_PLAIN = tuple(normal(rng, 2, n, 3, dtype="float64") for n in (5, 60, 60))
X, W, B = normal(rng, 2, 50, 300), normal(rng, 300, 72), normal(rng, 72)
SPREAD = X[0, :6] * 3
WEIGHTS = [normal(rng, 60, 60) / np.float32(8) for _ in range(4)]
NARROWED = [normal(rng, *shape, dtype="float64") for shape in ((45, 700), (2,), (2, 9, 3))]  # into narrower types
LONG_ROW = {dtype: (3 * np.sin(np.arange(40_003) * 0.7)).astype(DTYPES[dtype]) for dtype in DTYPES}
_LOGITS = np.concatenate(
    [
        normal(rng, 3, 5003) * np.float32([[1], [4], [1e-40]]),
        np.round(normal(rng, 2, 5003) * 2) / np.float32(2),
        rng.choice(np.float32([3e4, -3e4, 0.0, -0.0, 1e-42, -np.inf]), (2, 5003)),
    ]
)
LOGITS = {dtype: _LOGITS.astype(DTYPES[dtype]) for dtype in DTYPES}
SAMPLING: list[dict[str, Any]] = [
    {"temperature": np.array([1.0, 0.7, 1e-39, 2.0, 0.0, 5e-324, 1e39])},
    {"temperature": 0.8, "top_k": np.array([40, 700, 1, 90, 4000, 9, 5003]), "ties": "keep"},
    {"temperature": 1.5, "top_p": np.array([0.9, 0.5, 1e-300, 0.3, 1.0, 0.999, 0.7]), "min_p": 0.01},
    {
        "top_k": 300,
        "top_p": 0.9,
        "nucleus": "joint",
        "logit_bias": normal(rng, 5003, dtype="float64") * 1e-41,
        "allowed": list(range(5000)),
    },
]
HISTORY = np.tile(rng.integers(0, 5003, (7, 20)), 3)
TOKENS = rng.integers(0, 5003, (7, 2))
# a + b c, rounded once, is the number next to 1; rounded to float64 on the way, it is a tie, and goes the other way.
ONCE_X = np.array([[s * (1 + 2.0**-23), s * t * (1 + 2.0**-15)] for s in (1, -1) for t in (1, -1)], np.float32)
ONCE_W = np.array([[1], [(1 - 2.0**-15) * 2.0**-24]], np.float32)
POSITIONS = np.array([0, 1, 2, 1000, 100_000, 2**24 - 1])


def _whole(dtype: str) -> Any:
    arrays, options = INPUTS[dtype]
    return hw.attention(*arrays, return_lse=True, **options)


def _weights(dtype: str) -> Any:
    (q, k, _), options = INPUTS[dtype]
    return hw.attention_weights(q, k, **options)


def _parts(dtype: str) -> Any:
    (q, k, v), options = INPUTS[dtype]
    rest = {n: options[n] for n in ("causal", "window", "softcap", "kv_lengths")}
    states = []
    for a, b in [(CHUNK, 2 * CHUNK), (2 * CHUNK, k.shape[-2]), (0, CHUNK)]:
        part = {n: options[n][..., a:b] for n in ("mask", "bias")}
        states.append(hw.partial_attention(q, k[..., a:b, :], v[..., a:b, :], key_offset=a, **rest, **part))
    return hw.merge_attention(states, sinks=options["sinks"], return_lse=True)


def _cache(dtype: str) -> Any:
    q, k, v = INPUTS[dtype][0]
    cache = hw.KVCache(2, 23, value_dim=21, batch_shape=(2,), dtype=DTYPES[dtype])
    cache.append(k, v)
    return cache.attend(q, return_lse=True)


def _long(dtype: str) -> Any:
    q, k, v = (x.astype(DTYPES[dtype]) for x in LONG)
    in_a_window = hw.attention(q, k, v, causal="bottom_right", window=(3 * CHUNK, None))
    return hw.attention(q, k, v, return_lse=True), hw.attention(q[:, :1], k, v), in_a_window


def _awkward(dtype: str) -> Any:
    q, k, v = AWKWARD[dtype]
    return hw.attention(q, k, v, return_lse=True), hw.attention(q[:, 1:2], k[:, 6:400], v[:, 6:400])


def _layer(dtype: str) -> Any:
    x = X[..., :60].astype(DTYPES[dtype])
    w_q, w_k, w_v, w_o = (w.astype(DTYPES[dtype]) for w in WEIGHTS)
    return hw.multi_head_attention(x, x, x, num_heads=4, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o, causal=True)


def _linear(dtype: str) -> Any:
    x, w, b = (a.astype(DTYPES[dtype]) for a in (X, W, B))
    return hw.linear(x, w, b), hw.linear(x[0, :1], w[:, :5]), hw.linear(x, np.ascontiguousarray(w.T).T)


def in_panels(x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """Return x w + b from the panels that headway.lm keeps w in; float64 has none."""
    if w.dtype == np.float64:
        return hw.linear(x, w, b)
    K, N = w.shape
    y = np.empty((*x.shape[:-1], N), x.dtype)
    panels = np.full((-(-N // 16), K, 16), 99).astype(w.dtype)
    bits = [a if a is None or a.dtype != DTYPES["bfloat16"] else a.view(np.uint16) for a in (x, w, b, panels, y)]
    _native.pack(bits[1], bits[3])
    _native.linear(bits[0].reshape(-1, K), bits[3], bits[2], False, False, bits[4].reshape(-1, N))
    return y


def _panels(dtype: str) -> Any:
    x, w, b = (a.astype(DTYPES[dtype]) for a in (X, W, B))
    return in_panels(x, w, b), in_panels(x[0, :1], w[:, :5]), in_panels(x, np.ascontiguousarray(w.T).T)


def _small(dtype: str) -> Any:
    x, up, weight = (a.astype(DTYPES[dtype]) for a in (SPREAD, X[1, :6], X[0, 7]))
    tiny = AWKWARD[dtype][2][0]
    return (
        hw.rotary(x, positions=POSITIONS),
        hw.rms_norm(x, weight),
        hw.rms_norm(tiny[:400], tiny[401], eps=1e-12),
        hw.swiglu(x, up),
        hw.swiglu(tiny, tiny),
    )


def _sampling(dtype: str) -> Any:
    logits = LOGITS[dtype]
    return tuple(
        (
            hw.sample(logits, seed=3, position=2**63, **options),
            hw.sample(logits, uniform=0.999, **options),
            hw.probabilities(logits, **options),
            hw.filter_logits(logits, **options),
        )
        for options in SAMPLING
    )


def _long_row(dtype: str) -> Any:
    """A vocabulary that threads share; its filters begin with a sample."""
    row = LONG_ROW[dtype]
    options = (
        {},
        {"top_p": 0.9},
        {"top_k": 15_000, "min_p": 0.01},
        {"typical_p": 0.6},
        {"top_p": 0.3, "eta_cutoff": 1e-4},
    )
    drawn = [hw.sample(row, seed=3, position=p, **o) for o in options for p in range(3)]
    return np.array(drawn), hw.filter_logits(row, **options[2])


def _around(dtype: str) -> Any:
    """Penalties, several draws, log-probabilities, speculative sampling."""
    logits = LOGITS[dtype]
    penalized = hw.penalize(logits, HISTORY, repetition=1.3, frequency=0.1, dry_multiplier=0.8, dry_base=1.5)
    without = hw.sample(logits[:5], num_samples=300, replacement=False, temperature=1.5, seed=3)
    raw, processed = hw.logprobs(logits, TOKENS, top=9), hw.logprobs(logits, TOKENS, top=9, processed=True, top_p=0.9)
    verified = hw.verify_draft(logits[[0, 1, 0]], logits[[1, 0]], TOKENS[0], temperature=2, seed=3)
    return penalized, hw.sample(logits, num_samples=7, seed=3), without, *raw, *processed, verified.tokens


KINDS: dict[str, Callable[[str], Any]] = {
    "attention": _whole,
    "weights": _weights,
    "parts": _parts,
    "cache": _cache,
    "long": _long,
    "awkward": _awkward,
    "layer": _layer,
    "linear": _linear,
    "panels": _panels,
    "small": _small,
    "sampling": _sampling,
    "long row": _long_row,
    "around": _around,
}


def _flat(result: Any) -> list[Any]:
    return [x for part in result for x in _flat(part)] if isinstance(result, tuple) else [result]


def digests() -> dict[str, str]:
    """Run every case."""
    found = {f"{kind} {dtype}": digest(*_flat(run(dtype))) for kind, run in KINDS.items() for dtype in DTYPES}
    for D, (q, k, v) in PLAIN.items():
        found[f"plain {D}"] = digest(
            hw.attention(q, k, v), hw.attention(q[:, :1], k, v, window=(5, 9), causal="top_left")
        )
    found["plain float64"] = digest(hw.attention(*WIDE_PLAIN))  # its default scale is no power of two
    q, k, v = PLAIN[64]
    found["narrowed"] = digest(hw.attention(q, k, v, bias=NARROWED[0], sinks=NARROWED[1]))
    for dtype in ("float32", "float16", "bfloat16"):
        cache = hw.KVCache(2, 3, dtype=DTYPES[dtype])
        cache.append(NARROWED[2], NARROWED[2])
        found[f"narrowed {dtype} cache"] = digest(cache.keys, cache.values)
    found["fused"] = digest(hw.linear(ONCE_X, ONCE_W))
    found["decimals"] = digest(hw.multi_head_attention(X, X, X, num_heads=4, decimals=6))
    return found


RECORDED = Path(__file__).parent / "bits.json"
SAMPLED = ("sampling", "long row", "around")  # not recorded: the reference says their every token
EQUAL = {"parts": "attention", "panels": "linear"}  # by law


def inputs_digest() -> str:
    """One digest of what attention and its layers are given here."""
    given = [*PLAIN[64], *PLAIN[3], *LONG, *WIDE_PLAIN, X, W, B, *WEIGHTS, *NARROWED, ONCE_X, ONCE_W, POSITIONS]
    for dtype in DTYPES:
        arrays, options = INPUTS[dtype]
        given += [*arrays, *AWKWARD[dtype], *(x for x in options.values() if isinstance(x, np.ndarray))]
    return digest(*given)


def record(version: str) -> None:
    """Write down the bits of attention and its layers, once for each version of the contract."""
    found = {name: value for name, value in digests().items() if not name.startswith((*SAMPLED, "panels"))}
    content = {"version": version, "inputs": inputs_digest(), "digests": found}
    RECORDED.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if "--record" in sys.argv:
        record(sys.argv[-1])
    json.dump({"isa": hw.info().isa, "digests": digests()}, sys.stdout)
