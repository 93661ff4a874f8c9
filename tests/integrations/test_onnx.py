"""headway inside ONNX: onnx's own node tests, and what they do not try."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import headway as hw

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import TensorProto, helper  # noqa: E402
from onnx.backend.test import BackendTest  # noqa: E402

import headway.integrations.onnx as ho  # noqa: E402

OPERATORS = {"attention": 60, "rotary_embedding": 8, "rms_normalization": 19}  # at least so many tests of each
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # onnx computes the data of all its tests
    CASES = [
        BackendTest(ho.Backend, __name__).test_cases["OnnxBackendNodeModelTest"]
    ]  # in a list, out of pytest's sight
NAMES = [
    name
    for name in vars(CASES[0])
    if name.startswith(tuple(f"test_{operator}" for operator in OPERATORS))
    and name.endswith("_cpu")
    and "expanded" not in name
]


@pytest.mark.parametrize("name", NAMES)
def test_of_onnx(name: str) -> None:
    result = CASES[0](name).run()
    assert not result.skipped
    assert result.wasSuccessful(), (result.errors or result.failures)[0][1]


def test_onnx_has_tests_of_each_operator() -> None:
    """So that no other way of naming them leaves any out."""
    for operator, least in OPERATORS.items():
        assert sum(name.startswith(f"test_{operator}") for name in NAMES) >= least


# What onnx's own tests do not try -------------------------------------------------------------------------------------

rng = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = np.float32) -> Any:
    return rng.standard_normal(shape).astype(dtype)


def run(operator: str, inputs: list[Any], outputs: int = 1, opset: int = 23, **attributes: Any) -> Any:
    """The outputs of a model of one node; an input that is None is left out."""
    names = [f"i{i}" if x is not None else "" for i, x in enumerate(inputs)]
    node = helper.make_node(operator, names, [f"o{i}" for i in range(outputs)], **attributes)
    given = {name: x for name, x in zip(names, inputs) if name}
    kinds = {name: helper.np_dtype_to_tensor_dtype(x.dtype) for name, x in given.items()}
    values = [helper.make_tensor_value_info(name, kinds[name], x.shape) for name, x in given.items()]
    results = [helper.make_tensor_value_info(f"o{i}", kinds["i0"], None) for i in range(outputs)]
    model = helper.make_model(
        helper.make_graph([node], "g", values, results), opset_imports=[helper.make_opsetid("", opset)]
    )
    return ho.prepare(model).run(list(given.values()))


def test_past_keys_are_those_of_one_call() -> None:
    """Prefill, and then token by token through past and present: the bits of the whole."""
    q, k, v = normal(3, 2, 4, 9, 16)
    (whole,) = run("Attention", [q, k, v], is_causal=1)
    past_k, past_v, rows = k[:, :, :0], v[:, :, :0], []
    for part in (slice(0, 4), *(slice(i, i + 1) for i in range(4, 9))):
        arrays = [x[:, :, part] for x in (q, k, v)]
        y, past_k, past_v = run("Attention", [*arrays, None, past_k, past_v], outputs=3, is_causal=1)
        rows.append(y)
    assert np.array_equal(np.concatenate(rows, 2), whole)
    assert np.array_equal(whole, hw.attention(q, k, v, causal=True))
    assert np.array_equal(past_k, k)


def test_a_batch_of_lengths_is_each_alone() -> None:
    if onnx.defs.onnx_opset_version() < 24:
        pytest.skip("nonpad_kv_seqlen came with opset 24")
    q, k, v = normal(3, 4, 2, 16), normal(3, 4, 9, 16), normal(3, 4, 9, 16)
    lengths = np.array([9, 2, 5])
    (y,) = run("Attention", [q, k, v, None, None, None, lengths], opset=24, is_causal=1)
    for i, n in enumerate(lengths):
        assert np.array_equal(y[i], hw.attention(q[i], k[i, :, :n], v[i, :, :n], causal="bottom_right"))


@pytest.mark.parametrize("causal", [0, 1])
def test_windows_count_from_the_last_real_key(causal: int) -> None:
    if onnx.defs.onnx_opset_version() < 25 or "left_window_size" not in onnx.defs.get_schema("Attention").attributes:
        pytest.skip("windows came with opset 25")
    q, k, v = normal(3, 2, 2, 16), normal(3, 2, 9, 16), normal(3, 2, 9, 16)
    lengths, window = np.array([9, 2, 5]), {"left_window_size": 2, "right_window_size": 1}
    (y,) = run("Attention", [q, k, v, None, None, None, lengths], opset=25, is_causal=causal, **window)
    for i, n in enumerate(lengths):
        away = np.arange(9) - (np.arange(2)[:, None] + n - 2)
        allowed = (away >= -2) & (away <= (0 if causal else 1)) & (np.arange(9) < n)
        assert np.array_equal(y[i], hw.attention(q[i], k[i], v[i], mask=allowed))


def test_three_axes_are_four() -> None:
    q, k, v = normal(2, 5, 24), normal(2, 7, 12), normal(2, 7, 6)
    heads = {"q_num_heads": 4, "kv_num_heads": 2}
    (y,) = run("Attention", [q, k, v], scale=0.3, softcap=2.0, **heads)
    split = (x.reshape(2, x.shape[1], n, -1).swapaxes(1, 2) for x, n in ((q, 4), (k, 2), (v, 2)))
    want = hw.attention(*split, scale=0.3, softcap=2.0)
    assert np.array_equal(y, want.swapaxes(1, 2).reshape(2, 5, 12))
    with pytest.raises(ValueError, match="q_num_heads: expected q_num_heads and kv_num_heads for inputs of 3 axes"):
        run("Attention", [q, k, v])


def test_masks_that_are_short_and_rows_without_a_key() -> None:
    q, k, v = normal(1, 2, 3, 8), normal(1, 2, 6, 8), normal(1, 2, 6, 8)
    short = np.array([[True, False, True, True]] * 2 + [[False] * 4])
    (y,) = run("Attention", [q, k, v, short])
    assert np.array_equal(y, hw.attention(q, k, v, mask=np.pad(short, [(0, 0), (0, 2)])))
    assert not y[:, :, 2].any()
    (added,) = run("Attention", [q, k, v, np.where(short, np.float32(0), np.float32(-np.inf))])
    assert np.array_equal(added, y)


@pytest.mark.parametrize("mode", range(4))
def test_scores_are_what_the_softmax_sees(mode: int) -> None:
    q, k, v = normal(2, 4, 3, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 8)
    bias = normal(3, 5)
    *_, scores = run("Attention", [q, k, v, bias], outputs=4, softcap=1.5, qk_matmul_output_mode=mode, is_causal=1)
    raw = np.einsum("bhld,bhsd->bhls", q, k.repeat(2, 1)) / np.sqrt(8)
    capped = 1.5 * np.tanh(raw / 1.5)
    masked = np.where(np.tri(3, 5, dtype=bool), capped + bias, -np.inf)
    weights = np.exp(masked - masked.max(-1, keepdims=True))
    want = [raw, capped, masked, weights / weights.sum(-1, keepdims=True)][mode]
    np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-6)


def test_a_whole_model_runs() -> None:
    """Other operators are onnx's; initializers and optional inputs count."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("RMSNormalization", ["x", "ones"], ["n"], epsilon=1e-6),
        helper.make_node("Attention", ["n", "n", "n", "", "", ""], ["a"], q_num_heads=2, kv_num_heads=2, is_causal=1),
        helper.make_node("Add", ["x", "a"], ["y"]),
    ]
    table = normal(10, 8)
    constants = [
        helper.make_tensor(n, TensorProto.FLOAT, x.shape, x.ravel())
        for n, x in (("table", table), ("ones", np.ones(8)))
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1, None])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, None, 8])
    graph = helper.make_graph(nodes, "g", [ids], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    tokens = np.array([[3, 1, 4, 1]])
    x = table[tokens]
    n = hw.rms_norm(x, np.ones(8, np.float32), eps=1e-6)
    want = x + hw.multi_head_attention(n, n, n, num_heads=2, causal=True)
    for inputs in ([tokens], {"ids": tokens}, tokens):
        assert np.array_equal(ho.prepare(model).run(inputs)[0], want)
    assert np.array_equal(ho.Backend.run_model(model, [tokens])[0], want)
    with pytest.raises(ValueError, match=r"^inputs: expected 1, ids, got 2"):
        ho.prepare(model).run([tokens, tokens])
    with pytest.raises(ValueError, match=r"^device: expected 'CPU', got 'CUDA'"):
        ho.prepare(model, "CUDA")
    assert ho.Backend.supports_device("CPU:0")
    assert not ho.Backend.supports_device("CUDA:1")


def test_a_node_alone() -> None:
    x, cos, sin = normal(2, 4, 3, 8), normal(2, 3, 4), normal(2, 3, 4)
    node = helper.make_node("RotaryEmbedding", ["x", "c", "s"], ["y"])
    (y,) = ho.Backend.run_node(node, [x, cos, sin])
    c, s = cos[:, None], sin[:, None]
    assert np.array_equal(y, np.concatenate([c * x[..., :4] - s * x[..., 4:], s * x[..., :4] + c * x[..., 4:]], -1))
    turned = hw.rotary(x, frequencies=np.zeros(4))
    (same,) = ho.Backend.run_node(node, [x, np.ones_like(cos), np.zeros_like(sin)], opset_version=23)
    assert np.array_equal(same, turned)


@pytest.mark.parametrize("scale", [(8,), (1,), (4, 8), (3, 1, 8), (2, 3, 4, 8)], ids=str)
def test_a_scale_of_any_shape_that_broadcasts(scale: tuple[int, ...]) -> None:
    x, w = normal(2, 3, 4, 8, dtype=np.float64), normal(*scale, dtype=np.float64)
    for axis in (-1, 2):
        (y,) = run("RMSNormalization", [x, w], axis=axis)
        axes = tuple(range(axis % 4, 4))
        want = x / np.sqrt((x * x).mean(axes, keepdims=True) + 1e-5) * w
        np.testing.assert_allclose(y, want, rtol=1e-12)
