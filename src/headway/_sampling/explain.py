"""Why a token can be drawn or cannot: the sampler's stages one by one, each with its boundary.

The kernel that draws tells what the first stages leave, once for each of them: what is said here is what decides.
`headway.reference.explain` says the same by sorting everything.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

import headway._native as _native

from .. import _arrays, _check
from .._check import columns_of, shortened, shown
from .._signatures import AnyArray, Unpack
from .call import Call, native_stages, prepare
from .dialects import Step
from .params import SamplingOptions, SamplingParams, shows_sampling_options
from .rows import Array, unpacked
from .stages import STAGES, Judgement, number
from .stages import Stage as Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # a name for typing.get_type_hints
    Figure = Any

__all__ = ["Candidate", "Explanation", "Stage", "Why", "explain"]

Words = Callable[[int], str]


@dataclass(frozen=True)
class Candidate:
    """A token and its probability: at a boundary that of the stage, in the head the final one.

    Attributes:
        token: its id.
        probability: from 0 to 1.
        word: its text, "" where no tokens were given.

    >>> import headway as hw
    >>> hw.explain([3.0, 2.0, 1.0], top_k=1).head[0]
    Candidate(token=0, probability=1.0, word='')
    """

    token: int
    probability: float
    word: str = ""


@dataclass(frozen=True)
class Stage:
    """What one stage did to a row.

    Attributes:
        option: the option that switches the stage on.
        value: of that option.
        before: how many tokens came in.
        after: how many stayed.
        mass_before: a whole number, the mass that came in.
        mass_after: how much of it stayed. At `temperature` the masses are measured anew: there it is the whole at the
            new temperature.
        last_kept: the token on the inner side of the boundary, in the order of the stage; None where it removed none.
            xtc removes the best: there it is the best that stayed.
        first_removed: the token on the outer side; for xtc the last to go.
        ties_kept: of the tokens equal to the one on the boundary, how many the rule for ties let in; with the rule
            "keep", how many it let in beyond those that "lowest_id" would have.
        ties_removed: how many of them it kept out.
        rule: the rule for ties: "lowest_id", "highest_id" or "keep".
        floor_kept: how many tokens stayed for min_tokens_to_keep alone.
        note: what else there is to know, such as the temperature that a range came to, or how xtc's coin fell.

    >>> import headway as hw
    >>> stage = hw.explain([3.0, 2.0, 1.0], top_k=1).stages[0]
    >>> stage.option, stage.before, stage.after, stage.first_removed.token
    ('top_k', 3, 1, 1)
    """

    option: str
    value: float
    before: int
    after: int
    mass_before: int
    mass_after: int
    last_kept: Candidate | None
    first_removed: Candidate | None
    ties_kept: int
    ties_removed: int
    rule: str
    floor_kept: int
    note: str

    @property
    def removed(self) -> int:
        """How many tokens went.

        Returns:
            before less after.

        >>> import headway as hw
        >>> hw.explain([3.0, 2.0, 1.0], top_k=1).stages[0].removed
        2
        """
        return self.before - self.after

    @property
    def kept_mass(self) -> float:
        """How much of the mass stayed.

        Returns:
            From 0 to 1; 1.0 at `temperature`, which only measures.

        >>> import headway as hw
        >>> round(hw.explain([3.0, 2.0, 1.0], top_k=2).stages[0].kept_mass, 4)
        0.91
        """
        return 1.0 if STAGES[self.option].judge is None else self.mass_after / self.mass_before

    def notes(self) -> list[str]:
        """Say in words what does not fit into a row of the table.

        Returns:
            Sentences without a full stop, none where there is nothing to say.

        >>> import headway as hw
        >>> hw.explain([2.0, 2.0, 1.0], top_k=1).stages[0].notes()
        ['2 equal at the boundary: 1 in, 1 out, the lowest ids first']
        """
        lines = [self.note] if self.note else []
        if self.ties_removed:
            lines.append(
                f"{self.ties_kept + self.ties_removed} equal at the boundary: {self.ties_kept} in, "
                f"{self.ties_removed} out, the {self.rule.removesuffix('_id')} ids first"
                + (" to go" if STAGES[self.option].takes_best else "")
            )
        elif self.ties_kept:
            lines.append(f"{self.ties_kept} more kept, equal to the last")
        if self.floor_kept:
            lines.append(f"{self.floor_kept} more kept for min_tokens_to_keep")
        return lines


@dataclass(frozen=True)
class Why:
    """Why a token can be drawn, or cannot; `str()` says it in a sentence.

    Attributes:
        token: its id.
        word: its text, "" where no tokens were given.
        kept: whether it can be drawn.
        stage: what took it out: a stage's option, or what banned it ("logits", "logit_bias", "allowed"). "mass" where
            no stage did, but its mass is 0. None where it is in.
        measured: the number by which the stage judged the token.
        limit: the number that it should have reached or stayed below.
        missed_by: how far apart the two are, exact before it is rounded to a float.
        probability: of the final distribution.
        rank: in the final distribution, from 1; None for what cannot be drawn.
        text: the sentence.

    >>> import headway as hw
    >>> why = hw.explain([3.0, 2.0, 1.0], top_k=2).why(2)
    >>> why.kept, why.stage, why.measured, why.limit
    (False, 'top_k', 3.0, 2.0)
    """

    token: int
    word: str
    kept: bool
    stage: str | None
    measured: float | None
    limit: float | None
    missed_by: float | None
    probability: float
    rank: int | None
    text: str

    def __str__(self) -> str:
        return self.text


class Explanation:
    """A row's way through the sampler; `explain` makes one. `print` shows a table, and so do notebooks.

    Attributes:
        vocabulary: the number of tokens.
        banned: how many of them were banned before the first stage.
        stages: a `Stage` for each that was switched on, in order.
        masses: (V,) int64, what `sample` draws by, exactly; 0 where a token cannot be drawn.
        massless: how many tokens no stage removed, but whose mass rounds to 0 or is 0 at temperature 0.
        head: the best tokens, each a `Candidate`.

    >>> import headway as hw
    >>> hw.explain([3.0, 2.0, 1.0], top_k=2)
    <Explanation: 2 of 3 tokens left after 1 stage>
    """

    def __init__(self, trace: _Trace, banned_by: Callable[[int], str], top: int, words: Words) -> None:
        start, final, looks = trace.left[0], trace.left[-1], _looks(trace)
        drawn = final.take(np.flatnonzero(final.mass))
        self._start, self._looks, self._drawn = start, looks, drawn
        self._banned_by, self._words = banned_by, words
        self._temperature = looks[-1].temperature if looks else 1.0
        self.vocabulary = trace.run.vocabulary
        self.banned = self.vocabulary - start.ids.size
        self.stages = tuple(look.stage(trace, words) for look in looks)
        self.masses: Array = np.zeros(self.vocabulary, np.int64)
        self.masses[final.ids] = final.mass
        self.massless = final.ids.size - drawn.ids.size
        best = _Order.falling(drawn.z).first(min(top, drawn.ids.size))
        self.head = tuple(drawn.candidate(int(place), words) for place in best)

    @cached_property
    def kept(self) -> Array:
        """The tokens that can be drawn.

        Returns:
            (n,) int64, ids, the best first.

        >>> import headway as hw
        >>> hw.explain([1.0, 3.0, 2.0], top_k=2).kept
        array([1, 2])
        """
        drawn = self._drawn
        return drawn.ids[_Order.falling(drawn.z).first(drawn.ids.size)]

    @cached_property
    def entropy(self) -> float:
        """The entropy of the final distribution.

        Returns:
            In nats.

        >>> import headway as hw
        >>> round(hw.explain([1.0, 1.0]).entropy, 4)
        0.6931
        """
        shares = self._drawn.mass / self._drawn.total
        return max(0.0, float(-(shares * np.log(shares)).sum()))

    @_check.public
    def why(self, token: int) -> Why:
        """Say why a token is in or out.

        Args:
            token: an id from 0 to V - 1.

        Returns:
            A `Why`, of which `str()` is a sentence.

        Raises:
            TypeError: a token that is no integer.
            ValueError: an integer that is no token.

        >>> import headway as hw
        >>> print(hw.explain([3.0, 2.0, 1.0], top_k=2).why(2))
        token 2: removed by top_k=2: its rank is 3, the limit 2, missed by 1
        """
        token = _check.integer(token, "token", 0, self.vocabulary - 1)
        word = self._words(token)
        name = f"token {token}" + (f" {word!r}" if word else "")

        def out(stage: str, text: str, *numbers: float) -> Why:
            measured, limit, missed = numbers or (None, None, None)
            return Why(token, word, False, stage, measured, limit, missed, 0.0, None, f"{name}: {text}")

        if not self._start.has(token):
            by = self._banned_by(token)
            return out(by, f"banned by {by}, before the first stage")
        for look in self._looks:
            if not look.after.has(token):
                what, measured, limit = look.judge(token)
                missed = float(abs(measured - limit))
                text = (
                    f"removed by {look.step.option}={number(look.value)}: {what} is {number(float(measured))}, "
                    f"the limit {number(float(limit))}, "
                )
                text += f"missed by {number(missed)}" if missed else "exactly on the boundary, where it is out"
                return out(look.step.option, text, float(measured), float(limit), missed)
        if not self._drawn.has(token):
            cause = "its mass rounds to 0" if self._temperature else "temperature 0 leaves all mass to the best"
            return out("mass", f"no stage removed it, but {cause}, so it is never drawn")
        drawn, place = self._drawn, self._drawn.place(token)
        earlier = _Order.falling(drawn.z).before(place)
        probability, rank = drawn.share(place), int(np.count_nonzero(earlier)) + 1
        text = f"{name}: in, with probability {number(probability)}, rank {rank} of {drawn.ids.size}"
        return Why(token, word, True, None, None, None, None, probability, rank, text)

    @_check.public
    def plot(self) -> Figure:
        """Draw the stages and the head, as `headway.plot.filter_stages` does.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: matplotlib is missing.

        >>> import headway as hw
        >>> figure = hw.explain([3.0, 2.0, 1.0], top_k=2).plot()
        """
        from ..plot import filter_stages

        return filter_stages(self)

    def __repr__(self) -> str:
        stages = f"{len(self.stages)} stage{'' if len(self.stages) == 1 else 's'}"
        return f"<Explanation: {self._drawn.ids.size} of {self.vocabulary} tokens left after {stages}>"

    def __str__(self) -> str:
        stages, head = self._tables()
        notes = {0: [f"{self.banned} banned before the first stage"] if self.banned else []}
        notes |= {i: stage.notes() for i, stage in enumerate(self.stages, 2)}
        return "\n".join([*_aligned(stages, notes), "", *_aligned(head, {}), "", self._summary()])

    def _repr_html_(self) -> str:
        def table(rows: list[list[str]]) -> str:
            lines = (
                "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
                for row, tag in zip(rows, ["th"] + ["td"] * len(rows))
            )
            return f"<table>{''.join(lines)}</table>"

        stages, head = self._tables()
        stages = [[*row, note] for row, note in zip(stages, ["", "", *("; ".join(s.notes()) for s in self.stages)])]
        return f"{table(stages)}{table(head)}<p>{html.escape(self._summary())}</p>"

    def _tables(self) -> tuple[list[list[str]], list[list[str]]]:
        """Return the rows of the two tables, headings first."""
        start = self.vocabulary - self.banned
        stages = [["stage", "value", "left", "removed", "mass kept", "last kept", "first removed"]]
        stages.append(["", "", str(start), str(self.banned), "", "", ""])
        for stage in self.stages:
            edges = [_edge(stage.last_kept), _edge(stage.first_removed)]
            counts = [str(stage.after), str(stage.removed), number(stage.kept_mass)]
            stages.append([stage.option, number(stage.value), *counts, *edges])
        head = [["rank", "token", "probability", "word"]]
        for rank, one in enumerate(self.head, 1):
            head.append([str(rank), str(one.token), f"{one.probability:.6f}", shortened(one.word, 40)])
        return stages, head if any(one.word for one in self.head) else [row[:3] for row in head]

    def _summary(self) -> str:
        text = f"{self._drawn.ids.size} of {self.vocabulary} tokens can be drawn, entropy {self.entropy:.4f} nats"
        cause = "whose mass rounds to 0" if self._temperature else "to which temperature 0 leaves no mass"
        return text + (f"; {self.massless} more stay, {cause}" if self.massless else "")


# Rows between stages -------------------------------------------------------------------------------------------------

_NO_LIMIT = 2**63 - 1  # what a top_k without limit is read as


@dataclass(frozen=True)
class _Order:
    """Tokens by their places in an array: a smaller key comes first; of equal ones the first, or the last. No sort."""

    key: Array
    last_first: bool = False

    @classmethod
    def rising(cls, x: Array, last_first: bool = False) -> _Order:
        """Order float32 numbers, of which none is -0, as whole ones: a machine may take tiny floats for 0."""
        bits = x.view(np.int32)
        return cls(bits ^ (bits >> 31 & 0x7FFFFFFF), last_first)

    @classmethod
    def falling(cls, x: Array, last_first: bool = False) -> _Order:
        return cls(~cls.rising(x).key, last_first)

    def equal(self, key: int) -> Array:
        places = np.flatnonzero(self.key == key)
        return places[::-1] if self.last_first else places

    def ends(self, places: Array) -> tuple[int, int]:
        """Return the first and the last of these tokens, whose places rise."""
        keys = self.key[places]
        best, worst = places[keys == keys.min()], places[keys == keys.max()]
        return (int(best[-1]), int(worst[0])) if self.last_first else (int(best[0]), int(worst[-1]))

    def first(self, count: int) -> Array:
        """Return the first `count` in order, or all."""
        places = np.arange(self.key.size)
        if count < places.size:
            key = np.partition(self.key, count - 1)[count - 1]
            sure = np.flatnonzero(self.key < key)
            places = np.concatenate([sure, self.equal(key)[: count - sure.size]])
        return places[np.argsort(self.key[places], kind="stable")]

    def before(self, place: int) -> Array:
        """Tell which come before this one, (n,) bool."""
        before: Array = self.key < self.key[place]
        equal = self.equal(self.key[place])
        before[equal[: np.flatnonzero(equal == place)[0]]] = True
        return before


@dataclass(frozen=True)
class _Left:
    """The tokens that some stages left: ids, which rise, logits with their bias, and masses.

    found: what the last of the stages worked out, which `Row::found` in stages.h says for each.
    """

    ids: Array
    z: Array
    mass: Array
    found: float

    @property
    def total(self) -> int:
        return self._total

    @cached_property
    def _total(self) -> int:
        return int(self.mass.sum())

    def take(self, places: Array) -> _Left:
        if places.size == self.ids.size:
            return self
        return _Left(self.ids[places], self.z[places], self.mass[places], self.found)

    def place(self, token: int) -> int:
        return int(np.searchsorted(self.ids, token))

    def holds(self, ids: Array) -> Array:
        """Tell which of the tokens are among these, (n,) bool."""
        among = np.zeros(self.ids[-1] + 1, np.bool_)
        among[ids] = True
        return among[self.ids]

    def has(self, token: int) -> bool:
        place = self.place(token)
        return place < self.ids.size and bool(self.ids[place] == token)

    def share(self, place: int) -> float:
        return int(self.mass[place]) / self.total

    def candidate(self, place: int, words: Words) -> Candidate:
        token = int(self.ids[place])
        return Candidate(token, self.share(place), words(token))


class _Trace:
    """The kernel's account of a row: the stages that it went through, and what was left before and after each."""

    def __init__(self, run: Call) -> None:
        self.run, self.source = run, run.coin()
        rows = self.rows()
        self.steps = run.steps()
        shape = len(self.steps) + 1, run.vocabulary  # of which only what is left is ever touched
        ids, z, mass = np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(shape, np.int64)
        counts, found = self.read(rows, shape[0], ids, z, mass)
        self.left = [_Left(ids[i, :n], z[i, :n], mass[i, :n], found[i]) for i, n in enumerate(counts)]

    def rows(self, stages: _native.Stages | None = None) -> _native.Rows:
        self.status = np.empty(1, np.int64)
        return self.run.native(self.status, stages=stages, **self.source)

    def read(self, rows: _native.Rows, states: int, *left: Array) -> tuple[list[int], list[float]]:
        """Return how many tokens there are in each state, and what the stage before it worked out."""
        counts, found = np.empty(states, np.int64), np.empty(states)
        if not _native.trace(rows, counts, found, *(left or (None, None, None))):
            self.run.fail(self.status)
        return counts.tolist(), found.tolist()

    def would_leave(self, number: int, step: Step) -> int:
        """Return how many tokens there would be after the stage with this number, from 1, if it were this one."""
        steps = [*self.steps[: number - 1], (step, self.steps[number - 1][1])]
        rows = self.rows(native_stages(steps, self.run.per_row("min_tokens_to_keep")))
        return self.read(rows, number + 1)[0][-1]


@dataclass(frozen=True)
class _Look:
    """A row before and after one stage.

    number: of the stage, from 1. values: of its options, the one that switches it on first. floor: how many tokens it
    leaves at least. temperature: that at which masses are measured after it. spared: how many tokens xtc never takes.
    """

    before: _Left
    after: _Left
    number: int
    step: Step
    values: dict[str, float]
    floor: int
    temperature: float
    spared: int

    @property
    def value(self) -> float:
        return self.values[self.record.numbers[0]]

    @property
    def record(self) -> Record:
        return STAGES[self.step.option]

    @property
    def found(self) -> float:
        return self.after.found

    def stage(self, trace: _Trace, words: Words) -> Stage:
        before, after, step = self.before, self.after, self.step
        last = first = None
        ties_kept = ties_removed = floor_kept = 0
        mass_after = before.total
        if after.ids.size < before.ids.size:
            stays = before.holds(after.ids)
            mass_after = int(before.mass @ stays)
            order = self.order
            places = self.boundary(order, stays)
            last, first = (before.candidate(place, words) for place in places)
            if order.key[places[0]] == order.key[places[1]]:
                equal = stays[order.equal(order.key[places[0]])]
                ties_kept = int(np.count_nonzero(equal))
                ties_removed = equal.size - ties_kept
        if step.ties == "keep":
            ties_kept = after.ids.size - trace.would_leave(self.number, step._replace(ties="lowest_id"))
        if self.floor > 1:
            floor_kept = after.ids.size - trace.would_leave(self.number, step._replace(floor=False))
        return Stage(
            option=step.option,
            value=self.value,
            before=before.ids.size,
            after=after.ids.size,
            mass_before=before.total,
            mass_after=after.total if self.record.judge is None else mass_after,
            last_kept=last,
            first_removed=first,
            ties_kept=ties_kept,
            ties_removed=ties_removed,
            rule=step.ties,
            floor_kept=floor_kept,
            note=self.record.note(self),
        )

    @cached_property
    def order(self) -> _Order:
        """The stage's order of the tokens that came in, what it keeps first; with takes_best it is read backwards."""
        highest_first = self.step.ties == "highest_id"
        if self.record.distance is None:
            return _Order.falling(self.before.z, highest_first)
        return _Order.rising(self.record.distance(self), highest_first)

    def earlier(self, place: int) -> Array:
        return self.order.before(place)

    def boundary(self, order: _Order, stays: Array) -> tuple[int, int]:
        """Return the places of the last that stayed and the first that went."""
        best_kept, worst_kept = order.ends(np.flatnonzero(stays))
        best_removed, worst_removed = order.ends(np.flatnonzero(~stays))
        if self.record.takes_best:
            return best_kept, worst_removed
        return worst_kept, best_removed

    def judge(self, token: int) -> Judgement:
        """Return the number by which the stage judges a token that it removed, what it is, and the limit."""
        assert self.record.judge is not None  # only such a stage removes tokens
        return self.record.judge(self, self.before.place(token))


def _looks(trace: _Trace) -> list[_Look]:
    """Look at each stage that is on."""
    looks: list[_Look] = []
    temperature = 1.0
    for place, (step, arrays) in enumerate(trace.steps, 1):
        values = {name: array[0].item() for name, array in arrays.items()}
        if not _is_on(step.option, values, temperature):
            continue
        before, after = trace.left[place - 1 : place + 1]
        if STAGES[step.option].judge is None:
            temperature = after.found
        if step.option == "top_p" and temperature == 0:
            step = step._replace(ties="lowest_id")  # no token equals the first of the order, which has all the mass
        floor = int(trace.run.per_row("min_tokens_to_keep")[0]) if step.floor else 1
        looks.append(_Look(before, after, place, step, values, floor, temperature, trace.run.spared().size))
    return looks


def _is_on(option: str, values: dict[str, float], temperature: float) -> bool:
    """Tell whether a stage that was given has something to do in a row whose masses are measured at a temperature."""
    if option == "greedy":
        return values["temperature"] == 0
    if option == "temperature":
        return bool(values.get("dynamic_temperature_range")) or (temperature != 0 and values["temperature"] != 1)
    return option != "top_k" or values["top_k"] < _NO_LIMIT


@_check.public
@shows_sampling_options
def explain(
    logits: AnyArray,
    params: SamplingParams | None = None,
    *,
    top: int = 10,
    tokens: Sequence[str] | Words | None = None,
    **options: Unpack[SamplingOptions],
) -> Explanation:
    """Explain what `sample` does with a row of logits: stage by stage, and token by token with `.why`.

    Args:
        logits: (V,), or an array that holds one row.
        params: options that many calls share; a keyword wins over what params say of it.
        top: how many of the best tokens to show, at least 0.
        tokens: texts beside the ids: a sequence of V strings, or a function from an id to a string.
        **options: those of `SamplingParams`; seed and position matter to xtc's coin alone.

    Returns:
        An `Explanation`.

    Raises:
        TypeError, ValueError: as `sample`; more than one row.

    >>> import headway as hw
    >>> print(hw.explain([3.0, 1.0, 2.0, 2.0], temperature=0.5, top_k=2, tokens=["the", "a", "his", "her"]))
    stage        value  left  removed  mass kept  last kept        first removed
                           4        0
    temperature    0.5     4        0          1
    top_k            2     2        2     0.8808  2 'his'  0.1050  3 'her'  0.1050
      2 equal at the boundary: 1 in, 1 out, the lowest ids first
    <BLANKLINE>
    rank  token  probability  word
       1      0     0.880797  'the'
       2      2     0.119203  'his'
    <BLANKLINE>
    2 of 4 tokens can be drawn, entropy 0.3653 nats
    """
    operand = _arrays.unwrap(logits, "logits")
    run = prepare(operand._replace(data=operand.data.copy()), params, **options)  # which nobody writes to meanwhile
    if run.rows != 1:
        raise ValueError(
            f"logits: expected one row (V,), got {run.rows} in shape {run.data.shape}; explain them one by one, "
            "logits[i]"
        )
    top = _check.integer(top, "top", 1)
    words = _words(tokens, run.vocabulary)
    trace = _Trace(run)
    never, mask = run.operand.astype("float32").reshape(-1) == -np.inf, _mask(run)

    def banned_by(token: int) -> str:
        if never[token]:
            return "logits"
        return "allowed" if mask is not None and not mask[token] else "logit_bias"

    return Explanation(trace, banned_by, top, words)


def _mask(run: Call) -> Array | None:
    """Return which tokens are allowed, (V,) bool."""
    allowed, packed = run.allowed()
    if allowed is None:
        return None
    row = np.ascontiguousarray(allowed).reshape(-1)
    return unpacked(row, run.vocabulary) if packed else row.view(np.bool_)


def _words(tokens: Sequence[str] | Words | None, vocabulary: int) -> Words:
    if tokens is None:
        return lambda token: ""
    if callable(tokens):
        return lambda token: str(tokens(token))
    length = len(tokens) if isinstance(tokens, Sequence) else None
    if isinstance(tokens, str) or length != vocabulary:
        got = "one string" if isinstance(tokens, str) else shown(tokens) if length is None else f"{length}"
        raise ValueError(f"tokens: expected {vocabulary} words, or a function from an id to a word, got {got}")
    return lambda token: str(tokens[token])


# In words and columns -----------------------------------------------------------------------------------------------


def _edge(one: Candidate | None) -> str:
    if one is None:
        return ""
    small = 0 < one.probability < 1e-3
    probability = f"{one.probability:.0e}" if small else f"{one.probability:.4f}"
    return "  ".join(filter(None, (f"{one.token} {shortened(one.word, 8)}".rstrip(), probability)))


def _aligned(rows: list[list[str]], notes: dict[int, list[str]]) -> list[str]:
    """Return lines in which columns stand below each other, numbers to the right; notes come below their row."""
    left = {0: "stage", 3: "word", 5: "last kept", 6: "first removed"}
    widths = [max(map(columns_of, column)) for column in zip(*rows)]
    lines = []
    for i, row in enumerate(rows):
        cells = []
        for j, cell in enumerate(row):
            padding = " " * (widths[j] - columns_of(cell))
            cells.append(cell + padding if rows[0][j] == left.get(j) else padding + cell)
        lines.append("  ".join(cells).rstrip())
        lines += [f"  {note}" for note in notes.get(i, [])]
    return lines
