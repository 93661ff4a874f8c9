"""The options of attention and linear, each with its type; their defaults stand in the signature of `prepare`."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, TypedDict, get_args

from .. import _check
from .._signatures import AnyArray

Corner: TypeAlias = Literal["top_left", "bottom_right"]
Causal: TypeAlias = Corner | bool | None
Window: TypeAlias = tuple[int | None, int | None] | None
Precision: TypeAlias = Literal["exact", "fast"]


def is_fast(precision: Any, wide: bool, names: str) -> bool:
    """Check a precision, for arrays of these names that are computed in float64 where `wide`."""
    _check.choice(precision, "precision", get_args(Precision))
    if wide and precision == "fast":
        raise ValueError(
            f"precision: expected 'exact' for float64, got 'fast', which computes in bfloat16; convert {names} first"
        )
    return bool(precision == "fast")


class PartOptions(TypedDict, total=False):
    """The options of `partial_attention`; `attention` explains them."""

    mask: AnyArray | None
    bias: AnyArray | None
    causal: Causal
    window: Window
    scale: float | None
    softcap: float | None
    kv_lengths: AnyArray | None


class WeightOptions(PartOptions, total=False):
    """The options of `attention_weights`."""

    sinks: AnyArray | None


class AttentionOptions(WeightOptions, total=False):
    """The options of `attention`, and of `KVCache.attend`."""

    precision: Precision


class MultiHeadOptions(AttentionOptions, total=False):
    """The options of `multi_head_attention`, which explains those of its own."""

    w_q: AnyArray | None
    w_k: AnyArray | None
    w_v: AnyArray | None
    w_o: AnyArray | None
    b_q: AnyArray | None
    b_k: AnyArray | None
    b_v: AnyArray | None
    b_o: AnyArray | None
    num_kv_heads: int | None
    decimals: int | None
