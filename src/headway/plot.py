"""Pictures of attention and sampling. Needs matplotlib: pip install 'headway[plot]'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arrays import unwrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .explain import Explanation

__all__ = ["attention_map", "filter_stages"]


def attention_map(weights: Any, tokens: Sequence[str] | None = None, *, columns: int = 4) -> Figure:
    """Draw attention weights, one panel a head, darker where more weight lies.

    Args:
        weights: (H, L, S) or (L, S), from `attention_weights`.
        tokens: S words for the axes; queries count as the last L of them.
        columns: panels in a row.

    Returns:
        A matplotlib figure: show it, or ``figure.savefig("attention.png")``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a shape or a number of tokens that does not fit.

    >>> import numpy as np, headway as hw
    >>> from headway.plot import attention_map
    >>> q, k = np.random.default_rng(0).normal(size=(2, 2, 3, 8))
    >>> figure = attention_map(hw.attention_weights(q, k, causal=True), ["the", "cat", "sat"])
    """
    make = _figure("attention_map")
    heads = unwrap(weights, "weights").astype("float64")
    if heads.ndim == 2:
        heads = heads[None]
    if heads.ndim != 3 or heads.size == 0:
        raise ValueError(f"weights: expected shape (H, L, S) or (L, S), none of them 0, got {heads.shape}")
    count, queries, keys = heads.shape
    if tokens is not None and (len(tokens) != keys or queries > keys):
        raise ValueError(f"tokens: expected {keys} words for {queries} queries and {keys} keys, got {len(tokens)}")
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = make(figsize=(3.2 * columns, 3.2 * rows * max(0.4, min(queries / keys, 2)) + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for head, axis in enumerate(axes):
        axis.set_visible(head < count)
        if head >= count:
            continue
        # The square root keeps small weights visible: a uniform row over 64 keys would look empty otherwise.
        axis.imshow(np.sqrt(heads[head]), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_title(f"head {head}", fontsize=9)
        axis.set_xlabel("key", fontsize=8)
        axis.set_ylabel("query", fontsize=8)
        axis.tick_params(labelsize=7)
        if tokens is not None:
            axis.set_xticks(range(keys), tokens, rotation=90)
            axis.set_yticks(range(queries), tokens[keys - queries :])
    return figure


def filter_stages(explanation: Explanation) -> Figure:
    """Draw what `headway.explain` found: how many tokens and how much mass each stage left, and the final head.

    Raises ImportError where matplotlib is missing.

    >>> import headway as hw
    >>> from headway.plot import filter_stages
    >>> figure = filter_stages(hw.explain([3.0, 2.0, 1.0], temperature=0.5, top_k=2))
    """
    make = _figure("filter_stages")
    stages, head = explanation.stages, explanation.head
    figure = make(figsize=(11, 0.8 + 0.32 * max(len(stages) + 2, len(head), 4)), layout="constrained")
    counts, masses, best = figure.subplots(1, 3)

    names = ["start", *(f"{stage.option} {stage.value:g}" for stage in stages)]
    counts.barh(names, [explanation.vocabulary - explanation.banned, *(stage.after for stage in stages)])
    counts.set_xscale("log")
    counts.set_xlim(left=0.5)
    counts.set_title("tokens left", fontsize=9)
    masses.barh(names, [1.0, *(stage.kept_mass for stage in stages)])
    masses.set_xlim(0, 1)
    masses.set_title("mass kept by the stage", fontsize=9)
    masses.tick_params(labelleft=False)
    best.barh(range(len(head)), [one.probability for one in head])
    # A dollar sign would begin a formula.
    labels = [(repr(one.word) if one.word else str(one.token)).replace("$", r"\$") for one in head]
    best.set_yticks(range(len(head)), labels)
    best.set_title("probability", fontsize=9)
    for axis in (counts, masses, best):
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
    return figure


def _figure(name: str) -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{name} needs matplotlib: pip install 'headway[plot]'") from error
    return Figure
