"""The key/value cache: what decoding remembers, as an object of its own."""

from __future__ import annotations

import contextlib
import math
import typing
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import headway._native as _native

from .. import _check
from .._arrays import FLOATING, Operand, as_numpy, items, storage, unwrap
from .._signatures import AnyArray, NumPyLike, Tensor, Unpack, shows_options
from .call import DEFAULTS, LARGEST_HEAD, Keys, prepare, run
from .options import AttentionOptions

__all__ = ["KVCache"]

LANES: int = _native.LANES
_FIRST_CAPACITY = 64
_MOST_HEADS = 2**24

_alone = _check.one_at_a_time(
    "KVCache: another call of this cache is under way, in another thread or in what a signal interrupted; "
    "give each thread its own fork(), or guard the cache with a lock"
)


class KVCache:
    """Keys and values of the tokens so far, for attention token by token.

    Decoding with a cache equals attention over the whole, bit for bit. Keys are kept in panels of 16, transposed,
    (..., G, panels, D, 16): a kernel reads the scores of 16 keys in one go, and never transposes.

    A cache belongs to one thread at a time: where two calls meet, the second is a RuntimeError and changes nothing. Its
    forks are caches of their own.

    Args:
        num_kv_heads: G.
        head_dim: D, the head size of the keys.
        value_dim: E, the head size of the values; head_dim by default.
        batch_shape: the leading axes of every array that goes in and comes out.
        dtype: float64, float32, float16 or bfloat16 (by name, or as a NumPy type): how keys and values are stored.
        capacity: how many tokens to make room for at the start; the cache grows when it must.

    Raises:
        TypeError, ValueError: they name the argument, what was expected and what came.

    >>> import numpy as np, headway as hw
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 8))
    >>> cache = hw.KVCache(2, 8, dtype=np.float64)
    >>> rows = []
    >>> for i in range(5):
    ...     cache.append(k[:, i : i + 1], v[:, i : i + 1])
    ...     rows.append(cache.attend(q[:, i : i + 1]))
    >>> bool((np.concatenate(rows, axis=1) == hw.attention(q, k, v, causal=True)).all())
    True
    """

    @_check.public
    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        batch_shape: tuple[int, ...] = (),
        dtype: Any = np.float32,
        capacity: int | None = None,
    ) -> None:
        """Make an empty cache."""
        if not isinstance(batch_shape, (tuple, list)):
            raise TypeError(
                f"batch_shape: expected a tuple of integers, got {_check.shown(batch_shape)}; one axis is (n,)"
            )
        self._heads = _check.integer(num_kv_heads, "num_kv_heads", 1, _MOST_HEADS)
        self._key_size = _check.integer(head_dim, "head_dim", 1, LARGEST_HEAD)
        self._value_size = (
            self._key_size if value_dim is None else _check.integer(value_dim, "value_dim", 0, LARGEST_HEAD)
        )
        self._batch = tuple(_check.integer(n, "batch_shape", 0) for n in items(batch_shape, "batch_shape"))
        if math.prod(max(n, 1) for n in self._batch) * self._heads * max(self._key_size, self._value_size) >= 2**48:
            raise ValueError(f"batch_shape: expected sizes that memory could hold, got {_check.shown(batch_shape)}")
        self._dtype = _dtype_name(dtype)
        self._length = 0
        self._shared = False  # whether a fork reads the same memory, so that writing must copy first
        room = 0 if capacity is None else _check.integer(capacity, "capacity", 0, 2**40)
        self._panels, self._values = self._allocate(room)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self._length

    def __repr__(self) -> str:
        shape = f"num_kv_heads={self._heads}, head_dim={self._key_size}, batch_shape={self._batch}"
        return f"KVCache({shape}, dtype={self._dtype!r}, length={self._length})"

    def __bool__(self) -> bool:
        """An empty cache is a cache."""
        return True

    @property
    @_alone
    def keys(self) -> NDArray[Any]:
        """A copy of the keys.

        Returns:
            (..., G, S, D), in the cache's type.

        >>> import numpy as np, headway as hw
        >>> cache = hw.KVCache(1, 2)
        >>> cache.append(np.ones((1, 3, 2)), np.zeros((1, 3, 2)))
        >>> cache.keys.shape
        (1, 3, 2)
        """
        panels = np.moveaxis(self._panels, -1, -2)  # (..., G, panels, 16, D)
        rows = panels.reshape(*self._batch, self._heads, panels.shape[-3] * LANES, self._key_size)
        keys: NDArray[Any] = as_numpy(rows[..., : self._length, :].copy(), self._dtype)
        return keys

    @property
    @_alone
    def values(self) -> NDArray[Any]:
        """A copy of the values.

        Returns:
            (..., G, S, E), in the cache's type.

        >>> import numpy as np, headway as hw
        >>> cache = hw.KVCache(1, 2)
        >>> cache.append(np.ones((1, 3, 2)), np.zeros((1, 3, 2)))
        >>> cache.values.shape
        (1, 3, 2)
        """
        values: NDArray[Any] = as_numpy(self._values[..., : self._length, :].copy(), self._dtype)
        return values

    @_check.public
    @_alone
    def append(self, k: AnyArray, v: AnyArray) -> None:
        """Add the keys and values of L more tokens, converted to the cache's type.

        Args:
            k: (..., G, L, D).
            v: (..., G, L, E).

        Raises:
            TypeError: not an array of floating numbers.
            ValueError: shapes that do not fit; the cache is then as it was.
            RuntimeError: another call of this cache is under way.

        >>> import numpy as np, headway as hw
        >>> cache = hw.KVCache(1, 2)
        >>> cache.append(np.ones((1, 3, 2)), np.zeros((1, 3, 2)))
        >>> len(cache)
        3
        """
        new_keys, new_values = self._fitting(k, "k", self._key_size), self._fitting(v, "v", self._value_size)
        count = new_keys.shape[-2]
        if new_values.shape[-2] != count:
            raise ValueError(f"v: expected as many tokens as k has, {count}, got {new_values.shape[-2]}")
        if count:
            _native.append(new_keys, new_values, *self._room(count), self._length)
        self._length += count

    @typing.overload
    def attend(
        self, q: NumPyLike, *, return_lse: Literal[False] = False, **options: Unpack[AttentionOptions]
    ) -> NDArray[Any]: ...
    @typing.overload
    def attend(
        self, q: NumPyLike, *, return_lse: Literal[True], **options: Unpack[AttentionOptions]
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...
    @typing.overload
    def attend(
        self, q: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[AttentionOptions]
    ) -> Tensor: ...
    @typing.overload
    def attend(
        self, q: Tensor, *, return_lse: Literal[True], **options: Unpack[AttentionOptions]
    ) -> tuple[Tensor, Tensor]: ...
    @typing.overload
    def attend(self, q: AnyArray, *, return_lse: bool, **options: Unpack[AttentionOptions]) -> Any: ...
    @_check.public
    @_alone
    @shows_options(AttentionOptions, DEFAULTS | {"causal": "bottom_right"})
    def attend(self, q: AnyArray, *, return_lse: bool = False, **options: Unpack[AttentionOptions]) -> Any:
        """Attend to the cache: `attention(q, cache.keys, cache.values, ...)` without the copies.

        Args:
            q: queries (..., H, L, D), which count as the last L tokens of the cache, causally, unless causal says
                otherwise.
            return_lse: also return the log-sum-exp of each row's scores.
            **options: those of `attention`; causal is "bottom_right" unless given.

        Returns:
            (..., H, L, E) of q's kind; with return_lse a pair, the second (..., H, L).

        Raises:
            TypeError, ValueError: as `attention`.
            RuntimeError: another call of this cache is under way.

        >>> import numpy as np, headway as hw
        >>> cache = hw.KVCache(1, 2)
        >>> cache.append(np.ones((1, 3, 2)), np.zeros((1, 3, 2)))
        >>> cache.attend(np.ones((1, 1, 2))).tolist()
        [[[0.0, 0.0]]]
        """
        batch = self._batch
        stored = Operand(self._panels, self._dtype, as_numpy)
        values = Operand(self._values[..., : self._length, :], self._dtype, as_numpy)
        cached = Keys(stored, batch, self._heads, self._length, self._key_size, in_panels=True)
        options.setdefault("causal", "bottom_right")
        call = prepare(q, cached, values, **options)
        return run(call, _check.boolean(return_lse, "return_lse"))

    @_check.public
    @_alone
    def truncate(self, length: int) -> None:
        """Keep the first tokens, and forget the others.

        Args:
            length: how many to keep, at most as many as there are.

        Raises:
            TypeError, ValueError: a length that is no such number.
            RuntimeError: another call of this cache is under way.

        >>> import numpy as np, headway as hw
        >>> cache = hw.KVCache(1, 2)
        >>> cache.append(np.ones((1, 3, 2)), np.zeros((1, 3, 2)))
        >>> cache.truncate(1)
        >>> len(cache)
        1
        """
        self._length = _check.integer(length, "length", 0, self._length)

    @_check.public
    def fork(self) -> KVCache:
        """Return a second cache with the same tokens. They share memory until either is written to.

        Returns:
            A cache of its own.

        Raises:
            RuntimeError: another call of this cache is under way.

        >>> import numpy as np, headway as hw
        >>> cache = hw.KVCache(1, 2)
        >>> cache.append(np.ones((1, 3, 2)), np.zeros((1, 3, 2)))
        >>> twin = cache.fork()
        >>> twin.append(np.ones((1, 1, 2)), np.zeros((1, 1, 2)))
        >>> len(cache), len(twin)
        (3, 4)
        """
        twin = object.__new__(type(self))
        twin.__setstate__(self.__getstate__())
        return twin

    __copy__ = fork

    @_alone
    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy holds; whichever of the two writes first copies the memory."""
        self._shared = True
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become the cache with this state."""
        self.__dict__.update(state)

    def _allocate(self, capacity: int) -> tuple[NDArray[Any], NDArray[Any]]:
        panels = -(-capacity // LANES)
        kind = storage(self._dtype)
        # Zeros: a panel's unused lanes are multiplied too, though what comes of them is never used.
        return (
            np.zeros((*self._batch, self._heads, panels, self._key_size, LANES), kind),
            np.zeros((*self._batch, self._heads, panels * LANES, self._value_size), kind),
        )

    def _room(self, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the memory, of our own and with room for so many more tokens: twice as much as before if it was full.

        Returns:
            Keys (..., G, panels, D, 16) and values (..., G, 16 panels, E).
        """
        room, length = self._values.shape[-2], self._length + count
        if length > room or self._shared:
            panels, values = self._allocate(max(length, 2 * room if length > room else room, _FIRST_CAPACITY))
            panels[..., : self._panels.shape[-3], :, :] = self._panels
            values[..., :room, :] = self._values
            self._panels, self._values, self._shared = panels, values, False
        return self._panels, self._values

    def _fitting(self, x: Any, name: str, size: int) -> NDArray[Any]:
        operand = unwrap(x, name)
        shape = operand.data.shape
        expected = (*self._batch, self._heads)
        if len(shape) != len(expected) + 2 or shape[:-2] != expected or shape[-1] != size:
            listed = ", ".join(map(str, expected))
            raise ValueError(f"{name}: expected shape ({listed}, L, {size}), got {shape}")
        return operand.data


def room_for(cache: KVCache, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the memory of a cache, where the caller writes the next tokens before it calls `extend`.

    Args:
        cache: no other call of which is under way.
        count: how many tokens come next.

    Returns:
        Keys (..., G, panels, D, 16) and values (..., G, 16 panels, E), in the cache's type.

    >>> import headway as hw
    >>> panels, values = room_for(hw.KVCache(2, 8), 1)
    >>> panels.shape, values.shape
    ((2, 4, 8, 16), (2, 64, 8))
    """
    return cache._room(count)


def extend(cache: KVCache, count: int) -> None:
    """Let a cache hold the tokens that were written to its memory.

    Args:
        cache: whose memory it is, of `room_for`.
        count: how many tokens.

    >>> import headway as hw
    >>> cache = hw.KVCache(2, 8)
    >>> memory = room_for(cache, 3)
    >>> extend(cache, 3)
    >>> len(cache)
    3
    """
    cache._length += count


def _dtype_name(dtype: Any) -> str:
    if dtype is None:  # which NumPy would take for float64
        raise ValueError(f"dtype: expected one of {', '.join(FLOATING)}, got None")
    name: str = dtype
    with contextlib.suppress(Exception):  # whatever it is that cannot be a type
        if not isinstance(dtype, str):
            name = str(getattr(dtype, "name", dtype)).rpartition(".")[2]
        if name not in FLOATING:
            name = np.dtype(dtype).name
    if name not in FLOATING:
        raise ValueError(f"dtype: expected one of {', '.join(FLOATING)}, got {_check.shown(dtype)}")
    return name
