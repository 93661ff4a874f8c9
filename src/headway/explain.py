"""Why a token can be drawn or cannot: the sampler's stages one by one, each with its boundary.

The stages are those of `headway.reference`, looked at between one and the next: what is said here is what decides.
"""

from __future__ import annotations

import copy
import html
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from . import _arrays, _check
from ._dialects import OFF, Step
from ._options import Array, shown, unpacked
from .reference import sampling as definition
from .sampling import Options, SamplingParams, _Run, _shows_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from typing_extensions import Unpack

__all__ = ["Candidate", "Explanation", "Stage", "Why", "explain"]

Words = Callable[[int], str]


@dataclass(frozen=True)
class Candidate:
    """A token and its probability: at a boundary that of the stage, in the head the final one.

    word: its text, "" where no tokens were given.
    """

    token: int
    probability: float
    word: str = ""


@dataclass(frozen=True)
class Stage:
    """What one stage did.

    option, value: the option that switches it on.
    before, after: how many tokens came in, and how many stayed.
    mass_before, mass_after: whole numbers; the mass that came in, and how much of it stayed. At `temperature` the
        masses are measured anew: there the second is the whole at the new temperature.
    last_kept, first_removed: the tokens on both sides of the boundary, in the order of the stage; None where it
        removed none. xtc removes the best: there the first is the best that stayed, and the second the last to go.
    ties_kept, ties_removed: of the tokens equal to the one on the boundary, how many the rule for ties let in and how
        many it kept out; with the rule "keep", how many it let in beyond those that "lowest_id" would have.
    rule: the rule for ties: "lowest_id", "highest_id" or "keep".
    floor_kept: how many tokens stayed for min_tokens_to_keep alone.
    note: what else there is to know, such as the temperature that a range came to, or how xtc's coin fell.
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
        """How many tokens went."""
        return self.before - self.after

    @property
    def kept_mass(self) -> float:
        """The share of the mass that stayed; 1.0 at `temperature`, which only measures."""
        return 1.0 if self.option in _MEASURES else self.mass_after / self.mass_before

    def notes(self) -> list[str]:
        """Return what does not fit into a row of the table, in words."""
        lines = [self.note] if self.note else []
        if self.ties_removed:
            lines.append(
                f"{self.ties_kept + self.ties_removed} equal at the boundary: {self.ties_kept} in, "
                f"{self.ties_removed} out, the {self.rule.removesuffix('_id')} ids first"
                + (" to go" if self.option == "xtc_probability" else "")
            )
        elif self.ties_kept:
            lines.append(f"{self.ties_kept} more kept, equal to the last")
        if self.floor_kept:
            lines.append(f"{self.floor_kept} more kept for min_tokens_to_keep")
        return lines


@dataclass(frozen=True)
class Why:
    """Why a token can be drawn, or cannot; `str()` says it in a sentence.

    kept: whether it can be drawn.
    stage: what took it out: a stage's option, or what banned it ("logits", "logit_bias", "allowed"). "mass" where no
        stage did, but its mass is 0.
    measured, limit: the number by which the stage judged the token, and the one it should have reached or stayed below.
    missed_by: how far apart the two are, exact before it is rounded to a float.
    probability, rank: of the final distribution; the rank, from 1, is None for what cannot be drawn.
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

    vocabulary, banned: the number of tokens, and how many were banned before the first stage.
    stages: a `Stage` for each that was switched on, in order.
    masses: (V,) int64, what `sample` draws by, exactly; 0 where a token cannot be drawn.
    kept: (n,) the ids that can be drawn, the best first.
    massless: how many tokens no stage removed, but whose mass rounds to 0 or is 0 at temperature 0.
    head: the best of them, each a `Candidate`.
    entropy: of the final distribution, in nats.
    """

    def __init__(
        self, final: definition._Row, seen: list[_Look], banned_by: Callable[[int], str], top: int, words: Words
    ) -> None:
        self._final, self._seen, self._banned_by, self._words = final, seen, banned_by, words
        self.vocabulary = final.vocabulary
        self.banned = self.vocabulary - seen[0].before.ids.size
        self.stages = tuple(look.stage(words) for look in seen if look.on())
        self.masses: Array = final.final_weights()
        self.kept: Array = final.ids[final.mass > 0]
        self.massless = final.ids.size - self.kept.size
        self.head = tuple(
            Candidate(int(token), int(mass) / final.total, words(int(token)))
            for token, mass in zip(self.kept[:top], final.mass[final.mass > 0][:top])
        )
        shares = self.masses[self.kept] / final.total
        self.entropy = max(0.0, float(-(shares * np.log(shares)).sum()))

    def why(self, token: int) -> Why:
        """Say why a token is in or out.

        Raises TypeError for what is no integer, ValueError for what is no token.

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

        if token not in self._seen[0].before.ids:
            by = self._banned_by(token)
            return out(by, f"banned by {by}, before the first stage")
        for look in self._seen:
            if token not in look.after.ids:
                what, measured, limit = look.judge(token)
                missed = float(abs(measured - limit))
                text = (
                    f"removed by {look.step.option}={_number(look.value)}: {what} is {_number(float(measured))}, "
                    f"the limit {_number(float(limit))}, "
                )
                text += f"missed by {_number(missed)}" if missed else "exactly on the boundary, where it is out"
                return out(look.step.option, text, float(measured), float(limit), missed)
        mass = int(self.masses[token])
        if not mass:
            cause = "its mass rounds to 0" if self._final.temperature else "temperature 0 leaves all mass to the best"
            return out("mass", f"no stage removed it, but {cause}, so it is never drawn")
        probability, rank = mass / self._final.total, int(np.flatnonzero(self.kept == token)[0]) + 1
        text = f"{name}: in, with probability {_number(probability)}, rank {rank} of {self.kept.size}"
        return Why(token, word, True, None, None, None, None, probability, rank, text)

    def plot(self) -> Figure:
        """Draw the stages and the head; needs matplotlib. See `headway.plot.filter_stages`."""
        from .plot import filter_stages

        return filter_stages(self)

    def __repr__(self) -> str:
        stages = f"{len(self.stages)} stage{'' if len(self.stages) == 1 else 's'}"
        return f"<Explanation: {self.kept.size} of {self.vocabulary} tokens left after {stages}>"

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
            counts = [str(stage.after), str(stage.removed), _number(stage.kept_mass)]
            stages.append([stage.option, _number(stage.value), *counts, *edges])
        head = [["rank", "token", "probability", "word"]]
        for rank, one in enumerate(self.head, 1):
            head.append([str(rank), str(one.token), f"{one.probability:.6f}", shortened(one.word, 40)])
        return stages, head if any(one.word for one in self.head) else [row[:3] for row in head]

    def _summary(self) -> str:
        text = f"{self.kept.size} of {self.vocabulary} tokens can be drawn, entropy {self.entropy:.4f} nats"
        cause = "whose mass rounds to 0" if self._final.temperature else "to which temperature 0 leaves no mass"
        return text + (f"; {self.massless} more stay, {cause}" if self.massless else "")


_MEASURES = ("greedy", "temperature")
_NO_LIMIT = 2**63 - 1  # what a top_k without limit is read as


@dataclass(frozen=True)
class _Look:
    """A row before and after one stage."""

    before: definition._Row
    after: definition._Row
    step: Step
    value: float

    def on(self) -> bool:
        """Whether the stage is switched on."""
        option = self.step.option
        if option == "greedy":
            return self.value == 0
        if option == "top_k":
            return self.value < _NO_LIMIT
        if option == "temperature":
            dynamic = bool(self.before.settings["dynamic_temperature_range"])
            return dynamic or (self.value != OFF[option] and self.before.temperature != 0)
        return self.value != OFF[option]

    def stage(self, words: Words) -> Stage:
        before, after, option = self.before, self.after, self.step.option
        order, key = self.order()
        stays = np.isin(before.ids, after.ids)
        count = after.ids.size
        last = first = None
        ties_kept = ties_removed = 0
        if count < before.ids.size:
            inner, outer = int(order[stays[order]][-1]), int(order[~stays[order]][0])  # xtc may spare what lies between
            last, first = self.candidate(inner, words), self.candidate(outer, words)
            equal = key == key[inner]
            if equal[outer]:
                ties_kept, ties_removed = int((equal & stays).sum()), int((equal & ~stays).sum())
        if self.step.ties == "keep":
            ties_kept = count - self.again(self.step._replace(ties="lowest_id"), before.floor)
        return Stage(
            option=option,
            value=self.value,
            before=before.ids.size,
            after=count,
            mass_before=before.total,
            mass_after=after.total if option in _MEASURES else int(before.mass[stays].sum()),
            last_kept=last,
            first_removed=first,
            ties_kept=ties_kept,
            ties_removed=ties_removed,
            rule=self.step.ties,
            floor_kept=count - self.again(self.step, 1),
            note=self.note(),
        )

    def again(self, step: Step, floor: int) -> int:
        """How many tokens the stage would leave under another rule."""
        row = copy.copy(self.before)
        row.floor = floor
        definition._STAGES[step.option](row, self.value, step)
        return int(row.ids.size)

    def order(self) -> tuple[Array, Array]:
        """Return the places of tokens in the stage's order, what it keeps first, and what makes two of them equal."""
        row = self.before
        key = ~definition._keys(row.z)
        if self.step.option == "typical_p":
            key = definition._keys(definition._distance(row))
        ids = -row.ids if self.step.ties == "highest_id" else row.ids
        order = np.lexsort((ids, key))
        return (order[::-1] if self.step.option == "xtc_probability" else order), key

    def candidate(self, place: int, words: Words) -> Candidate:
        token = int(self.before.ids[place])
        return Candidate(token, int(self.before.mass[place]) / self.before.total, words(token))

    def note(self) -> str:
        row = self.before
        if self.step.option == "temperature" and row.settings["dynamic_temperature_range"]:
            return f"dynamic: {_number(self.after.temperature)}"
        if self.step.option == "top_n_sigma":
            return f"the standard deviation is {_number(definition._deviation(row))}"
        if self.step.option == "eta_cutoff":
            return f"the least probability is {_number(definition._eta(row, self.value) / row.total)}"
        if self.step.option == "xtc_probability":
            coin = definition._coin(row)
            fell = "below" if coin < self.value else "not below"
            spared = len(row.settings["xtc_special_tokens"] or ())
            return (
                f"coin {coin:.4f} is {fell} {_number(self.value)}; threshold {_number(row.settings['xtc_threshold'])}"
                + (f"; spares {spared} token{'' if spared == 1 else 's'}" if spared else "")
            )
        return ""

    def judge(self, token: int) -> tuple[str, Fraction, Fraction]:
        """Return the number by which the stage judges a token that it removed, what it is, and the limit."""
        row, option = self.before, self.step.option
        place = int(np.flatnonzero(row.ids == token)[0])
        share = Fraction(int(row.mass[place]), row.total)
        if option == "min_p":
            return "its share of the best one's mass", Fraction(int(row.mass[place]), 1 << row.s), Fraction(self.value)
        if option == "epsilon_cutoff":
            return "its probability", share, Fraction(self.value)
        if option == "eta_cutoff":
            return "its probability", share, Fraction(definition._eta(row, self.value), row.total)
        if option == "xtc_probability":
            return "its probability", share, Fraction(row.settings["xtc_threshold"])
        if option == "top_n_sigma":
            distance = -float(definition._below(row)[place])
            return (
                "its distance from the best logit",
                Fraction(distance),
                Fraction(self.value * definition._deviation(row)),
            )
        order, _ = self.order()
        earlier = order[: int(np.flatnonzero(order == place)[0])]
        if option == "top_k":
            return "its rank", Fraction(earlier.size + 1), Fraction(max(int(self.value), row.floor))
        what = "the mass before it" + (" in order of typicality" if option == "typical_p" else "")
        return what, Fraction(int(row.mass[earlier].sum()), row.total), Fraction(self.value)


@_shows_options
def explain(
    logits: ArrayLike,
    params: SamplingParams | None = None,
    *,
    top: int = 10,
    tokens: Sequence[str] | Words | None = None,
    **options: Unpack[Options],
) -> Explanation:
    """Explain what `sample` does with a row of logits: stage by stage, and token by token with `.why`.

    logits (V,), or an array that holds one row. top says how many of the best tokens to show. tokens puts words beside
    ids: a sequence of V strings, or a function from an id to a string. Options and errors are those of `sample`; seed
    and position matter to xtc's coin alone. It is made to be exact, not fast: it may take half a second.

    Raises ValueError for more than one row too.

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
    run = _Run(logits, params, options)
    if run.rows != 1:
        raise ValueError(
            f"logits: expected one row (V,), got {run.rows} in shape {run.data.shape}; explain them one by one, "
            "logits[i]"
        )
    top = _check.integer(top, "top", 1)
    words = _words(tokens, run.vocabulary)
    source = run.coin()
    run(probabilities=np.empty(run.data.shape, _arrays.compute_dtype(run.operand.dtype)), **source)  # finds faults
    settings = {name: value for name, value in run.settings.items() if name not in ("allowed", "logit_bias")}
    settings |= {name: run.per_row(name)[0].item() for name, value in settings.items() if isinstance(value, np.ndarray)}
    if "seed" in source:
        settings["seed"] = int(source["seed"][0])

    row = run.operand.astype("float64" if run.operand.dtype == "float64" else "float32").reshape(-1)
    bias, mask = run.bias(), _mask(run)
    bias = None if bias is None else bias.reshape(-1)
    z = definition._scores(row, bias, mask)
    seen: list[tuple[definition._Row, Step, float]] = []
    final = definition._through_stages(
        definition._Given(row, bias),
        z,
        settings,
        partial(definition._words, settings, 0),
        lambda now, step, value: seen.append((copy.copy(now), step, value)),
    )
    later = [now for now, _, _ in seen[1:]] + [final]
    looks = [_Look(before, after, step, value) for (before, step, value), after in zip(seen, later)]

    def banned_by(token: int) -> str:
        if row[token] == -np.inf:
            return "logits"
        return "allowed" if mask is not None and not mask[token] else "logit_bias"

    return Explanation(final, looks, banned_by, top, words)


def _mask(run: _Run) -> Array | None:
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


def _number(x: float) -> str:
    """Write a number in few characters; what is not 1 does not look like it."""
    if float(x).is_integer() and abs(x) < 1e15:
        return str(int(x))
    text = f"{x:.4g}"
    return f"{x:.7g}" if text == "1" and x != 1 else text


def _edge(one: Candidate | None) -> str:
    if one is None:
        return ""
    small = 0 < one.probability < 1e-3
    probability = f"{one.probability:.0e}" if small else f"{one.probability:.4f}"
    return "  ".join(filter(None, (f"{one.token} {shortened(one.word, 8)}".rstrip(), probability)))


def shortened(word: str, columns: int) -> str:
    """Quote a word, and cut it where it is too wide; no word stays none."""
    if not word:
        return ""
    quoted = repr(word)
    if _columns(quoted) <= columns:
        return quoted
    while _columns(quoted) > columns - 1:
        quoted = quoted[:-1]
    return quoted + "\N{HORIZONTAL ELLIPSIS}"


def _columns(text: str) -> int:
    """How wide a terminal shows it."""
    return sum((unicodedata.east_asian_width(c) in "WF") + (unicodedata.combining(c) == 0) for c in text)


def _aligned(rows: list[list[str]], notes: dict[int, list[str]]) -> list[str]:
    """Return lines in which columns stand below each other, numbers to the right; notes come below their row."""
    left = {0: "stage", 3: "word", 5: "last kept", 6: "first removed"}
    widths = [max(map(_columns, column)) for column in zip(*rows)]
    lines = []
    for i, row in enumerate(rows):
        cells = []
        for j, cell in enumerate(row):
            padding = " " * (widths[j] - _columns(cell))
            cells.append(cell + padding if rows[0][j] == left.get(j) else padding + cell)
        lines.append("  ".join(cells).rstrip())
        lines += [f"  {note}" for note in notes.get(i, [])]
    return lines
