"""SamplingParams: the options of sampling, checked once; and how a call finds its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from .. import _arrays, _check
from .._check import shown
from .._signatures import defaults_of, shows_options
from .checks import CHECKS, Settings, check_together, checked

__all__ = ["SamplingParams"]


class FrozenDict(Mapping[Any, Any]):
    """A dict that nobody can change. A MappingProxyType cannot be pickled, nor copied as dataclasses.asdict does."""

    def __init__(self, items: Mapping[Any, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


def frozen(value: Any, name: str) -> Any:
    """Return a copy that its owner cannot change: of lists, dicts and arrays; numbers and strings are themselves."""
    if value is None or isinstance(value, (str, int, float, np.generic)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(frozen(item, name) for item in _arrays.readable(value, name))
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    if isinstance(value, Mapping):
        return FrozenDict({key: frozen(item, name) for key, item in value.items()})
    array = _arrays.plain(value, name)[0].copy()
    if array.dtype == object and not array.ndim:  # no array; its check will say so
        return value
    array.flags.writeable = False
    return array


def identity(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, value.tobytes()) if value.ndim else value.item()
    if isinstance(value, tuple):
        return tuple(map(identity, value))
    if isinstance(value, FrozenDict):
        return frozenset((key, identity(item)) for key, item in value.items())
    return value


DialectName = Literal["hf", "vllm", "llama.cpp", "flashinfer", "sglang", "mlx"]


class SamplingOptions(TypedDict, total=False):
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


shows_sampling_options = shows_options(SamplingOptions, defaults_of(SamplingParams))


_DEFAULTS = checked({f.name: f.default for f in fields(SamplingParams) if f.init})


def resolve(params: SamplingParams | None, options: Mapping[str, Any]) -> Settings:
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
