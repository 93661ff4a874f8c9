"""headway inside JAX: its functions in jax.jit, jax.vmap, jax.lax.scan and jax.shard_map on the CPU.

Importing this module lets the public functions in `_operators.OPERATORS` take tracers. Each is then a call back from
the compiled program, by `jax.pure_callback`.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import headway as hw

from .. import _arrays, _check
from ._operators import OPERATORS, Operator, aligned, arguments

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError(f"headway.integrations.jax needs JAX ({error}): pip install 'headway[jax]'") from error

__all__ = ["dot_product_attention"]


# Calls back -----------------------------------------------------------------------------------------------------------


def _through_callback(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a public function from inside a transformation. A result that is a number outside is an array here."""
    name = function.__name__
    if name not in OPERATORS:
        return NotImplemented
    operator = OPERATORS[name]
    given = {x: _owned(value, x) for x, value in arguments(operator, jax.Array, args, kwargs).items()}
    draws = name == "sample" or given.get("xtc_probability") is not None
    if draws and given.get("seed") is None and given.get("uniform") is None:
        raise ValueError(
            "seed: expected one inside a transformation of JAX, which may run a call any number of times, got none"
        )
    if isinstance(given.get("logit_bias"), dict):
        bias = jnp.zeros(given["logits"].shape[-1], jnp.float32)
        for token, value in given["logit_bias"].items():
            bias = bias.at[token].set(value)
        given["logit_bias"] = bias
    for x in operator.axes.keys() & given.keys():  # what is mapped over is JAX's, but for what it would make narrower
        if given[x] is None or isinstance(given[x], jax.Array):
            continue
        if (array := np.asarray(given[x])).dtype != np.float64:
            given[x] = jnp.asarray(array)
    arrays = {x: value for x, value in given.items() if isinstance(value, jax.Array)}
    fixed = {x: value for x, value in given.items() if x not in arrays}
    out = _call(operator, fixed, tuple(arrays), *arrays.values())
    if name != "logprobs":
        return tuple(out) if len(out) > 1 else out[0]
    found = [None, None] if given.get("tokens") is None else [out.pop(0), out.pop(0)]
    return hw.Logprobs(*found, *(out or (None, None)))


def _owned(value: Any, name: str) -> Any:
    """Return an argument that nobody else can change, since a program may be run at any later time."""
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name}: expected numbers, got a key of jax.random; pass an integer")
        return value
    if isinstance(value, (list, tuple)) and any(isinstance(x, jax.Array) for x in jax.tree.leaves(value)):
        return jnp.asarray(value)
    return dict(value) if isinstance(value, Mapping) else copy.deepcopy(value)


def _call(operator: Operator, fixed: Mapping[str, Any], names: Sequence[str], *arrays: jax.Array) -> list[jax.Array]:
    """Call back with arrays by these names, and with fixed arguments. There is no gradient."""

    @jax.custom_batching.custom_vmap
    def mapped(*arrays: jax.Array) -> list[jax.Array]:
        return _called_back(operator, fixed, names, *arrays)

    @mapped.def_vmap
    def _(size: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[list[jax.Array], list[bool]]:
        out = _mapped(operator, fixed, names, size, batched, arrays)
        return out, [True] * len(out)

    @jax.custom_jvp
    def call(*arrays: jax.Array) -> list[jax.Array]:
        out: list[jax.Array] = mapped(*arrays)
        return out

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise TypeError(
            f"{names[0]}: expected an array that waits for no gradient, got one inside jax.grad, jax.jvp or another "
            f"derivative, and headway is forward only; pass `jax.lax.stop_gradient({names[0]})`"
        )

    return list(call(*arrays))


def _mapped(
    operator: Operator,
    fixed: Mapping[str, Any],
    names: Sequence[str],
    size: int,
    batched: Sequence[bool],
    arrays: Sequence[jax.Array],
) -> list[jax.Array]:
    """Return the results for jax.vmap: that of each item is what a call of its own gives."""
    over = {name for name, has_items in zip(names, batched) if has_items}
    if over <= operator.axes.keys() and next(iter(operator.axes)) in names:
        whole = [
            x if has_items else jnp.broadcast_to(x, (size, *x.shape)) if name in operator.axes else x
            for name, has_items, x in zip(names, batched, arrays)
        ]
        axes = [operator.axes.get(name) for name in names]
        lead = max(x.ndim - 1 - own for x, own in zip(whole, axes) if own is not None)
        return _call(
            operator,
            fixed,
            names,
            *(x if own is None else aligned(x, lead, own) for x, own in zip(whole, axes)),
        )

    def one(items: Sequence[jax.Array]) -> list[jax.Array]:
        left = iter(items)
        return _call(operator, fixed, names, *(next(left) if is_item else x for is_item, x in zip(batched, arrays)))

    out: list[jax.Array] = jax.lax.map(one, [x for is_item, x in zip(batched, arrays) if is_item])
    return out


def _called_back(
    operator: Operator, fixed: Mapping[str, Any], names: Sequence[str], *arrays: jax.Array
) -> list[jax.Array]:
    """Return the results as a call back from the compiled program gives them."""
    named = {x: p.default for x, p in inspect.signature(operator.function).parameters.items() if x != "params"}
    for name, value in {**fixed, **dict(zip(names, arrays))}.items():
        named[name] = np.asarray(value) if isinstance(value, (list, tuple)) and name != "window" else value
    results = [
        jax.ShapeDtypeStruct(tuple(shape), jax.dtypes.canonicalize_dtype(dtype))  # type: ignore[no-untyped-call]
        for shape, dtype in operator.results(**named)
    ]

    def run(*values: Any) -> list[np.ndarray[Any, Any]]:
        out = operator.function(**fixed, **dict(zip(names, map(np.asarray, values))))
        found = [x for x in (out if isinstance(out, tuple) else [out]) if x is not None]
        return [np.asarray(x, result.dtype) for x, result in zip(found, results)]

    out = list(jax.pure_callback(run, results, *arrays))
    # Over which axes of a mesh operands differ, results do.
    over = frozenset[Any]().union(*(jax.typeof(x).mat.varying for x in arrays))
    return [jax.lax.pcast(x, tuple(over), to="varying") for x in out] if over else out


_arrays.TRACED["jax"] = _through_callback


# JAX's own call -------------------------------------------------------------------------------------------------------


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Attend as `jax.nn.dot_product_attention` does, with its arguments, under headway's contract.

    Args:
        query: (B, T, N, H) or (T, N, H).
        key: (B, S, K, H) or (S, K, H); K divides N.
        value: of key's shape.
        bias: added to the scaled scores, of at most 4 axes, broadcasting to (B, N, T, S).
        mask: booleans, True may attend, of at most 4 axes, broadcasting to (B, N, T, S). A row that may attend to
            nothing gives 0, where JAX gives the mean of the values.
        scale: 1 / sqrt(H) by default.
        is_causal: query i sees keys 0 .. i.
        query_seq_lengths: (B,), how many queries each batch item really has; the rows of the others are 0.
        key_value_seq_lengths: (B,), how many keys each batch item really has.
        local_window_size: (left, right), or one number for both: query i sees keys i - left .. i + right.
        implementation: None, "xla" or "cudnn", which JAX chooses by; it has no meaning here.
        return_residual: also return the log-sum-exp of each row's scores.

    Returns:
        (B, T, N, H) or (T, N, H); with return_residual a pair, the second (B, T, N) or (T, N), in query's type.

    Raises:
        TypeError: not an array of floating numbers.
        ValueError: shapes that do not fit, an option out of range.

    >>> import jax.numpy as jnp
    >>> from headway.integrations.jax import dot_product_attention
    >>> x = jnp.ones((2, 5, 4, 8))
    >>> dot_product_attention(x, x[:, :, :2], x[:, :, :2], is_causal=True).shape
    (2, 5, 4, 8)
    """
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(f"implementation: expected None, 'xla' or 'cudnn', got {_check.shown(implementation)}")
    is_causal = _check.boolean(is_causal, "is_causal")
    return_residual = _check.boolean(return_residual, "return_residual")
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    for name, x in {"query": query, "key": key, "value": value}.items():
        if x.ndim not in (3, 4):
            raise ValueError(f"{name}: expected shape (B, length, heads, size) or without B, got {x.shape}")
    batch, queries, keys = query.shape[:-3], query.shape[-3], key.shape[-3]
    if value.shape != key.shape:
        raise ValueError(f"value: expected the shape of key {key.shape}, got {value.shape}")
    if key.shape[-1] != query.shape[-1] or query.shape[-2] % max(key.shape[-2], 1) or key.shape[:-3] != batch:
        raise ValueError(
            f"key: expected the batch and the size of query {query.shape}, and a number of heads that divides "
            f"{query.shape[-2]}, got {key.shape}"
        )
    if local_window_size is not None and not isinstance(local_window_size, int):
        sides = tuple(local_window_size) if isinstance(local_window_size, (tuple, list)) else ()
        if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
            raise TypeError(
                f"local_window_size: expected a number or (left, right), got {_check.shown(local_window_size)}"
            )
    both_sides = isinstance(local_window_size, int)
    window: Any = (local_window_size, local_window_size) if both_sides else local_window_size
    masks = [] if mask is None else [jnp.asarray(mask)]
    if masks and masks[0].dtype != bool:
        raise TypeError(
            f"mask: expected booleans, got {masks[0].dtype}; numbers that are added to the scores go into bias"
        )
    if query_seq_lengths is not None:
        real = jnp.arange(queries) < jnp.asarray(query_seq_lengths)[:, None]
        masks.append(real[:, None, :, None])
    if key_value_seq_lengths is not None:
        key_value_seq_lengths = jnp.clip(jnp.asarray(key_value_seq_lengths), 0, keys)
    if key_value_seq_lengths is not None and not batch:
        masks.append(jnp.arange(keys) < key_value_seq_lengths[:, None])
        key_value_seq_lengths = None
    if window is not None and not is_causal and queries != keys:
        left, right = window
        away = jnp.arange(keys) - jnp.arange(queries)[:, None]
        masks.append((away >= -left) & (away <= right))
        window = None
    both = functools.reduce(jnp.logical_and, masks) if masks else None
    if both is not None and not batch:
        both = both[0] if both.ndim == 4 else both
    if bias is not None:
        bias = jnp.asarray(bias)
        bias = bias[0] if bias.ndim == 4 and not batch else bias
    out = hw.attention(
        *(jnp.swapaxes(x, -3, -2) for x in (query, key, value)),
        mask=both,
        bias=bias,
        scale=scale,
        causal="top_left" if is_causal else None,
        window=window,
        kv_lengths=key_value_seq_lengths,
        return_lse=return_residual,
    )
    if not return_residual:
        return jnp.swapaxes(out, -3, -2)
    return jnp.swapaxes(out[0], -3, -2), jnp.swapaxes(out[1], -2, -1).astype(query.dtype)
