"""The stages of sampling: each takes a row and the value of its option, and leaves in the row the tokens that stay."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..._sampling import OFF, Step
from .masses import AnyArray, exponents, keys, least_mass, log, masses_of, power, scale_bits

Settings = dict[str, Any]
Words = Callable[[int], tuple[int, ...]]  # the random words of a draw


class Given(NamedTuple):
    """A row as it came."""

    logits: AnyArray  # (V,)
    bias: AnyArray | None  # (V,) float32


class Row:
    """One row on its way through the stages: the tokens that are still in, best first, and their masses."""

    def __init__(self, given: Given, z: AnyArray, settings: Settings, words: Words) -> None:
        order = np.argsort(~keys(z), kind="stable")  # z descending, id ascending
        self.given = given
        self.vocabulary = z.size
        self.s = scale_bits(z.size)
        self.ids: AnyArray = order[z[order] != -np.inf]
        self.z: AnyArray = z[self.ids]
        self.settings = settings
        self.words = words
        self.floor = 1  # what the stage must leave at least
        self.measure(1.0)

    def measure(self, temperature: float) -> None:
        """Measure masses at this temperature: 2^s is that of the best token that is left."""
        self.temperature = temperature
        self.x = exponents(self.z, temperature)
        self.mass = masses_of(self.x, self.s)
        if temperature == 0:  # all for the best one
            self.mass[:] = 0
            self.mass[0] = 1 << self.s

    @property
    def total(self) -> int:
        return int(self.mass.sum())

    def keep(self, stays: AnyArray) -> None:
        """Leave these in; where the best token goes, measure anew."""
        best = self.z[0]
        self.ids, self.z, self.x, self.mass = (part[stays] for part in (self.ids, self.z, self.x, self.mass))
        if self.z[0] != best:
            self.measure(self.temperature)

    def first(self, count: int, ties: str) -> AnyArray:
        """Which tokens are the first `count` of the order, at least as many as must be kept."""
        count = min(max(count, self.floor), self.ids.size)
        key = keys(self.z)
        if ties == "keep":
            return np.asarray(key >= key[count - 1])
        id_order = self.ids if ties == "lowest_id" else -self.ids
        order = np.lexsort((id_order, ~key))
        return np.asarray(np.isin(np.arange(self.ids.size), order[:count]))

    def sum(self, values: AnyArray) -> float:
        """The sum of float64 values, one per token: lane i of 16 adds the tokens with id mod 16 = i, in order."""
        of_id = np.zeros(-(-self.vocabulary // 16) * 16)
        of_id[self.ids] = values
        lanes = np.cumsum(of_id.reshape(-1, 16), axis=0)[-1]
        for half in (8, 4, 2, 1):
            lanes = lanes[:half] + lanes[half : 2 * half]
        return float(lanes[0])

    def mean(self) -> float:
        """The mean of x under the masses. The surprise of a token less the entropy is this less its x."""
        return self.sum(self.mass.astype(np.float64) * self.x.astype(np.float64)) / float(self.total)

    def final_masses(self) -> AnyArray:
        """(V,) int64: 0 where a token was removed."""
        final = np.zeros(self.vocabulary, np.int64)
        final[self.ids] = self.mass
        return final


def _greedy(row: Row, temperature: float, step: Step) -> None:
    """Temperature 0 before all else."""
    if temperature == 0:
        row.measure(0)


def _temperature(row: Row, temperature: float, step: Step) -> None:
    """Measure masses at the temperature; with a range, at one between t - range and t + range that rises with entropy.

    The entropy is that of the masses at temperature 1, as a share of the largest that so many tokens can have.
    """
    spread = row.settings["dynamic_temperature_range"]
    if spread:
        low, high = max(0.0, temperature - spread), min(temperature + spread, sys.float_info.max)
        row.measure(1.0)
        entropy = log(float(row.total) * 2.0**-row.s) - row.mean()
        share = entropy / log(float(row.ids.size)) if row.ids.size > 1 else 0.0
        way = power(min(max(share, 0.0), 1.0), row.settings["dynamic_temperature_exponent"])
        temperature = min(sys.float_info.max, low + (high - low) * way)
    row.measure(float(temperature))


def below_best(row: Row) -> AnyArray:
    """How far each z is from the best one: 0 or less, in float64."""
    return np.asarray(row.z.astype(np.float64) - float(row.z[0]))


def deviation(row: Row) -> float:
    """The standard deviation of z."""
    below, count = below_best(row), float(row.ids.size)
    mean, mean_square = row.sum(below) / count, row.sum(below * below) / count
    return math.sqrt(max(mean_square - mean * mean, 0.0))


def _top_n_sigma(row: Row, n: float, step: Step) -> None:
    """Tang et al. 2024 (arXiv:2411.07641): z at most n standard deviations below the best one's."""
    if n == OFF["top_n_sigma"]:
        return
    stays = below_best(row) >= -(n * deviation(row))
    row.keep(row.first(int(stays.sum()), step.ties))


def _top_k(row: Row, k: float, step: Step) -> None:
    """Fan et al. 2018 (arXiv:1805.04833): the k best."""
    row.keep(row.first(int(min(k, row.ids.size)), step.ties))


def _top_p(row: Row, p: float, step: Step) -> None:
    """Holtzman et al. 2020 (arXiv:1904.09751): a token stays iff the mass strictly before it is below p."""
    if p == OFF["top_p"]:
        return
    before = np.cumsum(row.mass) - row.mass
    stays = before < least_mass(p, row.total, not step.equal)
    row.keep(row.first(int(stays.sum()), step.ties))


def _heavy(row: Row, least: int, step: Step) -> None:
    """Keep masses of at least so much; where those are too few, the first of the order."""
    stays = row.mass >= least
    row.keep(stays if stays.sum() >= row.floor else row.first(0, step.ties))


def _min_p(row: Row, p: float, step: Step) -> None:
    """Nguyen et al. 2024 (arXiv:2407.01082): at least min_p times the mass of the best one."""
    _heavy(row, least_mass(p, 1 << row.s), step)


def distance_from_entropy(row: Row) -> AnyArray:
    """How far each surprise is from the entropy, float32."""
    return np.asarray(np.abs(row.x - np.float32(row.mean())))


def _typical_p(row: Row, p: float, step: Step) -> None:
    """Meister et al. 2022 (arXiv:2202.00666): as top_p, but ordered by the distance of surprise from entropy."""
    if p == OFF["typical_p"]:
        return
    distance = distance_from_entropy(row)
    order = np.lexsort((row.ids, keys(distance)))
    mass = row.mass[order]
    count = int((np.cumsum(mass) - mass < least_mass(p, row.total, not step.equal)).sum())
    if step.ties == "keep" and count:
        count = int((distance <= distance[order[count - 1]]).sum())
    row.keep(np.isin(np.arange(row.ids.size), order[: max(count, row.floor)]))


def _epsilon_cutoff(row: Row, epsilon: float, step: Step) -> None:
    """Hewitt et al. 2022 (arXiv:2210.15191): at least epsilon of the whole."""
    _heavy(row, least_mass(epsilon, row.total), step)


def least_eta(row: Row, epsilon: float) -> int:
    """The least mass that eta_cutoff keeps."""
    middle = int(masses_of(np.array([row.mean()], np.float32), row.s)[0])
    return min(least_mass(epsilon, row.total), least_mass(math.sqrt(epsilon), middle))


def _eta_cutoff(row: Row, epsilon: float, step: Step) -> None:
    """Hewitt et al. 2022: at least min(epsilon, sqrt(epsilon) exp(-entropy)) of the whole.

    exp(-entropy) of the whole is the mass that a token at the mean of x would have.
    """
    _heavy(row, least_eta(row, epsilon), step)


def coin(row: Row) -> float:
    """Xtc's random number, in [0, 1)."""
    return float((row.words(0)[1] >> 11) * 2.0**-53)


def _xtc(row: Row, probability: float, step: Step) -> None:
    """Exclude top choices (llama.cpp #9742): if the coin says so, all that reach the threshold go but the last.

    Of these the special tokens stay.
    """
    if coin(row) >= probability:
        return
    least = max(1, least_mass(row.settings["xtc_threshold"], row.total, step.equal))
    top = np.flatnonzero(row.mass >= least)
    if top.size < 2:
        return
    key = keys(row.z)
    goes = top[key[top] > key[top[-1]]] if step.ties == "keep" else top[:-1]
    goes = goes[~np.isin(row.ids[goes], row.settings["xtc_special_tokens"] or ())]
    if row.ids.size - goes.size >= row.floor:
        row.keep(~np.isin(np.arange(row.ids.size), goes))


STAGES = {
    "greedy": _greedy,
    "temperature": _temperature,
    "top_n_sigma": _top_n_sigma,
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "typical_p": _typical_p,
    "epsilon_cutoff": _epsilon_cutoff,
    "eta_cutoff": _eta_cutoff,
    "xtc_probability": _xtc,
}
