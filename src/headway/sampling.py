"""Next-token sampling: one token, the distribution it is drawn from, and the logits that are left.

Every function takes logits of shape (..., V), V the vocabulary, and the same options. Biases and bans come first, then
the stages in the order of `_dialects.py`; then the draw. `docs/semantics.md` says what each means to the last bit,
`headway.reference` says it in NumPy, and the kernels in `src/core/sampling.h` give those same bits.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from . import _arrays, _check, _native
from ._check import shown
from ._dialects import OFF, Step, rules
from ._options import (
    CHECKS,
    Array,
    Settings,
    Sparse,
    broadcast,
    check_together,
    checked,
    flat,
    frozen,
    identity,
    in_row,
    known_ids,
    mask_bytes,
    per_token,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SamplingParams", "filter_logits", "probabilities", "sample"]

DialectName = Literal["hf", "vllm", "llama.cpp", "flashinfer", "sglang", "mlx"]


class Options(TypedDict, total=False):
    """The options of `sample`, `probabilities` and `filter_logits`; `SamplingParams` explains them."""

    temperature: ArrayLike
    dynamic_temperature_range: ArrayLike | None
    dynamic_temperature_exponent: ArrayLike
    top_n_sigma: ArrayLike | None
    top_k: ArrayLike | None
    top_p: ArrayLike | None
    min_p: ArrayLike | None
    typical_p: ArrayLike | None
    epsilon_cutoff: ArrayLike | None
    eta_cutoff: ArrayLike | None
    xtc_probability: ArrayLike | None
    xtc_threshold: ArrayLike
    xtc_special_tokens: Any
    min_tokens_to_keep: ArrayLike
    allowed: Any
    logit_bias: Any
    ties: Literal["lowest_id", "keep"]
    nucleus: Literal["after_top_k", "joint"]
    dialect: DialectName | None
    seed: ArrayLike | None
    position: ArrayLike | None
    uniform: ArrayLike | None


@_check.public
@dataclass(frozen=True, eq=False, repr=False)
class SamplingParams:
    """How to sample: checked once, frozen, hashable; the options that `sample` takes as keywords.

    A number may be an array too, one value per row, of a shape that broadcasts to the leading axes of the logits.

    temperature: finite, >= 0. Logits are divided by it. 0 is argmax, the lowest id among equal logits.
    dynamic_temperature_range: the temperature goes from temperature - range to temperature + range with the entropy.
    dynamic_temperature_exponent: of the entropy's share of the largest possible, which says how far; 1 unless given.
    top_n_sigma: above 0. Keeps logits up to n standard deviations below the best one (Tang et al., 2024).
    top_k: at least 1. Keeps the k best tokens: logit descending, id ascending (Fan et al., 2018).
    top_p: in (0, 1]. Keeps a token iff the mass strictly before it is below p (Holtzman et al., 2020); 1 is off.
    min_p: in [0, 1]. Keeps a token iff it has at least min_p times the best one's mass (Nguyen et al., 2024).
    typical_p: in (0, 1]. As top_p, in the order of how far surprise is from the entropy (Meister et al., 2022).
    epsilon_cutoff: in [0, 1]. Keeps a token iff it has at least this share of the mass (Hewitt et al., 2022).
    eta_cutoff: in [0, 1]. The same with min(eta, sqrt(eta) exp(-entropy)) as the share.
    xtc_probability: in [0, 1]. With this probability removes all but the last of the tokens that reach the threshold.
    xtc_threshold: in [0, 1], a share of the mass; 0.1 unless given.
    xtc_special_tokens: ids that xtc never removes, such as those of the end and of a newline: one list for all rows.
    min_tokens_to_keep: at least 1. Every stage leaves so many tokens, where there are so many.
    allowed: which tokens may be drawn: a bool array (..., V), an int32 or uint32 array (..., ceil(V / 32)) with
        token 0 in the lowest bit of the first word, or a list, tuple, set or int64 array of ids. An int32 or uint32
        array is always a packed mask, never ids. (1, ceil(V / 32)), as grammar libraries allocate it, will do for a
        lone row.
    logit_bias: added to the logits before all else: an array (V,) or (..., V), or a dict {id: bias}; -inf bans.
    ties: "lowest_id", exactly k tokens; "keep", also all tokens equal to the k-th.
    nucleus: "after_top_k" measures top_p over what top_k left, "joint" over all tokens that are not banned.
    dialect: None, or the library whose order, ties, boundaries and zeros to follow: "hf" (transformers), "vllm",
        "llama.cpp", "flashinfer", "sglang" or "mlx" (mlx-lm). docs/semantics.md has the table.
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
    dynamic_temperature_range: ArrayLike | None = None
    dynamic_temperature_exponent: ArrayLike = 1.0
    top_n_sigma: ArrayLike | None = None
    top_k: ArrayLike | None = None
    top_p: ArrayLike | None = None
    min_p: ArrayLike | None = None
    typical_p: ArrayLike | None = None
    epsilon_cutoff: ArrayLike | None = None
    eta_cutoff: ArrayLike | None = None
    xtc_probability: ArrayLike | None = None
    xtc_threshold: ArrayLike = 0.1
    xtc_special_tokens: Any = None
    min_tokens_to_keep: ArrayLike = 1
    allowed: Any = None
    logit_bias: Any = None
    ties: Literal["lowest_id", "keep"] = "lowest_id"
    nucleus: Literal["after_top_k", "joint"] = "after_top_k"
    dialect: DialectName | None = None
    seed: ArrayLike | None = None
    position: ArrayLike | None = None
    uniform: ArrayLike | None = None

    def __post_init__(self) -> None:
        """Check every option, and take arrays out of the caller's reach."""
        for name in CHECKS:
            object.__setattr__(self, name, frozen(getattr(self, name), name))
        check_together(self._settings)

    @cached_property
    def _settings(self) -> Settings:
        return checked(self._fields())

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in CHECKS}

    def _given(self) -> dict[str, Any]:
        """Return the options that are not at their defaults."""
        defaults = {f.name: f.default for f in fields(self)}
        return {name: value for name, value in self._fields().items() if identity(value) != defaults[name]}

    def _key(self) -> tuple[Any, ...]:
        key = {name: identity(value) for name, value in self._fields().items()}
        allowed = self._settings["allowed"]
        if allowed is not None and allowed.dtype == np.int64:  # ids, of which the order says nothing
            key["allowed"] = frozenset(allowed.tolist())
        key["xtc_special_tokens"] = self._settings["xtc_special_tokens"]
        return tuple(key.values())

    def __eq__(self, other: object) -> bool:
        """Equal values are equal, arrays included."""
        return isinstance(other, SamplingParams) and self._key() == other._key()

    def __hash__(self) -> int:
        """Equal values have equal hashes, arrays and dicts included."""
        return hash(self._key())

    def __repr__(self) -> str:
        """Show the options that are not at their defaults."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._given().items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy the options, and check and freeze them again."""
        return partial(type(self), **self._given()), ()


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


@_check.public
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
    replacement = _check.boolean(replacement, "replacement")
    draws = () if num_samples is None else (_check.integer(num_samples, "num_samples", 1, 2**31 - 1),)
    tokens = np.empty((*run.lead, *draws), np.int64)
    run(tokens=tokens, draws=math.prod(draws), replacement=replacement, **run.source(*draws))
    return int(tokens) if not tokens.ndim else run.operand.wrap(tokens, "int64")


@_check.public
@_shows_options
def probabilities(logits: ArrayLike, params: SamplingParams | None = None, **options: Unpack[Options]) -> Any:
    """Return the distribution that `sample` draws from, exactly.

    logits (..., V) -> (..., V), the same kind of array: float32, or float64 for float64 logits. A removed token has
    probability 0. Options and errors are those of `sample`; seed and position matter to xtc's coin alone.

    >>> import headway as hw
    >>> hw.probabilities([3.0, 2.0, 1.0], temperature=0.5, top_k=2).round(4)
    array([0.8808, 0.1192, 0.    ])
    """
    run = _Run(logits, params, options)
    dtype = _arrays.compute_dtype(run.operand.dtype)
    out = np.empty(run.data.shape, dtype)
    run(probabilities=out, **run.coin())
    return run.operand.wrap(out, dtype)


@_check.public
@_shows_options
def filter_logits(logits: ArrayLike, params: SamplingParams | None = None, **options: Unpack[Options]) -> Any:
    """Return the logits as given, plus logit_bias, with -inf where a stage removed the token.

    logits (..., V) -> (..., V), the same kind of array. They are not divided by the temperature, which only has its
    part in what top_p and min_p remove. Their dtype is that of the logits; with a logit_bias they are the sums that
    decide, float32, or float64 for float64 logits. Sampling them at the same temperature draws the same token. Options
    and errors are those of `sample`.

    >>> import headway as hw
    >>> hw.filter_logits([3.0, 2.0, 1.0], temperature=0.5, top_p=0.9)
    array([  3.,   2., -inf])
    """
    run = _Run(logits, params, options)
    dtype = run.operand.dtype if run.settings["logit_bias"] is None else _arrays.compute_dtype(run.operand.dtype)
    out = np.empty(run.data.shape, _arrays.storage(dtype))
    run(filtered=out, **run.coin())
    return run.operand.wrap(out, dtype)


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
        **source: Any,
    ) -> None:
        """Fill the outputs that are given."""
        status = np.empty(self.rows, np.int64)
        rows = self.native(status, **source)
        if self.rows and not _native.sample(rows, draws, replacement, tokens, probabilities, filtered):
            self.fail(status, draws)

    def native(
        self,
        status: Array,
        histories: _native.Histories | None = None,
        *,
        stages: _native.Stages | None = None,
        seed: Array | None = None,
        stream: Array | None = None,
        position: Array | None = None,
        uniform: Array | None = None,
    ) -> _native.Rows:
        """Return the rows as the kernels take them; they write what is wrong with each into status."""
        data, bias, (allowed, packed) = self.data, self.bias(), self.allowed()
        if len(self.lead) > 8:  # more axes than the kernel walks
            data = flat(data)
            bias = None if bias is None else flat(bias)
            allowed = None if allowed is None else flat(allowed)
        return _native.Rows(
            logits=data,
            bias=bias,
            allowed=allowed,
            packed=packed,
            stages=self.stages() if stages is None else stages,
            spared=self.spared(),
            histories=histories,
            seed=seed,
            stream=stream,
            position=position,
            uniform=uniform,
            status=status,
        )

    def stages(self) -> _native.Stages:
        """Return the stages that do something, in order, with their values for each row."""
        values = [self.settings[name] for name in _NUMBERS]
        if all(value is None or value.ndim == 0 for value in values):
            return _stages_of_all(*self.how(), tuple(None if value is None else value.item() for value in values))
        return _native_stages(self.steps(), self.per_row("min_tokens_to_keep"))

    def steps(self) -> list[_Valued]:
        """Return these stages by name."""
        given = {name: self.per_row(name) for name in _NUMBERS if self.settings[name] is not None}
        return list(_steps(*self.how(), given))

    def how(self) -> tuple[str | None, str, str]:
        """Return what decides about stages besides numbers."""
        return self.settings["dialect"], self.settings["nucleus"], self.settings["ties"]

    def coin(self) -> dict[str, Any]:
        """Return the source of random numbers where xtc needs one, although no token is drawn."""
        return {} if self.settings["xtc_probability"] is None else self.source()

    def per_row(self, name: str, *draws: int) -> Array:
        """Return a setting as one value, or as one per row, or per row and draw, in C order."""
        value: Array = self.settings[name]
        if value.ndim == 0:
            return value.reshape(1)
        return np.ascontiguousarray(broadcast(name, value, (*self.lead, *draws))).reshape(-1)

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
        one_seed = seed.ndim == 0 and self.lead
        stream = np.arange(math.prod(self.lead), dtype=np.uint64) if one_seed else _FIRST_STREAM
        return {"seed": seed.reshape(-1), "stream": stream, "position": position}

    def bias(self) -> Array | None:
        bias = self.settings["logit_bias"]
        if bias is None:
            return None
        if isinstance(bias, Sparse):
            dense = np.zeros(self.vocabulary, np.float32)
            dense[known_ids("logit_bias", bias.ids, self.vocabulary)] = bias.values
            bias = dense
        return per_token("logit_bias", bias, self.data.shape)

    def allowed(self) -> tuple[Array | None, bool]:
        """Return the mask as bytes, and whether each byte holds eight tokens."""
        allowed = self.settings["allowed"]
        return (None, False) if allowed is None else mask_bytes("allowed", allowed, self.data.shape)

    def spared(self) -> Array:
        """Return the tokens that xtc leaves in."""
        ids = self.settings["xtc_special_tokens"]
        return _NO_IDS if ids is None else known_ids("xtc_special_tokens", np.array(ids), self.vocabulary)

    def fail(self, status: Array, draws: int = 1) -> None:
        """Raise what the kernel found in the first row that has a fault."""
        row = int(status.nonzero()[0][0])
        token, fault = divmod(int(status[row]), _native.SAMPLING_FAULTS)
        where = in_row(row, self.lead)
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


_NO_IDS = np.empty(0, np.int64)
# The numbers that stages take, and which of them those do that take another than the one they are named after.
_NUMBERS = (*OFF, "dynamic_temperature_exponent", "xtc_threshold", "min_tokens_to_keep")
_VALUES = {
    "greedy": ("temperature",),
    "temperature": ("temperature", "dynamic_temperature_range", "dynamic_temperature_exponent"),
    "xtc_probability": ("xtc_probability", "xtc_threshold"),
}


_Valued = tuple[Step, dict[str, Array]]  # a stage with the options that it takes, (1,) or (rows,)


def _steps(dialect: str | None, nucleus: str, ties: str, given: Mapping[str, Array]) -> Iterator[_Valued]:
    """Yield the stages that do something, in order."""
    for step in rules(dialect, nucleus).steps:
        names = _VALUES.get(step.option, (step.option,))
        dynamic = step.option == "temperature" and "dynamic_temperature_range" in given
        if step.option == "temperature" and not dynamic:
            names = names[:1]
        value = given.get(names[0])
        if value is None or (value.size == 1 and value[0] == OFF.get(step.option) and not dynamic):
            continue
        if ties == "keep" and step.option == "top_k":
            step = step._replace(ties="keep")
        yield step, {name: given[name] for name in names}


def _native_stages(steps: Iterable[_Valued], min_tokens: Array) -> _native.Stages:
    """Return stages as the kernel numbers them."""
    numbered: list[tuple[int, int, bool, bool, list[Array]]] = []
    for step, values in steps:
        numbers = [value.astype(np.float64, copy=False) for value in values.values()]
        place = _native.SAMPLING_STAGES.index(step.option), _native.SAMPLING_TIES.index(step.ties)
        numbered.append((*place, step.equal, step.floor, numbers))
    return _native.Stages(steps=numbered, min_tokens=min_tokens)


@lru_cache(1024)
def _stages_of_all(dialect: str | None, nucleus: str, ties: str, numbers: tuple[float | None, ...]) -> _native.Stages:
    """Return them where all rows have the same numbers, as they have in most calls."""
    given = {name: np.array([number]) for name, number in zip(_NUMBERS, numbers) if number is not None}
    return _native_stages(_steps(dialect, nucleus, ties, given), given["min_tokens_to_keep"])


_FIRST_STREAM = np.zeros(1, np.uint64)
_DEFAULTS = checked({f.name: f.default for f in fields(SamplingParams) if f.init})


def _resolve(params: SamplingParams | None, options: Mapping[str, Any]) -> Settings:
    """Return the settings of one call: the keywords, then params, then the defaults."""
    if params is None:
        settings = _DEFAULTS | checked(options)
    elif isinstance(params, SamplingParams) and "dialect" in options:  # it says what the numbers of params mean too
        settings = checked({**params._fields(), **options})
    elif isinstance(params, SamplingParams):
        settings = params._settings | checked(options, params.dialect)
    else:
        raise TypeError(f"params: expected SamplingParams, got {shown(params)}; options are keywords, temperature=0.7")
    check_together(settings)
    return settings
