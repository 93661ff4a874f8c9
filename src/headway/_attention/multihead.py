"""Multi-head attention: project, split into heads, attend, concatenate, project back."""

from __future__ import annotations

import typing
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import headway._native as _native

from .. import _check
from .._arrays import Operand, as_bits, compute_dtype, promote, storage, unwrap
from .._signatures import AnyArray, NumPyLike, Tensor, Unpack, shows_options
from .call import DEFAULTS, only, prepare, run
from .layers import product
from .options import AttentionOptions, MultiHeadOptions, Precision

__all__ = ["multi_head_attention"]


@typing.overload
def multi_head_attention(
    q: NumPyLike,
    k: AnyArray,
    v: AnyArray,
    *,
    num_heads: int,
    return_lse: Literal[False] = False,
    **options: Unpack[MultiHeadOptions],
) -> NDArray[Any]: ...
@typing.overload
def multi_head_attention(
    q: NumPyLike,
    k: AnyArray,
    v: AnyArray,
    *,
    num_heads: int,
    return_lse: Literal[True],
    **options: Unpack[MultiHeadOptions],
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@typing.overload
def multi_head_attention(
    q: Tensor,
    k: AnyArray,
    v: AnyArray,
    *,
    num_heads: int,
    return_lse: Literal[False] = False,
    **options: Unpack[MultiHeadOptions],
) -> Tensor: ...
@typing.overload
def multi_head_attention(
    q: Tensor,
    k: AnyArray,
    v: AnyArray,
    *,
    num_heads: int,
    return_lse: Literal[True],
    **options: Unpack[MultiHeadOptions],
) -> tuple[Tensor, Tensor]: ...
@typing.overload
def multi_head_attention(
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    *,
    num_heads: int,
    return_lse: bool,
    **options: Unpack[MultiHeadOptions],
) -> Any: ...
@_check.public
@shows_options(AttentionOptions, DEFAULTS)
def multi_head_attention(
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    *,
    num_heads: int,
    w_q: AnyArray | None = None,
    w_k: AnyArray | None = None,
    w_v: AnyArray | None = None,
    w_o: AnyArray | None = None,
    b_q: AnyArray | None = None,
    b_k: AnyArray | None = None,
    b_v: AnyArray | None = None,
    b_o: AnyArray | None = None,
    num_kv_heads: int | None = None,
    decimals: int | None = None,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Any:
    """Multi-head attention, forward (Vaswani et al., 2017, section 3.2.2).

    Project q, k and v, split the features into heads, attend in each head, concatenate, apply w_o. With
    num_kv_heads fewer key/value heads serve groups of query heads (Ainslie et al., 2023).

    Args:
        q: (..., L, M).
        k: (..., S, M).
        v: (..., S, M).
        num_heads: h; divides the width of the projected q.
        w_q: (in, out), y = x @ w; None: q counts as already projected. So do w_k, w_v and w_o, each on its own.
        w_k: (in, out) or None.
        w_v: (in, out) or None.
        w_o: (in, out) or None.
        b_q: (out,) added to the projection, or None; only beside its weight. So are b_k, b_v and b_o.
        b_k: (out,) or None.
        b_v: (out,) or None.
        b_o: (out,) or None.
        num_kv_heads: G, a divisor of num_heads; num_heads by default.
        decimals: round the result to so many decimals, as a published table would.
        mask: broadcasts to (..., h, L, S): (L, S) serves all heads, and a mask per batch item is (B, 1, L, S). See
            `attention` for this and what follows.
        bias: see `attention`.
        causal: see `attention`.
        window: see `attention`.
        scale: 1 / sqrt(d_head) by default.
        softcap: see `attention`.
        sinks: see `attention`.
        kv_lengths: see `attention`.
        precision: see `attention` and `linear`, which projects.
        return_lse: also return the log-sum-exp (..., h, L).

    Returns:
        (..., L, M), of q's kind, in the type that all arrays promote to. Between the steps 16-bit inputs stay float32.

    Raises:
        TypeError: not an array of floating numbers.
        ValueError: a width that num_heads does not divide, shapes that do not fit, or an option out of range.

    >>> import headway as hw
    >>> x = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]  # already projected: L = 2, d_model = 4
    >>> hw.multi_head_attention(x, x, x, num_heads=2, decimals=6)
    array([[0.669762, 0.330238, 0.330238, 0.669762],
           [0.330238, 0.669762, 0.669762, 0.330238]])
    """
    only(options, AttentionOptions)
    heads = _check.integer(num_heads, "num_heads", 1)
    groups = heads if num_kv_heads is None else _check.integer(num_kv_heads, "num_kv_heads", 1)
    if heads % groups:
        raise ValueError(
            f"num_kv_heads: expected a divisor of num_heads = {_check.shown(heads)}, got {_check.shown(groups)}"
        )
    precision: Precision = options.get("precision", "exact")
    places = None if decimals is None else _check.integer(decimals, "decimals", 0, 300)
    inputs = {"q": unwrap(q, "q"), "k": unwrap(k, "k"), "v": unwrap(v, "v")}
    for name, x in inputs.items():
        if x.data.ndim < 2:
            raise ValueError(f"{name}: expected shape (..., length, d_model), got {x.data.shape}")
    weights = {name: None if w is None else unwrap(w, f"w_{name}") for name, w in zip("qkvo", (w_q, w_k, w_v, w_o))}
    biases = {name: None if b is None else unwrap(b, f"b_{name}") for name, b in zip("qkvo", (b_q, b_k, b_v, b_o))}
    for name in "qkvo":
        if biases[name] is not None and weights[name] is None:
            side = "result" if name == "o" else "input"
            raise ValueError(f"b_{name}: expected w_{name} beside it, got None; add the bias to the {side} yourself")
    given = (*inputs.values(), *weights.values(), *biases.values())
    dtype = promote(*(operand.dtype for operand in given if operand is not None))
    compute = compute_dtype(dtype)
    final = dtype if places is None else compute

    projected = {}
    for name, x in inputs.items():
        count, argument = (heads, "num_heads") if name == "q" else (groups, "num_kv_heads")
        if argument == "num_kv_heads" and num_kv_heads is None and weights[name] is not None:
            argument = f"w_{name}"
        wide = _project(x, weights[name], biases[name], compute, name, precision)
        projected[name] = _split(wide, count, name, argument)
    size, other = (projected[name].data.shape[-1] for name in "qk")
    if size != other:
        named = next((f"w_{name}" for name in "kq" if weights[name] is not None), "k")
        raise ValueError(
            f"{named}: expected one head size of the projected q and k, got D = {size} in {heads} heads of q and "
            f"{other} in {groups} of k"
        )
    return_lse = _check.boolean(return_lse, "return_lse")
    call = prepare(projected["q"], projected["k"], projected["v"], **options)
    call = call._replace(dtype=final if w_o is None else compute, like=Operand(call.q, compute, as_bits))
    *batch, _, length = call.shape
    size = projected["v"].data.shape[-1]
    side_by_side = np.empty((*batch, length, heads, size), storage(call.dtype))
    attended = run(call, return_lse, np.swapaxes(side_by_side, -3, -2))
    lse = attended[1] if return_lse else None
    out = side_by_side.reshape(*batch, length, heads * size)
    if weights["o"] is not None:
        joined = Operand(out, compute, as_bits)
        out = product(joined, weights["o"], biases["o"], final, ("attended", "w_o", "b_o"), precision)
    if places is not None:
        rows = np.ascontiguousarray(out).reshape(-1, max(out.shape[-1], 1))
        _native.round(rows, places, rows)
        out = rows.reshape(out.shape)
    result = inputs["q"].wrap(out, final)
    return result if lse is None else (result, inputs["q"].wrap(lse, compute))


def _project(
    x: Operand, w: Operand | None, b: Operand | None, compute: str, name: str, precision: Precision
) -> Operand:
    if w is not None:
        return Operand(product(x, w, b, compute, (name, f"w_{name}", f"b_{name}"), precision), compute, as_bits)
    return Operand(x.astype(compute), compute, as_bits) if compute == "float64" else x


def _split(x: Operand, heads: int, name: str, argument: str) -> Operand:
    """(..., length, heads * size) -> (..., heads, length, size), a view where the memory allows."""
    *batch, length, width = x.data.shape
    if width % heads:
        fit = f"a divisor of the width {width} of the projected {name}, got {_check.shown(heads)}"
        if argument.startswith("w_"):
            fit = f"shape (in, out) with out a multiple of the {_check.shown(heads)} heads, got out = {width}"
        raise ValueError(f"{argument}: expected {fit}")
    data = np.swapaxes(x.data.reshape(*batch, length, heads, width // heads), -3, -2)
    return Operand(data, x.dtype, x.wrap)
