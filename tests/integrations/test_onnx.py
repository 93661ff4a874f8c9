"""headway inside ONNX: onnx's own node tests, and what they do not try."""

from __future__ import annotations

import tracemalloc
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
        want = x / np.sqrt((x * x).mean(axes, keepdims=True) + np.float32(1e-5)) * w  # ONNX has it as float32
        np.testing.assert_allclose(y, want, rtol=1e-12)


# Models and inputs as users give them ---------------------------------------------------------------------------------

Q, K, V = normal(1, 2, 3, 8), normal(1, 2, 3, 8), normal(1, 2, 3, 8)
FLAT = normal(1, 3, 10)
COS, SIN, PLACES = normal(10, 4), normal(10, 4), np.array([[0, 1, 2]])
REFUSED = [
    ("Attention", [Q, K, V], {"opset": 22}, ValueError, "opset_import: expected an opset whose Attention is that"),
    ("Attention", [Q.astype(int), K.astype(int), V], {}, TypeError, "Q: expected numbers of type bfloat16, float16,"),
    ("Attention", [Q, K.astype(np.float64), V], {}, TypeError, "K: expected numbers of type float32, as Q has"),
    ("Attention", [Q, K, V, np.ones((3, 5), bool)], {}, ValueError, "attn_mask: expected a shape that broadcasts to"),
    ("Attention", [Q, K, V], {"qk_matmul_output_mode": 7}, ValueError, "qk_matmul_output_mode: expected 0, 1, 2 or 3"),
    ("Attention", [Q, K, V], {"softmax_precision": 3}, ValueError, "softmax_precision: expected one of 1, 10, 11, 16"),
    ("Attention", [Q, K, V], {"q_num_heads": 5, "kv_num_heads": 2}, ValueError, "q_num_heads: expected none for"),
    ("Attention", [FLAT] * 3, {"q_num_heads": 4, "kv_num_heads": 2}, ValueError, "q_num_heads: expected a divisor of"),
    ("Attention", [Q, FLAT, V], {}, ValueError, r"K: expected 4 axes, as Q has, got shape \(1, 3, 10\)"),
    ("Attention", [Q, K, V], {"foo": 1}, ValueError, "foo: no such attribute of Attention in opset 23"),
    ("Attention", [Q, K, V], {"left_window_size": 1}, ValueError, "left_window_size: no such attribute of"),
    ("Attention", [Q, K, V, None, K], {}, ValueError, "past_key: expected past_key and past_value, got one"),
    ("Attention", [Q, K, V, None, FLAT, V], {}, ValueError, r"past_key: expected shape \(1, 2, P, 8\), got"),
    ("Attention", [Q, K, V, None, K, V[:, :, :2]], {}, ValueError, "past_value: expected 3 keys as past_key, got 2"),
    ("RMSNormalization", [Q, COS[0]], {}, ValueError, "scale: expected a shape that broadcasts to that of X"),
    ("RMSNormalization", [Q, Q[0, 0, 0]], {"axis": 4}, ValueError, "axis: expected an integer from -4 to 3 for X"),
    ("RMSNormalization", [Q, Q[0, 0, 0]], {"stash_type": 7}, ValueError, "stash_type: expected one of 1, 10, 11, 16"),
    ("RotaryEmbedding", [Q, COS, SIN, PLACES - 1], {}, ValueError, "position_ids: expected integers from 0 to 9"),
    ("RotaryEmbedding", [Q, COS, SIN, PLACES + 8], {}, ValueError, "position_ids: expected integers from 0 to 9"),
    ("RotaryEmbedding", [Q, COS, SIN, PLACES.T], {}, ValueError, r"position_ids: expected shape \(1, 3\), got"),
    ("RotaryEmbedding", [Q, COS, SIN], {}, ValueError, r"cos_cache: expected shape \(1, 3, 4\), as there are no pos"),
    ("RotaryEmbedding", [Q, COS, SIN, PLACES], {"rotary_embedding_dim": 3}, ValueError, "rotary_embedding_dim"),
    ("RotaryEmbedding", [FLAT, COS, SIN, PLACES], {"num_heads": 3}, ValueError, "num_heads: expected a divisor of the"),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "inputs", "options", "kind", "message"), REFUSED)
def test_what_is_refused(
    operator: str, inputs: list[Any], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=r"^" + message):
        run(operator, inputs, **options)


@pytest.mark.parametrize(("lengths", "message"), [([9], r"1 integers from 0 to 3, got \[9\]"), ([1, 2], "1 integers")])
def test_lengths_that_are_refused(lengths: list[int], message: str) -> None:
    if onnx.defs.onnx_opset_version() < 24:
        pytest.skip("nonpad_kv_seqlen came with opset 24")
    with pytest.raises(ValueError, match=r"^nonpad_kv_seqlen: expected " + message):
        run("Attention", [Q, K, V, None, None, None, np.array(lengths)], opset=24)
    with pytest.raises(ValueError, match=r"^nonpad_kv_seqlen: expected none beside past_key"):
        run("Attention", [Q, K, V, None, K, V, np.array([1])], opset=24)


def model_of(inputs: dict[str, Any], domain: str = "") -> Any:
    """A model of one Attention, whose name of ONNX's domain may be the other one."""
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in inputs.items()
    ]
    y = helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Attention", [*inputs], ["Y"], domain=domain)], "g", values, [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, 23)])


def test_the_other_name_of_the_domain() -> None:
    model = model_of({"Q": Q, "K": K, "V": V}, "ai.onnx")
    assert np.array_equal(ho.prepare(model).run([Q, K, V])[0], hw.attention(Q, K, V))
    assert model.opset_import[0].domain == model.graph.node[0].domain == "ai.onnx"  # as the user left it


def test_inputs_are_what_the_model_says() -> None:
    prepared = ho.prepare(model_of({"Q": Q, "K": K, "V": V}))
    with pytest.raises(ValueError, match=r"^inputs: expected 3, Q, K, V, got 2"):
        prepared.run([Q, K])
    with pytest.raises(ValueError, match=r"^V: expected an array, got none"):
        prepared.run({"Q": Q, "K": K})
    with pytest.raises(ValueError, match=r"^W: no such input of the model; expected one of Q, K, V"):
        prepared.run({"Q": Q, "K": K, "V": V, "W": V})
    with pytest.raises(TypeError, match=r"^Q: expected numbers of type float32, as the model says, got float64"):
        prepared.run([Q.astype(np.float64), K, V])
    with pytest.raises(ValueError, match=r"^V: expected shape \(1, 2, 3, 8\), got \(2, 3, 8\)"):
        prepared.run([Q, K, V[0]])
    with pytest.raises(TypeError, match=r"^model: expected an onnx.ModelProto or a path, got 3"):
        ho.prepare(3)
    node = helper.make_node("Attention", ["Q", "K", "V", "", "P", "W"], ["Y"])
    (y,) = ho.Backend.run_node(node, [Q, K, V, K, V], opset_version=23)
    assert np.array_equal(ho.Backend.run_node(node, [Q, K, V, None, K, V], opset_version=23)[0], y)
    with pytest.raises(ValueError, match=r"^inputs: expected 5, Q, K, V, P, W, got 3"):
        ho.Backend.run_node(node, [Q, K, V])


def test_a_mask_for_one_key() -> None:
    """Opset 23 has masks that broadcast, opset 24 pads them. A mask without axes holds for all keys."""
    one = np.array([[True], [False], [True]])
    (y,) = run("Attention", [Q, K, V, one])
    assert np.array_equal(y, hw.attention(Q, K, V, mask=np.repeat(one, 3, 1)))
    if onnx.defs.onnx_opset_version() >= 24:
        (y,) = run("Attention", [Q, K, V, one], opset=24)
        assert np.array_equal(y, hw.attention(Q, K, V, mask=np.pad(one, [(0, 0), (0, 2)])))
    (y,) = run("Attention", [Q, K, V, np.array(0.5, np.float32)])
    assert np.array_equal(y, hw.attention(Q, K, V, bias=np.full((3, 3), 0.5)))


def test_past_keys_without_as_many_new_ones() -> None:
    """The offset of the queries is the number of past keys, however many keys are new."""
    for new in (1, 2, 5):
        q, k, v = normal(1, 2, 3, 8), normal(1, 2, 4 + new, 8), normal(1, 2, 4 + new, 8)
        inputs = [q, k[:, :, 4:], v[:, :, 4:], None, k[:, :, :4], v[:, :, :4]]
        (y,) = run("Attention", inputs, is_causal=1)
        allowed = np.arange(4 + new) <= np.arange(3)[:, None] + 4
        assert np.array_equal(y, hw.attention(q, k, v, mask=allowed)), new


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_scores_have_the_bits_of_attention(dtype: str) -> None:
    """Their log-sum-exp over a single key is attention's own."""
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    q, k, v = (x.astype(kind) for x in (Q, K, V))
    attributes = {"softcap": 1.5, "qk_matmul_output_mode": 2}
    *_, scores = run("Attention", [q, k, v, np.float32([0, 0.5, -np.inf])], outputs=4, **attributes)
    for j, bias in enumerate([0, 0.5]):
        _, lse = hw.attention(
            q, k[:, :, j : j + 1], v[:, :, :1], softcap=1.5, bias=np.full((3, 1), bias), return_lse=True
        )
        assert np.array_equal(scores[..., j], lse.astype(kind)), j
    assert (scores[..., 2] == -np.inf).all()
    assert scores.dtype == kind


def test_scores_before_the_softcap() -> None:
    """Mode 0 of the schema; onnx's evaluator has the softcap in it."""
    *_, raw = run("Attention", [Q, K, V], outputs=4, softcap=0.5)
    *_, same = run("Attention", [Q, K, V], outputs=4)
    assert np.array_equal(raw, same)
    assert np.abs(raw).max() > 0.5


def test_no_scores_where_none_are_wanted() -> None:
    """A layer of 2,048 tokens takes no array of 2,048 x 2,048 numbers."""
    x = np.zeros((1, 1, 2048, 8), np.float32)
    prepared = ho.prepare(model_of({"Q": x, "K": x, "V": x}))
    prepared.run([x, x, x])
    tracemalloc.start()
    prepared.run([x, x, x])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2048 * 2048 / 4


def test_numbers_beyond_16_bits_are_infinite() -> None:
    q, k = (np.full((1, 1, 1, 8), 300, np.float16) for _ in range(2))
    *_, scores = run("Attention", [q, k, k], outputs=4, scale=1.0)
    assert scores == np.inf


def test_precisions() -> None:
    """float64 where an attribute says so; never less than an input has."""
    wide = [x.astype(np.float64) for x in (Q, K, V)]
    (y,) = run("Attention", [Q, K, V], softmax_precision=TensorProto.DOUBLE)
    assert np.array_equal(y, hw.attention(*wide).astype(np.float32))
    (y,) = run("Attention", [Q, K, V], softmax_precision=TensorProto.FLOAT16)
    assert np.array_equal(y, hw.attention(Q, K, V))
    x, w = normal(5, 16), normal(16)
    for dtype in (np.float16, np.float32, np.float64):
        (y,) = run("RMSNormalization", [x.astype(dtype), w.astype(dtype)])
        assert np.array_equal(y, hw.rms_norm(x.astype(dtype), w.astype(dtype), eps=float(np.float32(1e-5)))), dtype
    (y,) = run("RMSNormalization", [x, w], stash_type=TensorProto.DOUBLE)
    want = hw.rms_norm(x.astype(np.float64), w.astype(np.float64), eps=float(np.float32(1e-5)))
    assert np.array_equal(y, want.astype(np.float32))


def test_an_epsilon_of_0() -> None:
    x = np.array([[0, 0], [3, -3]], np.float32)
    (y,) = run("RMSNormalization", [x, np.ones(2, np.float32)], epsilon=0.0)
    assert np.array_equal(y, [[0, 0], [1, -1]])


def test_empty_arrays() -> None:
    heads = {"q_num_heads": 2, "kv_num_heads": 2}
    (y,) = run("Attention", [FLAT, FLAT[:, :0], FLAT[:, :0]], **heads)
    assert np.array_equal(y, np.zeros_like(FLAT))
    (y,) = run("Attention", [FLAT[:0]] * 3, **heads)
    assert y.shape == (0, 3, 10)
    (y,) = run("RMSNormalization", [np.ones((2, 0), np.float32), np.ones(0, np.float32)])
    assert y.shape == (2, 0)


def test_angles_of_rotary() -> None:
    """With the cosines and sines of headway's angles, RotaryEmbedding has the bits of headway.rotary."""
    places, frequencies = np.arange(3), 10000.0 ** (-np.arange(4) / 4)
    one = np.ones((3, 8), np.float32) * np.repeat([1, 0], 4).astype(np.float32)
    cos, sin = np.split(hw.rotary(one, positions=places, frequencies=frequencies), 2, axis=-1)
    want = hw.rotary(Q, positions=places, frequencies=frequencies)
    (y,) = run("RotaryEmbedding", [Q, cos, sin, PLACES])
    assert np.array_equal(y, want)
    order = np.arange(8).reshape(2, 4).T.ravel()  # pairs side by side
    (y,) = run("RotaryEmbedding", [Q[..., order], cos, sin, PLACES], interleaved=1)
    assert np.array_equal(y, want[..., order])
    longer = np.concatenate([Q, Q], -1)
    (y,) = run("RotaryEmbedding", [longer, cos, sin, PLACES], rotary_embedding_dim=8)
    assert np.array_equal(y, np.concatenate([want, Q], -1))


def test_present_keys_are_the_callers_own() -> None:
    """Writing to them leaves the inputs as they are."""
    _, key, value = run("Attention", [Q, K, V], outputs=3)
    before = K.copy(), V.copy()
    assert np.array_equal(key, K)
    assert np.array_equal(value, V)
    key[:], value[:] = 0, 0
    assert np.array_equal(K, before[0])
    assert np.array_equal(V, before[1])


def test_padding_has_no_scores_after_the_mask() -> None:
    if onnx.defs.onnx_opset_version() < 24:
        pytest.skip("nonpad_kv_seqlen came with opset 24")
    for mode in (0, 2):
        inputs = [Q, K, V, None, None, None, np.array([2])]
        *_, scores = run("Attention", inputs, outputs=4, opset=24, qk_matmul_output_mode=mode)
        assert np.isfinite(scores[..., :2]).all()
        assert (scores[..., 2] == -np.inf).all() == (mode == 2)
