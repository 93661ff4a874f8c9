"""Scaled dot-product attention, and its weights. docs/architecture.md says where a new option goes.

Shapes: ... any number of leading batch axes, H query heads, G key/value heads (G divides H), L queries, S keys,
D head size of q and k, E head size of v.
"""

from __future__ import annotations

import typing
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import _check
from .._arrays import storage
from .._signatures import AnyArray, NumPyLike, Tensor, Unpack, shows_options
from .call import DEFAULTS, NO_VALUES, compute, only, prepare, run, weigh
from .options import AttentionOptions, WeightOptions

__all__ = ["attention", "attention_weights"]


# Editors on jedi show the signature of the function itself, with every option, where overloads are written so.
@typing.overload
def attention(
    q: NumPyLike,
    k: AnyArray,
    v: AnyArray,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> NDArray[Any]: ...
@typing.overload
def attention(
    q: NumPyLike, k: AnyArray, v: AnyArray, *, return_lse: Literal[True], **options: Unpack[AttentionOptions]
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@typing.overload
def attention(
    q: Tensor, k: AnyArray, v: AnyArray, *, return_lse: Literal[False] = False, **options: Unpack[AttentionOptions]
) -> Tensor: ...
@typing.overload
def attention(
    q: Tensor, k: AnyArray, v: AnyArray, *, return_lse: Literal[True], **options: Unpack[AttentionOptions]
) -> tuple[Tensor, Tensor]: ...
@typing.overload
def attention(
    q: AnyArray, k: AnyArray, v: AnyArray, *, return_lse: bool, **options: Unpack[AttentionOptions]
) -> Any: ...
@_check.public
@shows_options(AttentionOptions, DEFAULTS)
def attention(
    q: AnyArray, k: AnyArray, v: AnyArray, *, return_lse: bool = False, **options: Unpack[AttentionOptions]
) -> Any:
    """Attend: softmax(q k^T * scale) v, head by head (Vaswani et al., 2017, "Attention Is All You Need").

    Args:
        q: queries (..., H, L, D), of float64, float32, float16 or bfloat16; the leading axes of q, k and v broadcast.
        k: keys (..., G, S, D). Query head h uses key/value head h // (H / G).
        v: values (..., G, S, E).
        mask: booleans, or numbers that are all 0 or 1, broadcasting to (..., H, L, S); 1 = may attend. What a masked
            key holds, NaN included, has no influence. A row that may attend to nothing gives 0.
        bias: added to the scaled scores, broadcasting to (..., H, L, S); -inf masks.
        causal: None; "top_left": query i sees keys 0 .. i; "bottom_right": the last query sees all keys, as when
            queries continue a cache; True where L == S, and the two agree.
        window: (left, right): query at position p sees keys p - left .. p + right; None leaves a side open.
        scale: of the scores; 1 / sqrt(D) by default.
        softcap: c > 0 replaces each scaled score s by c tanh(s / c) (Gemma 2, 2024), before bias and mask.
        sinks: (H,) or (..., H): a score per head that joins the softmax's denominator alone (Xiao et al., 2023).
        kv_lengths: integers broadcasting to the batch (...): how many keys each batch item really has.
        precision: "exact"; "fast" gives up the contract of bits for the machine's 16-bit dot products, where it has
            them (AMX, AVX512-BF16) and they pay: q, k, the weights and v are rounded to bfloat16, sums stay float32.
            Scores are then off by up to 2^-7 |q| |k| scale. Not for float64.
        return_lse: also return the log-sum-exp of each row's scores (natural logarithm, without sinks).

    Returns:
        (..., H, L, E) of q's kind, in the type that q, k and v promote to; with return_lse a pair, the second
        (..., H, L) in float32, or float64 for float64. Unless precision is "fast", each row depends, bit for bit,
        only on its query, the keys and values that it may attend to, their positions and the options.

    Raises:
        TypeError: not an array of floating numbers, or not in CPU memory.
        ValueError: shapes that do not fit, a floating mask that is no 0/1 mask, an option out of range.

    >>> import numpy as np, headway as hw
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 4, 8))  # H = 2, L = S = 4, D = E = 8
    >>> hw.attention(q, k, v, causal=True).shape
    (2, 4, 8)
    """
    call = prepare(q, k, v, **options)
    return run(call, _check.boolean(return_lse, "return_lse"))


@typing.overload
def attention_weights(q: NumPyLike, k: AnyArray, **options: Unpack[WeightOptions]) -> NDArray[Any]: ...
@typing.overload
def attention_weights(q: Tensor, k: AnyArray, **options: Unpack[WeightOptions]) -> Tensor: ...
@_check.public
@shows_options(WeightOptions, DEFAULTS)
def attention_weights(q: AnyArray, k: AnyArray, **options: Unpack[WeightOptions]) -> Any:
    """Return the weights that `attention` gives to the values, for looking at.

    This is the L x S array that attention itself never makes.

    Args:
        q: queries (..., H, L, D).
        k: keys (..., G, S, D).
        **options: those of `attention`, but for precision.

    Returns:
        (..., H, L, S) of q's kind, in the type that q and k promote to. Rows sum to 1, less what a sink takes; a row
        that may attend to nothing is 0.

    Raises:
        TypeError, ValueError: as `attention`.

    >>> import numpy as np, headway as hw
    >>> hw.attention_weights(np.zeros((1, 2, 4)), np.zeros((1, 2, 4)), causal=True)
    array([[[1. , 0. ],
            [0.5, 0.5]]])
    """
    only(options, WeightOptions)
    call = prepare(q, k, NO_VALUES, **options)
    out = np.empty((*call.shape, call.keys), storage(call.dtype))
    compute(weigh, call, out)
    return call.like.wrap(out, call.dtype)
