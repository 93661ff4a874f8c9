"""A grammar of bad calls: every public function, every argument of it, every bad value.

Whatever comes of such a call, it is a TypeError or a ValueError that begins with the name of the argument that is bad,
or the value is one that the argument takes. Where the message has code in backticks, that is the cure: an expression
to give in the argument's place, or ``name=expression`` to give instead of it; the call then works.
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import headway as hw
from headway import plot
from headway._sampling.penalties import Penalties

V = 4
X = np.random.default_rng(0).standard_normal((2, 3, 4))
LOGITS = X[0]
DRAFT = {"target_logits": LOGITS, "draft_logits": LOGITS[:2], "draft_tokens": [1, 2]}


class Call(NamedTuple):
    """A function, and arguments that are good."""

    function: Callable[..., Any]
    good: dict[str, Any]


def cache() -> hw.KVCache:
    one = hw.KVCache(2, 4)
    one.append(X, X)
    return one


def sampler() -> hw.Sampler:
    one = hw.Sampler(V)
    one.admit()
    return one


def drawing() -> Any:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    return plot


QKV = {"q": X, "k": X, "v": X}
CALLS: dict[str, Call] = {
    "attention": Call(hw.attention, QKV),
    "attention_weights": Call(hw.attention_weights, {"q": X, "k": X}),
    "partial_attention": Call(hw.partial_attention, QKV),
    "merge_attention": Call(hw.merge_attention, {"states": [hw.partial_attention(X, X, X)]}),
    "AttentionState.from_lse": Call(hw.AttentionState.from_lse, {"out": X, "lse": X[..., 0]}),
    "multi_head_attention": Call(hw.multi_head_attention, {"q": X, "k": X, "v": X, "num_heads": 2}),
    "linear": Call(hw.linear, {"x": X, "w": np.eye(4)}),
    "rotary": Call(hw.rotary, {"x": X}),
    "rms_norm": Call(hw.rms_norm, {"x": X, "weight": np.ones(4)}),
    "swiglu": Call(hw.swiglu, {"gate": X, "up": X}),
    "KVCache": Call(hw.KVCache, {"num_kv_heads": 2, "head_dim": 4}),
    "KVCache.append": Call(lambda **call: cache().append(**call), {"k": X, "v": X}),
    "KVCache.attend": Call(lambda **call: cache().attend(**call), {"q": X}),
    "KVCache.truncate": Call(lambda **call: cache().truncate(**call), {"length": 1}),
    "KVCache.fork": Call(lambda **call: cache().fork(**call), {}),
    "sample": Call(hw.sample, {"logits": LOGITS}),
    "probabilities": Call(hw.probabilities, {"logits": LOGITS}),
    "filter_logits": Call(hw.filter_logits, {"logits": LOGITS}),
    "SamplingParams": Call(hw.SamplingParams, {}),
    "penalize": Call(hw.penalize, {"logits": LOGITS, "token_ids": [[1, 2], [3], []]}),
    "logprobs": Call(hw.logprobs, {"logits": LOGITS, "top": 2, "processed": True}),
    "verify_draft": Call(hw.verify_draft, DRAFT),
    "explain": Call(hw.explain, {"logits": LOGITS[0]}),
    "Explanation.why": Call(hw.explain(LOGITS[0]).why, {"token": 1}),
    "Explanation.plot": Call(lambda **call: drawing() and hw.explain(LOGITS[0]).plot(**call), {}),
    "Sampler": Call(hw.Sampler, {"vocabulary": V}),
    "Sampler.admit": Call(lambda **call: hw.Sampler(V).admit(**call), {}),
    "Sampler.step": Call(lambda **call: sampler().step(**call), {"logits": LOGITS[:1]}),
    "Sampler.retire": Call(lambda **call: sampler().retire(**call), {"handle": 0}),
    "Sampler.history": Call(lambda **call: sampler().history(**call), {"handle": 0}),
    "Sampler.force": Call(lambda **call: sampler().force(**call), {"handle": 0, "token": 1}),
    "Sampler.truncate": Call(lambda **call: sampler().truncate(**call), {"handle": 0, "length": 0}),
    "Sampler.fork": Call(lambda **call: sampler().fork(**call), {"handle": 0}),
    "Sampler.verify": Call(
        lambda **call: sampler().verify(**call),
        {"target_logits": np.stack([LOGITS[:1]] * 2, 1), "draft_tokens": [[1]]},
    ),
    "attention_map": Call(lambda **call: drawing().attention_map(**call), {"weights": np.abs(X)}),
    "filter_stages": Call(lambda **call: drawing().filter_stages(**call), {"explanation": hw.explain(LOGITS[0])}),
    "set_num_threads": Call(hw.set_num_threads, {"n": hw.get_num_threads()}),
}
METHODS = {
    "attention_map": plot.attention_map,
    "filter_stages": plot.filter_stages,
    "KVCache.append": hw.KVCache.append,
    "KVCache.attend": hw.KVCache.attend,
    "KVCache.truncate": hw.KVCache.truncate,
    "KVCache.fork": hw.KVCache.fork,
    "Explanation.plot": hw.Explanation.plot,
    "Sampler.admit": hw.Sampler.admit,
    "Sampler.step": hw.Sampler.step,
    "Sampler.retire": hw.Sampler.retire,
    "Sampler.history": hw.Sampler.history,
    "Sampler.force": hw.Sampler.force,
    "Sampler.truncate": hw.Sampler.truncate,
    "Sampler.fork": hw.Sampler.fork,
    "Sampler.verify": hw.Sampler.verify,
}


def arguments(name: str) -> list[str]:
    found = []
    for argument, parameter in inspect.signature(METHODS.get(name, CALLS[name].function)).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found += list(Penalties.__annotations__)
        elif argument != "self":
            found.append(argument)
    return found


# Bad values -----------------------------------------------------------------------------------------------------------


def lying(**attributes: Any) -> Any:
    """Make an object that says it is an array, a number or a list; what it then hands over is none."""
    return type("Lying", (), attributes)()


def raising(error: Exception) -> Callable[..., Any]:
    def method(*_: Any, **__: Any) -> Any:
        raise error

    return method


def nested(depth: int) -> Any:
    value: Any = 1.0
    for _ in range(depth):
        value = [value]
    return value


def itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def consumed() -> Any:
    capsule = np.ones(3).__dlpack__()
    once = lying(__dlpack__=lambda *_, **__: capsule, __dlpack_device__=lambda *_: (1, 0))
    np.from_dlpack(once)
    return once


class Colour(enum.Enum):
    RED = 1


NO_ARRAYS: dict[str, Callable[[], Any]] = {
    "a dict": lambda: {},
    "a dict of words": lambda: {"a": "b"},
    "a string": lambda: "text",
    "an empty string": lambda: "",
    "digits": lambda: "1",
    "bytes": lambda: b"x",
    "an object": object,
    "a function": lambda: lambda *_: 0,
    "a generator": lambda: (i for i in [1]),
    "a set of words": lambda: {"a"},
    "a type": lambda: int,
    "an ellipsis": lambda: ...,
    "a slice": lambda: slice(None),
    "a module": lambda: np,
    "an exception": lambda: ValueError("no"),
    "an enum": lambda: Colour.RED,
    "a list of None": lambda: [None, None, None],
    "a list of words": lambda: ["a", "b", "c"],
    "a list of dicts": lambda: [{}, {"a": 1}],
    "a list of objects": lambda: [object()],
    "complex": lambda: 1j,
    "an array of complex": lambda: np.ones((2, 3, 4)) + 1j,
    "an array of words": lambda: np.array(["a", "b", "c"]),
    "a date": lambda: np.datetime64(1, "s"),
    "an array of dates": lambda: np.zeros(3, "datetime64[s]"),
    "durations": lambda: np.zeros(3, "timedelta64[s]"),
    "a structured array": lambda: np.zeros(3, [("a", "f4")]),
    "a void": lambda: np.zeros(1, "V3")[0],
    "a masked array": lambda: np.ma.array(np.ones(3), mask=[0, 1, 0]),
    "masked rows": lambda: [np.ma.array(np.ones(3), mask=[0, 1, 0])],
    "float8": lambda: np.ones(3, ml_dtypes.float8_e4m3fn),
    "int4": lambda: np.ones(3, ml_dtypes.int4),
    "lists nested 40 deep": lambda: nested(40),
    "lists nested 2,000 deep": lambda: nested(2000),
    "a list of itself": itself,
    "a lying __array__": lambda: lying(__array__=lambda *_, **__: [1.0]),
    "a raising __array__": lambda: lying(__array__=raising(KeyError("x"))),
    "a lying __array_interface__": lambda: lying(__array_interface__={"shape": (2,)}),
    "a lying __dlpack__": lambda: lying(__dlpack__=lambda *_, **__: "x", __dlpack_device__=lambda *_: (1, 0)),
    "a raising __dlpack__": lambda: lying(__dlpack__=raising(OSError("x")), __dlpack_device__=lambda *_: (1, 0)),
    "a lying __dlpack_device__": lambda: lying(__dlpack__=raising(OSError()), __dlpack_device__=lambda *_: None),
    "a raising __dlpack_device__": lambda: lying(__dlpack__=raising(OSError()), __dlpack_device__=raising(OSError())),
    "a lying dtype": lambda: lying(dtype="bfloat16", __dlpack__=lambda *_, **__: 1, __dlpack_device__=lambda *_: (1,)),
    "a raising attribute": lambda: lying(__getattr__=raising(RuntimeError("no"))),
    "a lying __len__": lambda: lying(__len__=lambda _: -1, __getitem__=lambda _, i: 1),
    "a raising __len__": lambda: lying(__len__=raising(OSError("no")), __getitem__=raising(OSError("no"))),
    "a raising __index__": lambda: lying(__index__=raising(OSError("no"))),
    "a lying __index__": lambda: lying(__index__=lambda _: "1"),
    "a raising __float__": lambda: lying(__float__=raising(OSError("no"))),
    "a lying __bool__": lambda: lying(__bool__=lambda _: 3),
    "a raising __eq__": lambda: lying(__eq__=raising(OSError("no")), __hash__=lambda _: 1),
    "a raising __repr__": lambda: lying(__repr__=raising(OSError("no"))),
    "a raising __iter__": lambda: lying(__iter__=raising(OSError("no"))),
    "a list that cannot be read": lambda: type("Lying", (list,), {"__iter__": raising(OSError("no"))})([1.0]),
    "a tuple that cannot be read": lambda: type("Lying", (tuple,), {"__iter__": raising(OSError("no"))})([1.0]),
    "a consumed capsule": consumed,
}
NUMBERS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "an empty list": lambda: [],
    "a set": lambda: {1},
    "a range": lambda: range(3),
    "NaN": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: -float("inf"),
    "-1": lambda: -1,
    "0": lambda: 0,
    "a half": lambda: 0.5,
    "10^400": lambda: 10**400,
    "-10^400": lambda: -(10**400),
    "10^5000": lambda: 10**5000,
    "a list of 10^400": lambda: [10**400],
    "a list of 10^5000": lambda: [10**5000, 1],
    "2^63": lambda: 2**63,
    "a list of 2^63 and -1": lambda: [2**63, -1],
    "uint64": lambda: np.array([2**64 - 1, 0], np.uint64),
    "1e300": lambda: 1e300,
    "True": lambda: True,
    "np.True_": lambda: np.True_,
    "a list of True": lambda: [True],
    "ids and booleans": lambda: [True, 1],
    "a tuple": lambda: (1, 2, 3),
    "ragged lists": lambda: [[1.0], [1.0, 2.0]],
    "ragged ids": lambda: [[0], [1, 2], []],
    "lists of ids": lambda: [[0, 1], [1, 2], [0, 2]],
    "an empty array": lambda: np.zeros(0),
    "an array without rows": lambda: np.zeros((0, 4)),
    "five numbers": lambda: np.ones(5),
    "two axes": lambda: X[0],
    "four axes": lambda: np.ones((5, 2, 3, 4)),
    "thirty axes": lambda: np.ones((1,) * 30),
    "numbers of NaN": lambda: np.full((2, 3, 4), np.nan),
    "numbers of inf": lambda: np.full((2, 3, 4), np.inf),
    "numbers of -inf": lambda: np.full((2, 3, 4), -np.inf),
    "numbers of 1e300": lambda: np.full((2, 3, 4), 1e300),
    "whole numbers": lambda: np.arange(24).reshape(2, 3, 4),
    "negative numbers": lambda: -np.arange(24).reshape(2, 3, 4),
    "booleans": lambda: np.ones((2, 3, 4), bool),
    "objects": lambda: np.ones((2, 3, 4), object),
    "0 and 1": lambda: np.ones((3, 4)),
    "longdouble": lambda: np.ones((2, 3, 4), np.longdouble),
    "a memoryview": lambda: memoryview(b"abc"),
    "a bytearray": lambda: bytearray(b"abc"),
}
VALUES = NO_ARRAYS | NUMBERS


@pytest.mark.filterwarnings("ignore:converting a masked element")
@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in CALLS for argument in arguments(name)], ids=str
)
def test_a_bad_value_is_named(name: str, argument: str) -> None:
    call = CALLS[name]
    for bad, make in VALUES.items():
        given = {**call.good, argument: make()}
        try:
            call.function(**given)
            continue
        except Exception as error:  # of any kind: which kind is the question
            wrong = error
        message = str(wrong)
        about = f"{name}({argument}={bad}): {type(wrong).__name__}: {message[:300]}"
        assert type(wrong) in (TypeError, ValueError), about
        assert "\n" not in message, about
        assert len(message) < 420, about
        named = re.match(r"(\w+)( and \w+)*(\[[\d, ]*\])*: ", message)
        assert named, about
        assert named[1] in arguments(name), about
        if bad in NO_ARRAYS:
            assert named[1] == argument, about
        cured(call.function, given, message, about)


def cured(function: Callable[..., Any], given: dict[str, Any], message: str, about: str) -> None:
    """Do what messages say until the call works."""
    for _ in range(4):
        code = re.findall(r"`([^`]+)`", message)
        if not code:
            return
        argument, known = message.partition(":")[0], {"np": np, "hw": hw, "V": V, **given}
        if option := re.match(r"(\w+)=(?!=)", code[0]):
            given = {name: value for name, value in given.items() if name != argument}
            argument = option[1]
            code[0] = code[0][option.end() :]
        fixed = eval(code[0], known)
        if "[" in argument:  # in a list: the whole of it, with this item
            given[argument.partition("[")[0]] = replaced(given[argument.partition("[")[0]], argument, fixed)
        else:
            given = {**given, argument: fixed}
        try:
            function(**given)
            return
        except (TypeError, ValueError) as error:
            message = str(error)
    pytest.fail(f"the cure does not work: {about}; {message}")


def replaced(value: Any, place: str, item: Any) -> Any:
    for index in map(int, reversed(re.findall(r"\d+", place.partition("[")[2]))):
        inner = value
        value = list(inner)
        value[index] = item
    return value


# Arguments that there are not -----------------------------------------------------------------------------------------


UNKNOWN = {
    "attention": ("casual", "did you mean 'causal'?"),
    "multi_head_attention": ("num_head", "did you mean 'num_heads'?"),
    "KVCache": ("num_heads", "did you mean 'num_kv_heads'?"),
    "KVCache.attend": ("sink", "did you mean 'sinks'?"),
    "rotary": ("position", "did you mean 'positions'?"),
    "sample": ("topk", "did you mean 'top_k'?"),
    "probabilities": ("temperatur", "did you mean 'temperature'?"),
    "SamplingParams": ("top_pp", "did you mean 'top_p'?"),
    "logprobs": ("token", "did you mean 'tokens'?"),
    "penalize": ("repetition_penalty", "did you mean 'repetition'?"),
    "Sampler.admit": ("presence_penalty", "did you mean 'presence'?"),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_that_there_is_not(name: str) -> None:
    """Python's own words would begin with the function's name."""
    function = METHODS.get(name, CALLS[name].function)
    makes = {"KVCache": cache, "Sampler": sampler, "Explanation": lambda: hw.explain(LOGITS[0])}
    this = [makes[name.partition(".")[0]]()] if "self" in inspect.signature(function).parameters else []
    good, known = CALLS[name].good, arguments(name)
    wrong, says = UNKNOWN.get(name, ("colour", "expected one of "))
    with pytest.raises(TypeError, match=rf"^{wrong}: no such (option|penalty); expected one of ") as caught:
        function(*this, **good, **{wrong: 1})
    assert says in str(caught.value)
    listed = Penalties.__annotations__ if "penalty" in str(caught.value) else known
    assert all(argument in str(caught.value) for argument in listed)
    assert len(str(caught.value)) < 600
    for argument in [a for a in good if name not in ("logprobs", "Sampler.retire") or a in ("logits", "handle")]:
        with pytest.raises(TypeError, match=rf"^{argument}: expected an argument, got none"):
            function(*this, **{n: value for n, value in good.items() if n != argument})
    places = [
        n
        for n, p in inspect.signature(function).parameters.items()
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and n != "self"
    ]
    if name != "SamplingParams":
        last = places[-1] if places else "arguments"
        with pytest.raises(TypeError, match=rf"^{last}: expected as the last argument without a name, got more"):
            function(*this, *[None] * (len(places) + 1))
    if places and places[0] in good:
        with pytest.raises(TypeError, match=rf"^{places[0]}: expected one argument, got two"):
            function(*this, good[places[0]], **good)


@pytest.mark.parametrize("name", ["sample", "probabilities", "logprobs", "explain", "SamplingParams", "verify_draft"])
def test_penalties_that_are_given_to_sampling(name: str) -> None:
    call = CALLS[name]
    for wrong in ("repetition_penalty", "repeat_penalty", "frequency_penalty", "presence", "dry_multiplier"):
        with pytest.raises(
            TypeError, match=rf"^{wrong}: no such option; expected one of .*; penalties are options of penalize"
        ) as caught:
            call.function(**call.good, **{wrong: 1.2})
        code = re.findall(r"`(.+)`", str(caught.value))[0]
        eval(code, {"hw": hw, "logits": LOGITS[0], "token_ids": [1, 2]})


def test_options_of_a_text() -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    from headway import lm

    model = lm.load()
    with pytest.raises(
        TypeError, match=r"^topk: no such option; expected one of .*max_tokens.*; did you mean 'top_k'\?"
    ):
        model.generate("In", topk=3)
    with pytest.raises(TypeError, match=r"^max_token: no such option; .*; did you mean 'max_tokens'\?"):
        model.generate("In", max_token=3)
    with pytest.raises(TypeError, match=r"^repetition_penalty: no such option; .*; did you mean 'repetition'\?"):
        model.generate("In", repetition_penalty=1.2)


def test_whose_fault_it_is() -> None:
    """The first error is about the first argument that is wrong, and not about one that is right."""
    flat = X[0]
    for message, call in {
        r"^q: .*`q\[None\]`": lambda: hw.attention(flat, flat, flat),
        r"^q: .*`np.asarray\(q\)\[None\]`": lambda: hw.attention(flat.tolist(), flat, flat),
        r"^q: .*`q\[None, None\]`": lambda: hw.attention_weights(flat[0], flat),
        r"^q: expected the head size D = 4 of the cache": lambda: cache().attend(np.ones((2, 1, 3))),
        r"^q: expected a multiple of the 2 heads of the cache": lambda: cache().attend(np.ones((3, 1, 4))),
        r"^w_k: ": lambda: hw.multi_head_attention(flat, flat, flat, num_heads=2, w_k=np.ones((4, 6))),
        r"^w_q: ": lambda: hw.multi_head_attention(flat, flat, flat, num_heads=2, w_q=np.ones((4, 6))),
        r"^k: ": lambda: hw.multi_head_attention(flat, np.ones((3, 6)), flat, num_heads=2),
        r"^x: expected at most 16777216 rows": lambda: hw.rotary(np.broadcast_to(np.float16(1), (2**24 + 1, 2))),
        r"^states: .*`\[states\]`": lambda: hw.merge_attention(hw.partial_attention(X, X, X)),
        r"^v: expected floating-point numbers, got None": lambda: hw.attention(X, X, None),
        r"^causal: expected None, 'top_left'": lambda: hw.partial_attention(X, X, X, causal=np.True_),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    np.testing.assert_array_equal(
        hw.attention(X, X, X, causal=np.True_, return_lse=np.False_), hw.attention(X, X, X, causal=True)
    )


def test_cures_for_masks() -> None:
    """A mask per batch item lacks axes; one of another length does not, and gets no such advice."""
    q, k = np.ones((2, 1, 3, 4)), np.ones((2, 1, 5, 4))
    for mask in (np.ones((2, 3, 5)), np.ones((2, 3, 5)).tolist(), np.ones((2, 5))):
        call = {"q": q, "k": k, "v": k, "mask": mask}
        with pytest.raises(ValueError, match=r"^mask: .*a mask per batch item is `") as caught:
            hw.attention(**call)
        cured(hw.attention, call, str(caught.value), "mask")
    for mask in ([1, 0, 1], np.ones((2, 3, 4)), np.ones((3, 3))):
        with pytest.raises(ValueError, match=r"^mask: [^`]*$"):
            hw.attention(q, k, k, mask=mask)
