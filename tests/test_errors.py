"""Bad input to the attention side: the type of the error, and a message with argument, expectation, what came, cure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from oracles import CHUNK

import headway as hw

Q, K, V = np.ones((4, 6, 8)), np.ones((2, 9, 8)), np.ones((2, 9, 5))
SQUARE = np.ones((2, 6, 8))
NARROW = {name: x.astype(np.float32) for name, x in (("q", Q), ("k", K), ("v", V))}
X, W = np.ones((6, 8)), np.eye(8)


class OnAGpu:
    """What a CUDA array says of itself."""

    shape, dtype, ndim = (2, 6, 8), np.dtype("float32"), 3

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("an array on another device was asked for its memory")


def attend(**changes: Any) -> Callable[[], Any]:
    return lambda: hw.attention(**{"q": Q, "k": K, "v": V, **changes})


def square(**changes: Any) -> Callable[[], Any]:
    return lambda: hw.attention(**{"q": SQUARE, "k": SQUARE, "v": SQUARE, **changes})


def heads(**changes: Any) -> Callable[[], Any]:
    return lambda: hw.multi_head_attention(**{"q": X, "k": X, "v": X, "num_heads": 2, **changes})


def part(**changes: Any) -> Callable[[], Any]:
    return lambda: hw.partial_attention(**{"q": Q, "k": K, "v": V, **changes})


ragged = [[[1.0, 2.0], [3.0]]]
additive = np.where(np.tri(6, 9) == 1, 0.0, -1e9)
state = hw.partial_attention(Q, K, V)
later = hw.partial_attention(Q, K, V, key_offset=CHUNK)

# What is wrong: the call, the error, and pieces of its message in order: argument, expected, got, cure.
CASES: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    # kinds of arrays
    "complex q": (attend(q=Q.astype(complex)), TypeError, ["q:", "floating", "complex128", "convert"]),
    "object q": (attend(q=Q.astype(object)), TypeError, ["q:", "floating", "object", "convert"]),
    "bool v": (attend(v=V.astype(bool)), TypeError, ["v:", "floating", "bool", "convert"]),
    "text k": (attend(k=K.astype(str)), TypeError, ["k:", "floating", "text", "convert"]),
    "a string": (attend(q="queries"), TypeError, ["q:", "floating", "text$"]),
    "None": (attend(q=None), TypeError, ["q:", "floating", "None$"]),
    "longdouble q": (attend(q=Q.astype(np.longdouble)), TypeError, ["q:", "float64", "longdouble|float128", "convert"]),
    "ragged lists": (attend(q=ragged), ValueError, ["q:", "array", "unequal lengths"]),
    "a GPU array": (attend(q=OnAGpu()), TypeError, ["q:", "CPU memory", "another device", "copy it to the CPU"]),
    "a GPU mask": (attend(mask=OnAGpu()), TypeError, ["mask:", "CPU memory", "another device", "copy"]),
    # shapes
    "q of two axes": (attend(q=Q[0]), ValueError, ["q:", r"\(..., H, L, D\)", r"\(6, 8\)", "add an axis"]),
    "k of two axes": (attend(k=K[0]), ValueError, ["k:", r"\(..., G, S, D\)", r"\(9, 8\)", "add an axis"]),
    "v of two axes": (attend(v=V[0]), ValueError, ["v:", r"2, 9, E", r"\(9, 5\)"]),
    "D of k": (attend(k=K[..., :7]), ValueError, ["k:", "D = 8", "7"]),
    "D of 0": (attend(q=Q[..., :0], k=K[..., :0]), ValueError, ["q:", "at least 1", r"\(4, 6, 0\)"]),
    "S of v": (attend(v=V[:, :8]), ValueError, ["v:", "2, 9, E", r"\(2, 8, 5\)"]),
    "G of v": (attend(v=V[:1]), ValueError, ["v:", "2, 9, E", r"\(1, 9, 5\)"]),
    "G not dividing H": (attend(q=Q[:3]), ValueError, ["k:", "divides the 3", "got 2"]),
    "G of 0": (attend(k=K[:0], v=V[:0]), ValueError, ["k:", "divides", "got 0"]),
    "batches": (
        lambda: hw.attention(np.ones((2, 4, 6, 8)), np.ones((3, 2, 9, 8)), V),
        ValueError,
        ["q and k", "broadcast", r"\(2,\)", r"\(3,\)"],
    ),
    "nine leading axes": (
        lambda: hw.attention(np.ones((1,) * 9 + Q.shape), K, V),
        ValueError,
        ["q:", "8 leading", "9", "flatten|reshape"],
    ),
    # masks and biases
    "an additive mask": (attend(mask=additive), ValueError, ["mask:", "0 and 1", r"-1e\+09|-1000000000", "bias"]),
    "a mask of halves": (attend(mask=np.full((6, 9), 0.5)), ValueError, ["mask:", "0 and 1", "0.5", "bias"]),
    "a mask of twos": (attend(mask=np.full((6, 9), 2)), ValueError, ["mask:", "0 and 1", "2", "bias"]),
    "a mask with NaN": (attend(mask=np.full((6, 9), np.nan)), ValueError, ["mask:", "0 and 1", "nan", "bias"]),
    "an additive mask of zeros": (
        attend(mask=np.zeros((6, 9))),
        ValueError,
        ["mask:", "at least one 1", "only 0", "bias"],
    ),
    "zeros in lists": (attend(mask=np.zeros((6, 9)).tolist()), ValueError, ["mask:", "only 0", "bias"]),
    "a complex mask": (attend(mask=np.ones((6, 9), complex)), TypeError, ["mask:", "0 or 1", "complex128"]),
    "the shape of a mask": (attend(mask=np.ones((9, 6))), ValueError, ["mask:", r"\(4, 6, 9\)", r"\(9, 6\)"]),
    "too many axes": (attend(mask=np.ones((1, 4, 6, 9))), ValueError, ["mask:", r"\(4, 6, 9\)", r"\(1, 4, 6, 9\)"]),
    "the shape of a bias": (attend(bias=np.ones((3, 6, 9))), ValueError, ["bias:", r"\(4, 6, 9\)", r"\(3, 6, 9\)"]),
    "a bool bias": (attend(bias=np.ones((6, 9), bool)), TypeError, ["bias:", "floating", "bool"]),
    "a bias that float32 cannot hold": (
        attend(**NARROW, bias=np.full((6, 9), -1e300)),
        ValueError,
        ["bias:", "within float32", r"-1e\+300", "-inf masks"],
    ),
    "a mask per batch item": (
        attend(q=np.ones((3, 4, 6, 8)), mask=np.ones((3, 6, 9))),
        ValueError,
        ["mask:", r"\(3, 4, 6, 9\)", r"\(3, 6, 9\)", r"mask\[:, None\]"],
    ),
    # options
    "a scale that float32 cannot hold": (
        attend(**NARROW, scale=1e300),
        ValueError,
        ["scale:", "finite number within float32", r"1e\+300"],
    ),
    "a softcap that float32 cannot hold": (attend(**NARROW, softcap=1e-300), ValueError, ["softcap:", "> 0", "1e-300"]),
    "causal=True, L != S": (
        attend(causal=True),
        ValueError,
        ["causal:", "'top_left' or 'bottom_right'", "6 queries and 9 keys"],
    ),
    "an unknown causal": (attend(causal="upper"), ValueError, ["causal:", "'top_left', 'bottom_right'", "'upper'"]),
    "a mask as causal": (square(causal=np.tril(np.ones((3, 3), bool))), ValueError, ["causal:", "'top_left'"]),
    "causal=1": (square(causal=1), ValueError, ["causal:", "True", "1"]),
    "a negative window": (square(window=(-1, 0)), ValueError, ["window:", ">= 0|from 0", "-1"]),
    "a window of one": (square(window=3), TypeError, ["window:", r"\(left, right\)", "3"]),
    "a window of three": (square(window=(1, 2, 3)), TypeError, ["window:", r"\(left, right\)", r"\(1, 2, 3\)"]),
    "a window of halves": (square(window=(1.5, 0)), TypeError, ["window:", "integer", "1.5"]),
    "a window of bools": (square(window=(True, 0)), TypeError, ["window:", "integer", "True"]),
    "a window without a corner": (
        attend(window=(2, 2)),
        ValueError,
        ["window:", "causal='top_left' or 'bottom_right'", "6 queries and 9 keys", "mask"],
    ),
    "scale NaN": (attend(scale=float("nan")), ValueError, ["scale:", "finite", "nan"]),
    "scale inf": (attend(scale=float("inf")), ValueError, ["scale:", "finite", "inf"]),
    "a scale of text": (attend(scale="auto"), TypeError, ["scale:", "finite number", "'auto'"]),
    "a scale per head": (attend(scale=np.ones(4)), TypeError, ["scale:", "finite number", "ndarray"]),
    "softcap 0": (attend(softcap=0), ValueError, ["softcap:", "> 0", "0", ""]),
    "softcap negative": (attend(softcap=-1.0), ValueError, ["softcap:", "> 0", "-1"]),
    "softcap NaN": (attend(softcap=float("nan")), ValueError, ["softcap:", "> 0", "nan"]),
    "sinks of G": (attend(sinks=np.ones(2)), ValueError, ["sinks:", r"\(4,\)", r"\(2,\)"]),
    "sinks of inf": (attend(sinks=np.array([0, 0, np.inf, 0])), ValueError, ["sinks:", "below infinity", "inf"]),
    "sinks of NaN": (attend(sinks=np.full(4, np.nan)), ValueError, ["sinks:", "NaN"]),
    "kv_lengths above S": (attend(kv_lengths=10), ValueError, ["kv_lengths:", "from 0 to 9", "10"]),
    "kv_lengths below 0": (attend(kv_lengths=-1), ValueError, ["kv_lengths:", "from 0 to 9", "-1"]),
    "kv_lengths of floats": (attend(kv_lengths=3.0), TypeError, ["kv_lengths:", "integers", "float64"]),
    "kv_lengths per head": (attend(kv_lengths=np.ones(4, int)), ValueError, ["kv_lengths:", r"\(\)", r"\(4,\)"]),
    # parts
    "key_offset unaligned": (
        part(key_offset=100),
        ValueError,
        ["key_offset:", f"multiple of .*{CHUNK}", "100", "split"],
    ),
    "key_offset below 0": (part(key_offset=-CHUNK), ValueError, ["key_offset:", ">= 0|from 0", str(-CHUNK)]),
    "key_offset of float": (part(key_offset=512.0), TypeError, ["key_offset:", "integer", "512.0"]),
    "causal=True in a part": (part(causal=True), ValueError, ["causal:", "'top_left' or 'bottom_right'", "True"]),
    "bottom_right in a part": (part(causal="bottom_right"), ValueError, ["kv_lengths:", "bottom_right", "None"]),
    "a window in a part": (part(window=(1, 1)), ValueError, ["window:", "'top_left' or 'bottom_right'"]),
    "sinks in a part": (part(sinks=np.ones(4)), TypeError, ["sinks"]),
    "no states": (lambda: hw.merge_attention([]), TypeError, ["states:", "AttentionState"]),
    "arrays as states": (lambda: hw.merge_attention([Q]), TypeError, ["states:", "AttentionState"]),
    "the same part twice": (
        lambda: hw.merge_attention([state, state]),
        ValueError,
        ["states:", "overlap", "key_offset"],
    ),
    "parts of other calls": (
        lambda: hw.merge_attention([state, hw.partial_attention(Q[:, :2], K, V, key_offset=CHUNK)]),
        ValueError,
        ["states:", r"\(4, 6, 5\)", r"\(4, 2, 5\)"],
    ),
    "sinks of a merge": (
        lambda: hw.merge_attention([state, later], sinks=np.ones(3)),
        ValueError,
        ["sinks:", r"\(4,\)", r"\(3,\)"],
    ),
    "lse of another shape": (
        lambda: hw.AttentionState.from_lse(np.ones((4, 6, 5)), np.ones((4, 5))),
        ValueError,
        ["lse:", r"\(4, 6, 5\)", r"\(4, 5\)"],
    ),
    # whole layers
    "d_model not divisible": (heads(num_heads=3), ValueError, ["num_heads:", "divisor", "8", "3"]),
    "no heads": (heads(num_heads=0), ValueError, ["num_heads:", ">= 1", "0"]),
    "heads of float": (heads(num_heads=2.0), TypeError, ["num_heads:", "integer", "2.0"]),
    "num_kv_heads": (heads(num_heads=4, num_kv_heads=3), ValueError, ["num_kv_heads:", "divisor", "4", "3"]),
    "a vector": (heads(q=X[0]), ValueError, ["q:", r"\(..., length, d_model\)", r"\(8,\)"]),
    "a weight that does not fit": (
        heads(w_q=np.ones((7, 8))),
        ValueError,
        ["w_q:", r"\(in, out\)", r"\(7, 8\)", "transposed"],
    ),
    "a weight of one axis": (heads(w_k=np.ones(8)), ValueError, ["w_k:", r"\(in, out\)", r"\(8,\)"]),
    "the shape of w_o": (heads(w_o=np.ones((7, 8))), ValueError, ["w_o:", r"\(in, out\)", r"\(7, 8\)"]),
    "the shape of a projection's bias": (heads(w_v=W, b_v=np.ones(7)), ValueError, ["b_v:", r"\(8,\)", r"\(7,\)"]),
    **{
        f"{name} without its weight": (
            heads(**{name: np.ones(8)}),
            ValueError,
            [f"{name}:", name.replace("b", "w"), "None", f"to the {side} yourself"],
        )
        for name, side in {"b_q": "input", "b_k": "input", "b_v": "input", "b_o": "result"}.items()
    },
    "k wider than q": (heads(k=np.ones((6, 12))), ValueError, ["k:", "D = 4", "6"]),
    "decimals of float": (heads(decimals=6.0), TypeError, ["decimals:", "integer", "6.0"]),
    "a mask per d_model": (heads(mask=np.ones((6, 8))), ValueError, ["mask:", r"\(2, 6, 6\)", r"\(6, 8\)"]),
    # layers
    "linear, inner axis": (
        lambda: hw.linear(X, np.ones((7, 3))),
        ValueError,
        ["w:", "in = 8", r"\(7, 3\)", "transposed"],
    ),
    "linear, w": (lambda: hw.linear(X, np.ones((1, 8, 3))), ValueError, ["w:", r"\(in, out\)", r"\(1, 8, 3\)"]),
    "linear, b": (lambda: hw.linear(X, W, np.ones((1, 8))), ValueError, ["b:", r"\(8,\)", r"\(1, 8\)"]),
    "linear of a number": (lambda: hw.linear(1.0, W), ValueError, ["w:|x:", r"\(\)"]),
    "rotary, odd D": (lambda: hw.rotary(np.ones((3, 5))), ValueError, ["x:", "even", r"\(3, 5\)"]),
    "rotary, positions": (lambda: hw.rotary(X, positions=[1, 2]), ValueError, ["positions:", r"\(6,\)", r"\(2,\)"]),
    "rotary, floats": (
        lambda: hw.rotary(X, positions=np.arange(6.0)),
        TypeError,
        ["positions:", "integers", "float64"],
    ),
    "rotary, below 0": (lambda: hw.rotary(X, positions=np.arange(-1, 5)), ValueError, ["positions:", "from 0", "-1"]),
    "rotary, 2^24": (
        lambda: hw.rotary(X, positions=np.arange(6) + 2**24),
        ValueError,
        ["positions:", "16777215", "16777216"],
    ),
    "rotary, base": (lambda: hw.rotary(X, base=0.0), ValueError, ["base:", ">= 1", "0"]),
    "rotary, frequencies": (
        lambda: hw.rotary(X, frequencies=np.ones(3)),
        ValueError,
        ["frequencies:", r"\(4,\)", r"\(3,\)"],
    ),
    "rotary, inf": (
        lambda: hw.rotary(X, frequencies=np.full(4, np.inf)),
        ValueError,
        ["frequencies:", "finite", "inf"],
    ),
    "rms_norm, weight": (lambda: hw.rms_norm(X, np.ones(7)), ValueError, ["weight:", r"\(7,\)", r"\(6, 8\)"]),
    "rms_norm, eps": (lambda: hw.rms_norm(X, np.ones(8), eps=-1.0), ValueError, ["eps:", "> 0", "-1"]),
    "swiglu": (lambda: hw.swiglu(X, X[:5]), ValueError, ["up:", r"\(6, 8\)", r"\(5, 8\)"]),
    # the machine
    "threads": (lambda: hw.set_num_threads(0), ValueError, ["n:", "from 1", "0"]),
    "threads of float": (lambda: hw.set_num_threads(2.0), TypeError, ["n:", "integer", "2.0"]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_message(name: str) -> None:
    call, kind, pieces = CASES[name]
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind
    assert re.search(".*".join(f"({piece})" for piece in pieces), message, re.DOTALL), message
    assert "\n" not in message
    assert len(message) < 400


def test_nothing_is_an_error_that_is_not() -> None:
    """The calls that the table spoils one by one are good."""
    for call in (attend(), square(), heads(), part()):
        call()
    hw.merge_attention([later, state], sinks=np.ones(4))
    for mask in (
        np.zeros((6, 9), bool),
        np.zeros((6, 9), int),
        np.ones((6, 9)),
        np.ones((6, 9), np.uint8),
        [[1] * 9] * 6,
    ):
        attend(mask=mask)()
    attend(window=(2, 2), causal="top_left")()
    attend(scale=-1, softcap=1, kv_lengths=np.uint8(9), sinks=np.full(4, -np.inf))()
