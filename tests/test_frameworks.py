"""Gradients, transformations and compilers of torch and JAX: nothing is lost silently, and nothing crashes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from test_doors import DOORS, Door, numbers

import headway as hw
from headway import _arrays

# What torch says of its own parts, not of what is done here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]

READ_AS_FLOATS = {name: one for name, one in DOORS.items() if "float32" in one.takes}


def refused(argument: str, says: str, call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    assert type(caught.value) is TypeError
    message = str(caught.value)
    assert re.match(rf"{argument}(\[[\d, ]*\])*: expected ", message), message
    assert says in message, message
    assert "\n" not in message
    assert len(message) < 400


def same(got: Any, want: Any) -> None:
    for ours, theirs in zip(numbers(got), numbers(want), strict=True):
        np.testing.assert_array_equal(ours, theirs)


class TestTorch:
    @pytest.fixture(autouse=True)
    def _torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("torch", reason="PyTorch is not installed")
        monkeypatch.delitem(_arrays.TRACED, "torch", raising=False)  # as before its integration was imported

    @pytest.mark.parametrize("name", READ_AS_FLOATS)
    def test_a_gradient_is_not_lost_silently(self, name: str) -> None:
        import torch

        one, argument = DOORS[name], name.split()[1]
        x = torch.from_numpy(np.array(one.good)).float()
        want = one.call(x)
        waiting = [x.clone().requires_grad_(), torch.nn.Parameter(x), x.clone().requires_grad_().bfloat16()]
        waiting += [list(waiting[0]), [*x[:-1], torch.nn.Parameter(x[-1])]] if x.ndim else []
        waiting += [list(map(list, waiting[0]))] if x.ndim == 2 else []
        for value in waiting:
            refused(argument, "forward only", lambda value=value: one.call(value))
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                for value in waiting[:2]:
                    same(one.call(value), want)
        same(one.call(waiting[0].detach()), want)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            refused(argument, "forward only", lambda: one.call(dual))
            same(one.call(x), want)

    @pytest.mark.parametrize("name", ["scale", "softcap"])
    def test_a_single_number_that_waits_for_a_gradient(self, name: str) -> None:
        import torch

        x, number = np.ones((1, 2, 4)), torch.tensor(0.5)
        same(hw.attention(x, x, x, **{name: number}), hw.attention(x, x, x, **{name: 0.5}))
        number.requires_grad_()
        refused(name, "forward only", lambda: hw.attention(x, x, x, **{name: number}))

    @pytest.mark.parametrize("name", DOORS)
    def test_tensors_that_cannot_be_read(self, name: str) -> None:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        one, argument = DOORS[name], name.split()[1]
        x = torch.from_numpy(np.array(one.good)).to(torch.float32 if "float32" in one.takes else torch.int64)
        with FakeTensorMode():
            fake = torch.ones(x.shape, dtype=x.dtype)
        refused(argument, "`import headway.integrations.torch`", lambda: one.call(fake))
        refused(argument, "CPU memory", lambda: one.call(x.to("meta")))
        refused(argument, f"`{argument}.to_dense()`", lambda: one.call(x.to_sparse()))
        if x.dtype == torch.float32:
            refused(argument, f"`{argument}.to_dense()`", lambda: one.call(x.reshape(x.shape or 1).to_mkldnn()))
            quantized = torch.quantize_per_tensor(x, 0.5, 0, torch.qint8)
            refused(argument, "", lambda: one.call(quantized))
            refused(argument, "", lambda: one.call(x.to(torch.float8_e5m2)))

    @pytest.mark.parametrize("name", DOORS)
    def test_transformations_are_named(self, name: str) -> None:
        import torch

        one, argument = DOORS[name], name.split()[1]
        x = torch.from_numpy(np.array(one.good)).to(torch.float32 if "float32" in one.takes else torch.int64)
        refused(argument, "torch.vmap", lambda: torch.vmap(lambda row: (row, one.call(row))[0])(x[None]))
        if x.dtype == torch.float32:
            refused(argument, "torch.func.grad", lambda: torch.func.grad(lambda x: (one.call(x), x.sum())[1])(x))
            refused(argument, "torch.func.grad", lambda: torch.func.jvp(lambda x: (one.call(x), x)[1], (x,), (x,)))


def projected(x: Any) -> Any:
    return hw.multi_head_attention(x, x, x, num_heads=2, w_q=np.eye(4), causal=True, return_lse=True)


def decoded(x: Any) -> Any:
    cache = hw.KVCache(2, 4)
    cache.append(x, x)
    return cache.attend(x * 2)


def in_parts(x: Any) -> Any:
    states = [hw.partial_attention(x, x, x), hw.AttentionState.from_lse(x, x[..., 0])]
    return hw.merge_attention(states)


def layers(x: Any) -> Any:
    return hw.swiglu(hw.rotary(hw.rms_norm(x * 2, [1.0] * 4)), hw.linear(x, np.eye(4)))


def sampled(x: Any) -> Any:
    params = hw.SamplingParams(temperature=0.7, top_k=3, seed=1)
    return hw.sample(x * 2, params), hw.sample(x * 2, top_p=0.9, seed=2), hw.probabilities(x, params)


def around(x: Any) -> Any:
    sampler = hw.Sampler(4)
    sampler.admit(hw.SamplingParams(top_k=2), [1, 2], seed=5)
    token = sampler.step(x[0, :1])
    lower = hw.penalize(x[0, 0] * 2, [1, 2], repetition=2.0)
    verified = hw.verify_draft(x[0, :2], x[0, :1], [1], seed=1)
    return token, lower, hw.logprobs(x[0, 0], top=2), verified, hw.explain(x[0, 0], top_k=2).masses


CALLERS = [
    lambda x: hw.attention(x * 2, x, x, causal=True) + 1,
    lambda x: hw.attention_weights(x * 2, x),
    projected,
    decoded,
    in_parts,
    layers,
    sampled,
    around,
]


@contextlib.contextmanager
def unknown_to_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that imported headway before torch.compile was asked for."""
    import torch._dynamo.trace_rules as rules

    torch = rules.torch
    torch._dynamo.reset()
    for place in [place for place in rules.SKIP_DIRS if "headway" in place]:
        rules.SKIP_DIRS.remove(place)
    rules._recompile_re()
    monkeypatch.setattr(_arrays, "_hidden", False)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("caller", CALLERS, ids=range(len(CALLERS)))
def test_torch_compile_breaks_the_graph(caller: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 4), dtype=np.float32))
    try:
        torch.compile(lambda x: x + 1, backend="eager")(x)
    except RuntimeError as error:  # a Python that is too new for it
        pytest.skip(str(error))
    with unknown_to_dynamo(monkeypatch):
        want = caller(x)
    with unknown_to_dynamo(monkeypatch):
        compiled = torch.compile(caller, backend="eager")
        for _ in range(3):
            same(compiled(x), want)
    double = torch.compile(caller, backend="eager")
    same(double(x.double()), caller(x.double()))


QKV = np.ones((3, 1, 2, 4))
SINGLE: dict[str, Callable[[Any], Any]] = {
    "scale": lambda n: hw.attention(*QKV, scale=n),
    "softcap": lambda n: hw.attention(*QKV, softcap=n),
    "window": lambda n: hw.attention(*QKV, window=(n, None)),
    "key_offset": lambda n: hw.partial_attention(*QKV, key_offset=n),
    "num_heads": lambda n: hw.multi_head_attention(*QKV, num_heads=n),
    "num_kv_heads": lambda n: hw.multi_head_attention(*QKV, num_heads=2, num_kv_heads=n),
    "decimals": lambda n: hw.multi_head_attention(*QKV, num_heads=2, decimals=n),
    "head_dim": lambda n: hw.KVCache(1, n),
    "length": lambda n: hw.KVCache(1, 4).truncate(n),
    "eps": lambda n: hw.rms_norm(QKV[0], np.ones(4), eps=n),
    "base": lambda n: hw.rotary(QKV[0], base=n),
    "num_samples": lambda n: hw.sample(np.zeros(3), num_samples=n),
    "top": lambda n: hw.logprobs(np.zeros(3), top=n),
    "token": lambda n: hw.explain(np.zeros(3)).why(n),
    "vocabulary": lambda n: hw.Sampler(n),
    "stream": lambda n: hw.Sampler(3).admit(stream=n),
}


class TestJax:
    @pytest.fixture(autouse=True)
    def _jax(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("jax", reason="JAX is not installed")
        monkeypatch.delitem(_arrays.TRACED, "jax", raising=False)

    @staticmethod
    def given(one: Door) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(one.good.astype(np.float32 if "float32" in one.takes else np.int32))

    @pytest.mark.parametrize("name", DOORS)
    def test_transformations_are_named(self, name: str) -> None:
        import jax

        one, argument = DOORS[name], name.split()[1]
        x = self.given(one)
        refused(argument, "jax.pure_callback", lambda: jax.jit(lambda x: (one.call(x), x)[1])(x))
        refused(argument, "jax.vmap", lambda: jax.vmap(lambda x: (one.call(x), x)[1])(x[None]))
        if "float32" in one.takes:
            refused(argument, "jax.grad", lambda: jax.grad(lambda x: (one.call(x), x.sum())[1])(x))
        if x.ndim:
            refused(argument, "jax.jit", lambda: jax.jit(lambda x: (one.call(list(x)), x)[1])(x))

    @pytest.mark.parametrize("argument", SINGLE)
    def test_transformations_where_one_number_is_meant(self, argument: str) -> None:
        import jax

        refused(argument, "jax.pure_callback", lambda: jax.jit(lambda n: (SINGLE[argument](n), n)[1])(1))

    def test_inside_jit_through_a_callback(self) -> None:
        import jax
        import jax.numpy as jnp

        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4), dtype=np.float32))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        inside = jax.jit(lambda x: 1 + jax.pure_callback(lambda x: np.asarray(hw.attention(x, x, x)), shape, 2 * x))
        np.testing.assert_allclose(inside(x), 1 + hw.attention(2 * x, 2 * x, 2 * x), rtol=1e-6)

    def test_arrays_that_hold_nothing(self) -> None:
        import jax
        import jax.numpy as jnp

        gone = jnp.ones(3)
        gone.delete()
        for value in (gone, jax.random.key(0)):
            refused("logits", "", lambda value=value: hw.sample(value))
