"""What the attention tests share: random arrays, awkward memory layouts, equal bits, errors in units of rounding."""

from __future__ import annotations

import hashlib
from typing import Any

import ml_dtypes
import numpy as np

import headway as hw
from headway import reference

DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
# Half the distance from 1 to the next number: what one rounding may lose, relatively.
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Below this a number of the type keeps fewer digits; the absolute rounding error there is UNIT * TINY.
TINY = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}
CHUNK = hw.info().chunk_length


def normal(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> np.ndarray:
    return rng.standard_normal(shape).astype(DTYPES[dtype])


def wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays, or tuples of arrays, agree in type, shape and every bit."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def digest(*arrays: Any) -> str:
    h = hashlib.sha256()
    for a in arrays:
        h.update(f"{a.dtype} {a.shape}".encode())
        h.update(a.tobytes())
    return h.hexdigest()


LAYOUTS = ("contiguous", "transposed", "reversed", "last axis apart", "offset", "spread")


def laid_out(x: np.ndarray, layout: str) -> np.ndarray:
    """The same numbers in other memory."""
    if layout == "transposed":
        return np.ascontiguousarray(np.swapaxes(x, -1, -2)).swapaxes(-1, -2)
    if layout == "reversed":
        return np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    if layout == "last axis apart":
        base = np.zeros((*x.shape[:-1], 3 * x.shape[-1]), x.dtype)
        base[..., ::3] = x
        return base[..., ::3]
    if layout == "offset":  # one item past an aligned address
        base = np.zeros(x.size + 1, x.dtype)
        base[1:] = x.ravel()
        return base[1:].reshape(x.shape)
    if layout == "spread":  # the L axis outside the heads: (..., L, H, D) in memory
        return np.ascontiguousarray(np.swapaxes(x, -3, -2)).swapaxes(-3, -2)
    return np.ascontiguousarray(x)


def tolerance(q: Any, k: Any, v: Any, dtype: str, **options: Any) -> np.ndarray:
    """A bound on |attention - reference| for the computing type, element by element of the reference's result.

    A chain of n fused multiply-adds errs by about sqrt(n) roundings of its size (Higham and Mary, 2019); a score so
    gathers sqrt(D) units of scale * sum |q| |k|, and a few more of its own size on its way through softcap and bias.
    An absolute error e of the scores is a relative error 2e of the weights. The weighted sum is a chain of at most
    CHUNK, whose terms add up to at most max |v|. The factors in front were chosen once: 2 to 4 times what was seen.
    """
    unit = UNIT["float64" if dtype == "float64" else "float32"]
    q, k, v = wide(q), wide(k), wide(v)
    D, S = q.shape[-1], k.shape[-2]
    if S == 0 or v.size == 0 or q.size == 0:
        return np.float64(0)
    scale = abs(options.get("scale") or D**-0.5)
    size = scale * np.max(np.linalg.norm(q, axis=-1)) * np.max(np.linalg.norm(k, axis=-1))
    score_error = unit * size * (2 + np.sqrt(D))
    if options.get("softcap"):
        score_error += 4 * unit * min(size, options["softcap"])
    if options.get("bias") is not None:
        bias = wide(options["bias"])
        score_error += unit * (size + np.max(np.abs(bias), where=np.isfinite(bias), initial=0))
    relative = 2 * score_error + unit * (4 + np.sqrt(min(S, CHUNK)))
    return relative * np.max(np.abs(v))


def assert_close(got: Any, want: np.ndarray, tol: Any, dtype: str) -> None:
    """Within tol, plus the one rounding to the result's type."""
    assert got.dtype == DTYPES[dtype]
    assert got.shape == want.shape
    got = wide(got)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    bound = tol + UNIT[dtype] * np.maximum(np.abs(want), TINY[dtype]) * 1.01
    worst = np.max(np.abs(np.nan_to_num(got - want)) - bound, initial=-np.inf)
    assert worst <= 0, f"error exceeds its bound by {worst:.3e}; bound up to {np.max(bound):.3e}"


def reference_attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """The definition on the numbers that the arrays hold."""
    for name in ("bias", "sinks"):
        if options.get(name) is not None:
            options[name] = wide(options[name])
    return reference.attention(wide(q), wide(k), wide(v), **options)
