"""In which order sampling's stages run, here and in other libraries. A dialect is data: the tables below are all of it.

The kernel and `headway.reference` both follow these tables; docs/semantics.md says the same in words. What is said
about the other libraries was read from their sources; tests/sampling/test_dialects.py compares with those that are
installed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from .checks import Reading
from .stages import OFF, STAGES

INF, LARGEST = math.inf, sys.float_info.max


class Step(NamedTuple):
    """One stage, named after the option that switches it on, and how it settles what is on its boundary.

    ties: where a count or a mass cuts through tokens with equal logits (typical_p: with equal distances): the lowest
        ids are in, the highest, or all of them.
    equal: whether a token exactly on the boundary is in: for top_p and typical_p one before which there is exactly
        the mass p, for xtc one that has exactly the mass of the threshold.
    floor: whether min_tokens_to_keep is heeded.
    """

    option: str
    ties: Literal["lowest_id", "highest_id", "keep"] = "lowest_id"
    equal: bool = False
    floor: bool = True


class Dialect(NamedTuple):
    """The stages in order, and what numbers mean that mean something else, or nothing, in headway.

    A stage that is not listed does not exist in that library, nor does one of OPTIONAL that is not in `also`.
    """

    steps: tuple[Step, ...]
    readings: Mapping[str, tuple[Reading, ...]] = {}
    also: tuple[str, ...] = ()

    def lacks(self) -> set[str]:
        """Name the filters that the dialect does not have."""
        return FILTERS - {step.option for step in self.steps} - set(self.also)


OPTIONAL = ("dynamic_temperature_range", "min_tokens_to_keep", "xtc_special_tokens")
FILTERS = {*OFF, *OPTIONAL}


def _from_0_down(option: str) -> tuple[Reading, ...]:
    return (Reading(-INF, 0, OFF[option]),)


def _above(bound: float, means: float) -> Reading:
    return Reading(math.nextafter(bound, INF), INF, means)


_NATIVE = tuple(Step(stage.name, equal=stage.equal) for stage in STAGES.values() if stage.name != "greedy")
_FIRST_P = {"top_k": "top_p", "top_p": "top_k"}  # the two change places

# headway's own. top_k and top_p keep prefixes of one order, so measuring p over all tokens is taking top_p first.
NUCLEUS = {
    "after_top_k": Dialect(_NATIVE, also=OPTIONAL),
    "joint": Dialect(tuple(Step(_FIRST_P.get(s.option, s.option), equal=s.equal) for s in _NATIVE), also=OPTIONAL),
}

# Its kernels check neither: a token stays if what is above it holds less than p, and if it reaches min_p.
_FLASHINFER = {"top_p": (Reading(1, INF, 1),), "min_p": _from_0_down("min_p")}

DIALECTS = {
    # transformers 5: generation/logits_process.py and _get_logits_processor. top_p sorts upwards, so of equal logits
    # the lower ids go first, if the sort is stable: torch's need not be. The other filters compare values.
    "hf": Dialect(
        (
            Step("temperature"),
            Step("top_k", "keep"),
            Step("top_p", "highest_id"),
            Step("min_p"),
            Step("typical_p", "keep"),
            Step("epsilon_cutoff", "keep"),
            Step("eta_cutoff", "keep"),
        ),
        {
            "temperature": (Reading(0, 0, None, "use top_k=1, or leave dialect='hf' out"),),
            "top_k": (Reading(0, 0, INF),),
            "top_p": (Reading(0, 0, 0), Reading(1, INF, 1)),
            "typical_p": (Reading(1, INF, 1),),
            "epsilon_cutoff": (Reading(-INF, 0, 0), Reading(1, INF, 0)),
            "eta_cutoff": (Reading(-INF, 0, 0), Reading(1, INF, 0)),
        },
        also=("min_tokens_to_keep",),
    ),
    # vLLM 0.33: v1/sample, the path in plain torch. Its Sampler takes the best token at a temperature below 1e-5.
    # SamplingParams, before it, makes 0.01 of what is below that and not 0.
    "vllm": Dialect(
        (Step("temperature"), Step("min_p"), Step("top_k", "keep"), Step("top_p", "highest_id")),
        {
            "temperature": (Reading(0, math.nextafter(1e-5, 0), 0), Reading(1e-5, math.nextafter(0.01, 0), 0.01)),
            "top_k": (Reading(-1, 0, INF),),
        },
    ),
    # llama.cpp as in llama-cpp-python 0.3.36: src/llama-sampler.cpp, in the default order of common/common.h.
    "llama.cpp": Dialect(
        (
            Step("top_n_sigma", floor=False),
            Step("top_k", floor=False),
            Step("typical_p", equal=True),
            Step("top_p"),
            Step("min_p"),
            Step("xtc_probability", equal=True),
            Step("temperature"),
        ),
        {
            "temperature": (Reading(-INF, 0, 0),),
            "dynamic_temperature_range": (Reading(-INF, 0, 0),),
            "dynamic_temperature_exponent": (Reading(-LARGEST, 0, "itself"),),
            "top_n_sigma": _from_0_down("top_n_sigma"),
            "top_k": _from_0_down("top_k"),
            "typical_p": (Reading(-INF, 0, 0), Reading(1, INF, 1)),
            "top_p": (Reading(-INF, 0, 0), Reading(1, INF, 1)),
            # Above 1 no token has enough: the first of the order stays, its equals too do not.
            "min_p": (*_from_0_down("min_p"), _above(1, 2)),
            "xtc_probability": (*_from_0_down("xtc_probability"), Reading(1, INF, 1)),
            "xtc_threshold": (Reading(-INF, 0, 0), Reading(1, INF, 1)),  # no two tokens have more than 0.5: off
            "min_tokens_to_keep": (Reading(0, 0, 1),),
        },
        also=("dynamic_temperature_range", "min_tokens_to_keep"),
    ),
    # FlashInfer 0.7: sampling.py with filter_apply_order="top_k_first". It compares with a pivot's value.
    "flashinfer": Dialect(
        (Step("temperature"), Step("top_k", "keep"), Step("top_p", "keep"), Step("min_p")), _FLASHINFER
    ),
    # SGLang 0.5: srt/layers/sampler.py, the path in plain torch: p is measured over all tokens.
    "sglang": Dialect(
        (Step("temperature"), Step("top_p", equal=True), Step("top_k"), Step("min_p")),
        {"temperature": (Reading(0, math.nextafter(1e-6, 0), 0),), "top_k": (Reading(-1, -1, INF),)},
    ),
    # mlx-lm 0.32: sample_utils.py, make_sampler. Temperature 0 skips all filters; top_p cuts at a value.
    "mlx": Dialect(
        (
            Step("greedy"),
            Step("top_p", "keep", floor=False),
            Step("min_p"),
            Step("xtc_probability", "keep", floor=False),
            Step("top_k", floor=False),
            Step("temperature"),
        ),
        {
            "top_p": (Reading(-INF, 0, 1), Reading(1, INF, 1)),
            "top_k": _from_0_down("top_k"),
            "xtc_probability": _from_0_down("xtc_probability"),
        },
        also=("min_tokens_to_keep", "xtc_special_tokens"),
    ),
}

# FlashInfer's filter_apply_order="joint".
FLASHINFER_JOINT = Dialect(
    (Step("temperature"), Step("top_p", "keep"), Step("top_k", "keep"), Step("min_p")), _FLASHINFER
)


class Dialects(Mapping[str, Dialect]):
    """The dialects by name; "headway" is its own. `print` shows a table.

    A dialect's steps are its stages in order, each with how it settles what is on its boundary.

    >>> import headway as hw
    >>> [step.option for step in hw.dialects["vllm"].steps]
    ['temperature', 'min_p', 'top_k', 'top_p']
    >>> print(hw.dialects)  # doctest: +ELLIPSIS
    dialect     stages in order, and which of equal tokens stay where not those with the lowest ids
    headway     temperature, top_n_sigma, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, xtc_probability
    hf          temperature, top_k (all), top_p (highest ids), min_p, ...
    """

    def __init__(self, dialects: Mapping[str, Dialect]) -> None:
        self._dialects = dict(dialects)

    def __getitem__(self, name: str) -> Dialect:
        return self._dialects[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dialects)

    def __len__(self) -> int:
        return len(self._dialects)

    def __str__(self) -> str:
        said = {"lowest_id": "", "highest_id": " (highest ids)", "keep": " (all)"}
        head = "stages in order, and which of equal tokens stay where not those with the lowest ids"
        rows = [("dialect", head)]
        rows += [(name, ", ".join(s.option + said[s.ties] for s in own.steps)) for name, own in self.items()]
        return "\n".join(f"{name:<12}{stages}" for name, stages in rows)

    def __repr__(self) -> str:
        return f"<headway.dialects: {', '.join(self)}>"


dialects = Dialects({"headway": NUCLEUS["after_top_k"], **DIALECTS})


def rules(dialect: str | None, nucleus: str) -> Dialect:
    """Return the table for a call."""
    if dialect is None:
        return NUCLEUS[nucleus]
    return FLASHINFER_JOINT if (dialect, nucleus) == ("flashinfer", "joint") else DIALECTS[dialect]
