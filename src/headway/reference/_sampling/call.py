"""A call of sampling: each row of logits with options of its own, taken through the stages."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..._sampling import DEFAULTS, Reading, Step, rules
from .masses import AnyArray, biased, float32
from .rng import words_of
from .stages import STAGES, Given, Row, Settings, Words

Watch = Callable[[Row, Step, float], None]  # sees a row, a stage and its value before the stage


def through_stages(
    logits: AnyArray,
    params: Any,
    options: Settings,
    blocks: Sequence[tuple[int, ...]] | None = None,
    watch: Watch = lambda row, step, value: None,
) -> list[Row]:
    """Return every row of logits (..., V), in C order, with its own settings, taken through the stages.

    blocks: the rows' random numbers, where they are not those of seed and position; good for one draw.
    """
    given = {} if params is None else {name: getattr(params, name) for name in DEFAULTS}
    settings = {**DEFAULTS, **given, **options}
    mask, bias = mask_of(settings.pop("allowed"), logits.shape), bias_of(settings.pop("logit_bias"), logits.shape)
    special = settings.pop("xtc_special_tokens")  # one list for all rows
    if settings["seed"] is None:
        settings["seed"] = secrets.randbits(64)
    one_seed = np.ndim(settings["seed"]) == 0
    lead = logits.shape[:-1]
    settings = {name: np.broadcast_to(np.asarray(value, object), lead) for name, value in settings.items()}
    rows = []
    for number, index in enumerate(np.ndindex(lead)):
        own: dict[str, Any] = {name: values[index] for name, values in settings.items()}
        own["xtc_special_tokens"] = None if special is None else sorted(special)
        row_bias = None if bias is None else bias[index]
        z = biased(logits[index], row_bias, None if mask is None else mask[index])
        words = partial(words_of, own, number if one_seed else 0) if blocks is None else _only(blocks[number])
        rows.append(_one_row(Given(logits[index], row_bias), z, own, words, watch))
    return rows


def _one_row(
    given: Given,
    z: AnyArray,
    settings: Settings,
    words: Words,
    watch: Watch = lambda row, step, value: None,
) -> Row:
    """Take one row through the stages that its settings switch on, in its dialect's order."""
    dialect = rules(settings["dialect"], settings["nucleus"])
    settings = {name: _read(value, dialect.readings.get(name, ())) for name, value in settings.items()}
    row = Row(given, z, settings, words)
    for step in dialect.steps:
        value = settings["temperature" if step.option == "greedy" else step.option]
        if value is not None:
            ties = "keep" if step.option == "top_k" and settings["ties"] == "keep" else step.ties
            if step.option == "top_p" and row.temperature == 0:
                ties = "lowest_id"  # no token equals the first of the order, which has all the mass
            row.floor = settings["min_tokens_to_keep"] if step.floor else 1
            step = step._replace(ties=ties)
            watch(row, step, value)
            STAGES[step.option](row, value, step)
    return row


def _read(value: Any, readings: tuple[Reading, ...]) -> Any:
    """What a number means in the dialect."""
    return next((r.of(value) for r in readings if value is not None and r.low <= value <= r.high), value)


def _only(block: tuple[int, ...]) -> Words:
    """These random numbers, given instead."""
    return lambda draw: block


def mask_of(allowed: Any, shape: tuple[int, ...]) -> AnyArray | None:
    """`allowed` in any of its forms as bool (..., V)."""
    if allowed is None:
        return None
    array = np.asarray(sorted(allowed) if isinstance(allowed, (set, frozenset)) else allowed)
    if array.dtype in (np.int32, np.uint32):  # 32 tokens in a word, the lowest bit first
        token = np.arange(shape[-1])
        array = array[..., token // 32].view(np.uint32) >> (token % 32).astype(np.uint32) & np.uint32(1) == 1
    elif array.dtype != np.bool_:
        ids, array = array.astype(np.int64), np.zeros(shape[-1], np.bool_)
        array[ids] = True
    return _fitted(array, shape)


def bias_of(logit_bias: Any, shape: tuple[int, ...]) -> AnyArray | None:
    """`logit_bias` in any of its forms as float32 (..., V)."""
    if logit_bias is None:
        return None
    if isinstance(logit_bias, Mapping):
        array = np.zeros(shape[-1])
        for token, value in logit_bias.items():
            array[token] = value
    else:
        array = np.asarray(logit_bias)
    return _fitted(float32(array), shape)


def _fitted(array: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """Broadcast to the shape of the logits; leading axes of length 1 that those do not have are dropped."""
    while array.ndim > len(shape) and array.shape[0] == 1:
        array = array[0]
    return np.broadcast_to(array, shape)
