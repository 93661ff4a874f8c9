"""headway inside JAX: its transformations and its own call of attention."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import calls
import numpy as np
import pytest

import headway as hw

jax = pytest.importorskip("jax", reason="JAX is not installed")
import jax.numpy as jnp  # noqa: E402

import headway.integrations.jax as hj  # noqa: E402

rng = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jnp.asarray(rng.standard_normal(shape), dtype)


X = normal(2, 4, 8)
PARAMS = hw.SamplingParams(temperature=0.8, top_k=5, dialect="hf", logit_bias={3: 0.5}, seed=11)
CALLS = {
    **calls.CALLS,
    "attention, NumPy's False": lambda x: hw.attention(x, x, x, mask=np.tri(4, dtype=bool), causal=np.bool_(False)),
    "attention, NumPy's keys": lambda x: hw.attention(x, np.ones((2, 4, 8), np.float32), x, sinks=[0.1, 0.2]),
    "linear, weights": lambda x: hw.linear(x, x[0].T, x[0, :, 0]),
    "sample, params": lambda x: hw.sample(x, PARAMS, position=3),
    "sample, a set": lambda x: hw.sample(x, num_samples=3, replacement=False, seed=5, allowed={0, 2, 3, 5}),
    "sample, a position": lambda x: hw.sample(x, temperature=0.7, seed=1, position=(x[0, 0, 0] > 0).astype(int)),
    "sample, uniform": lambda x: hw.sample(x, uniform=abs(x[..., 0]) % 1),
    "logprobs": lambda x: hw.logprobs(x, (x[..., 0] > 0).astype(jnp.int32), top=2),
    "logprobs, best": lambda x: hw.logprobs(x, params=PARAMS, top=2, processed=True),
}


def arrays(result: Any) -> list[Any]:
    results = result if isinstance(result, tuple) else (result,)
    return [jnp.asarray(x) for x in results if x is not None]


def same(got: Any, want: Any) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda t: t.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_inside_jit(name: str, dtype: Any) -> None:
    call, x = CALLS[name], X.astype(dtype)
    same(jax.jit(lambda x: arrays(call(x)))(x), arrays(call(x)))
    shapes = jax.eval_shape(lambda x: arrays(call(x)), x)
    assert [(s.shape, s.dtype) for s in shapes] == [(y.shape, y.dtype) for y in arrays(call(x))]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_vmap_is_a_loop(name: str, size: int) -> None:
    call = CALLS[name]
    x = normal(size, 2, 4, 8)
    want = [jnp.stack(results) for results in zip(*[arrays(call(item)) for item in x])]
    for axis in range(4):
        same(jax.vmap(lambda x: arrays(call(x)), in_axes=axis)(jnp.moveaxis(x, 0, axis)), want)
    same(jax.jit(jax.vmap(lambda x: arrays(call(x))))(x), want)
    same(jax.vmap(jax.vmap(lambda x: arrays(call(x))))(x[None]), [y[None] for y in want])
    same(jax.lax.map(lambda x: arrays(call(x)), x), want)
    _, scanned = jax.lax.scan(lambda carry, x: (carry, arrays(call(x))), 0, x)
    same(scanned, want)


@pytest.mark.parametrize("mapped", [m for n in (1, 2, 3) for m in itertools.combinations("qkvmbsn", n)], ids="".join)
def test_vmap_over_any_argument_of_attention(mapped: tuple[str, ...]) -> None:
    given = {
        "q": normal(2, 4, 8),
        "k": normal(5, 1, 6, 8),  # with a batch axis of its own
        "v": normal(1, 6, 3),
        "m": normal(6) > 0,
        "b": normal(4, 6),
        "s": normal(2),
        "n": jnp.array([1, 2, 3, 4, 6]),
    }
    many = {x: jnp.stack([given[x], given[x][::-1]]) if x in mapped else given[x] for x in given}

    def call(q: Any, k: Any, v: Any, m: Any, b: Any, s: Any, n: Any) -> Any:
        return hw.attention(q, k, v, mask=m, bias=b, sinks=s, kv_lengths=n)

    got = jax.vmap(call, in_axes=tuple(0 if x in mapped else None for x in given))(*many.values())
    items = [{x: many[x][i] if x in mapped else many[x] for x in many} for i in (0, 1)]
    same([got], [jnp.stack([call(*item.values()) for item in items])])


def test_vmap_over_the_positions_of_rotary_alone() -> None:
    positions = jnp.array([[0, 1, 2, 3], [5, 6, 7, 9]])
    got = jax.vmap(lambda p: hw.rotary(X, positions=p))(positions)
    same([got], [jnp.stack([hw.rotary(X, positions=p) for p in positions])])
    got = jax.vmap(lambda p: hw.rotary(np.asarray(X), positions=p))(positions)
    same([got], [jnp.stack([jnp.asarray(hw.rotary(np.asarray(X), positions=np.asarray(p))) for p in positions])])


def test_a_loop_that_decodes() -> None:
    """Token by token in lax.scan, with the bits of a loop in Python."""
    table = normal(50, 50) * 3

    def step(token: Any, position: Any) -> tuple[Any, Any]:
        drawn = hw.sample(table[token], temperature=0.9, top_p=0.95, seed=4, position=position)
        return drawn, drawn

    _, drawn = jax.jit(lambda first: jax.lax.scan(step, first, jnp.arange(30)))(jnp.int32(7))
    token, want = 7, []
    for position in range(30):
        token = hw.sample(table[token], temperature=0.9, top_p=0.95, seed=4, position=position)
        want.append(token)
    assert drawn.tolist() == want


def test_large_arrays_in_a_program() -> None:
    """Where a call back waits for what computes its operands, it never ends."""
    x = normal(8, 1024, 64)

    @jax.jit
    def program(x: Any) -> Any:
        for _ in range(3):
            x = hw.attention(jnp.sin(x), x + 1, x @ jnp.eye(64)) + hw.attention(x, x, x)
        return x

    assert program(x).shape == x.shape


def test_over_two_devices() -> None:
    code = """
        import jax, jax.numpy as jnp, numpy as np, headway as hw, headway.integrations.jax
        from jax.sharding import Mesh, PartitionSpec as P
        assert len(jax.devices()) == 2
        mesh = Mesh(np.array(jax.devices()), ("heads",))
        q, k, v = (jnp.asarray(x) for x in np.random.default_rng(0).standard_normal((3, 4, 300, 16), dtype=np.float32))
        specs = {"mesh": mesh, "in_specs": P("heads"), "out_specs": P("heads")}
        attend = jax.shard_map(lambda q, k, v: hw.attention(q, k, v, causal=True), **specs)
        assert np.array_equal(jax.jit(attend)(q, k, v), hw.attention(q, k, v, causal=True))
        logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 100), dtype=np.float32))
        draw = jax.pmap(lambda x, seed: hw.sample(x, seed=seed))
        assert draw(logits, jnp.array([5, 6])).tolist() == [hw.sample(x, seed=s) for x, s in zip(logits, (5, 6))]
    """
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_scan_within_shard_map() -> None:
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))

    def decode(table: Any, first: Any) -> Any:
        def step(token: Any, position: Any) -> Any:
            drawn = hw.sample(table[token], seed=4, position=position)
            return drawn, drawn

        return jax.vmap(lambda token: jax.lax.scan(step, token, jnp.arange(9))[1])(first)

    table, first = normal(50, 50) * 3, jnp.array([3, 4])
    split = jax.shard_map(decode, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows"))
    same([jax.jit(split)(table, first)], [decode(table, first)])


def test_a_program_keeps_what_it_was_made_of() -> None:
    mask, bias = np.tri(4, dtype=bool), {3: 1.0}
    program = jax.jit(lambda x: (hw.attention(x, x, x, mask=mask), hw.sample(x, seed=1, logit_bias=bias)))
    want = program(X)
    mask[:], bias[3] = True, -9.0
    same(program(X), want)


def test_tracers_in_lists_and_dicts() -> None:
    sinks = jnp.array([0.5, -0.5])
    got = jax.jit(lambda s: hw.attention(X, X, X, sinks=[s[0], s[1]]))(sinks)
    same([got], [hw.attention(X, X, X, sinks=sinks)])
    got = jax.jit(lambda b: hw.filter_logits(X, logit_bias={1: b, 3: -np.inf}))(jnp.float32(2.5))
    same([got], [hw.filter_logits(X, logit_bias={1: 2.5, 3: -np.inf})])


def test_double_precision() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(X), jnp.float64)
        for name in ("attention", "linear", "sample", "probabilities", "logprobs"):
            call = CALLS[name]
            same(jax.jit(lambda x, call=call: arrays(call(x)))(x), arrays(call(x)))


# What is refused ------------------------------------------------------------------------------------------------------


def refused(match: str, call: Callable[[], Any], kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match):
        call()


def total(x: Any) -> Any:
    return hw.attention(x, x, x).sum()


@pytest.mark.parametrize(
    "call",
    [
        lambda: jax.grad(total)(X),
        lambda: jax.value_and_grad(total)(X),
        lambda: jax.jit(jax.grad(total))(X),
        lambda: jax.vmap(jax.grad(total))(X[None]),
        lambda: jax.grad(lambda x: jax.vmap(total)(x).sum())(X[None]),
        lambda: jax.grad(jax.jit(total))(X),
        lambda: jax.grad(jax.checkpoint(total))(X),
        lambda: jax.jvp(total, (X,), (X,)),
        lambda: jax.linearize(total, X),
        lambda: jax.jacrev(total)(X),
        lambda: jax.hessian(total)(X),
    ],
)
def test_gradients_are_refused_in_clear_words(call: Callable[[], Any]) -> None:
    refused("^q: expected an array that waits for no gradient, .* forward only; pass `jax.lax.stop", call, TypeError)


def test_a_gradient_that_stops_before() -> None:
    def f(x: Any) -> Any:
        y = jax.lax.stop_gradient(x)
        return (hw.attention(y, y, y) * x).sum()

    same([jax.grad(f)(X)], [hw.attention(X, X, X)])


def test_errors_inside_are_those_outside() -> None:
    for way in (lambda f: f(X), lambda f: jax.jit(f)(X), lambda f: jax.vmap(f)(X[None])):
        refused("^top_p: expected", lambda way=way: way(lambda x: hw.sample(x, top_p=3.0, seed=1)))
        refused("^tpo_p: no such option.*top_p", lambda way=way: way(lambda x: hw.sample(x, tpo_p=3.0)), TypeError)
        refused("^causal: expected one of", lambda way=way: way(lambda x: hw.attention(x, x, x, causal="left")))
        refused("^causal: .*3 keys", lambda way=way: way(lambda x: hw.attention(x, x[:, :3], x[:, :3], causal=True)))
        refused("^window: ", lambda way=way: way(lambda x: hw.attention(x, x, x, window=3)), TypeError)
        refused("^params: ", lambda way=way: way(lambda x: hw.sample(x, {"top_k": 1})), TypeError)
    refused("^seed: expected one inside", lambda: jax.jit(hw.sample)(X))
    coin = jax.jit(lambda x: hw.probabilities(x, xtc_probability=0.5))
    refused("^seed: expected one inside", lambda: coin(X))
    keyed = jax.jit(lambda x, key: hw.sample(x, seed=key))
    refused("^seed: .* a key of jax.random", lambda: keyed(X, jax.random.key(0)), TypeError)
    several = jax.jit(lambda x, n: hw.sample(x, seed=1, num_samples=n))
    refused("^num_samples: expected a plain value", lambda: several(X, 3), TypeError)
    scaled = jax.jit(lambda x: hw.attention(x, x, x, scale=x[0, 0, 0]))
    refused("^scale: expected a plain value", lambda: scaled(X), TypeError)
    refused("outside of it", lambda: jax.jit(lambda x: hw.KVCache(2, 8).append(x, x))(X), TypeError)
    refused("outside of it", lambda: jax.jit(lambda x: hw.explain(x).masses)(X[0, 0]), TypeError)


def test_what_the_kernel_refuses_is_said_by_the_program() -> None:
    with pytest.raises(Exception, match="logits: expected numbers, got NaN at token 1"):
        jax.block_until_ready(jax.jit(lambda x: hw.sample(x, seed=1))(jnp.array([0.0, jnp.nan])))


# dot_product_attention ------------------------------------------------------------------------------------------------

TOLERANCE = {jnp.float32: 5e-6, jnp.bfloat16: 3e-2, jnp.float16: 4e-3}
MASKS = [None, "mask", "key mask", "heads", "bias", "causal", "window", "lengths", "all"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: t.__name__)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("query", "key"),
    [
        ((2, 5, 4, 16), (2, 5, 4, 16)),
        ((2, 5, 4, 16), (2, 7, 2, 16)),
        ((2, 7, 4, 16), (2, 5, 1, 16)),
        ((5, 4, 16), (7, 4, 16)),
        ((1, 1, 4, 16), (1, 7, 4, 16)),
    ],
    ids=str,
)
def test_against_jaxs_attention(query: Any, key: Any, mask: str | None, dtype: Any) -> None:
    q, k, v = normal(*query, dtype=dtype), normal(*key, dtype=dtype), normal(*key, dtype=dtype)
    batch, heads, length, keys = (query[0] if len(query) == 4 else 1), query[-2], query[-3], key[-3]
    some = (normal(batch, heads, length, keys) > 0).at[..., 0].set(True)
    options = {
        "mask": {"mask": some[:1, :1]},
        "key mask": {"mask": some[0, 0, :1]},
        "heads": {"mask": some},
        "bias": {"bias": normal(1, heads, length, keys, dtype=dtype), "scale": 0.2},
        "causal": {"is_causal": True},
        "window": {"local_window_size": (1, 0) if length == keys else (20, 2)},
        "lengths": {
            "query_seq_lengths": jnp.arange(1, batch + 1, dtype=jnp.int32) * 0 + length,
            "key_value_seq_lengths": jnp.arange(batch, dtype=jnp.int32) + 1,
        },
        "all": {
            "mask": some,
            "bias": normal(batch, 1, 1, keys, dtype=dtype),
            "is_causal": True,
            "local_window_size": 20,
            "query_seq_lengths": jnp.full(batch, max(length - 2, 1), jnp.int32),
        },
    }.get(mask or "", {})
    want, theirs = jax.nn.dot_product_attention(q, k, v, **options, implementation="xla", return_residual=True)
    got, ours = hj.dot_product_attention(q, k, v, **options, implementation="xla", return_residual=True)
    assert (got.dtype, got.shape, ours.dtype, ours.shape) == (want.dtype, want.shape, theirs.dtype, theirs.shape)
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=0, atol=TOLERANCE[dtype])
    real = np.isfinite(np.float32(ours))
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    np.testing.assert_allclose(np.float32(ours)[real], np.float32(theirs)[real], **tolerance)
    inside = jax.jit(lambda q, k, v: hj.dot_product_attention(q, k, v, **options))
    same([inside(q, k, v)], [got])


def test_the_signature_is_jaxs() -> None:
    def faces(function: Any) -> Any:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert faces(hj.dot_product_attention) == faces(jax.nn.dot_product_attention)


def test_where_jax_differs() -> None:
    x, nothing = normal(1, 3, 2, 8), jnp.zeros((1, 1, 3, 3), bool)
    assert not np.asarray(hj.dot_product_attention(x, x, x, mask=nothing)).any()
    mean = jax.nn.dot_product_attention(x, x, x, mask=nothing)
    np.testing.assert_allclose(mean, jnp.broadcast_to(x.mean(1, keepdims=True), x.shape), rtol=1e-6)
    refused("^mask: expected booleans", lambda: hj.dot_product_attention(x, x, x, mask=x[..., 0]), TypeError)
    refused("^implementation: expected", lambda: hj.dot_product_attention(x, x, x, implementation="gpu"))
    refused("^value: expected the shape of key", lambda: hj.dot_product_attention(x, x, x[..., :4]))
    refused("^key: expected the batch and the size", lambda: hj.dot_product_attention(x, x[..., :4], x[..., :4]))
    refused("^local_window_size: ", lambda: hj.dot_product_attention(x, x, x, local_window_size="a"), TypeError)
    beyond = {"key_value_seq_lengths": jnp.array([9], jnp.int32)}
    same([hj.dot_product_attention(x, x, x, **beyond)], [hj.dot_product_attention(x, x, x)])
    refused("^query: expected shape", lambda: hj.dot_product_attention(x[0, 0], x, x))
