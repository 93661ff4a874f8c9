"""The Llama architecture on headway's operations: what one sequence of tokens is, and what scores its successors.

`_Layers._record` is the architecture; docs/architecture.md says where another one goes.

Touvron et al. 2023 (arXiv:2302.13971): RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) before each block,
rotary positions (Su et al. 2021, arXiv:2104.09864), grouped-query attention (Ainslie et al. 2023,
arXiv:2305.13245), SwiGLU (Shazeer 2020, arXiv:2002.05202). Arithmetic is float32. Shapes: L tokens, M model
width, V vocabulary, H query heads, G key/value heads, D head size, I inner width of the feed-forward block.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import headway as hw
import headway._native as _native

from .. import _check
from .._arrays import Operand, as_numpy
from .._attention.cache import extend, room_for
from .._attention.call import Call, Keys, prepare
from .._attention.call import run as attend
from .checkpoint import Config, Floats, Stored, Weights

_alone = _check.one_at_a_time(
    "Session: another call of this session is under way, in another thread or in what a signal interrupted; give each "
    "thread a session of its own, or guard it with a lock"
)


def in_panels(weights: Weights) -> Weights:
    """Return weights whose matrices (in, out) are in panels of 16 columns, (panels, in, 16).

    A product with one token waits for memory, which is read fastest in one stretch, the 16 sums that grow together side
    by side. The type is the file's, but for float64, which becomes float32. Pages that were read of a mapped file are
    released.
    """

    def packed(matrix: Stored) -> Stored:
        inner, outer = matrix.shape
        kind = np.float32 if matrix.dtype == np.float64 else matrix.dtype
        panels = np.empty((-(-outer // 16), inner, 16), kind)
        _native.pack(np.require(matrix, kind, "A"), panels)
        owner: Any = matrix
        while isinstance(owner, np.ndarray):
            owner = owner.base
        # What was written to a private mapping would be lost.
        if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and not matrix.flags.writeable:
            with suppress(OSError):  # of memory that is locked
                owner.madvise(mmap.MADV_DONTNEED)
        return panels

    layers = (
        replace(layer, **{name: packed(w) for name, w in vars(layer).items() if w is not None and w.ndim == 2})
        for layer in weights.layers
    )
    return replace(weights, layers=tuple(layers), head=packed(weights.head))


class Session:
    """One sequence of tokens, and the keys and values that every layer keeps of it.

    Feeding a sequence whole, in parts, or token by token gives the same logits in bits: there is one way of
    computing, and no row of any product knows how many rows stand beside it. `len(session)` is the number of
    tokens so far. `Model.session` makes one.

    Attributes:
        config: the shape of its model.
        weights: the tensors of its model.

    >>> import numpy as np
    >>> from headway.lm import load
    >>> model = load()
    >>> session = model.session()
    >>> rows = [session.next_logits([token]) for token in (5, 6, 7)]
    >>> np.array_equal(rows, model.logits([5, 6, 7]))
    True
    """

    def __init__(self, config: Config, weights: Weights, panels: Weights) -> None:
        self.config = config
        self.weights = weights
        self._panels = panels  # the same, as in_panels returns them
        self._caches = [hw.KVCache(config.num_key_value_heads, config.head_dim) for _ in weights.layers]
        self._length = 0
        self._layers: _Layers | None = None  # for as many tokens as came last

    def __len__(self) -> int:
        return self._length

    @_check.public
    @_alone
    def next_logits(self, ids: ArrayLike) -> Floats:
        """Append tokens, and score the successors of the last.

        Args:
            ids: (L,), at least one, from 0 to V - 1.

        Returns:
            (V,), float32.

        Raises:
            TypeError: ids that are no integers.
            ValueError: ids outside the vocabulary, or more than the context has room for; the session is then as it
                was.
            RuntimeError: another call of this session is under way.

        >>> from headway.lm import load
        >>> session = load().session()
        >>> session.next_logits([5, 6, 7]).shape, len(session)
        ((2048,), 3)
        """
        tokens = self._checked(ids)
        if not len(tokens):
            raise ValueError("ids: expected at least one token, got none")
        # Of a long prompt only the last row is wanted, and V is the widest product of all.
        scores: Floats = self._scores(self._append(tokens)[-1:])[0]
        return scores

    @_check.public
    @_alone
    def logits(self, ids: ArrayLike) -> Floats:
        """Append tokens, and score the successors of each.

        Args:
            ids: (L,), from 0 to V - 1.

        Returns:
            (L, V), float32: row i scores the token that follows ids[: i + 1].

        Raises:
            TypeError, ValueError, RuntimeError: as `next_logits`.

        >>> from headway.lm import load
        >>> load().session().logits([5, 6, 7]).shape
        (3, 2048)
        """
        return self._scores(self._append(self._checked(ids)))

    def _scores(self, x: Floats) -> Floats:
        scores = np.empty((len(x), self.config.vocab_size), np.float32)
        if len(x):
            _native.linear(x, self._panels.head, None, False, False, scores)
        return scores

    def _append(self, tokens: NDArray[np.int64]) -> Floats:
        """Run the layers over new tokens, the caches giving them all that came before: (L,) -> (L, M)."""
        for cache in self._caches:
            if len(cache) > self._length:  # of a call that Ctrl-C has ended
                cache.truncate(self._length)
        if not len(tokens):
            return np.empty((0, self.config.hidden_size), np.float32)
        memory = [room_for(cache, len(tokens)) for cache in self._caches]
        layers = self._layers
        if layers is None or not layers.fit(len(tokens), memory):
            layers = self._layers = _Layers(self.config, self._panels, len(tokens), memory)
        x = layers.run(tokens, self._length)
        for cache in self._caches:
            extend(cache, len(tokens))
        self._length += len(tokens)
        return x

    def _checked(self, ids: ArrayLike) -> NDArray[np.int64]:
        tokens = _check.integers(ids, "ids", 0, self.config.vocab_size - 1)
        if tokens.ndim != 1:
            raise ValueError(f"ids: expected shape (L,), got {tokens.shape}")
        context = self.config.max_position_embeddings
        if len(self) + len(tokens) > context:
            raise ValueError(
                f"ids: expected at most {context - len(self)} more tokens (the model's context holds {context}, of "
                f"which {len(self)} are there), got {len(tokens)}"
            )
        return tokens


_Memory = tuple[NDArray[Any], NDArray[Any]]  # of a cache: keys in panels, and values


class _Layers:
    """The layers over L new tokens of a sequence: recorded once on arrays of their own, and run without Python."""

    def __init__(self, config: Config, weights: Weights, rows: int, memory: list[_Memory]) -> None:
        self._rows, self._memory, self._embedding = rows, memory, weights.embedding
        self._program = _native.Program()
        self._attended: dict[int, tuple[int, Floats, Floats]] = {}  # by the number of steps then done: layer, q, result
        self._positions = np.empty(rows, np.int64)
        self._x, self._normed = (np.empty((rows, config.hidden_size), np.float32) for _ in range(2))
        self._record(config, weights)

    def _record(self, config: Config, weights: Weights) -> None:
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rows, eps, program, x, h = self._rows, config.rms_norm_eps, self._program, self._x, self._normed
        frequencies = np.array(config.rope_frequencies)
        positions = np.broadcast_to(self._positions, (heads + groups, rows))

        def buffer(width: int) -> Floats:
            return np.empty((rows, width), np.float32)

        def by_head(columns: Floats) -> Floats:
            return columns.reshape(rows, -1, size).swapaxes(0, 1)

        qkv, turned, attended, y = (
            buffer(n) for n in ((heads + 2 * groups) * size, (heads + groups) * size, heads * size, x.shape[1])
        )
        q, k, v = np.split(qkv, (heads * size, (heads + groups) * size), axis=1)
        gate, up, gated = (buffer(config.intermediate_size) for _ in range(3))
        qk = by_head(turned)

        for i, (layer, (panels, values)) in enumerate(zip(weights.layers, self._memory, strict=True)):
            program.rms_norm(x, layer.attention_norm, eps, h)
            program.linear(h, [layer.w_q, layer.w_k, layer.w_v], [layer.b_q, layer.b_k, layer.b_v], [q, k, v])
            program.rotary(by_head(qkv)[: heads + groups], positions, frequencies, qk)
            program.append(qk[heads:], by_head(v), panels, values)
            call = _call(qk[:heads], panels, values, values.shape[-2])
            program.attend(qk[:heads], panels, values, call.options, by_head(attended))
            self._attended[len(program)] = i, qk[:heads], by_head(attended)
            program.linear(attended, [layer.w_o], [layer.b_o], [y])
            program.add(y, x)

            program.rms_norm(x, layer.mlp_norm, eps, h)
            program.linear(h, [layer.w_gate, layer.w_up], [layer.b_gate, layer.b_up], [gate, up])
            program.swiglu(gate, up, gated)
            program.linear(gated, [layer.w_down], [layer.b_down], [y])
            program.add(y, x)
        program.rms_norm(x, weights.norm, eps, h)

    def fit(self, rows: int, memory: list[_Memory]) -> bool:
        """Whether they were recorded for so many tokens and for this memory."""
        return rows == self._rows and all(a[0] is b[0] for a, b in zip(memory, self._memory, strict=True))

    def run(self, tokens: NDArray[np.int64], start: int) -> Floats:
        """Write the keys and values of tokens that come after `start` others to memory, and return (L, M)."""
        self._positions[:] = np.arange(start, start + self._rows)
        _native.convert(self._embedding[tokens], self._x)
        done = self._program.run(start)
        while done < len(self._program):  # attention had results beyond float32, which it computes again
            i, q, attended = self._attended[done]
            attend(_call(q, *self._memory[i], start + self._rows), False, attended)
            done = self._program.run(start, done)
        return self._normed


def _call(q: Floats, panels: NDArray[Any], values: NDArray[Any], length: int) -> Call:
    """Return the call of attention to so many tokens of a cache, each of q's seeing those up to itself."""
    stored, kept = Operand(panels, "float32", as_numpy), Operand(values[..., :length, :], "float32", as_numpy)
    keys = Keys(stored, (), panels.shape[0], length, panels.shape[-2], in_panels=True)
    return prepare(q, keys, kept, causal="bottom_right")
