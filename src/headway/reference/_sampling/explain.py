"""What `explain` says, by the definition: a row is looked at between one stage and the next, all of it sorted.

The texts and tables are not defined here, only the facts that they state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from ..._sampling import OFF, Step
from .call import through_stages
from .masses import AnyArray, floats, keys
from .stages import STAGES, Row, below_best, coin, deviation, distance_from_entropy, least_eta

_NO_LIMIT = 2**63 - 1  # what a top_k without limit is read as


class StageFacts(NamedTuple):
    """What one stage did; the other fields are those of `headway.Stage`.

    Attributes:
        last_kept: a token and its share of the mass that came in.
        first_removed: the same.
        found: the number that the stage worked out, which the note states: the temperature that a range came to, the
            standard deviation, eta's least share, xtc's coin; None for all others.
    """

    option: str
    value: float
    before: int
    after: int
    mass_before: int
    mass_after: int
    last_kept: tuple[int, float] | None
    first_removed: tuple[int, float] | None
    ties_kept: int
    ties_removed: int
    rule: str
    floor_kept: int
    found: float | None


class Facts(NamedTuple):
    """What there is to say of a row: what `explain` returns."""

    stages: list[StageFacts]
    kept: AnyArray
    removed: Callable[[int], tuple[str, float, float] | None]


def explain(logits: Any, params: Any = None, **options: Any) -> Facts:
    """Look at one row of logits between one stage and the next.

    Args:
        logits: (V,), or an array that holds one row.
        params: `headway.SamplingParams`, or None.
        **options: those of `headway.SamplingParams`.

    Returns:
        The stages, each with facts under the names that `headway.Stage` has for them; kept, the ids that can be drawn,
        the best first; removed, a function that gives for a token the stage that removed it, the number by which that
        judged, and the limit, or None where no stage did.

    >>> from headway import reference
    >>> facts = reference.explain([3.0, 1.0, 2.0, 2.0], top_k=2)
    >>> facts.kept
    array([0, 2])
    >>> facts.removed(1)
    ('top_k', 4.0, 2.0)
    """
    seen: list[tuple[Row, Step, float]] = []
    (final,) = through_stages(
        floats(logits).reshape(1, -1),
        params,
        options,
        watch=lambda row, step, value: seen.append((copy.copy(row), step, value)),
    )
    later = [row for row, _, _ in seen[1:]] + [final]
    looks = [_Look(before, after, step, value) for (before, step, value), after in zip(seen, later)]

    def removed(token: int) -> tuple[str, float, float] | None:
        return next((look.judge(token) for look in looks if look.removed(token)), None)

    return Facts([look.facts() for look in looks if look.on()], final.ids[final.mass > 0], removed)


class _Look(NamedTuple):
    """A row before and after one stage."""

    before: Row
    after: Row
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

    def facts(self) -> StageFacts:
        before, after, option = self.before, self.after, self.step.option
        order, key = self.order()
        stays = np.isin(before.ids, after.ids)
        count = after.ids.size
        last = first = None
        ties_kept = ties_removed = 0
        if count < before.ids.size:
            inner, outer = int(order[stays[order]][-1]), int(order[~stays[order]][0])  # xtc may spare what lies between
            last, first = self.candidate(inner), self.candidate(outer)
            equal = key == key[inner]
            if equal[outer]:
                ties_kept, ties_removed = int((equal & stays).sum()), int((equal & ~stays).sum())
        if self.step.ties == "keep":
            ties_kept = count - self.again(self.step._replace(ties="lowest_id"), before.floor)
        return StageFacts(
            option=option,
            value=self.value,
            before=before.ids.size,
            after=count,
            mass_before=before.total,
            mass_after=after.total if option in ("greedy", "temperature") else int(before.mass[stays].sum()),
            last_kept=last,
            first_removed=first,
            ties_kept=ties_kept,
            ties_removed=ties_removed,
            rule=self.step.ties,
            floor_kept=count - self.again(self.step, 1),
            found=self.found(),
        )

    def again(self, step: Step, floor: int) -> int:
        """How many tokens the stage would leave under another rule."""
        row = copy.copy(self.before)
        row.floor = floor
        STAGES[step.option](row, self.value, step)
        return int(row.ids.size)

    def order(self) -> tuple[AnyArray, AnyArray]:
        """The places of tokens in the stage's order, what it keeps first, and what makes two of them equal."""
        row = self.before
        key = ~keys(row.z)
        if self.step.option == "typical_p":
            key = keys(distance_from_entropy(row))
        ids = -row.ids if self.step.ties == "highest_id" else row.ids
        order = np.lexsort((ids, key))
        return (order[::-1] if self.step.option == "xtc_probability" else order), key

    def candidate(self, place: int) -> tuple[int, float]:
        return int(self.before.ids[place]), int(self.before.mass[place]) / self.before.total

    def found(self) -> float | None:
        row = self.before
        if self.step.option == "temperature" and row.settings["dynamic_temperature_range"]:
            return self.after.temperature
        if self.step.option == "top_n_sigma":
            return deviation(row)
        if self.step.option == "eta_cutoff":
            return least_eta(row, self.value) / row.total
        return coin(row) if self.step.option == "xtc_probability" else None

    def removed(self, token: int) -> bool:
        return bool(token in self.before.ids and token not in self.after.ids)

    def judge(self, token: int) -> tuple[str, float, float]:
        """What removed a token, the number by which it judged, and the limit."""
        measured, limit = self.measured(int(np.flatnonzero(self.before.ids == token)[0]))
        return self.step.option, float(measured), float(limit)

    def measured(self, place: int) -> tuple[Fraction, Fraction]:
        row, option = self.before, self.step.option
        share = Fraction(int(row.mass[place]), row.total)
        if option == "min_p":
            return Fraction(int(row.mass[place]), 1 << row.s), Fraction(self.value)
        if option == "epsilon_cutoff":
            return share, Fraction(self.value)
        if option == "eta_cutoff":
            return share, Fraction(least_eta(row, self.value), row.total)
        if option == "xtc_probability":
            return share, Fraction(row.settings["xtc_threshold"])
        if option == "top_n_sigma":
            return Fraction(-float(below_best(row)[place])), Fraction(self.value * deviation(row))
        order, _ = self.order()
        earlier = order[: int(np.flatnonzero(order == place)[0])]
        if option == "top_k":
            return Fraction(earlier.size + 1), Fraction(max(int(self.value), row.floor))
        if option in ("top_p", "typical_p"):
            return Fraction(int(row.mass[earlier].sum()), row.total), Fraction(self.value)
        raise NotImplementedError(f"{option}: what it measures is not written here")
