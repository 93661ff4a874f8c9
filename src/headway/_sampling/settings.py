"""The options of a call: all that there are, checked one by one and together; and what SamplingParams can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from .. import _arrays
from .._check import no_such, shown
from .checks import Check, Choice, Integers, Reading, Reals, allowed, logit_bias
from .dialects import DIALECTS, rules
from .options import Settings
from .stages import NUMBER, NUMBER_OR_NONE, OF_STAGES, Option

_WHOLE = "an integer from 0 to 2^64 - 1"
OPTIONS = (
    *OF_STAGES,
    Option(
        "min_tokens_to_keep",
        Integers("an integer >= 1", "1 is the least", 1, np.int64, clip=True, optional=False),
        1,
        NUMBER,
        "at least 1. Every stage leaves so many tokens, where there are so many.",
        "leave at least N tokens",
        "N",
    ),
    Option(
        "allowed",
        allowed,
        None,
        "Any",
        "which tokens may be drawn: a bool array (..., V), an int32 or uint32 array (..., ceil(V / 32)) with token 0 "
        "in the lowest bit of the first word, or a list, tuple, set or int64 array of ids. An int32 or uint32 array is "
        "always a packed mask, never ids. (1, ceil(V / 32)), as grammar libraries allocate it, will do for a lone row.",
    ),
    Option(
        "logit_bias",
        logit_bias,
        None,
        "Any",
        "added to the logits before all else: an array (V,) or (..., V), or a dict {id: bias}; -inf bans.",
    ),
    Option(
        "ties",
        Choice(("lowest_id", "keep")),
        "lowest_id",
        'Literal["lowest_id", "keep"]',
        '"lowest_id", exactly k tokens; "keep", also all tokens equal to the k-th.',
        "at the K-th token keep exactly K, or all its ties",
    ),
    Option(
        "nucleus",
        Choice(("after_top_k", "joint")),
        "after_top_k",
        'Literal["after_top_k", "joint"]',
        '"after_top_k" measures top_p over what top_k left, "joint" over all tokens that are not banned.',
        "measure P over the tokens that top-k left, or over all",
    ),
    Option(
        "dialect",
        Choice((None, *DIALECTS)),
        None,
        f"Literal[{', '.join(repr(name).replace(chr(39), chr(34)) for name in DIALECTS)}] | None",
        'None, or the library whose order, ties, boundaries and zeros to follow: "hf" (transformers), "vllm", '
        '"llama.cpp", "flashinfer", "sglang" or "mlx" (mlx-lm). docs/semantics.md has the table.',
        "follow this library's order, ties and boundaries",
    ),
    Option(
        "seed",
        Integers(_WHOLE, "use None for fresh entropy", 0, np.uint64, other_kind=ValueError),
        None,
        NUMBER_OR_NONE,
        "a whole number below 2^64, or one per row, of exactly the leading shape; None takes fresh entropy.",
    ),
    Option(
        "position",
        Integers(_WHOLE, "use the number of the step", 0, np.uint64, other_kind=ValueError),
        None,
        NUMBER_OR_NONE,
        "a whole number below 2^64, 0 unless given: which draw of the seed's this is, such as the step.",
    ),
    Option(
        "uniform",
        Reals("a number in [0, 1)", "use seed instead", lambda u: (u >= 0) & (u < 1)),
        None,
        NUMBER_OR_NONE,
        "numbers in [0, 1) of the caller's own generator, instead of seed and position.",
    ),
)
CHECKS: dict[str, Check] = {option.name: option.check for option in OPTIONS}
DEFAULTS = {option.name: option.default for option in OPTIONS}
# Options that no stage takes. They may differ from call to call.
BESIDE_STAGES = ("seed", "position", "uniform", "allowed", "logit_bias")


def checked(options: Mapping[str, Any], dialect: str | None = None) -> dict[str, Any]:
    """Return the options that are given as `Settings` has them, checked one by one.

    The dialect that is among them, or the one given, says what numbers mean.
    """
    if "dialect" in options:
        dialect = CHECKS["dialect"]("dialect", options["dialect"], ())
    readings: Mapping[str, tuple[Reading, ...]] = {} if dialect is None else DIALECTS[dialect].readings
    out = {}
    for name, value in options.items():
        if name not in CHECKS:
            raise TypeError(no_such(name, value, "option", CHECKS))
        out[name] = CHECKS[name](name, value, readings.get(name, ()))
    return out


def check_source(settings: Settings) -> None:
    """Check what options say about where random numbers come from."""
    if settings.uniform is not None:
        for name in ("seed", "position"):
            if getattr(settings, name) is not None:
                raise ValueError(f"uniform: expected no {name} beside it, got both; leave one of them out")
        coin = settings.xtc_probability
        if coin is not None and ((coin > 0) & (coin < 1)).any():
            raise ValueError(
                "uniform: expected xtc_probability 0 or 1 beside it, got another: its coin needs a random number of "
                "its own; use seed"
            )


def check_stages(settings: Settings) -> None:
    """Check what the options of stages say about each other."""
    dialect = settings.dialect
    if dialect is None:
        return
    for name in sorted(rules(dialect, settings.nucleus).lacks()):
        value = getattr(settings, name)
        if value is not None and name != "temperature" and np.any(value != DEFAULTS[name]):
            raise ValueError(f"{name}: expected none in dialect {dialect!r}, which has no such filter; leave it out")
    for name, own in (("ties", "lowest_id"), ("nucleus", "after_top_k")):
        if getattr(settings, name) != own and (name, dialect) != ("nucleus", "flashinfer"):
            raise ValueError(
                f"{name}: expected none beside dialect {dialect!r}, which decides it; leave one of them out"
            )


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


P = TypeVar("P", bound="Params")


class Params:
    """What SamplingParams is, but for its options, which params.py lists."""

    def __post_init__(self) -> None:
        """Check every option, and take arrays out of the caller's reach."""
        for name in CHECKS:
            object.__setattr__(self, name, frozen(getattr(self, name), name))
        check_source(self._settings)
        check_stages(self._settings)

    @classmethod
    def from_generation_config(cls: type[P], config: Any) -> P:
        """Make params of the filters in a GenerationConfig of transformers, with its order and boundaries.

        Args:
            config: of transformers, or anything with its attributes; None there is unset, and becomes what
                transformers' `generate` makes of it: top_k=50. do_sample=False is temperature 0. Its penalties are no
                filters: `headway.integrations.transformers.row_options` reads them.

        Returns:
            Params with `dialect="hf"`.

        Raises:
            TypeError, ValueError: an option out of range, or a filter that headway does not have.

        >>> import headway as hw
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(do_sample=True, temperature=0.7, top_k=50, top_p=None)
        >>> hw.SamplingParams.from_generation_config(config)
        SamplingParams(temperature=0.7, top_k=50, dialect='hf')
        """
        make: Any = cls
        if not getattr(config, "do_sample", False):
            return make(temperature=0.0)  # type: ignore[no-any-return]
        if getattr(config, "top_h", None) is not None:
            raise ValueError(f"top_h: expected None, got {shown(config.top_h)}; headway has no such filter")
        names = ("temperature", *(step.option for step in DIALECTS["hf"].steps))
        given = {"top_k": 50} | {name: x for name in names if (x := getattr(config, name, None)) is not None}
        return make(dialect="hf", **given)  # type: ignore[no-any-return]

    @cached_property
    def _settings(self) -> Settings:
        return Settings.of(checked(self._fields()))

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in CHECKS}

    def _given(self) -> dict[str, Any]:
        """Return the options that are not at their defaults."""
        return {name: value for name, value in self._fields().items() if identity(value) != DEFAULTS[name]}

    def _key(self) -> tuple[Any, ...]:
        key = {name: identity(value) for name, value in self._fields().items()}
        allowed = self._settings.allowed
        if allowed is not None and allowed.dtype == np.int64:  # ids, of which the order says nothing
            key["allowed"] = frozenset(allowed.tolist())
        key["xtc_special_tokens"] = self._settings.xtc_special_tokens
        return tuple(key.values())

    def __eq__(self, other: object) -> bool:
        """Equal values are equal, arrays included."""
        return isinstance(other, Params) and self._key() == other._key()

    def __hash__(self) -> int:
        """Equal values have equal hashes, arrays and dicts included."""
        return hash(self._key())

    def __repr__(self) -> str:
        """Show the options that are not at their defaults."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._given().items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy the options, and check and freeze them again."""
        return partial(type(self), **self._given()), ()


DEFAULT_SETTINGS = Settings.of(checked(DEFAULTS))
