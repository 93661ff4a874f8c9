"""Every array argument of every public function, given as every kind of array of every type.

The numbers are small and whole, so that every type holds them exactly: a call gives what it gives for float64 (int64
where integers are meant, bool for masks), to within the rounding of the result's type, or it is an error that begins
with the argument's name. Numbers read by their bits (bfloat16 1.0 as 16256) are far off.
"""

from __future__ import annotations

import array
import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import headway as hw
from headway import _sampling
from headway._sampling import Integers
from headway._sampling.checks import Reals

V = 4
FLOATS = ["float64", "float32", "float16", "bfloat16"]
WHOLE = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
OTHERS = ["bool", "complex64", "complex128", "object", "str", "datetime64[s]", "float8_e4m3fn", "float8_e5m2", "int4"]
TYPES = FLOATS + WHOLE + OTHERS


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


# How numbers are handed over ------------------------------------------------------------------------------------------


def as_torch(x: np.ndarray, name: str) -> Any:
    import torch

    dtype = getattr(torch, name.partition("[")[0], None)
    return None if dtype is None else torch.from_numpy(np.array(x, np.float64)).to(dtype)


def as_jax(x: np.ndarray, name: str) -> Any:
    import jax.numpy as jnp

    if re.search("64|128|object|str", name) and name != "complex64":
        return None  # which JAX has no more than NumPy has int4
    return jnp.asarray(x.astype(np.float32)).astype(dtype_of(name))


def as_scalars(x: np.ndarray, name: str) -> Any:
    """Nested lists of the type's own scalars."""
    return [as_scalars(row, name) for row in x] if x.ndim else np.ravel(x).astype(dtype_of(name))[0]


def as_buffer(x: np.ndarray, name: str) -> Any:
    return array.array(dtype_of(name).char, x.astype(dtype_of(name)).tolist()) if x.ndim == 1 else None


MAKES: dict[str, Callable[[np.ndarray, str], Any]] = {
    "NumPy": lambda x, name: x.astype(dtype_of(name)),
    "torch": as_torch,
    "JAX": as_jax,
    "scalars in lists": as_scalars,
    "arrays in a list": lambda x, name: list(x.astype(dtype_of(name))) if x.ndim else None,
    "tensors in a list": lambda x, name: list(as_torch(x, name)) if x.ndim and as_torch(x, name) is not None else None,
    "JAX in a tuple": lambda x, name: tuple(as_jax(x, name)) if x.ndim and as_jax(x, name) is not None else None,
    "memoryview": lambda x, name: memoryview(x.astype(dtype_of(name))),
    "array.array": as_buffer,
}


def made(make: str, x: np.ndarray, name: str) -> Any:
    """None where there is no such array."""
    if "torch" in make or "tensor" in make:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    if "JAX" in make:
        pytest.importorskip("jax", reason="JAX is not installed")
    try:
        return MAKES[make](x, name)
    except (ValueError, TypeError, NotImplementedError, RuntimeError):
        assert make not in ("NumPy", "scalars in lists", "arrays in a list")
        return None


# What takes arrays ----------------------------------------------------------------------------------------------------


class Door(NamedTuple):
    """An argument: a call of the function with a value for it, a good value, and the types that it takes."""

    call: Callable[[Any], Any]
    good: np.ndarray
    takes: list[str]


def grid(*shape: int) -> np.ndarray:
    """0, 1, 2, 3, ... small and whole."""
    return np.arange(float(np.prod(shape))).reshape(shape) % 3


X = grid(2, 3, 4)  # H, L, D
TRI = np.tri(3)
LOGITS = np.array([[0.0, 2.0, 1.0, 2.0], [3.0, 0.0, 1.0, 2.0]])
AS_FLOATS, AS_MASK, AS_WHOLE = FLOATS + WHOLE, [*FLOATS, *WHOLE, "bool"], WHOLE
DOORS: dict[str, Door] = {}


def door(function: Callable[..., Any], name: str, takes: list[str], good: Any, at: str = "", **rest: Any) -> None:
    def call(value: Any) -> Any:
        return function(**{**rest, name: value})

    where = at or function.__name__
    DOORS[f"{where}, {name}{'' if np.ndim(good) else ' alone'}"] = Door(call, np.asarray(good, np.float64), takes)


def merged(**call: Any) -> Any:
    return hw.merge_attention([hw.partial_attention(**call)])


def from_lse(**call: Any) -> Any:
    return hw.merge_attention([hw.AttentionState.from_lse(**call)])


def cached(**call: Any) -> Any:
    cache = hw.KVCache(2, 4, dtype=np.float64)
    cache.append(call.pop("k"), call.pop("v"))
    return cache.attend(**call)


QKV = {"q": X, "k": X + 1, "v": X}
OF_SCORES = {"mask": (AS_MASK, TRI), "bias": (AS_FLOATS, TRI), "sinks": (AS_FLOATS, [1, 2]), "kv_lengths": (WHOLE, 2)}
for function, at in (
    (hw.attention, "attention"),
    (hw.attention_weights, "attention_weights"),
    (merged, "partial_attention"),
    (cached, "KVCache"),
):
    call = {name: x for name, x in QKV.items() if at != "attention_weights" or name != "v"}
    for name, x in call.items():
        door(function, name, AS_FLOATS, x, at, **{**call, name: None})
    for name, (takes, good) in OF_SCORES.items():
        if at != "partial_attention" or name != "sinks":
            door(function, name, takes, good, at, **call)
STATE = hw.partial_attention(**QKV)
door(hw.merge_attention, "sinks", AS_FLOATS, [1, 2], states=[STATE])
for name, good in (("out", X), ("lse", grid(2, 3))):
    door(from_lse, name, AS_FLOATS, good, "from_lse", **{"out": X, "lse": grid(2, 3), name: None})
HEADS = {"q": grid(3, 4), "k": grid(3, 4), "v": grid(3, 4), "num_heads": 2}
for name in ("q", "k", "v"):
    door(hw.multi_head_attention, name, AS_FLOATS, HEADS[name], **HEADS)
for name in "qkvo":
    door(hw.multi_head_attention, f"w_{name}", AS_FLOATS, np.eye(4), **HEADS)
    door(hw.multi_head_attention, f"b_{name}", AS_FLOATS, [0, 1, 2, 3], **HEADS, **{f"w_{name}": np.eye(4)})
for name, (takes, good) in OF_SCORES.items():
    door(hw.multi_head_attention, name, takes, good, **HEADS)
for name, good in (("x", X), ("w", grid(4, 2)), ("b", [1, 2])):
    door(hw.linear, name, AS_FLOATS, good, **{"x": X, "w": grid(4, 2), name: None})
for name, takes, good in (("x", AS_FLOATS, X), ("positions", WHOLE, [0, 5, 2]), ("frequencies", AS_FLOATS, [1, 2])):
    door(hw.rotary, name, takes, good, **{"x": X, name: None})
for name, good in (("x", X), ("weight", [1, 2, 3, 4])):
    door(hw.rms_norm, name, AS_FLOATS, good, **{"x": X, "weight": np.ones(4), name: None})
for name in ("gate", "up"):
    door(hw.swiglu, name, AS_FLOATS, X, **{"gate": X, "up": X, name: None})


# Options: what they do shows in the distribution, in the draw, or in both.
def of_option(option: Any) -> tuple[list[str], list[float]]:
    """What kinds of numbers an option takes, and two numbers that it accepts, the first of which does something."""
    for good in ([1, 2], [1, 0], [1, 1]):
        with contextlib.suppress(ValueError):
            option.check(option.name, good, ())
            return WHOLE if isinstance(option.check, Integers) else AS_FLOATS, good
    raise ValueError(f"{option.name} takes none of these")


OPTIONS: dict[str, tuple[list[str], list[float]]] = {
    "xtc_special_tokens": (WHOLE, [1, 3]),
    "uniform": (AS_FLOATS, [0, 0]),
    "logit_bias": (AS_FLOATS, [0, 1, 2, 3]),
    "allowed": (["bool"], [0, 1, 1, 0]),
}
OPTIONS |= {
    option.name: of_option(option)
    for option in _sampling.OPTIONS
    if option.name not in OPTIONS and isinstance(option.check, (Integers, Reals))
}
BESIDE: dict[str, dict[str, Any]] = {
    "dynamic_temperature_exponent": {"dynamic_temperature_range": 1.0},
    "xtc_threshold": {"xtc_probability": 1.0},
    "xtc_special_tokens": {"xtc_probability": 1.0, "xtc_threshold": 0.0},
    "min_tokens_to_keep": {"top_k": 1},
}


def all_of(logits: Any, params: Any = None, **options: Any) -> Any:
    options = {} if params is not None else options
    drawn = hw.sample(logits, params, **options)
    return drawn, hw.probabilities(logits, params, **options), hw.filter_logits(logits, params, **options)


def of_params(**options: Any) -> Any:
    return all_of(LOGITS, hw.SamplingParams(**options))


def explained(logits: Any) -> Any:
    found = hw.explain(logits, top_k=2)
    return found.masses, found.kept


def stepped(logits: Any = LOGITS, allowed: Any = None, **admitted: Any) -> Any:
    sampler = hw.Sampler(V)
    for _ in range(2):
        sampler.admit(hw.SamplingParams(temperature=0), **{"prompt_tokens": [1, 1], **admitted})
    return sampler.step(logits, allowed=allowed)


for name, (takes, good) in OPTIONS.items():
    rest = {} if name in ("seed", "uniform") else {"seed": 3}
    rest |= BESIDE.get(name, {})
    for value in [good] if name in ("xtc_special_tokens", "allowed", "logit_bias") else [good, good[0]]:
        door(all_of, name, takes, value, "sampling", logits=LOGITS, **rest)
        door(of_params, name, takes, value, "SamplingParams", **rest)
    if name != "uniform":
        chain = {"target_logits": LOGITS[None], "draft_logits": None, "draft_tokens": [[1]]}
        door(hw.verify_draft, name, takes, good if len(good) == V else good[:1], **chain, **rest)
    ranked = {"logits": LOGITS, "top": 1, "processed": True}
    if name not in ("seed", "uniform"):
        door(hw.logprobs, name, takes, good, **ranked, **rest)
door(lambda logits: all_of(logits, seed=1), "logits", AS_FLOATS, LOGITS, "sampling")
door(explained, "logits", AS_FLOATS, LOGITS[0], "explain")
door(hw.logprobs, "logits", AS_FLOATS, LOGITS, tokens=[0, 1], top=1)
door(hw.logprobs, "tokens", WHOLE, [0, 1], logits=LOGITS)
door(hw.logprobs, "tokens", WHOLE, 1, logits=LOGITS[0])
for name, takes, good in (
    ("target_logits", AS_FLOATS, LOGITS),
    ("draft_logits", AS_FLOATS, LOGITS[:1]),
    ("draft_tokens", WHOLE, [1]),
    ("lengths", WHOLE, 1),
):
    chain = {"target_logits": LOGITS, "draft_logits": LOGITS[:1], "draft_tokens": [1], "seed": 1}
    door(hw.verify_draft, name, takes, good, **chain)
PENALIZED = {"logits": LOGITS, "token_ids": np.array([[1, 2, 1, 2], [3, 0, 0, 1]])}
PENALTIES = {
    "repetition": (AS_FLOATS, [1, 2]),
    "frequency": (AS_FLOATS, [1, 2]),
    "presence": (AS_FLOATS, [1, 2]),
    "window": (WHOLE, [1, 2]),
    "repetition_window": (WHOLE, [1, 2]),
    "frequency_window": (WHOLE, [1, 2]),
    "dry_window": (WHOLE, [1, 2]),
    "dry_multiplier": (AS_FLOATS, [1, 2]),
    "dry_base": (AS_FLOATS, [1, 2]),
    "dry_allowed_length": (WHOLE, [1, 2]),
    "dry_breakers": (WHOLE, [1, 2]),
}
for name, takes, good in (
    ("logits", AS_FLOATS, LOGITS),
    ("token_ids", WHOLE, PENALIZED["token_ids"]),
    ("lengths", WHOLE, [1, 2]),
    ("prompt_lengths", WHOLE, [1, 2]),
):
    door(hw.penalize, name, takes, good, **{**PENALIZED, "frequency": 1.0, name: None})
for name, (takes, good) in PENALTIES.items():
    rest = {"dry_multiplier": 1.0} if name.startswith("dry") else {"frequency": 1.0}
    rest.pop(name, None)
    door(hw.penalize, name, takes, good, **PENALIZED, **rest)
    value = good if name == "dry_breakers" else good[1]
    door(stepped, name, takes, value, "Sampler", **rest)
door(stepped, "logits", AS_FLOATS, LOGITS, "Sampler")
door(stepped, "allowed", ["bool"], [[0, 1, 1, 0], [1, 1, 0, 0]], "Sampler")
door(stepped, "prompt_tokens", WHOLE, [1, 1], "Sampler", repetition=5.0)
door(stepped, "output_tokens", WHOLE, [1, 1], "Sampler", repetition=5.0)
door(stepped, "stop_tokens", WHOLE, [1, 2], "Sampler", min_tokens=1)


# What comes back ------------------------------------------------------------------------------------------------------


def numbers(result: Any) -> Iterator[np.ndarray]:
    """The numbers of a result of any kind, in float64."""
    if isinstance(result, tuple):
        for part in result:
            yield from numbers(part)
    elif result is not None:
        if type(result).__module__ == "torch":
            result = result.double().numpy()
        yield np.asarray(result).astype(np.float64)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("name", DOORS)
def test_every_kind_of_array_of_every_type(name: str, make: str) -> None:
    one, argument = DOORS[name], name.split()[1]
    meant = next(dtype for dtype in ("bool", "float64", "int64") if dtype in one.takes)
    want = list(numbers(one.call(one.good.astype(meant))))
    for dtype in TYPES:
        value = made(make, one.good, dtype)
        if value is None or (argument == "allowed" and dtype in ("int32", "uint32", "int64")):
            continue  # these are packed masks, or ids
        error: Exception | None = None
        try:
            got = list(numbers(one.call(value)))
        except (TypeError, ValueError) as caught:
            error = caught
        if error is not None:
            assert dtype not in one.takes, (dtype, error)
            kinds = (TypeError, ValueError) if argument in ("seed", "position") else (TypeError,)
            assert type(error) in kinds, (dtype, error)
            assert re.match(rf"{argument}(\[[\d, ]*\])*: expected ", str(error)), (dtype, error)
            continue
        assert dtype in one.takes or dtype == "object", dtype  # objects may be numbers
        coarse = 2.0**-6 if dtype in ("float16", "bfloat16") else 1e-6
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=coarse, atol=coarse, err_msg=dtype)


# Arguments that are no arrays: numbers alone, words, switches.
ALONE = {
    "causal", "window", "scale", "softcap", "precision", "return_lse", "key_offset", "states", "num_heads",
    "num_kv_heads", "decimals", "base", "eps", "params", "num_samples", "replacement", "top", "processed", "ties",
    "nucleus", "dialect", "draft_params", "n", "vocabulary", "handle", "head_dim", "value_dim", "batch_shape", "dtype",
    "capacity", "length", "unknown_tokens", "count_prompt", "stream", "self", "logprobs", "token",
    "min_tokens", "no_repeat_ngram", "banned_sequences",
}  # fmt: skip


def test_no_door_is_forgotten() -> None:
    known = {door.split()[1] for door in DOORS} | ALONE
    functions = [face for face in (getattr(hw, name) for name in hw.__all__) if callable(face)]
    for kind in (hw.KVCache, hw.Sampler, hw.AttentionState):
        functions += [f for n, f in vars(kind).items() if inspect.isfunction(f) and not n.startswith("_")]
    functions.append(hw.AttentionState.from_lse)
    results = (hw.AttentionState, hw.Drawn, hw.Explanation, hw.Info, hw.Logprobs, hw.RowError, hw.Verified)
    results += (hw.Candidate, hw.Stage, hw.Why)
    for function in functions:
        if function in results:
            continue
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and (function, name) != (hw.explain, "tokens"):
                assert name in known, f"{function.__name__}: {name}"
