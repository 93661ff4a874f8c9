"""headway inside torch: operators, by which torch.compile, torch.export and torch.vmap see it, and torch's own calls.

Importing this module registers an operator `torch.ops.headway.<name>` for each public function in `OPERATORS`. The
public functions go by them where a tensor has no numbers to read: while torch traces, and inside its transformations.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import headway as hw

from .. import _arrays, _check
from ._operators import OPERATORS, Operator, aligned, arguments

try:
    import torch
except ImportError as error:
    raise ImportError(f"headway.integrations.torch needs torch ({error}): pip install 'headway[torch]'") from error

__all__ = ["MultiheadAttention", "from_torch", "scaled_dot_product_attention"]


# Operators ------------------------------------------------------------------------------------------------------------

# The types of arguments in an operator's schema, by their annotations. What is none of them is a word.
_TYPES = {
    "AnyArray": "Tensor",
    "AnyArray | None": "Tensor?",
    "ArrayLike": "Tensor?",
    "ArrayLike | None": "Tensor?",
    "Any": "Tensor?",
    "bool": "bool",
    "int": "SymInt",
    "int | None": "SymInt?",
    "float": "float",
    "float | None": "float?",
}


class _Argument(NamedTuple):
    """An argument of an operator: its name, and the type and the default that it has in a schema."""

    name: str
    type: str
    default: Any

    def __str__(self) -> str:
        if self.default is inspect.Parameter.empty:
            return f"{self.type} {self.name}"
        default = f'"{self.default}"' if self.type == "str" else self.default
        return f"{self.type} {self.name}={default}"


def _arguments(function: Callable[..., Any]) -> list[_Argument]:
    """Return the arguments of a public function's operator: those of its signature, and each side of the window."""
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        kind = _TYPES.get(parameter.annotation) or ("str?" if default is None else "str")
        if parameter.annotation == "Window":
            found += [_Argument(f"window_{side}", "int?", None) for side in ("left", "right")]
        elif kind.startswith("Tensor"):
            required = default is parameter.empty
            found.append(_Argument(name, "Tensor" if required else "Tensor?", default if required else None))
        elif name != "params":
            found.append(_Argument(name, kind, default))
    return found


def _named(arguments: Sequence[_Argument], given: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments of a call by name. Dispatchers leave out the last ones where they are defaults."""
    return {x.name: given[i] if i < len(given) else x.default for i, x in enumerate(arguments)}


def _run(operator: Operator, *given: Any) -> list[torch.Tensor]:
    """Compute the results of an operator from tensors that hold numbers."""
    arguments = _ARGUMENTS[operator.function.__name__]
    named = {
        x.name: value for x, value in zip(arguments, given) if isinstance(value, torch.Tensor) or value != x.default
    }
    sides = named.pop("window_left", None), named.pop("window_right", None)
    if sides != (None, None):
        named["window"] = sides
    out = operator.function(**named)
    return [torch.as_tensor(x) for x in (out if isinstance(out, tuple) else [out]) if x is not None]


def _fake(operator: Operator, *given: Any) -> list[torch.Tensor]:
    """Return empty results of an operator, for tensors that stand for others."""
    results = operator.results(**_named(_ARGUMENTS[operator.function.__name__], given))
    return [given[0].new_empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in results]


def _mapped(operator: Operator, info: Any, dims: Sequence[int | None], *given: Any) -> Any:
    """Compute an operator for torch.vmap: the result of each item is what a call of its own gives."""
    call: Any = getattr(torch.ops.headway, operator.function.__name__)
    names = [x.name for x in _ARGUMENTS[operator.function.__name__]]
    size = info.batch_size
    if not operator.axes.keys() >= {name for name, dim in zip(names, dims) if dim is not None}:
        items = [call(*(x if dim is None else x.select(dim, i) for x, dim in zip(given, dims))) for i in range(size)]
        out = [torch.stack(results) for results in zip(*items)]
        return out, [0] * len(out)
    axes = [operator.axes.get(name) if isinstance(x, torch.Tensor) else None for name, x in zip(names, given)]
    batched = [
        x if own is None else x[None].expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim, own in zip(given, dims, axes)
    ]
    lead = max(x.ndim - 1 - own for x, own in zip(batched, axes) if own is not None)
    out = call(*(x if own is None else aligned(x, lead, own) for x, own in zip(batched, axes)))
    return out, [0] * len(out)


def _gradtracking(x: torch.Tensor) -> bool:
    """Whether a tensor stands for one whose gradient torch.func takes."""
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 (which type checkers do not know)
    return bool(functorch.is_gradtrackingtensor(x))


def _no_gradient(name: str, *_: Any) -> None:
    raise RuntimeError(
        f"headway.{name} is forward only and has no gradient; call it under torch.no_grad(), or on `tensor.detach()`"
    )


def _register(name: str, operator: Operator) -> None:
    arguments = _ARGUMENTS[name]
    op = torch.library.custom_op(
        f"headway::{name}",
        functools.partial(_run, operator),
        mutates_args=(),
        device_types="cpu",
        schema=f"({', '.join(map(str, arguments))}) -> Tensor[]",
        # A draw without a seed is another one at each call.
        tags=(torch.Tag.nondeterministic_seeded,) if "seed" in {x.name for x in arguments} else (),
    )
    op.register_fake(functools.partial(_fake, operator))
    op.register_vmap(functools.partial(_mapped, operator))
    op.register_autograd(functools.partial(_no_gradient, name))
    torch.compiler.allow_in_graph(operator.function)  # type: ignore[no-untyped-call]


def _through_operator(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a public function by its operator. A result that is a number outside is a tensor here."""
    name = function.__name__
    if name not in OPERATORS:
        return NotImplemented
    given = arguments(OPERATORS[name], torch.Tensor, args, kwargs)
    for argument, x in given.items():
        if isinstance(x, torch.Tensor) and _gradtracking(x):
            raise TypeError(
                f"{argument}: expected a tensor that waits for no gradient, got one inside torch.func.grad or "
                f"torch.func.jvp, and headway is forward only; pass `{argument}.detach()`"
            )
    if "causal" in inspect.signature(OPERATORS[name].function).parameters:
        given["window_left"], given["window_right"] = given.pop("window", None) or (None, None)
    values = {
        x.name: _as_tensor(given[x.name], x.name, given) if x.type.startswith("Tensor") else given[x.name]
        for x in _ARGUMENTS[name]
        if x.name in given
    }
    out = getattr(torch.ops.headway, name)(**values)
    if name != "logprobs":
        return tuple(out) if len(out) > 1 else out[0]
    found = [None, None] if given.get("tokens") is None else [out.pop(0), out.pop(0)]
    return hw.Logprobs(*found, *(out or (None, None)))


def _as_tensor(x: Any, name: str, given: Mapping[str, Any]) -> torch.Tensor | None:
    """Return an argument as a tensor, of which an operator takes no other kinds of arrays."""
    if x is None or isinstance(x, torch.Tensor):
        return x
    if isinstance(x, Mapping):  # a bias for some tokens
        bias = np.zeros(given["logits"].shape[-1], np.float32)
        for token, value in x.items():
            bias[token] = value
        x = bias
    array = _arrays.plain(sorted(x) if isinstance(x, (set, frozenset)) else x, name)[0]
    return torch.tensor(array.astype(array.dtype.name))  # C's long long, say, is int64 by another name


_ARGUMENTS = {name: _arguments(operator.function) for name, operator in OPERATORS.items()}
for _name, _operator in OPERATORS.items():
    _register(_name, _operator)
_arrays.TRACED["torch"] = _through_operator


# torch's own calls ----------------------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attend as `torch.nn.functional.scaled_dot_product_attention` does, with its arguments, under headway's contract.

    Args:
        query: (..., H, L, E), or (L, E).
        key: (..., G, S, E), or (S, E).
        value: (..., G, S, Ev), or (S, Ev).
        attn_mask: broadcasting to (..., H, L, S): booleans, True = may attend; or numbers that are added to the scores.
            A row that may attend to nothing gives 0.
        dropout_p: 0, since headway is forward only.
        is_causal: query i sees keys 0 .. i, also where L and S differ ("top_left"); not beside attn_mask.
        scale: 1 / sqrt(E) by default.
        enable_gqa: whether G may be a divisor of H.

    Returns:
        (..., H, L, Ev).

    Raises:
        TypeError: what is no tensor in CPU memory.
        ValueError: shapes that do not fit, dropout, both a mask and is_causal.

    >>> import torch
    >>> from headway.integrations.torch import scaled_dot_product_attention
    >>> q, k, v = torch.ones(3, 2, 4, 8)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
    torch.Size([2, 4, 8])
    """
    if dropout_p:
        raise ValueError(f"dropout_p: expected 0, got {_check.shown(dropout_p)}; headway is forward only")
    is_causal, enable_gqa = _check.boolean(is_causal, "is_causal"), _check.boolean(enable_gqa, "enable_gqa")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal: expected False beside attn_mask, got True; put both into the mask")
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {_check.shown(x)}; for other arrays call hw.attention")
        if x.is_nested:
            raise TypeError(f"{name}: expected a dense tensor, got a nested one; pad it, `{name}.to_padded_tensor(0)`")
        if x.ndim < 2:
            raise ValueError(f"{name}: expected shape (..., length, size), got {tuple(x.shape)}")
    flat = query.ndim == 2
    query, key, value = (x[None] if x.ndim == 2 else x for x in arrays.values())
    heads, groups, of_values = query.shape[-3], key.shape[-3], value.shape[-3]
    if not enable_gqa and {groups, of_values} - {heads, 1}:
        raise ValueError(
            f"key: expected the {heads} heads of query, got {groups} of key and {of_values} of value; "
            f"enable_gqa=True lets groups of heads share theirs"
        )
    if groups != of_values:  # one of them is 1, or divides the other
        groups = max(groups, of_values)
        key, value = (x.repeat_interleave(groups // x.shape[-3], -3) for x in (key, value))
    options: dict[str, Any] = {}
    if attn_mask is not None:
        options["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask
    out: torch.Tensor = hw.attention(
        query, key, value, scale=scale, causal="top_left" if is_causal else None, **options
    )
    return out[0] if flat and out.ndim == 3 else out


torch.compiler.allow_in_graph(scaled_dot_product_attention)  # type: ignore[no-untyped-call]


class MultiheadAttention(torch.nn.Module):
    """`torch.nn.MultiheadAttention`, computed by headway; made by `from_torch`, whose weights it shares.

    Args:
        module: of torch, in evaluation mode or without dropout.

    >>> import torch
    >>> MultiheadAttention(torch.nn.MultiheadAttention(8, 2).eval()).num_heads
    2
    """

    def __init__(self, module: torch.nn.MultiheadAttention) -> None:
        super().__init__()
        if not isinstance(module, torch.nn.MultiheadAttention):
            raise TypeError(f"module: expected torch.nn.MultiheadAttention, got {_check.shown(module)}")
        if module.dropout and module.training:
            raise ValueError(
                f"module: expected no dropout, got {module.dropout}; headway is forward only: call `module.eval()`"
            )
        self.module = module
        self.num_heads = module.num_heads

    @torch._dynamo.dont_skip_tracing
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend as torch's module does; a row that may attend to nothing gives 0, where torch gives NaN.

        Args:
            query: (L, N, M), (N, L, M) with batch_first, or (L, M).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S,): booleans, True = is padding, or numbers that are added to the scores.
            need_weights: whether to return the weights too.
            attn_mask: (L, S) or (N * heads, L, S): booleans, True = may not attend, or numbers to be added.
            average_attn_weights: over the heads.
            is_causal: says that attn_mask is causal, which the mask says itself.

        Returns:
            The result in the layout of query; and the weights (N, L, S), (N, heads, L, S) or without N, or None.

        Raises:
            TypeError: what is no tensor.
            ValueError: shapes that do not fit; is_causal without attn_mask.
        """
        own = self.module
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected a mask beside is_causal=True, got None; the mask says what is causal")
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not own.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._projected(x, i) for i, x in enumerate((query, key, value)))
        extra = 0
        if own.bias_k is not None and own.bias_v is not None:
            k = torch.cat([k, own.bias_k.detach().expand(len(k), 1, -1)], 1)
            v = torch.cat([v, own.bias_v.detach().expand(len(v), 1, -1)], 1)
            extra += 1
        if own.add_zero_attn:
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
            extra += 1
        q, k, v = (x.reshape(*x.shape[:2], own.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        bias = self._bias(key_padding_mask, attn_mask, len(q), extra)
        out = hw.attention(q, k, v, bias=bias).transpose(1, 2).flatten(2)
        out = hw.linear(out, own.out_proj.weight.detach().T, _detached(own.out_proj.bias))
        weights = None
        if need_weights:
            weights = hw.attention_weights(q, k, bias=bias)
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if own.batch_first else out.transpose(0, 1), weights

    @torch._dynamo.dont_skip_tracing
    def _projected(self, x: torch.Tensor, i: int) -> torch.Tensor:
        own, size = self.module, self.module.embed_dim
        if own._qkv_same_embed_dim:
            weight = own.in_proj_weight[i * size : (i + 1) * size]
        else:
            weight = (own.q_proj_weight, own.k_proj_weight, own.v_proj_weight)[i]
        bias = None if own.in_proj_bias is None else own.in_proj_bias[i * size : (i + 1) * size]
        return hw.linear(x, weight.detach().T, _detached(bias))

    @torch._dynamo.dont_skip_tracing
    def _bias(
        self, padding: torch.Tensor | None, mask: torch.Tensor | None, batch: int, extra: int
    ) -> torch.Tensor | None:
        """Return both masks as numbers that are added to the scores, (N or 1, heads or 1, L or 1, S)."""
        parts = []
        if padding is not None:
            parts.append(_added(padding)[:, None, None])
        if mask is not None:
            added = _added(mask)
            parts.append(
                added[None, None] if mask.ndim == 2 else added.reshape(batch, self.num_heads, *added.shape[1:])
            )
        if not parts:
            return None
        return torch.nn.functional.pad(sum(parts[1:], parts[0]), (0, extra))


@torch._dynamo.dont_skip_tracing
def _detached(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach()


@torch._dynamo.dont_skip_tracing
def _added(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask in which True is "may not attend" as numbers that are added to the scores."""
    if mask.dtype != torch.bool:
        return mask.float() if mask.dtype != torch.float64 else mask
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


def from_torch(module: torch.nn.MultiheadAttention) -> MultiheadAttention:
    """Return a `torch.nn.MultiheadAttention` that headway computes, with the same weights and the same arguments.

    Args:
        module: of torch; its weights are shared, not copied.

    Returns:
        A module whose forward takes what that of torch's takes, masks with torch's meaning included.

    Raises:
        TypeError: something else.
        ValueError: a module with dropout in training mode.

    >>> import torch
    >>> from headway.integrations.torch import from_torch
    >>> attend = from_torch(torch.nn.MultiheadAttention(8, num_heads=2, batch_first=True).eval())
    >>> x = torch.ones(1, 3, 8)
    >>> with torch.no_grad():
    ...     attend(x, x, x, need_weights=False)[0].shape
    torch.Size([1, 3, 8])
    """
    return MultiheadAttention(module)
