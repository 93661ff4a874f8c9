"""Pictures of attention. Needs matplotlib: pip install 'headway[plot]'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arrays import unwrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["attention_map"]


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("attention_map needs matplotlib: pip install 'headway[plot]'") from error

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
    figure = Figure(figsize=(3.2 * columns, 3.2 * rows * max(0.4, min(queries / keys, 2)) + 0.6), layout="constrained")
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
