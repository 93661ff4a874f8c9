"""Pictures of attention and sampling. Needs matplotlib: pip install 'headway[plot]'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from . import _check
from ._arrays import unwrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # a name for typing.get_type_hints
    Figure = Any

__all__ = ["attention_map", "filter_stages"]


class Explained(Protocol):
    """What `headway.explain` returns, as far as a picture shows it."""

    vocabulary: int
    banned: int
    stages: tuple[Any, ...]
    head: tuple[Any, ...]


@_check.public
def attention_map(weights: Any, tokens: Sequence[str] | None = None, *, columns: int = 4) -> Figure:
    """Draw attention weights, one panel a head, darker where more weight lies.

    Args:
        weights: (H, L, S) or (L, S), from `attention_weights`.
        tokens: S texts for the axes; queries count as the last L of them.
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
    if not ((heads >= 0) & (heads < np.inf)).all():
        raise ValueError("weights: expected numbers from 0 on, as attention_weights gives them, got another")
    count, queries, keys = heads.shape
    if tokens is not None:
        length = len(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else None
        if length != keys or queries > keys:
            got = _check.shown(tokens) if length is None else length
            raise ValueError(f"tokens: expected {keys} words for {queries} queries and {keys} keys, got {got}")
    columns = min(_check.integer(columns, "columns", 1), count)
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


@_check.public
def filter_stages(explanation: Explained) -> Figure:
    """Draw what `headway.explain` found: how many tokens and how much mass each stage left, and the final head.

    Args:
        explanation: what `headway.explain` returned.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: something else than an explanation.

    >>> import headway as hw
    >>> from headway.plot import filter_stages
    >>> figure = filter_stages(hw.explain([3.0, 2.0, 1.0], temperature=0.5, top_k=2))
    """
    make = _figure("filter_stages")
    try:
        stages, head = explanation.stages, explanation.head
        start = explanation.vocabulary - explanation.banned
    except Exception:  # what another object does when it is asked is its own affair
        raise TypeError(
            f"explanation: expected what headway.explain returns, got {_check.shown(explanation)}"
        ) from None
    names = ["start", *(f"{stage.option} {stage.value:g}" for stage in stages)]
    left = [start, *(stage.after for stage in stages)]
    kept = [1.0, *(stage.kept_mass for stage in stages)]
    # A dollar sign would begin a formula.
    words = [f"{one.token} {_check.shortened(one.word, 20)}".rstrip().replace("$", r"\$") for one in head]
    best = [one.probability for one in head]
    lines = max(len(names), len(head))
    figure = make(figsize=(11, 0.7 + 0.3 * lines), layout="constrained")
    room = 1.3  # for the numbers behind the bars, which say how long they are
    panels: list[tuple[str, list[str], Sequence[float], list[str]]] = [
        ("tokens left, on a log scale", names, left, [f"{n:,}" for n in left]),
        ("mass kept by the stage", [""] * len(names), kept, [f"{share:.4g}" for share in kept]),
        ("probability", words, best, [f"{share:.4g}" for share in best]),
    ]
    for axis, (title, labels, widths, numbers) in zip(figure.subplots(1, 3), panels):
        axis.bar_label(axis.barh(range(len(labels)), widths), numbers, padding=3, fontsize=8)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.set_ylim(lines - 0.5, -0.5)  # the first on top, and bars of one height in all panels
        axis.set_xlim(0, room * max(widths))
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(length=0)
    counts = figure.axes[0]
    counts.set_xscale("log")
    counts.set_xlim(0.5, 0.5 * (2 * max(left)) ** room)
    return figure


def _figure(name: str) -> Callable[..., Figure]:
    """Return what makes figures that notebooks show, also where pyplot, which would see to that, is not loaded."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{name} needs matplotlib: pip install 'headway[plot]'") from error

    def make(**options: Any) -> Figure:
        figure: Any = Figure(**options)
        figure._repr_png_ = partial(_png, figure)
        return figure  # type: ignore[no-any-return]

    return make


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
