"""Sampling's rows: one row of a large vocabulary, filter by filter."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

import headway as hw

from .harness import Array, Candidate, Contest, Row
from .runtimes import as_torch

VOCABULARY = 128_256
TEMPERATURE = 0.8
FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k=50": {"top_k": 50},
    "top_p=0.9": {"top_p": 0.9},
    "top_k=50, top_p=0.9": {"top_k": 50, "top_p": 0.9},
}


def rows() -> Iterator[Row]:
    """Yield all rows of sampling."""
    for name, spread in (("peaked", 4.0), ("flat", 0.5)):
        for label, options in FILTERS.items():
            yield Row("sampling", f"V={VOCABULARY}, {name}, {label}", partial(contest, spread, options))


def contest(spread: float, options: dict[str, Any]) -> Contest:
    """Draw one token; reading the logits once is the floor."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(VOCABULARY, np.float32) * np.float32(spread)
    builders = {
        "headway": lambda: Candidate(lambda: hw.sample(logits, temperature=TEMPERATURE, seed=1, **options)),
        "NumPy": lambda: Candidate(lambda: _by_hand(logits, rng, **options)),
        "torch, reading once": lambda: _torch_maximum(logits),
    }
    if not options:
        builders["torch"] = lambda: _torch_softmax(logits)
    return Contest(builders, floors=("torch, reading once",))


def _by_hand(logits: Array, rng: np.random.Generator, top_k: int | None = None, top_p: float | None = None) -> int:
    order = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp((logits[order] - logits[order[0]]) / TEMPERATURE)
    weights /= weights.sum()
    if top_p is not None:
        keep = np.cumsum(weights) - weights < top_p
        order, weights = order[keep], weights[keep] / weights[keep].sum()
    return int(rng.choice(order, p=weights.astype(np.float64) / weights.astype(np.float64).sum()))


def _torch_softmax(logits: Array) -> Candidate:
    tensor = as_torch(logits)
    import torch

    return Candidate(lambda: torch.multinomial(torch.softmax(tensor / TEMPERATURE, -1), 1))


def _torch_maximum(logits: Array) -> Candidate:
    tensor = as_torch(logits)
    return Candidate(lambda: tensor.max())
