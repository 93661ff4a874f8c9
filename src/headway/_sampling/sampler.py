"""A sampler for serving loops: rows come and go, and none disturbs another."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
import typing
from collections.abc import Iterator, Sequence
from itertools import count, groupby
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

import headway._native as _native

from .. import _arrays, _check
from .._check import F, one_at_a_time, shown
from .._signatures import AnyArray, NumPyLike, Tensor, Unpack
from . import bans
from .call import Call, prepare, ready, resolve
from .histories import Histories
from .logprobs import Logprobs, Ranked
from .options import SamplingOptions, Settings
from .params import SamplingParams
from .penalties import (
    DEFAULTS,
    Penalties,
    UnknownTokens,
    breaker_ids,
    checked,
    penalizes,
    shows_penalties,
    with_windows,
)
from .rows import Array, lengths_within, mask_bytes, unpacked
from .settings import CHECKS
from .speculative import Verified, chains, check_draft_params, draft_ids, fail_draft
from .stages import OFF

__all__ = ["Drawn", "RowError", "Sampler"]

_WORDS = ("ties", "nucleus", "dialect", "xtc_special_tokens")  # the settings that cannot be one per row
_ROWS_PER_CALL = 4  # at least, on average: calls of fewer leave threads idle, which costs more than masks and biases do


class Drawn(NamedTuple):
    """What `Sampler.step` drew, with log-probabilities.

    Attributes:
        tokens: (rows,).
        raw: of each token under the logits as they were given, as `logprobs` finds them.
        processed: the same under the distribution that it was drawn from.

    >>> import headway as hw
    >>> sampler = hw.Sampler(2)
    >>> row = sampler.admit(hw.SamplingParams(temperature=0))
    >>> sampler.step([[1.0, 1.0]], logprobs=0).raw.logprobs.round(4)
    array([-0.6931])
    """

    tokens: Any
    raw: Logprobs
    processed: Logprobs


class _Row(NamedTuple):
    """What does not change while a row is active."""

    handle: int
    slot: int  # of its history
    settings: Settings  # of one row: allowed and logit_bias (V,) or None; the position is that of index 0
    stream: np.uint64
    prompt: Array  # the first tokens of its sequence, a number below 0 of its own for each that has no logit
    penalties: dict[str, Array]
    breakers: frozenset[int]
    bans: bans.RowBans

    def words(self) -> tuple[Any, ...]:
        """Return what rows must share to be sampled by one call."""
        return tuple(getattr(self.settings, name) for name in _WORDS)

    def kind(self) -> tuple[Any, ...]:
        """Return what rows should share to be sampled by one call: those without a mask or bias (V,) get none."""
        return *self.words(), self.settings.allowed is None, self.settings.logit_bias is None


def _seed_of(row: _Row) -> int:
    assert row.settings.seed is not None
    return int(row.settings.seed)


def _masks(own: Any, name: str) -> Sequence[Any] | None:
    """Return the masks of a row's places, each to be checked."""
    if own is None:
        return None
    if isinstance(own, (list, tuple)):
        return _arrays.items(own, name)
    array: Array = CHECKS["allowed"](name, own, ())
    if array.ndim != 2:
        raise ValueError(f"{name}: expected a mask for each place of the row, got shape {array.shape}")
    return list(array)


class RowError(ValueError):
    """What is wrong with one row of a `Sampler`.

    Attributes:
        handle: the row's, for `Sampler.retire`, say.

    >>> import headway as hw
    >>> sampler = hw.Sampler(2)
    >>> row = sampler.admit()
    >>> try:
    ...     sampler.step([[float("nan"), 0.0]])
    ... except hw.RowError as error:
    ...     sampler.retire(error.handle)
    >>> sampler.handles
    []
    """

    def __init__(self, message: str, handle: int) -> None:
        super().__init__(message, handle)
        self.handle = handle

    def __str__(self) -> str:
        return f"{self.args[0]}; the row's handle is {self.handle}"


@contextlib.contextmanager
def _of_row(row: _Row) -> Iterator[None]:
    """Let an error say the row's handle."""
    try:
        yield
    except ValueError as error:
        raise RowError(str(error), row.handle) from None


class _Group(NamedTuple):
    """Neighbours that one call samples, and their settings and streams, one of each row."""

    handles: tuple[int, ...]
    rows: slice  # not an array of numbers, which would copy their logits
    settings: Settings
    streams: Array


class _Active(NamedTuple):
    """The active rows, and what a step takes of them: replaced as a whole, so that a signal never finds half of it."""

    rows: tuple[_Row, ...]
    groups: tuple[_Group, ...]
    # One of each row: the slot of its history, the position of its next draw, its penalties.
    slots: Array
    position: Array
    penalties: dict[str, Array]
    penalized: bool  # whether any row has penalties
    banning: tuple[int, ...]  # which rows have bans


_ONE = np.uint64(1)


def _in_turn(method: F) -> F:
    """Let calls of other threads wait for their turn; one from within a call, as of a signal's handler, is an error."""
    alone = one_at_a_time("Sampler: expected a call after the last one, got one from within it; let it end first")(
        method
    )

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return alone(self, *args, **kwargs)

    return cast(F, call)


def _of_admit() -> list[str]:
    """Return the names of the options of `Sampler.admit`."""
    return [name for name in inspect.signature(Sampler.admit).parameters if name != "self"]


class Sampler:
    """What a serving loop keeps for each request beside its logits: parameters, seed, position and history.

    A row's tokens are a function of its own logits, params, penalties, seed, stream and prompt, and of nothing else.
    Each has the bits of

        sample(penalize(logits, history, prompt_lengths=len(prompt), **penalties),
               params, seed=seed, position=len(history))

    where history is the row's prompt and its output so far; in stream k, of row k of a batch with that seed. So a text
    may stop anywhere: a row that is admitted with the output so far goes on as if it had never stopped. Calls from
    several threads take turns.

    Args:
        vocabulary: V, the number of tokens, from 1 to 2^31 - 1.

    Raises:
        TypeError, ValueError: a vocabulary that is no such number.

    >>> import headway as hw
    >>> sampler = hw.Sampler(4)
    >>> a = sampler.admit(hw.SamplingParams(temperature=0.8), [3, 3], seed=7, repetition=1.3)
    >>> b = sampler.admit(hw.SamplingParams(temperature=0))
    >>> sampler.step([[0.0, 1.0, 2.0, 3.0], [0.0, 5.0, 2.0, 3.0]])  # a row for each of sampler.handles
    array([1, 1])
    >>> sampler.retire(a)
    >>> sampler.step([[0.0, 5.0, 2.0, 6.0]])
    array([3])

    Several answers to one prompt, from one seed:

    >>> params = hw.SamplingParams(seed=4)
    >>> answers = [sampler.admit(params) for _ in range(3)]
    >>> sampler.step([[0.0, 5.0, 2.0, 6.0]] + [[0.0, 0.0, 0.0, 0.0]] * 3)
    array([3, 1, 3, 0])
    """

    @_check.public
    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = _check.integer(vocabulary, "vocabulary", 1, 2**31 - 1)
        self._admitted = 0
        self._streams: dict[int, int] = {}  # of each seed of an active row, the highest that rows with it have had
        none = np.zeros(0, np.int64)
        self._histories = Histories(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.bool_), none, none)
        self._active = _Active((), (), none, np.zeros(0, np.uint64), {}, False, ())
        self._lock = threading.RLock()  # kernels run without the GIL, and all of the above belongs together

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:  # a copy, since the state goes on changing while it is pickled
            return copy.deepcopy({name: x for name, x in self.__dict__.items() if name not in ("_lock", "_turn")})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become the sampler with this state."""
        self.__dict__.update(state, _lock=threading.RLock())

    def __repr__(self) -> str:
        return f"Sampler(vocabulary={self.vocabulary}, handles={self.handles})"

    @property
    def handles(self) -> list[int]:
        """The active rows, in the order in which `step` takes their logits.

        Returns:
            Their handles, the longest active first.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> sampler.admit(), sampler.admit()
        (0, 1)
        >>> sampler.handles
        [0, 1]
        """
        return [row.handle for row in self._active.rows]

    @shows_penalties
    @_check.public
    @_in_turn
    def admit(
        self,
        params: SamplingParams | None = None,
        prompt_tokens: AnyArray = (),
        output_tokens: AnyArray = (),
        *,
        seed: int | None = None,
        stream: int | None = None,
        count_prompt: bool = False,
        unknown_tokens: UnknownTokens = "error",
        stop_tokens: AnyArray = (),
        min_tokens: int = 0,
        banned_sequences: Sequence[int | AnyArray] = (),
        no_repeat_ngram: int | None = None,
        **penalties: Unpack[Penalties],
    ) -> int:
        """Add a row behind the others, for as long as it is active.

        Args:
            params: single numbers, and allowed and logit_bias of one row; None are the defaults. Their seed is the
                row's unless `seed` is given; where there is none it is fresh entropy. Their position, 0 unless given,
                is that of the first token of the prompt: it is added to the index of each draw in the row's sequence.
            prompt_tokens: (n,), ids: what was given.
            output_tokens: (n,), ids: what was drawn, if the row goes on with a text that another has begun. The first
                draw comes behind both.
            seed: a whole number below 2^64.
            stream: which of the seed's streams the row draws from, a whole number below 2^64. Unless given, a row with
                the seed of its params takes the lowest that no active row with that seed has: rows with the same params
                differ, as the rows of a batch do. All others take stream 0, so that `admit(seed=5)` always draws the
                same, which is what requests that bring seeds of their own want.
            count_prompt: whether frequency and presence count the prompt too; repetition and DRY always do.
            unknown_tokens: what to do with ids of the prompt outside 0 to V - 1, such as placeholders for images, where
                a penalty looks at the prompt: "error", or "ignore", which leaves them out of the history. Each has its
                place in the sequence all the same.
            stop_tokens: the ids after which the loop ends a row, which are banned until its output has min_tokens. That
                is all they do: the loop sees itself what a row draws.
            min_tokens: how many tokens the output has before any of stop_tokens, at least 0.
            banned_sequences: ids and lists of ids that are never drawn: the last id of each is banned where the history
                ends with those before it (`bad_words_ids` in transformers).
            no_repeat_ngram: n, at least 1: no n tokens come twice in prompt and output (Paulus et al., 2017,
                arXiv:1705.04304). Looking takes time linear in the history.
            **penalties: those of `penalize`, over the prompt and the output; one value each.

        Returns:
            The row's handle, which no other row of this sampler ever has.

        Raises:
            TypeError, ValueError: they name the argument, what was expected and what came.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> row = sampler.admit(hw.SamplingParams(temperature=0), [3, 3], presence=4.0, count_prompt=True)
        >>> sampler.step([[0.0, 1.0, 2.0, 5.0]])
        array([2])
        """
        of_row: SamplingOptions = {} if seed is None else {"seed": seed}
        alone = prepare(np.zeros(self.vocabulary, np.float32), params, **of_row)
        if alone.settings.uniform is not None:
            raise ValueError("uniform: expected seed and position, which make each step differ; leave it out of params")
        for name, value in vars(alone.settings).items():
            if isinstance(value, np.ndarray) and value.ndim and name not in ("allowed", "logit_bias"):
                raise ValueError(f"{name}: expected one value for the row, got shape {value.shape}")
        for name, value in penalties.items():
            if name in CHECKS:
                raise TypeError(f"{name}: no such option; give `params=hw.SamplingParams({name}={shown(value)})`")
            if name not in Penalties.__annotations__:
                raise TypeError(_check.no_such(name, value, "option", _of_admit()))
        own = checked(**penalties)
        for name, value in own.items():
            if value.ndim:
                raise ValueError(f"{name}: expected one value for the row, got shape {value.shape}")
        own_bans = bans.checked(stop_tokens, min_tokens, banned_sequences, no_repeat_ngram, self.vocabulary)
        breakers = breaker_ids(penalties.get("dry_breakers", ()), self.vocabulary)
        count_prompt = _check.boolean(count_prompt, "count_prompt")
        of_all, of_output = penalizes(own)
        prompt, known = self._prompt(prompt_tokens, unknown_tokens, bool(of_all | (of_output & count_prompt)))
        output = _check.integers(output_tokens, "output_tokens", 0, self.vocabulary - 1)
        if output.ndim != 1:
            raise ValueError(f"output_tokens: expected a list of token ids, got shape {output.shape}")
        if stream is not None:
            stream = _check.integer(stream, "stream", 0, 2**64 - 1)

        alone.spared()  # so that an id outside of the vocabulary is an error here
        source, bias = alone.source(), alone.bias()
        position = source["position"] + np.uint64(prompt.size + output.size)
        allowed, packed = alone.allowed()
        if allowed is not None:
            allowed = unpacked(allowed, self.vocabulary) if packed else allowed.view(np.bool_)
        start = source["position"][0]
        settings = alone.settings.updated(
            {"seed": source["seed"][0], "position": start, "allowed": allowed, "logit_bias": bias}
        )
        if stream is None:
            of_params = seed is None and alone.settings.seed is not None
            stream = self._free_stream(source["seed"][0]) if of_params else 0
        history = np.concatenate([known, output])
        slot = self._histories.admit(history, np.isin(history, breakers), 0 if count_prompt else known.size)
        ids = frozenset(breakers.tolist())
        row = _Row(self._admitted, slot, settings, np.uint64(stream), prompt, with_windows(own), ids, own_bans)
        active = self._with([*self._active.rows, row], np.append(self._active.position, position))
        self._note(row)
        # No function is called between the two, so that no signal's handler runs there.
        self._active = active
        self._admitted += 1
        return row.handle

    def _note(self, row: _Row) -> None:
        """Keep in mind which stream a row draws from."""
        seed = _seed_of(row)
        self._streams[seed] = max(self._streams.get(seed, 0), int(row.stream))

    def _free_stream(self, seed: Any) -> int:
        """Return the lowest stream that no active row with this seed draws from."""
        taken = {int(row.stream) for row in self._active.rows if row.settings.seed == seed}
        return next(stream for stream in count() if stream not in taken)

    def _prompt(self, prompt_tokens: AnyArray, unknown_tokens: UnknownTokens, looked_at: bool) -> tuple[Array, Array]:
        """Return the tokens of a prompt as `_Row` has them, and those of them that have a logit.

        All must have one where penalties look at the prompt, unless told otherwise.
        """
        _check.choice(unknown_tokens, "unknown_tokens", ("error", "ignore"))
        prompt = _check.integers(prompt_tokens, "prompt_tokens", -(2**63), 2**64 - 1)
        if prompt.ndim != 1:
            raise ValueError(f"prompt_tokens: expected a list of token ids, got shape {prompt.shape}")
        known = (prompt >= 0) & (prompt < self.vocabulary)
        if looked_at and unknown_tokens == "error" and not known.all():
            at = int(np.flatnonzero(~known)[0])
            raise ValueError(
                f"prompt_tokens: expected ids from 0 to {self.vocabulary - 1}, got {prompt[at]} at {at}; leave such "
                f'ids out of what penalties count with unknown_tokens="ignore"'
            )
        return np.where(known, prompt, -1 - np.arange(prompt.size)), prompt[known]

    @_check.public
    @_in_turn
    def retire(self, handle: int) -> None:
        """Remove a row: those after it move up by one.

        Args:
            handle: an active row.

        Raises:
            ValueError: a handle of no active row.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> rows = [sampler.admit() for _ in range(3)]
        >>> sampler.retire(rows[1])
        >>> sampler.handles
        [0, 2]
        """
        at = self._place(handle)
        rows, position = self._active.rows, self._active.position
        self._active = self._with([*rows[:at], *rows[at + 1 :]], np.delete(position, at))
        self._histories.retire(rows[at].slot)
        if _seed_of(rows[at]) not in map(_seed_of, self._active.rows):
            self._streams.pop(_seed_of(rows[at]), None)

    def _place(self, handle: int) -> int:
        """Return where in `handles` a row stands."""
        whole = isinstance(handle, (int, np.integer)) and not isinstance(handle, bool)
        if not whole or handle not in self.handles:
            raise ValueError(f"handle: expected one of the active rows, {self.handles}, got {shown(handle)}")
        return self.handles.index(handle)

    @_check.public
    @_in_turn
    def history(self, handle: int) -> Array:
        """Return the tokens of a row that penalties know: those of its prompt that have a logit, and its output.

        Args:
            handle: an active row.

        Returns:
            int64 (n,), the oldest first: a copy.

        Raises:
            ValueError: a handle of no active row.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> row = sampler.admit(hw.SamplingParams(temperature=0), [3, 3])
        >>> sampler.step([[0.0, 1.0, 0.0, 0.0]])
        array([1])
        >>> sampler.history(row)
        array([3, 3, 1])
        """
        return self._histories.tokens_of(self._active.rows[self._place(handle)].slot).copy()

    @_check.public
    @_in_turn
    def length(self, handle: int) -> int:
        """Return how many tokens the sequence of a row has: all of its prompt, and its output.

        Args:
            handle: an active row.

        Returns:
            The index of the token that the row draws next. It is the length of `history`, unless tokens of the prompt
            have no logit.

        Raises:
            ValueError: a handle of no active row.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> sampler.length(sampler.admit(None, [3, 3, 99], [1]))
        4
        """
        at = self._place(handle)
        return int(self._active.position[at] - self._active.rows[at].settings.position)

    @_check.public
    @_in_turn
    def fork(self, handle: int, *, seed: int | None = None, stream: int | None = None) -> int:
        """Add a row behind the others that goes on from where another is, and return its handle.

        The new row has the params, penalties, bans, prompt and output of the other. From here on each goes its own way,
        as the answers of a best-of-n or the beams of a search do. It is the row that
        `admit(params, prompt_tokens, output_tokens, seed=seed, stream=stream, ...)` would add.

        Args:
            handle: an active row.
            seed: of the new row, a whole number below 2^64; None is the other row's.
            stream: of the seed, a whole number below 2^64. None is a new one, above all that rows with the other row's
                seed have had while one of them was active: forks that are tried one after another differ. Beside a
                seed of its own it is 0.

        Returns:
            The new row's handle.

        Raises:
            TypeError, ValueError: a handle of no active row; a seed or stream that is no such number.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> row = sampler.admit(hw.SamplingParams(seed=4), [3, 3])
        >>> twin = sampler.fork(row)
        >>> sampler.step([[0.0, 0.0, 0.0, 0.0]] * 2)
        array([1, 3])
        >>> sampler.history(twin)
        array([3, 3, 3])
        """
        at = self._place(handle)
        row, position = self._active.rows[at], self._active.position
        settings = row.settings
        if seed is not None:
            settings = settings.updated({"seed": np.uint64(_check.integer(seed, "seed", 0, 2**64 - 1))})
        if stream is None:
            stream = (self._streams[_seed_of(row)] + 1) % 2**64 if seed is None else 0
        stream = _check.integer(stream, "stream", 0, 2**64 - 1)
        slot = self._histories.fork(row.slot)
        new = row._replace(handle=self._admitted, slot=slot, settings=settings, stream=np.uint64(stream))
        active = self._with([*self._active.rows, new], np.append(position, position[at]))
        self._note(new)
        # No function is called between the two, so that no signal's handler runs there.
        self._active = active
        self._admitted += 1
        return new.handle

    @_check.public
    @_in_turn
    def force(self, handle: int, token: int) -> None:
        """Put a token behind those of a row, as if the row had drawn it: penalties count it, and the position goes on.

        Args:
            handle: an active row.
            token: an id from 0 to V - 1, such as one that a grammar or an agent prescribes.

        Raises:
            TypeError: a token that is no integer.
            ValueError: a handle of no active row, or a token outside the vocabulary.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> row = sampler.admit(hw.SamplingParams(temperature=0), [3, 3])
        >>> sampler.force(row, 2)
        >>> sampler.history(row)
        array([3, 3, 2])
        """
        at = self._place(handle)
        token = _check.integer(token, "token", 0, self.vocabulary - 1)
        active, histories, row = self._active, self._histories, self._active.rows[at]
        this, slots = slice(at, at + 1), active.slots[at : at + 1]
        histories.write(slots, np.array([token]), np.array([token in row.breakers]))
        # No function is called between the two, so that no signal's handler runs there: both happen, or neither.
        histories.length[slots] += 1
        active.position[this] += _ONE

    @_check.public
    @_in_turn
    def truncate(self, handle: int, length: int) -> None:
        """Take the last tokens of a row's output back, so that its sequence has this length; the row forgets them.

        Args:
            handle: an active row.
            length: of the sequence, prompt included, as of a `KVCache`: from the prompt's length to the present one,
                which `length(handle)` says.

        Raises:
            TypeError: a length that is no integer.
            ValueError: a handle of no active row, or a length out of range.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> row = sampler.admit(None, [3, 3], [1, 2, 0])
        >>> sampler.truncate(row, 3)
        >>> sampler.history(row)
        array([3, 3, 1])
        """
        at = self._place(handle)
        active, histories, row = self._active, self._histories, self._active.rows[at]
        start, this, slots = row.settings.position, slice(at, at + 1), active.slots[at : at + 1]
        present = int((active.position[this] - start)[0])
        length = _check.integer(length, "length", row.prompt.size, present)
        less = present - length
        back = np.uint64(less)
        # No function is called from here on, so that no signal's handler runs there: all of it happens, or nothing.
        histories.length[slots] -= less
        histories.counted[slots] = 0  # what is left is counted anew
        active.position[this] -= back

    @typing.overload
    def step(self, logits: NumPyLike, *, allowed: Any = None, logprobs: None = None) -> NDArray[np.int64]: ...
    @typing.overload
    def step(self, logits: Tensor, *, allowed: Any = None, logprobs: None = None) -> Tensor: ...
    @typing.overload
    def step(self, logits: AnyArray, *, allowed: Any = None, logprobs: int) -> Drawn: ...
    @_check.public
    @_in_turn
    def step(self, logits: AnyArray, *, allowed: Any = None, logprobs: int | None = None) -> Any:
        """Draw one token for each active row.

        Where a row has an error, no row draws: the message names it and its handle, and the step may be taken again
        with other logits or after a `retire`.

        Args:
            logits: (rows, V), in the order of `handles`, of any kind of array.
            allowed: which tokens each row may draw in this step alone, of those that its params allow, such as a
                grammar's: a bool array (rows, V); an int32 or uint32 array (rows, ceil(V / 32)) with token 0 in the
                lowest bit of the first word, as grammar libraries fill it; of a lone row also (V,) or (ceil(V / 32),);
                or a list with, for each row, such a mask of one row, ids, or None.
            logprobs: n, from 0 to V, asks for log-probabilities of the drawn tokens, and of the n best.

        Returns:
            int64 (rows,), the kind of array that logits are; with logprobs `Drawn(tokens, raw, processed)`, the last
            two `Logprobs` of the drawn tokens, (rows,), and of the n best, (rows, n), None for n = 0.

        Raises:
            TypeError, ValueError: as `sample`; another number of rows.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> handles = [sampler.admit(hw.SamplingParams(temperature=0)) for _ in range(2)]
        >>> sampler.step([[0.0, 1.0, 2.0, 3.0], [0.0, 5.0, 2.0, 3.0]], allowed=[[0, 2], None])
        array([2, 1])
        >>> drawn = sampler.step([[0.0, 1.0, 2.0, 3.0], [0.0, 5.0, 2.0, 3.0]], allowed=[[0, 2], None], logprobs=1)
        >>> drawn.tokens, drawn.raw.logprobs.round(3), drawn.processed.logprobs, drawn.raw.top_tokens.tolist()
        (array([2, 1]), array([-1.44 , -0.176]), array([0., 0.]), [[3], [1]])
        """
        n = None if logprobs is None else _check.integer(logprobs, "logprobs", 0, self.vocabulary)
        operand = _arrays.unwrap(logits, "logits")
        active, histories = self._active, self._histories
        rows = len(active.rows)
        if operand.data.shape != (rows, self.vocabulary):
            raise ValueError(
                f"logits: expected shape {(rows, self.vocabulary)}, a row for each active one, got {operand.data.shape}"
            )
        mask = self._without_banned(self._mask(allowed), histories, active.position)
        if active.penalized:
            histories.penalize(operand.data, active.slots, active.penalties)
        tokens = np.empty((rows, 1), np.int64)
        processed = None if n is None else Ranked.empty(tokens, n)
        for group in active.groups:
            run, source = self._call(group, operand, active.position, mask)
            own = histories.of(active.slots[group.rows]) if active.penalized else None
            status = np.zeros(rows, np.int64)
            native, drawn = run.native(status[group.rows], own, **source), tokens[group.rows]
            if not _native.sample(native, 1, True, drawn, None, None):
                self._fail(run, status)
            if processed is not None and not processed.of(group.rows).fill(native, drawn, True):
                self._fail(run, status)
        result = operand.wrap(tokens[:, 0], "int64")
        if processed is not None:
            run, status, raw = prepare(operand, None), np.zeros(rows, np.int64), Ranked.empty(tokens, n or 0)
            if rows and not raw.fill(run.native(status), tokens, False):
                self._fail(run, status)
            top = (rows, n) if n else None
            result = Drawn(result, *(found.wrapped(operand, (rows,), top) for found in (raw, processed)))
        histories.write(active.slots, tokens[:, 0], self._breaks(tokens[:, 0]))
        # No function is called between the two, so that no signal's handler runs there: both happen, or neither.
        histories.length[active.slots] += 1
        active.position[...] += _ONE
        return result

    @_check.public
    @_in_turn
    def verify(
        self,
        target_logits: AnyArray,
        draft_tokens: AnyArray,
        draft_logits: AnyArray | None = None,
        *,
        lengths: AnyArray | None = None,
        draft_params: SamplingParams | None = None,
        allowed: Any = None,
    ) -> Verified:
        """Take a step of several tokens: accept or replace what a draft proposes for each active row.

        What comes out is distributed as the steps of the target alone would be (`verify_draft` has the sources), and
        the accepted tokens and the next one are then in the row's history. At each place the penalties, bans and
        positions are those after the drafted tokens before it; they hold for the draft's logits too, unless
        draft_params are given. So a draft that a `Sampler` with the same rows drew from draft_logits is verified as it
        was drawn. A row for which nothing was drafted takes an ordinary step. Where a row has an error, no row goes on.

        Args:
            target_logits: (rows, n + 1, V), in the order of `handles`: what the target says after 0, 1, ... n of the
                drafted tokens.
            draft_tokens: (rows, n), ids.
            draft_logits: (rows, n, V), what the draft was drawn from; None where the draft has no choice (a lookup, a
                greedy model).
            lengths: (rows,), from 0 to n: how many tokens of each row were drafted; None is all n. What stands behind
                them, tokens and logits, is padding and not looked at.
            draft_params: how the draft was drawn, where that was with other params and without penalties and bans; no
                seed, position or uniform, and one value for each option.
            allowed: which tokens each place may have, of those that the params allow: bool (rows, n + 1, V); int32
                or uint32 (rows, n + 1, ceil(V / 32)), packed as `step` takes them; of a lone row also without the
                first axis; or a list with, for each row, None or a list of masks, one for each of its places.

        Returns:
            `Verified`: accepted (rows,), next_token (rows,), tokens (rows, n + 1), of the kind of target_logits.

        Raises:
            TypeError, ValueError: what `step` and `verify_draft` raise, with the row and its handle.

        >>> import headway as hw
        >>> sampler = hw.Sampler(3)
        >>> row = sampler.admit(hw.SamplingParams(temperature=0), [0])
        >>> sampler.verify([[[0.0, 2.0, 1.0], [3.0, 1.0, 0.0], [1.0, 2.0, 5.0]]], [[1, 2]])
        Verified(accepted=array([1]), next_token=array([0]), tokens=array([[ 1,  0, -1]]))
        >>> sampler.history(row)
        array([0, 1, 0])
        """
        active, V = self._active, self.vocabulary
        rows, operand = len(active.rows), _arrays.unwrap(target_logits, "target_logits")
        shape = operand.data.shape
        if len(shape) != 3 or shape[0] != rows or shape[1] < 1 or shape[2] != V:
            raise ValueError(
                f"target_logits: expected shape ({rows}, n + 1, {V}), a row for each active one, got {shape}"
            )
        n = shape[1] - 1
        drafted = np.full(rows, n)
        if lengths is not None:
            drafted = lengths_within("lengths", lengths, (rows,), drafted, "draft_tokens")
        tokens = draft_ids(draft_tokens, drafted, (rows,), n, V)
        draft = None if draft_logits is None else _arrays.unwrap(draft_logits, "draft_logits")
        if draft is not None and draft.data.shape != (rows, n, V):
            raise ValueError(
                f"draft_logits: expected shape {(rows, n, V)} beside target_logits of {shape}, got {draft.data.shape}"
            )
        of_draft = self._of_draft(draft_params, draft is not None)
        masks = self._masks_of_places(allowed, drafted, n + 1)

        histories = self._histories.ahead(active.slots)
        accepted, next_token = np.zeros(rows, np.int64), np.full(rows, -1)
        for i in range(n + 1):
            goes_on = next_token < 0
            if not goes_on.any():
                break
            asked = np.where(goes_on, i < drafted, -1)
            token = tokens[:, i] if i < n else np.zeros(rows, np.int64)
            took, after = np.zeros((2, rows), np.int64)
            position = active.position + np.uint64(i)
            mask = self._without_banned(masks[i], histories, position)
            here = operand._replace(data=operand.data[:, i])
            there = None if draft is None or i == n else draft._replace(data=draft.data[:, i])
            beside = histories.beside() if there is not None and of_draft is None else histories
            if active.penalized:
                histories.penalize(here.data, active.slots, active.penalties)
                if there is not None and of_draft is None:
                    beside.penalize(there.data, active.slots, active.penalties)
            for group in active.groups:
                part = group.rows
                status, draft_status = np.zeros((2, rows), np.int64)
                slots = active.slots[part]
                run, source = self._call(group, here, position, mask, "target_logits")
                native = run.native(status[part], histories.of(slots) if active.penalized else None, **source)
                other, of_other = None, None
                if there is not None and of_draft is None:
                    other, _ = self._call(group, there, position, mask, "draft_logits")
                    own = beside.of(slots) if active.penalized else None
                    of_other = other.native(np.zeros_like(slots), own, **source)
                elif there is not None and of_draft is not None:
                    other = ready(there._replace(data=there.data[part]), of_draft, "draft_logits")
                    of_other = other.native(np.zeros_like(slots), **source)
                drafts = np.ascontiguousarray(token[part, None]), asked[part]
                if not _native.verify(native, of_other, *drafts, draft_status[part], took[part], after[part]):
                    self._fail_at(i, n, run, status, other, draft_status)
            next_token = np.where(goes_on & (took == 0), after, next_token)
            took = goes_on & (took == 1)
            accepted += took
            histories.write(active.slots[took], token[took], self._breaks(token)[took])
            histories.length[active.slots[took]] += 1
        histories.write(active.slots, next_token, self._breaks(next_token))
        histories.length[active.slots] += 1
        found = accepted, next_token, chains(tokens, accepted, next_token)
        result = Verified(*(operand.wrap(array, "int64") for array in found))
        went = active._replace(position=active.position + (accepted + 1).astype(np.uint64))
        # No function is called between the two, so that no signal's handler runs there: both happen, or neither.
        self._histories = histories
        self._active = went
        return result

    def _fail_at(self, i: int, n: int, run: Call, status: Array, draft: Call | None, draft_status: Array) -> None:
        """Raise what is wrong with place i of a row."""
        of_draft = draft_status.any()
        places = np.zeros((len(status), n if of_draft else n + 1), np.int64)
        places[:, i] = draft_status if of_draft else status
        row = self._active.rows[int(places[:, i].nonzero()[0][0])]
        with _of_row(row):
            if of_draft:
                fail_draft(draft and draft._replace(lead=places.shape), places.reshape(-1), places.shape)
            run._replace(lead=places.shape).fail(places.reshape(-1), bans=row.bans.names())

    def _of_draft(self, params: SamplingParams | None, has_logits: bool) -> Settings | None:
        """Return the settings of a draft, None where they are those of each row."""
        if params is None:
            return None
        if not has_logits:
            raise ValueError("draft_params: expected draft_logits to apply them to, got None; leave one of them out")
        check_draft_params(params)
        settings = resolve(params)
        for name, value in vars(settings).items():
            if isinstance(value, np.ndarray) and value.ndim > (name in ("allowed", "logit_bias")):
                raise ValueError(f"draft_params: expected one {name} for all rows, got shape {value.shape}")
        return settings

    def _masks_of_places(self, allowed: Any, drafted: Array, places: int) -> list[Array | None]:
        """Return the masks of each place, as `_mask` returns those of a step."""
        if allowed is None:
            return [None] * places
        rows = len(drafted)
        if isinstance(allowed, (list, tuple)):
            if len(allowed) != rows:
                raise ValueError(
                    f"allowed: expected {rows} lists of masks, one for each active row, got {len(allowed)}"
                )
            each = [_masks(own, f"allowed[{r}]") for r, own in enumerate(_arrays.items(allowed, "allowed"))]
            for r, (own, count) in enumerate(zip(each, drafted.tolist())):
                if own is not None and len(own) <= count:
                    raise ValueError(
                        f"allowed[{r}]: expected {count + 1} masks, one for each place of the row, got {len(own)}"
                    )
            return [
                self._mask([None if own is None or i >= len(own) else own[i] for own in each]) for i in range(places)
            ]
        array: Array = CHECKS["allowed"]("allowed", allowed, ())
        if rows == 1 and array.ndim == 2:
            array = array[None]
        if array.ndim != 3 or array.shape[:2] != (rows, places):
            raise ValueError(
                f"allowed: expected a mask for each place of each row, of shape ({rows}, {places}, ...), got shape "
                f"{array.shape}"
            )
        return [self._mask(array[:, i]) for i in range(places)]

    def _call(
        self, group: _Group, operand: _arrays.Operand, position: Array, mask: Array | None, name: str = "logits"
    ) -> tuple[Call, dict[str, Any]]:
        """Return the call that samples a group, of operand (rows, V), and the source of its random numbers."""
        changes: dict[str, Any] = {"position": position[group.rows]}
        if mask is not None:
            changes["allowed"] = self._both(group.settings.allowed, mask[group.rows])
        run = ready(operand._replace(data=operand.data[group.rows]), group.settings.beside(changes), name)
        return run, run.source() | {"stream": group.streams}

    def _breaks(self, tokens: Array) -> Array:
        """Return whether the token of each row is a breaker there."""
        return np.array([token in row.breakers for token, row in zip(tokens.tolist(), self._active.rows)], np.bool_)

    def _fail(self, run: Call, status: Array) -> None:
        row = self._active.rows[int(status.nonzero()[0][0])]
        with _of_row(row):
            run._replace(lead=status.shape).fail(status, bans=row.bans.names())

    def _mask(self, allowed: Any) -> Array | None:
        """Return a step's masks: bool (rows, V), or uint32 (rows, ceil(V / 32))."""
        if allowed is None:
            return None
        rows, vocabulary = len(self._active.rows), self.vocabulary
        if isinstance(allowed, (list, tuple)):
            if len(allowed) != rows:
                raise ValueError(f"allowed: expected {rows} masks, one for each active row, got {len(allowed)}")
            masks = np.ones((rows, vocabulary), np.bool_)
            for i, own in enumerate(_arrays.items(allowed, "allowed")):
                mask = CHECKS["allowed"](f"allowed[{i}]", own, ())
                if mask is not None:
                    as_bytes, packed = mask_bytes(f"allowed[{i}]", mask, (vocabulary,))
                    masks[i] = unpacked(as_bytes, vocabulary) if packed else as_bytes
            return masks
        array: Array = CHECKS["allowed"]("allowed", allowed, ())
        shapes = {np.dtype(np.bool_): (rows, vocabulary), np.dtype(np.uint32): (rows, -(-vocabulary // 32))}
        shaped: Array = array[None] if rows == 1 and array.ndim == 1 else array
        while shaped.ndim > 2 and len(shaped) == 1:
            shaped = shaped[0]
        if shaped.shape != shapes.get(array.dtype):
            bools, words = shapes.values()
            kind = {"bool": "a bool mask", "uint32": "a packed mask"}.get(array.dtype.name, "ids")
            raise ValueError(
                f"allowed: expected a mask for each active row, of shape {bools} for bool or {words} for packed int32, "
                f"or a list of {rows}, got {kind} of shape {array.shape}"
            )
        return shaped

    def _without_banned(self, mask: Array | None, histories: Histories, position: Array) -> Array | None:
        """Return a step's masks, without what rows have banned after these histories, at these positions."""
        active = self._active
        banned = {}
        for at in active.banning:
            row = active.rows[at]
            drawn = int((position[at : at + 1] - row.settings.position)[0]) - row.prompt.size
            history = histories.tokens_of(row.slot)
            ids = row.bans.next(np.concatenate([row.prompt, history[history.size - drawn :]]), drawn)
            if ids.size:
                banned[at] = ids
        if not banned:
            return mask
        rows = len(active.rows)
        masks = np.ones((rows, self.vocabulary), np.bool_) if mask is None else self._bools(mask).copy()
        for at, ids in banned.items():
            masks[at, ids] = False
        return masks

    def _both(self, own: Array | None, mask: Array) -> Array:
        return mask if own is None else own & self._bools(mask)

    def _bools(self, mask: Array) -> Array:
        if mask.dtype == np.uint32:
            return unpacked(np.ascontiguousarray(mask).view(np.uint8), self.vocabulary)
        return mask

    def _with(self, rows: list[_Row], position: Array) -> _Active:
        """Batch the settings of these rows, so that a step has nothing to do with them."""
        penalties = {name: np.array([row.penalties[name] for row in rows]) for name in with_windows(DEFAULTS)}
        before = {group.handles: group for group in self._active.groups}
        runs = [list(run) for _, run in groupby(rows, _Row.kind)]
        if len(rows) < _ROWS_PER_CALL * len(runs):
            runs = [list(run) for _, run in groupby(rows, _Row.words)]
        groups, end = [], 0
        for members in runs:
            handles = tuple(row.handle for row in members)
            start, end = end, end + len(members)
            if handles in before:
                groups.append(before[handles]._replace(rows=slice(start, end)))
            else:
                streams = np.array([row.stream for row in members])
                groups.append(_Group(handles, slice(start, end), self._batched(members), streams))
        slots = np.array([row.slot for row in rows], np.int64)
        penalized = any(on.any() for on in penalizes(penalties))
        banning = tuple(at for at, row in enumerate(rows) if row.bans.any())
        return _Active(tuple(rows), tuple(groups), slots, position, penalties, penalized, banning)

    def _batched(self, members: list[_Row]) -> Settings:
        off: dict[str, Any] = OFF | {
            "allowed": np.full(self.vocabulary, True),
            "logit_bias": np.zeros(self.vocabulary, np.float32),
        }
        batched: dict[str, Any] = {}
        for name, first in vars(members[0].settings).items():
            values = [getattr(row.settings, name) for row in members]
            if name in _WORDS:
                batched[name] = first
            elif all(value is None for value in values):
                batched[name] = None
            else:
                batched[name] = np.array([off[name] if value is None else value for value in values])
        return Settings.of(batched)
