"""Next-token sampling: one token, the distribution it is drawn from, and the logits that are left.

Every function takes logits of shape (..., V), V the vocabulary, and the same options. The stages, in order:
logit_bias and allowed, temperature, top_k, top_p, min_p; then the draw. `docs/semantics.md` says what each means to the
last bit, `headway.reference` says it in NumPy, and the kernels in `src/core/sampling.h` give those same bits.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _arrays, _check, _native

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SamplingParams", "filter_logits", "probabilities", "sample"]

Array = NDArray[Any]
Settings = dict[str, Any]  # checked options, as the kernels want them


class Options(TypedDict, total=False):
    """The options of `sample`, `probabilities` and `filter_logits`; `SamplingParams` explains them."""

    temperature: ArrayLike
    top_k: ArrayLike | None
    top_p: ArrayLike | None
    min_p: ArrayLike | None
    allowed: Any
    logit_bias: Any
    ties: Literal["lowest_id", "keep"]
    nucleus: Literal["after_top_k", "joint"]
    seed: ArrayLike | None
    position: ArrayLike | None
    uniform: ArrayLike | None


@dataclass(frozen=True, eq=False)
class SamplingParams:
    """How to sample: checked once, frozen, hashable; the options that `sample` takes as keywords.

    A number may be an array too, one value per row, of a shape that broadcasts to the leading axes of the logits.

    temperature: finite, >= 0. Logits are divided by it. 0 is argmax, the lowest id among equal logits.
    top_k: at least 1. Keeps the k best tokens: logit descending, id ascending (Fan et al., 2018).
    top_p: in (0, 1]. Keeps a token iff the mass strictly before it is below p (Holtzman et al., 2020); 1 is off.
    min_p: in [0, 1]. Keeps a token iff it has at least min_p times the best one's mass (Nguyen et al., 2024).
    allowed: which tokens may be drawn: a bool array (..., V), an int32 or uint32 array (..., ceil(V / 32)) with
        token 0 in the lowest bit of the first word, or a list, tuple, set or int64 array of ids.
    logit_bias: added to the logits before all else: an array (V,) or (..., V), or a dict {id: bias}; -inf bans.
    ties: "lowest_id", exactly k tokens; "keep", also all tokens equal to the k-th.
    nucleus: "after_top_k" measures top_p over what top_k left, "joint" over all tokens that are not banned.
    seed: a whole number below 2^64, or one per row, of exactly the leading shape; None takes fresh entropy.
    position: a whole number below 2^64, 0 unless given: which draw of the seed's this is, such as the step.
    uniform: numbers in [0, 1) of the caller's own generator, instead of seed and position.

    Raises ValueError and TypeError that name the option, what was expected and what came.

    >>> import headway as hw
    >>> params = hw.SamplingParams(temperature=0.8, top_k=2, seed=1)
    >>> hw.sample([0.5, 3.0, 2.5], params)
    2
    """

    temperature: ArrayLike = 1.0
    top_k: ArrayLike | None = None
    top_p: ArrayLike | None = None
    min_p: ArrayLike | None = None
    allowed: Any = None
    logit_bias: Any = None
    ties: Literal["lowest_id", "keep"] = "lowest_id"
    nucleus: Literal["after_top_k", "joint"] = "after_top_k"
    seed: ArrayLike | None = None
    position: ArrayLike | None = None
    uniform: ArrayLike | None = None

    def __post_init__(self) -> None:
        """Check every option, and take arrays out of the caller's reach."""
        for name in _CHECKS:
            object.__setattr__(self, name, _frozen(getattr(self, name), name))
        _check_source(self._settings)

    @cached_property
    def _settings(self) -> Settings:
        return _checked({name: getattr(self, name) for name in _CHECKS})

    def _key(self) -> tuple[Any, ...]:
        return tuple(_identity(getattr(self, name)) for name in _CHECKS)

    def __eq__(self, other: object) -> bool:
        """Equal values are equal, arrays included."""
        return isinstance(other, SamplingParams) and self._key() == other._key()

    def __hash__(self) -> int:
        """Equal values have equal hashes, arrays and dicts included."""
        return hash(self._key())


F = TypeVar("F", bound=Callable[..., Any])


def _shows_options(function: F) -> F:
    """Let help() and editors show every option with its default instead of **options."""
    signature = inspect.signature(function)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(SamplingParams)
    ]
    function.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return function


@_shows_options
def sample(
    logits: ArrayLike,
    params: SamplingParams | None = None,
    *,
    num_samples: int | None = None,
    replacement: bool = True,
    **options: Unpack[Options],
) -> Any:
    """Draw one token per row of logits, or several.

    logits (V,) -> int; (..., V) -> int64 (...), the same kind of array. `SamplingParams` explains the options; those
    given by keyword win over those in params. A draw depends on nothing but the row's logits, its options, seed and
    position: with one seed for many rows, row i draws from stream i of the seed, so row 0 draws what it would alone.

    num_samples=n draws n tokens per row: (..., V) -> (..., n), the first of which is the one that a lone call draws.
    With replacement they are independent; without, each is drawn from what the earlier ones left, so all differ.
    uniform is then one number per draw, (..., n).

    Random numbers: Philox4x64-10 (Salmon et al., 2011), those of numpy.random.Philox for the same key and counter.

    Raises ValueError for NaN and +inf in the logits, for a row in which every token is banned or fewer are left than
    are to be drawn without replacement, and for options out of range; TypeError for what is no number or no array.

    >>> import headway as hw
    >>> hw.sample([1.0, 3.0, 2.0], temperature=0)
    1
    >>> hw.sample([[1.0, 3.0, 2.0], [4.0, 1.0, 0.0]], temperature=0.7, top_p=0.9, seed=7)
    array([2, 0])
    >>> hw.sample([1.0, 3.0, 2.0], num_samples=3, replacement=False, seed=7)
    array([2, 1, 0])
    """
    run = _Run(logits, params, options)
    if not isinstance(replacement, (bool, np.bool_)):
        raise TypeError(f"replacement: expected True or False, got {_shown(replacement)}")
    draws = () if num_samples is None else (_check.integer(num_samples, "num_samples", 1),)
    tokens = np.empty((*run.lead, *draws), np.int64)
    run(tokens=tokens, draws=math.prod(draws), replacement=bool(replacement), **run.source(*draws))
    return int(tokens) if not tokens.ndim else run.operand.wrap(tokens, "int64")


@_shows_options
def probabilities(logits: ArrayLike, params: SamplingParams | None = None, **options: Unpack[Options]) -> Any:
    """Return the distribution that `sample` draws from, exactly.

    logits (..., V) -> (..., V), the same kind of array: float32, or float64 for float64 logits. A removed token has
    probability 0. Options and errors are those of `sample`; seed, position and uniform change nothing.

    >>> import headway as hw
    >>> hw.probabilities([3.0, 2.0, 1.0], temperature=0.5, top_k=2).round(4)
    array([0.8808, 0.1192, 0.    ])
    """
    run = _Run(logits, params, options)
    dtype = _arrays.compute_dtype(run.operand.dtype)
    out = np.empty(run.data.shape, dtype)
    run(probabilities=out)
    return run.operand.wrap(out, dtype)


@_shows_options
def filter_logits(logits: ArrayLike, params: SamplingParams | None = None, **options: Unpack[Options]) -> Any:
    """Return the logits as given, plus logit_bias, with -inf where a stage removed the token.

    logits (..., V) -> (..., V), the same kind of array and dtype. They are not divided by the temperature, which only
    has its part in what top_p and min_p remove. Options and errors are those of `sample`.

    >>> import headway as hw
    >>> hw.filter_logits([3.0, 2.0, 1.0], temperature=0.5, top_p=0.9)
    array([  3.,   2., -inf])
    """
    run = _Run(logits, params, options)
    out = np.empty(run.data.shape, run.data.dtype)
    run(filtered=out)
    return run.operand.wrap(out, run.operand.dtype)


class _Run:
    """One call: the logits, and the options in the form that the kernel takes."""

    def __init__(
        self, logits: Any, params: SamplingParams | None, options: Mapping[str, Any], name: str = "logits"
    ) -> None:
        self.name = name
        self.operand = _arrays.unwrap(logits, name)
        self.data = self.operand.data
        if self.data.ndim == 0:
            raise ValueError(f"{name}: expected an array (V,) or (..., V), got a single number")
        if self.data.shape[-1] == 0:
            raise ValueError(f"{name}: expected at least one token, got an array of shape {self.data.shape}")
        self.lead, self.vocabulary = self.data.shape[:-1], self.data.shape[-1]
        self.rows = self.data.size // self.vocabulary
        self.settings = _resolve(params, options)

    def __call__(
        self,
        *,
        draws: int = 1,
        replacement: bool = True,
        tokens: Array | None = None,
        probabilities: Array | None = None,
        filtered: Array | None = None,
        edits: list[Array] | None = None,
        **source: Any,
    ) -> None:
        """Fill the outputs that are given."""
        status = np.empty(self.rows, np.int64)
        rows = self.native(status, edits, **source)
        if self.rows and not _native.sample(rows, draws, replacement, tokens, probabilities, filtered):
            self.fail(status, draws)

    def native(
        self,
        status: Array,
        edits: list[Array] | None = None,
        *,
        seed: Array | None = None,
        position: Array | None = None,
        rows_per_stream: int = 0,
        uniform: Array | None = None,
    ) -> _native.Rows:
        """Return the rows as the kernels take them; they write what is wrong with each into status."""
        data, bias, (allowed, packed) = self.data, self.bias(), self.allowed()
        if len(self.lead) > 8:  # more axes than the kernel walks
            data = _flat(data)
            bias = None if bias is None else _flat(bias)
            allowed = None if allowed is None else _flat(allowed)
        return _native.Rows(
            logits=data,
            bias=bias,
            allowed=allowed,
            packed=packed,
            temperature=self.per_row("temperature"),
            top_k=self.per_row("top_k"),
            top_p=self.per_row("top_p"),
            min_p=self.per_row("min_p"),
            keep_ties=self.settings["ties"] == "keep",
            joint=self.settings["nucleus"] == "joint",
            edits=edits,
            seed=seed,
            position=position,
            rows_per_stream=rows_per_stream,
            uniform=uniform,
            status=status,
        )

    def per_row(self, name: str, *draws: int) -> Array:
        """Return a setting as one value, or as one per row, or per row and draw, in C order."""
        value: Array = self.settings[name]
        if value.ndim == 0:
            return value.reshape(1)
        return np.ascontiguousarray(_broadcast(name, value, (*self.lead, *draws))).reshape(-1)

    def source(self, *draws: int) -> dict[str, Any]:
        """Return where the random numbers come from."""
        if self.settings["uniform"] is not None:
            return {"uniform": self.per_row("uniform", *draws)}
        seed = self.settings["seed"]
        if seed is None:
            seed = np.frombuffer(os.urandom(8), np.uint64)[0]
        if seed.ndim and seed.shape != self.lead:
            raise ValueError(
                f"seed: expected one integer, or one per row in an array of shape {self.lead}, got shape {seed.shape}; "
                "rows that share a seed in such an array would draw the same"
            )
        position = self.per_row("position") if self.settings["position"] is not None else np.zeros(1, np.uint64)
        return {"seed": seed.reshape(-1), "position": position, "rows_per_stream": int(seed.ndim == 0)}

    def bias(self) -> Array | None:
        bias = self.settings["logit_bias"]
        if bias is None:
            return None
        if isinstance(bias, _Sparse):
            dense = np.zeros(self.vocabulary, np.float32)
            dense[self.ids("logit_bias", bias.ids)] = bias.values
            bias = dense
        return self.per_token("logit_bias", bias)

    def allowed(self) -> tuple[Array | None, bool]:
        """Return the mask as bytes, and whether each byte holds eight tokens."""
        allowed = self.settings["allowed"]
        if allowed is None:
            return None, False
        if allowed.dtype == np.int64:
            mask = np.zeros(self.vocabulary, np.uint8)
            mask[self.ids("allowed", allowed)] = 1
            return self.per_token("allowed", mask), False
        if allowed.dtype == np.bool_:
            return self.per_token("allowed", allowed.view(np.uint8)), False
        words = -(-self.vocabulary // 32)
        if allowed.ndim == 0 or allowed.shape[-1] != words:
            raise ValueError(
                f"allowed: expected a packed mask of {words} 32-bit words for {self.vocabulary} tokens, got shape "
                f"{allowed.shape}; give ids as a list or an int64 array"
            )
        packed = np.ascontiguousarray(allowed).view(np.uint8)
        return _broadcast("allowed", packed, (*self.lead, packed.shape[-1])), True

    def per_token(self, name: str, array: Array) -> Array:
        if array.shape[-1:] != (self.vocabulary,):
            raise ValueError(
                f"{name}: expected a last axis of {self.vocabulary}, one for each token, got shape {array.shape}"
            )
        return _broadcast(name, array, self.data.shape)

    def ids(self, name: str, ids: Array) -> Array:
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            bad = ids[(ids < 0) | (ids >= self.vocabulary)][0]
            raise ValueError(f"{name}: expected ids from 0 to {self.vocabulary - 1}, got {bad}")
        return ids

    def fail(self, status: Array, draws: int = 1) -> None:
        """Raise what the kernel found in the first row that has a fault."""
        row = int(status.nonzero()[0][0])
        token, fault = divmod(int(status[row]), _native.SAMPLING_FAULTS)
        where = _in_row(row, self.lead)
        if fault == 1:
            raise ValueError(
                f"{self.name}: expected numbers, got NaN at token {token}{where}; -inf is what bans a token"
            )
        if fault == 2:
            raise ValueError(f"{self.name}: expected finite numbers or -inf, got +inf at token {token}{where}")
        if fault == 3:
            raise ValueError(
                f"{self.name}: expected numbers within float32, got one at token {token}{where} that overflows"
                + (" with its logit_bias" if self.settings["logit_bias"] is not None else "")
                + "; subtract the row's maximum first"
            )
        if fault == 5:
            raise ValueError(
                f"num_samples: expected at most {token} without replacement{where}, where no more tokens are left to "
                f"draw from, got {draws}; draw with replacement, or filter less"
            )
        name = next((n for n in ("allowed", "logit_bias") if self.settings[n] is not None), self.name)
        raise ValueError(f"{name}: expected at least one token that is not banned{where}, got none; allow one")


# Checks of options --------------------------------------------------------------------------------------------------


_LARGEST: dict[Any, int] = {np.int64: 2**63 - 1, np.uint64: 2**64 - 1}


class _Sparse(NamedTuple):
    ids: Array
    values: Array


@dataclass(frozen=True)
class _Reals:
    """What a real-valued option may be, and the value that switches it off."""

    expected: str
    cure: str
    holds: Callable[[Any], Any]
    off: float | None = None

    def __call__(self, name: str, value: Any) -> Array | None:
        if value is None and name != "temperature":
            return None if self.off is None else np.array(self.off)
        if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
            if not self.holds(value) or value > sys.float_info.max:
                raise ValueError(f"{name}: expected {self.expected}, got {value!r}; {self.cure}")
            return np.array(value, np.float64)
        if value is None or isinstance(value, (str, bool, np.bool_, complex)):
            raise TypeError(f"{name}: expected {self.expected}, or an array of them, got {_shown(value)}")
        array = _arrays.unwrap(value, name).astype("float64")
        holds = self.holds(array)
        if not holds.all():
            index, bad = _first(array, ~holds)
            raise ValueError(f"{name}{_place(index)}: expected {self.expected}, got {bad!r}; {self.cure}")
        return array


@dataclass(frozen=True)
class _Integers:
    """What a whole-numbered option may be, the kernel's type for it, and the value that None stands for."""

    expected: str
    cure: str
    least: int
    dtype: type[np.integer[Any]]
    none: int | None = None
    clip: bool = False  # a larger number than the type holds means no more than its largest

    def __call__(self, name: str, value: Any) -> Array | None:
        if value is None:
            return None if self.none is None else np.array(self.none, self.dtype)
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            return np.array(self.one(name, value, ()), self.dtype)
        if isinstance(value, (str, bool)) or str(getattr(value, "dtype", "")).endswith("bfloat16"):
            raise ValueError(f"{name}: expected {self.expected}, got {_shown(value)}; {self.cure}")
        # Lists as objects, so that no number above 2^63 becomes a float on the way.
        array = np.array(value, object) if isinstance(value, (list, tuple)) else _arrays.plain(value, name)
        whole = array.dtype.kind in "iu" and array.size
        if whole and array.min() >= self.least and int(array.max()) <= _LARGEST[self.dtype]:
            return array.astype(self.dtype)
        out = np.empty(array.shape, self.dtype)
        for index, item in np.ndenumerate(array):
            out[index] = self.one(name, item, index)
        return out

    def one(self, name: str, value: Any, index: tuple[int, ...]) -> int:
        largest = _LARGEST[self.dtype]
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < self.least or (value > largest and not self.clip):
            raise ValueError(f"{name}{_place(index)}: expected {self.expected}, got {_shown(value)}; {self.cure}")
        return min(int(value), largest)


def _choice(*choices: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")
        return value

    return check


def _allowed(name: str, value: Any) -> Array | None:
    """None, or an array whose dtype says what it is: bool a mask, uint32 a packed one, int64 ids."""
    if value is None:
        return None
    if isinstance(value, (set, frozenset)):
        value = list(value)
    array = _arrays.plain(value, name) if not isinstance(value, (str, Mapping)) else np.array(None)
    if isinstance(value, (list, tuple)) and not array.size:
        array = array.astype(np.int64)
    if array.dtype == np.int32:
        return array.view(np.uint32)
    if array.dtype in (np.bool_, np.uint32):
        return array
    if array.dtype == np.int64 and array.ndim == 1:
        return array
    raise TypeError(
        f"{name}: expected a bool mask (..., V), a packed int32 mask (..., ceil(V / 32)), or a flat list of ids, got "
        f"{_shown(value)}"
    )


def _logit_bias(name: str, value: Any) -> Array | _Sparse | None:
    if value is None:
        return None
    ids: Array | None = None
    if isinstance(value, Mapping):
        keys = _Integers("token ids as keys", "use a dict {id: bias}", 0, np.int64)
        ids = np.array([keys.one(name, token, ()) for token in value], np.int64)
        value = list(value.values())
    with np.errstate(over="ignore"):
        array = _arrays.unwrap(value, name).astype("float32")
    if array.size and not array.max() < np.inf:  # NaN too
        index, bad = _first(array, ~(array < np.inf))
        place = _place(index) if ids is None else f"[{ids[index]}]"
        raise ValueError(f"{name}{place}: expected a finite number within float32, or -inf, got {bad}")
    return array if ids is None else _Sparse(ids, array)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _Reals("a finite number >= 0", "0 is argmax", lambda t: (t >= 0) & (t < np.inf)),
    "top_k": _Integers("an integer >= 1", "use None to switch it off", 1, np.int64, 2**63 - 1, clip=True),
    "top_p": _Reals("a number in (0, 1]", "use None to switch it off", lambda p: (p > 0) & (p <= 1), 1.0),
    "min_p": _Reals("a number in [0, 1]", "use None to switch it off", lambda p: (p >= 0) & (p <= 1), 0.0),
    "allowed": _allowed,
    "logit_bias": _logit_bias,
    "ties": _choice("lowest_id", "keep"),
    "nucleus": _choice("after_top_k", "joint"),
    "seed": _Integers("an integer from 0 to 2^64 - 1", "use None for fresh entropy", 0, np.uint64),
    "position": _Integers("an integer from 0 to 2^64 - 1", "use the number of the step", 0, np.uint64),
    "uniform": _Reals("a number in [0, 1)", "use seed instead", lambda u: (u >= 0) & (u < 1)),
}


def _checked(options: Mapping[str, Any]) -> Settings:
    settings = {}
    for name, value in options.items():
        check = _CHECKS.get(name)
        if check is None:
            raise TypeError(f"{name}: no such option; expected one of {', '.join(_CHECKS)}")
        settings[name] = check(name, value)
    return settings


_OFF = _checked({f.name: f.default for f in fields(SamplingParams) if f.init})


def _resolve(params: SamplingParams | None, options: Mapping[str, Any]) -> Settings:
    """Return the settings of one call: the keywords, then params, then the defaults."""
    if params is None:
        settings = _OFF | _checked(options)
    elif isinstance(params, SamplingParams):
        settings = params._settings | _checked(options)
    else:
        raise TypeError(f"params: expected SamplingParams, got {_shown(params)}; options are keywords, temperature=0.7")
    _check_source(settings)
    return settings


def _check_source(settings: Settings) -> None:
    """Random numbers have one source."""
    if settings["uniform"] is not None:
        for name in ("seed", "position"):
            if settings[name] is not None:
                raise ValueError(f"uniform: expected no {name} beside it, got both; leave one of them out")


def _broadcast(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {array.shape}") from None


def _flat(array: Array) -> Array:
    """Return (..., n) as (rows, n)."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def _frozen(value: Any, name: str) -> Any:
    """Return a copy that its owner cannot change: of lists, dicts and arrays; numbers and strings are themselves."""
    if value is None or isinstance(value, (str, int, float, np.generic)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, name) for item in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    if isinstance(value, Mapping):
        return dict(value)
    array = _arrays.plain(value, name).copy()
    array.flags.writeable = False
    return array


def _identity(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, tuple):
        return tuple(map(_identity, value))
    return frozenset(value.items()) if isinstance(value, dict) else value


def _first(array: Array, wrong: Array) -> tuple[tuple[int, ...], Any]:
    index = tuple(map(int, np.argwhere(wrong)[0]))
    return index, array[index].item()


def _place(index: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, index))}]" if index else ""


def _in_row(row: int, lead: tuple[int, ...]) -> str:
    """Return where in the leading axes a row stands, as an error message says it."""
    index = tuple(map(int, np.unravel_index(row, lead))) if lead else ()
    return "" if not lead else f" in row {index[0] if len(index) == 1 else index}"


def _shown(value: Any) -> str:
    """Return a value as an error message shows it: a number or a string itself, of all else the kind."""
    if value is None or isinstance(value, (str, bool, int, float, np.generic)):
        return repr(value)
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ if dtype is None else f"{type(value).__name__} of {dtype}"
