"""The public functions that other libraries call inside their compilers and transformations.

There arrays have shapes and types, but no numbers yet: `Operator` says what the results will be.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

import headway as hw

from .. import _arrays, _check

Shape = Sequence[Any]  # numbers, or what a library has in their place
Results = list[tuple[Shape, str]]  # shapes, and the names of types


class Operator(NamedTuple):
    """A public function.

    results: of the results, from the function's arguments by name. axes: how many trailing axes of an argument belong
    to one call, the others being batch axes: mapped over these arguments alone, it is one call. Else it is one for each
    item.
    """

    function: Callable[..., Any]
    results: Callable[..., Results]
    axes: Mapping[str, int] = {}


def _broadcast(*shapes: Shape) -> Shape:
    out: list[Any] = []
    for shape in shapes:
        longer, shorter = (list(shape), out) if len(shape) > len(out) else (out, list(shape))
        lead = len(longer) - len(shorter)
        out = longer[:lead] + [other if one == 1 else one for one, other in zip(longer[lead:], shorter)]
    return out


def _promoted(*arrays: Any) -> str:
    names = (_arrays.dtype_name(x) or str(np.asarray(x).dtype) for x in arrays if x is not None)
    return _arrays.promote(*(name if name in _arrays.FLOATING else "float64" for name in names))


def _attention(q: Any, k: Any, v: Any, return_lse: bool, **options: Any) -> Results:
    lead = _broadcast(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    dtype = _promoted(q, k, v)
    out: Results = [((*lead, *q.shape[-3:-1], v.shape[-1]), dtype)]
    return [*out, ((*lead, *q.shape[-3:-1]), _arrays.compute_dtype(dtype))] if return_lse else out


def _attention_weights(q: Any, k: Any, **options: Any) -> Results:
    lead = _broadcast(q.shape[:-3], k.shape[:-3])
    return [((*lead, *q.shape[-3:-1], k.shape[-2]), _promoted(q, k))]


def _multi_head_attention(
    q: Any, k: Any, v: Any, num_heads: Any, num_kv_heads: Any, decimals: Any, return_lse: bool, **more: Any
) -> Results:
    lead = _broadcast(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    dtype = _promoted(q, k, v, *(more[f"{kind}_{name}"] for kind in "wb" for name in "qkvo"))
    width = v.shape[-1] if more["w_v"] is None else more["w_v"].shape[-1]
    width = width // (num_kv_heads or num_heads) * num_heads
    width = width if more["w_o"] is None else more["w_o"].shape[-1]
    out: Results = [((*lead, q.shape[-2], width), dtype if decimals is None else _arrays.compute_dtype(dtype))]
    return [*out, ((*lead, num_heads, q.shape[-2]), _arrays.compute_dtype(dtype))] if return_lse else out


def _sample(logits: Any, num_samples: Any, **options: Any) -> Results:
    return [((*logits.shape[:-1], *(() if num_samples is None else (num_samples,))), "int64")]


def _filter_logits(logits: Any, logit_bias: Any, **options: Any) -> Results:
    dtype = _promoted(logits)
    return [(logits.shape, dtype if logit_bias is None else _arrays.compute_dtype(dtype))]


def _logprobs(logits: Any, tokens: Any, top: Any, **options: Any) -> Results:
    dtype = _arrays.compute_dtype(_promoted(logits))
    found: Results = [] if tokens is None else [(tokens.shape, dtype), (tokens.shape, "int64")]
    best = () if top is None else (*logits.shape[:-1], top)
    return found if top is None else [*found, (best, "int64"), (best, dtype)]


def _computed(logits: Any, **options: Any) -> Results:
    return [(logits.shape, _arrays.compute_dtype(_promoted(logits)))]


_SCORES = {"mask": 3, "bias": 3, "sinks": 1, "kv_lengths": 0}
OPERATORS = {
    operator.function.__name__: operator
    for operator in (
        Operator(hw.attention, _attention, {"q": 3, "k": 3, "v": 3, **_SCORES}),
        Operator(hw.attention_weights, _attention_weights, {"q": 3, "k": 3, **_SCORES}),
        Operator(hw.multi_head_attention, _multi_head_attention, {"q": 2, "k": 2, "v": 2, **_SCORES}),
        Operator(hw.linear, lambda x, w, b, **_: [((*x.shape[:-1], w.shape[-1]), _promoted(x, w, b))], {"x": 1}),
        Operator(hw.rotary, lambda x, **options: [(x.shape, _promoted(x))], {"x": 2, "positions": 1}),
        Operator(hw.rms_norm, lambda x, weight, eps: [(x.shape, _promoted(x, weight))], {"x": 1}),
        Operator(hw.swiglu, lambda gate, up: [(gate.shape, _promoted(gate, up))]),
        Operator(hw.sample, _sample),
        Operator(hw.probabilities, _computed),
        Operator(hw.filter_logits, _filter_logits),
        Operator(hw.logprobs, _logprobs),
        Operator(hw.penalize, _computed),
    )
}
_TAKES_ARRAYS = ("AnyArray", "ArrayLike", "Any", "SamplingParams")  # annotations; params have an error of their own
_SAMPLING = {field.name: field.default for field in fields(hw.SamplingParams)}


def arguments(operator: Operator, kind: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name. All that is not of this kind of array is checked.

    params become the options that they hold, and causal=True the corner of the triangle.
    """
    signature = inspect.signature(operator.function)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, value in given.items():
        if isinstance(value, kind) and not str(signature.parameters[name].annotation).startswith(_TAKES_ARRAYS):
            raise TypeError(f"{name}: expected a plain value inside a transformation, got an array; it is a constant")
    if "seed" in signature.parameters:
        given = _sampling_options(kind, given)
    if "causal" in signature.parameters:
        one, plain = np.zeros((1, 1, 1), np.float32), {}
        for name in ("causal", "window", "scale", "softcap", "precision"):
            if name in given:
                plain[name] = given[name]
        hw.attention(one, one, one, **plain)
        if isinstance(given.get("causal"), (bool, np.bool_)):
            given["causal"] = _corner(given)
    return given


def _sampling_options(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in given.items() if name in _SAMPLING}
    params = given.get("params")
    if params is not None:
        if not isinstance(params, hw.SamplingParams):
            raise TypeError(f"params: expected SamplingParams, got {_check.shown(params)}")
        own = {name: getattr(params, name) for name in _SAMPLING}
        options = {name: value for name, value in own.items() if value is not _SAMPLING[name]} | options
    hw.SamplingParams(**{name: value for name, value in options.items() if not _holds(value, kind)})
    return {name: value for name, value in given.items() if name != "params"} | options


def _holds(value: Any, kind: Any) -> bool:
    """Whether a value is an array of this kind, or a list or dict that holds one."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return isinstance(value, kind) or any(_holds(item, kind) for item in items)


def _corner(given: Mapping[str, Any]) -> str | None:
    if not given["causal"]:
        return None
    queries, keys = given["q"].shape[-2], given["k"].shape[-2]
    if queries != keys:
        raise ValueError(
            f"causal: expected 'top_left' or 'bottom_right' where the numbers of queries and keys differ, got True "
            f"with {queries} queries and {keys} keys: say which corner the triangle starts from"
        )
    return "top_left"


def aligned(x: Any, lead: int, axes: int) -> Any:
    """Return an array whose first axis is that of a map, with so many batch axes between it and the last ones."""
    return x.reshape(x.shape[0], *[1] * (lead + axes + 1 - x.ndim), *x.shape[1:])
