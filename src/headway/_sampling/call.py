"""One call of sampling: the logits, and the options in the form that the kernels take."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

import headway._native as _native

from .. import _arrays
from .._check import shown
from .._signatures import Unpack
from .checks import Sparse
from .dialects import Step, rules
from .options import SamplingOptions, Settings
from .params import SamplingParams
from .rows import Array, broadcast, flat, in_row, known_ids, mask_bytes, per_token
from .settings import BESIDE_STAGES, CHECKS, DEFAULT_SETTINGS, check_source, check_stages, checked
from .stages import OFF, STAGES


class Call(NamedTuple):
    """One call: the logits, and the options in the form that the kernels take. `prepare` makes one.

    name: of the argument, for errors. data: the logits (*lead, vocabulary), as many rows as lead has places.
    """

    name: str
    operand: _arrays.Operand
    data: Array
    lead: tuple[int, ...]
    vocabulary: int
    rows: int
    settings: Settings

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

        def make() -> _native.Stages:
            return native_stages(self.steps(), self.per_row("min_tokens_to_keep"))

        stages: _native.Stages = self.settings.once(("stages", self.lead), make)
        return stages

    def steps(self) -> list[_Valued]:
        """Return these stages by name."""
        given = {name: self.per_row(name) for name in _NUMBERS if getattr(self.settings, name) is not None}
        return list(_steps(*self.how(), given))

    def how(self) -> tuple[str | None, str, str]:
        """Return what decides about stages besides numbers."""
        return self.settings.dialect, self.settings.nucleus, self.settings.ties

    def coin(self) -> dict[str, Any]:
        """Return the source of random numbers where xtc needs one, although no token is drawn."""
        return {} if self.settings.xtc_probability is None else self.source()

    def per_row(self, name: str) -> Array:
        """Return a setting as one value, or as one per row, in C order."""
        return per_row(name, getattr(self.settings, name), self.lead)

    def source(self, *draws: int) -> dict[str, Any]:
        """Return where the random numbers come from."""
        return random_source(self.settings, self.lead, *draws)

    def bias(self) -> Array | None:
        bias = self.settings.logit_bias
        if bias is None:
            return None
        if isinstance(bias, Sparse):
            dense = np.zeros(self.vocabulary, np.float32)
            dense[known_ids("logit_bias", bias.ids, self.vocabulary)] = bias.values
            bias = dense
        return per_token("logit_bias", bias, self.data.shape)

    def allowed(self) -> tuple[Array | None, bool]:
        """Return the mask as bytes, and whether each byte holds eight tokens."""
        allowed = self.settings.allowed
        return (None, False) if allowed is None else mask_bytes("allowed", allowed, self.data.shape)

    def spared(self) -> Array:
        """Return the tokens that xtc leaves in."""
        ids = self.settings.xtc_special_tokens
        return _NO_IDS if ids is None else known_ids("xtc_special_tokens", np.array(ids), self.vocabulary)

    def fail(self, status: Array, draws: int = 1, bans: Sequence[str] = ()) -> None:
        """Raise what the kernel found in the first row that has a fault.

        Args:
            status: (rows,), as the kernel left it.
            draws: how many tokens of a row were to be drawn.
            bans: the options of the row, beside those of the call, that can ban tokens.
        """
        row = int(status.nonzero()[0][0])
        token, fault = fault_in(int(status[row]))
        where = in_row(row, self.lead)
        if fault == "nan":
            raise ValueError(
                f"{self.name}: expected numbers, got NaN at token {token}{where}; -inf is what bans a token"
            )
        if fault == "infinite":
            raise ValueError(f"{self.name}: expected finite numbers or -inf, got +inf at token {token}{where}")
        if fault == "overflow":
            raise ValueError(
                f"{self.name}: expected numbers within float32, got one at token {token}{where} that overflows"
                + (" with its logit_bias" if self.settings.logit_bias is not None else "")
                + "; subtract the row's maximum first"
            )
        if fault == "few":
            raise ValueError(
                f"num_samples: expected at most {token} without replacement{where}, where no more tokens are left to "
                f"draw from, got {draws}; draw with replacement, or filter less"
            )
        if bans:
            name, cure = self.name, f"less of {' and '.join(bans)} leaves one"
        else:
            names = (n for n in ("allowed", "logit_bias") if getattr(self.settings, n) is not None)
            name, cure = next(names, self.name), "allow one"
        raise ValueError(f"{name}: expected at least one token that is not banned{where}, got none; {cure}")


def prepare(
    logits: Any, params: SamplingParams | None, name: str = "logits", /, **options: Unpack[SamplingOptions]
) -> Call:
    """Check a call of any of the functions of sampling."""
    operand = _arrays.unwrap(logits, name)
    if operand.data.ndim == 0:
        raise ValueError(f"{name}: expected an array (V,) or (..., V), got a single number")
    if operand.data.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one token, got an array of shape {operand.data.shape}")
    return ready(operand, resolve(params, **options), name)


# Editors on jedi know no TypedDict: they go from **options to **options, up to SamplingParams, which lists them.
def resolve(params: SamplingParams | None, **options: Unpack[SamplingOptions]) -> Settings:
    """Return the settings of one call: the keywords, then params, then the defaults."""
    if params is None:
        settings = DEFAULT_SETTINGS
    elif isinstance(params, SamplingParams) and "dialect" not in options:
        settings = params._settings
    else:  # a dialect says what the numbers of params mean too
        return with_options(params, **options)._settings
    given: dict[str, Any] = {**options}
    beside = {name: given.pop(name) for name in BESIDE_STAGES if name in given}
    if given:
        settings = _changed(settings, given)
    if beside:
        settings = settings.beside(checked(beside))
    check_source(settings)
    return settings


def _changed(settings: Settings, options: dict[str, Any]) -> Settings:
    """Return the settings of params, or the defaults, with these options of stages: one object for all such calls."""
    kinds = tuple(map(type, options.values()))
    if not _PLAIN.issuperset(kinds):
        return _updated(settings, options)
    key = (*options.items(), kinds)  # by type as well: True equals 1, and is an error
    changed: Settings = settings.once(key, lambda: _updated(settings, options))
    return changed


def _updated(settings: Settings, options: dict[str, Any]) -> Settings:
    settings = settings.updated(checked(options, settings.dialect))
    check_stages(settings)
    return settings


def with_options(params: SamplingParams, **options: Unpack[SamplingOptions]) -> SamplingParams:
    """Return params with these options instead of their own."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params: expected SamplingParams, got {shown(params)}; options are keywords, temperature=0.7")
    own: Any = {name: value for name, value in vars(params).items() if name in CHECKS and name not in options}
    return SamplingParams(**own, **options)


def fault_in(status: int) -> tuple[int, str]:
    """Return the token that a kernel's status tells of, and the name of its fault."""
    token, fault = divmod(status, len(_native.SAMPLING_FAULTS))
    return token, _native.SAMPLING_FAULTS[fault]


def ready(operand: _arrays.Operand, settings: Settings, name: str = "logits") -> Call:
    """Return a call whose options have been checked before."""
    *lead, vocabulary = operand.data.shape
    return Call(name, operand, operand.data, tuple(lead), vocabulary, operand.data.size // vocabulary, settings)


def per_row(name: str, value: Array, shape: tuple[int, ...]) -> Array:
    """Return a setting as one value, or as one for each place of this shape, in C order."""
    if value.ndim == 0:
        return value.reshape(1)
    return np.ascontiguousarray(broadcast(name, value, shape)).reshape(-1)


def random_source(settings: Settings, lead: tuple[int, ...], *draws: int) -> dict[str, Any]:
    """Return where the random numbers of rows (*lead) come from."""
    if settings.uniform is not None:
        return {"uniform": per_row("uniform", settings.uniform, (*lead, *draws))}
    seed = settings.seed
    if seed is None:
        seed = np.frombuffer(os.urandom(8), np.uint64)[0]
    if seed.ndim and seed.shape != lead:
        raise ValueError(
            f"seed: expected one integer, or one per row in an array of shape {lead}, got shape {seed.shape}; "
            "rows that share a seed in such an array would draw the same"
        )
    position = _ZERO if settings.position is None else per_row("position", settings.position, lead)
    stream = np.arange(math.prod(lead), dtype=np.uint64) if seed.ndim == 0 and lead else _ZERO
    return {"seed": seed.reshape(-1), "stream": stream, "position": position}


# Types of options that can be looked up.
_PLAIN = frozenset({int, float, str, type(None), np.float64, np.float32, np.int64, np.int32})
_NO_IDS = np.empty(0, np.int64)
_ZERO = np.zeros(1, np.uint64)  # the first stream, or position
# The numbers that stages take.
_NUMBERS = (*dict.fromkeys(name for stage in STAGES.values() for name in stage.numbers), "min_tokens_to_keep")
_numbers_of = attrgetter(*_NUMBERS)
_Valued = tuple[Step, dict[str, Array]]  # a stage with the options that it takes, (1,) or (rows,)


def _steps(dialect: str | None, nucleus: str, ties: str, given: Mapping[str, Array]) -> Iterator[_Valued]:
    """Yield the stages that do something, in order."""
    for step in rules(dialect, nucleus).steps:
        names = STAGES[step.option].numbers
        dynamic = step.option == "temperature" and "dynamic_temperature_range" in given
        if step.option == "temperature" and not dynamic:
            names = names[:1]
        value = given.get(names[0])
        if value is None or (value.size == 1 and value[0] == OFF.get(step.option) and not dynamic):
            continue
        if ties == "keep" and step.option == "top_k":
            step = step._replace(ties="keep")
        yield step, {name: given[name] for name in names}


def native_stages(steps: Iterable[_Valued], min_tokens: Array) -> _native.Stages:
    """Return stages as the kernel numbers them."""
    numbered: list[tuple[int, int, bool, bool, list[Array]]] = []
    for step, values in steps:
        numbers = [value.astype(np.float64, copy=False) for value in values.values()]
        place = _native.SAMPLING_STAGES.index(step.option), _native.SAMPLING_TIES.index(step.ties)
        numbered.append((*place, step.equal, step.floor, numbers))
    return _native.Stages(steps=numbered, min_tokens=min_tokens)
