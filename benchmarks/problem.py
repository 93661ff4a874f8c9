"""One attention to compute: its shape, its arrays, what it costs at least, and its exact result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .harness import Array


@dataclass(frozen=True)
class Shape:
    """What distinguishes one row of the benchmark from another."""

    heads: int
    length: int
    size: int
    keys: int = 0  # length by default
    groups: int = 0  # key/value heads; heads by default
    batch: int = 1
    dtype: str = "float32"
    causal: bool = False
    window: int | None = None  # how many keys before its own a query sees, beside causal
    lengths: tuple[int, ...] = ()  # how many keys each batch item really has
    density: float | None = None  # of a random mask

    def __post_init__(self) -> None:
        """Fill in what others imply."""
        object.__setattr__(self, "keys", self.keys or self.length)
        object.__setattr__(self, "groups", self.groups or self.heads)

    @property
    def flops(self) -> float:
        """Operations that need doing: causal counts half of the square, a random mask all of it."""
        if self.window is not None:
            pairs = float(np.minimum(np.arange(self.length) + 1, self.window + 1).sum())
        else:
            pairs = self.length * self.keys / (2 if self.causal else 1)
        items = sum(self.lengths) / self.keys if self.lengths else self.batch
        return 4.0 * items * self.heads * pairs * self.size

    @property
    def bytes_read(self) -> float:
        """Keys and values, each read once."""
        tokens = sum(self.lengths) if self.lengths else self.batch * self.keys
        return 2.0 * tokens * self.groups * self.size * numbers(self.dtype).itemsize

    @property
    def scores(self) -> float:
        """Bytes of all scores at once, in float32 at least."""
        count = self.batch * self.heads * self.length * self.keys
        return float(count) * max(4, numbers(self.dtype).itemsize)


@dataclass(frozen=True)
class Problem:
    """A shape with its arrays: q (B, H, L, D), k and v (B, G, S, D)."""

    shape: Shape
    q: Array
    k: Array
    v: Array
    mask: Array | None = None  # (L, S)

    @staticmethod
    def random(shape: Shape) -> Problem:
        """Fill a shape with standard normal numbers, the same each time."""
        rng = np.random.default_rng(0)
        dtype = numbers(shape.dtype)

        def normal(heads: int, length: int) -> Array:
            kind = np.float64 if dtype == np.float64 else np.float32
            drawn = rng.standard_normal((shape.batch, heads, length, shape.size), kind)
            return drawn.astype(dtype, copy=False)

        q, k, v = normal(shape.heads, shape.length), *(normal(shape.groups, shape.keys) for _ in range(2))
        mask = None if shape.density is None else rng.random((shape.length, shape.keys)) < shape.density
        return Problem(shape, q, k, v, mask)

    @cached_property
    def lengths(self) -> Array | None:
        """How many keys each batch item has (B), or None."""
        return np.array(self.shape.lengths, np.int64) if self.shape.lengths else None

    def allowed(self, rows: Array | None = None) -> Array | None:
        """Return which keys the rows may attend to, (B or 1, 1, rows, S), or None where it is all of them."""
        shape = self.shape
        if not shape.causal and self.lengths is None and self.mask is None:
            return None
        i = (np.arange(shape.length) if rows is None else rows)[:, None]
        j = np.arange(shape.keys)
        may = np.ones((1, 1, len(i), shape.keys), bool)
        if shape.causal:
            may = may & (j <= i)
        if shape.window is not None:
            may = may & (i - j <= shape.window)
        if self.lengths is not None:
            may = may & (j < self.lengths[:, None, None, None])
        return may if self.mask is None else may & self.mask[i[:, 0]]

    def folded(self) -> Problem:
        """Make the query heads of a group the rows of one head, so that no key is read twice. For one query."""
        shape = replace(self.shape, heads=self.shape.groups, length=self.shape.heads // self.shape.groups)
        q = self.q.reshape(shape.batch, shape.heads, shape.length, shape.size)
        if self.mask is not None or shape.causal or self.shape.length != 1:
            raise ValueError("only one query at a time folds")
        return Problem(shape, q, self.k, self.v)

    def sample(self) -> Array:
        """Choose at most 64 queries to be judged by; fewer where arithmetic beyond float64 is slow."""
        count = min(self.shape.length, 8 if self.q.dtype == np.float64 else 64)
        return np.sort(np.random.default_rng(1).choice(self.shape.length, count, replace=False))

    def exact(self, rows: Array) -> Array:
        """Return these rows of the result from float64 arithmetic; from longer numbers where float64 is judged."""
        wide = np.longdouble if self.q.dtype == np.float64 else np.float64
        may = self.allowed(rows)
        out = np.empty((*self.q.shape[:2], len(rows), self.v.shape[-1]), wide)
        repeats = self.shape.heads // self.shape.groups
        for item in range(self.shape.batch):
            for group in range(self.shape.groups):
                heads = slice(group * repeats, (group + 1) * repeats)
                q, k, v = (
                    x.astype(wide) for x in (self.q[item, heads][:, rows], self.k[item, group], self.v[item, group])
                )
                s = q @ k.T / np.sqrt(wide(self.shape.size))
                if may is not None:
                    s = np.where(may[item % len(may)], s, -np.inf)
                s = np.exp(s - s.max(-1, keepdims=True))
                out[item, heads] = s @ v / s.sum(-1, keepdims=True)
        return out


def numbers(dtype: str) -> np.dtype:
    """Return NumPy's type of this name; bfloat16 comes from another package."""
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)
