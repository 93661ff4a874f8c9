"""headway inside torch: operators in its compilers and transformations, and torch's own calls."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import calls
import numpy as np
import pytest

import headway as hw

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

import headway.integrations.torch as ht  # noqa: E402

pytestmark = pytest.mark.filterwarnings(  # torch's own
    "ignore::DeprecationWarning",
    "ignore::UserWarning:torch",
    "ignore::torch.jit.TracerWarning",
    "ignore::ResourceWarning",
)


@pytest.fixture(autouse=True)
def _many_compilations() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=1000):
        yield


rng = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = torch.float32) -> Any:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


X = normal(2, 4, 8)
PARAMS = hw.SamplingParams(temperature=0.8, top_k=5, dialect="hf", seed=11)
CALLS = {
    **calls.CALLS,
    "multi_head_attention, float64 weights": lambda x: hw.multi_head_attention(
        x, x[..., :4], x[..., :4], num_heads=4, num_kv_heads=2, w_o=np.ones((8, 3))
    ),
    "rms_norm, float64 weights": lambda x: hw.rms_norm(x, np.ones(8), eps=1e-5),
    "sample, params": lambda x: hw.sample(x, PARAMS, position=3),
    "logprobs": lambda x: hw.logprobs(x, (x[..., 0] > 0).to(torch.int64), top=2),
    "logprobs, best": lambda x: hw.logprobs(x, params=PARAMS, top=2, processed=True),
}


def tensors(result: Any) -> list[Any]:
    results = result if isinstance(result, tuple) else (result,)
    return [torch.as_tensor(x) for x in results if x is not None]


def same(got: Any, want: Any) -> None:
    for ours, theirs in zip(tensors(got), tensors(want), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)


class Calling(torch.nn.Module):
    def __init__(self, call: Callable[[Any], Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Any) -> Any:
        return tensors(self.call(x * 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_compiled_in_one_graph(name: str, dtype: Any) -> None:
    call, x = CALLS[name], X.to(dtype)
    if name == "attention, fast" and dtype == torch.float64:
        pytest.skip("precision='fast' is not for float64")
    compiled = torch.compile(lambda x: call(x * 2), fullgraph=True, backend="aot_eager")
    same(compiled(x), call(x * 2))


def test_compiled_by_inductor() -> None:
    def layer(x: Any) -> Any:
        attended = hw.attention(x, x, x, causal=True)
        return hw.linear(hw.rms_norm(attended + x, torch.ones(8)), torch.ones(8, 8)), hw.sample(x, top_k=3, seed=1)

    for ours, theirs in zip(torch.compile(layer, fullgraph=True)(X), layer(X), strict=True):
        assert torch.equal(ours, theirs)


def test_two_draws_without_a_seed_are_two() -> None:
    logits = torch.zeros(64, 1000)
    for backend in ("aot_eager", "inductor"):
        compiled = torch.compile(lambda x: (hw.sample(x), hw.sample(x)), fullgraph=True, backend=backend)
        one, two = compiled(logits)
        assert not torch.equal(one, two)  # by chance with probability 1000^-64


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_exported(name: str, strict: bool) -> None:
    program = torch.export.export(Calling(CALLS[name]), (X,), strict=strict)
    used = {str(node.target) for node in program.graph.nodes if "headway" in str(node.target)}
    assert used == {f"headway.{name.partition(',')[0]}.default"}
    same(tuple(program.module()(X * 3)), tuple(Calling(CALLS[name])(X * 3)))


def test_exported_for_any_length_and_batch() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(normal(8, 8))

        def forward(self, x: Any) -> Any:
            heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
            out = hw.attention(hw.rotary(heads), heads, heads, causal=True).transpose(1, 2).flatten(2)
            return hw.linear(hw.swiglu(out, out), self.w), hw.sample(out, temperature=0.5, seed=1)

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    layer = Layer()
    program = torch.export.export(layer, (normal(2, 5, 8),), dynamic_shapes=({0: batch, 1: length},))
    x = normal(3, 70, 8)
    with torch.no_grad():
        same(program.module()(x), layer(x))


@pytest.mark.parametrize("name", CALLS)
def test_traced(name: str) -> None:
    """What a tracer takes down is the call, not its result."""
    module = Calling(CALLS[name])
    want = tuple(module(X * 3))
    for mode in ("real", "fake", "symbolic"):
        same(tuple(make_fx(module, tracing_mode=mode)(X)(X * 3)), want)
    same(tuple(torch.jit.trace(module, (X,), check_trace=False)(X * 3)), want)


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_without_numbers(name: str) -> None:
    want = tensors(CALLS[name](X))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = tensors(CALLS[name](mode.from_tensor(X)))
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_vmap_is_a_loop(name: str, size: int) -> None:
    call = CALLS[name]
    x = normal(size, 2, 4, 8)
    want = [tensors(call(item)) for item in x]
    for axis in range(4):
        got = torch.vmap(lambda x: tensors(call(x)), in_dims=axis)(x.movedim(0, axis))
        same(tuple(got), tuple(torch.stack(results) for results in zip(*want)))
    twice = torch.vmap(torch.vmap(lambda x: tensors(call(x))))(x[None])
    same(tuple(twice), tuple(torch.stack(results)[None] for results in zip(*want)))


@pytest.mark.parametrize("mapped", [m for n in (1, 2, 3) for m in itertools.combinations("qkvmbsn", n)], ids="".join)
def test_vmap_over_any_argument_of_attention(mapped: tuple[str, ...]) -> None:
    given = {
        "q": normal(2, 4, 8),
        "k": normal(5, 1, 6, 8),  # with a batch axis of its own
        "v": normal(1, 6, 3),
        "m": normal(6) > 0,
        "b": normal(4, 6),
        "s": normal(2),
        "n": torch.tensor([1, 2, 3, 4, 6]),
    }
    many = {x: torch.stack([given[x], given[x].flip(0)]) if x in mapped else given[x] for x in given}

    def call(q: Any, k: Any, v: Any, m: Any, b: Any, s: Any, n: Any) -> Any:
        return hw.attention(q, k, v, mask=m, bias=b, sinks=s, kv_lengths=n)

    got = torch.vmap(call, in_dims=tuple(0 if x in mapped else None for x in given))(*many.values())
    items = [{x: many[x][i] if x in mapped else many[x] for x in many} for i in (0, 1)]
    assert torch.equal(got, torch.stack([call(*item.values()) for item in items]))


@pytest.mark.parametrize("name", ht.OPERATORS)
def test_operators_hold_to_torchs_rules(name: str) -> None:
    """torch's own check of schemas, fakes, gradients and compilers."""
    given = {
        "attention": (X, X, X, True, None, None, "top_left"),
        "attention_weights": (X, X),
        "multi_head_attention": (X, X, X, 2, torch.eye(8)),
        "linear": (X, torch.eye(8)),
        "rotary": (X,),
        "rms_norm": (X, torch.ones(8)),
        "swiglu": (X, X),
        "logprobs": (X, None, 2),
        "penalize": (X[0, :2], torch.tensor([[0, 1, 1], [3, 2, 3]])),
    }.get(name, (X,))
    op = getattr(torch.ops.headway, name).default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    options = {"seed": torch.tensor(1)} if name in ("sample", "probabilities", "filter_logits") else {}
    torch.library.opcheck(op, given, options, test_utils=tests)


# Gradients ------------------------------------------------------------------------------------------------------------


def test_gradients_are_refused_in_clear_words() -> None:
    def total(x: Any) -> Any:
        return hw.attention(x, x, x).sum()

    for call in (
        lambda: torch.func.grad(total)(X),
        lambda: torch.func.vjp(total, X),
        lambda: torch.func.jvp(total, (X,), (X,)),
        lambda: torch.vmap(torch.func.grad(total))(X[None]),
    ):
        refused("^q: expected a tensor that waits for no gradient, .* forward only", call, TypeError)
    waiting = X.clone().requires_grad_()
    compiled = torch.compile(lambda x: hw.attention(x, x, x), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"headway\.attention is forward only and has no gradient; call it under torch"):
        compiled(waiting)
    with torch.no_grad():
        assert torch.equal(compiled(waiting), hw.attention(X, X, X))
    with pytest.raises(RuntimeError, match=r"headway\.attention is forward only"):
        torch.ops.headway.attention(waiting, X, X)[0].sum().backward()


def refused(match: str, call: Callable[[], Any], kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match):
        call()


def test_errors_inside_transformations_are_those_outside() -> None:
    for way in (lambda f: f(X), lambda f: torch.vmap(f)(X[None])):
        refused("^top_p: expected", lambda way=way: way(lambda x: hw.sample(x, top_p=3.0)))
        refused("^tpo_p: no such option.*top_p", lambda way=way: way(lambda x: hw.sample(x, tpo_p=3.0)), TypeError)
        refused("^causal: expected one of", lambda way=way: way(lambda x: hw.attention(x, x, x, causal="left")))
        refused("^causal: .*3 keys", lambda way=way: way(lambda x: hw.attention(x, x[:, :3], x[:, :3], causal=True)))
        refused("^window: ", lambda way=way: way(lambda x: hw.attention(x, x, x, window=3)), TypeError)
        refused("^softcap: ", lambda way=way: way(lambda x: hw.attention(x, x, x, softcap=-1.0)))
        refused("^params: ", lambda way=way: way(lambda x: hw.sample(x, {"top_k": 1})), TypeError)
    refused(
        "^scale: .*plain value",
        lambda: torch.vmap(lambda x: hw.attention(x, x, x, scale=x[0, 0, 0]))(X[None]),
        TypeError,
    )
    refused("outside of it", lambda: torch.vmap(lambda x: hw.KVCache(2, 8).append(x, x))(X[None]), TypeError)
    refused("outside of it", lambda: torch.vmap(lambda x: hw.explain(x).masses)(X[0, :1]), TypeError)


# Where torch is used --------------------------------------------------------------------------------------------------


def test_inference_mode_and_autocast() -> None:
    with torch.inference_mode():
        assert torch.equal(hw.attention(X, X, X), hw.attention(X.clone(), X, X))
    want = hw.attention(X, X, X)
    with torch.autocast("cpu", torch.bfloat16):
        same(hw.attention(X, X, X), want)  # of the type that it is given
        same(torch.ops.headway.attention(X, X, X)[0], want)
        same(torch.vmap(lambda x: hw.attention(x, x, x))(X[None])[0], want)


LOADER = """
import sys
import numpy as np, torch, headway as hw


class Draws(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        x = torch.from_numpy(np.random.default_rng(i).standard_normal((4, 300, 64), dtype=np.float32))
        return hw.attention(x, x, x), hw.sample(x[0, 0], seed=i)


if __name__ == "__main__":
    want = [Draws()[i] for i in range(6)]  # with threads, which a fork does not have
    loader = torch.utils.data.DataLoader(Draws(), batch_size=2, num_workers=2, multiprocessing_context=sys.argv[1])
    got = list(loader)
    assert torch.equal(torch.cat([x for x, _ in got]), torch.stack([x for x, _ in want]))
    assert torch.cat([ids for _, ids in got]).tolist() == [token for _, token in want]
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start: str, tmp_path: Path) -> None:
    """In a process of its own: other libraries here do not like to be forked."""
    (tmp_path / "loader.py").write_text(LOADER)
    command = [sys.executable, str(tmp_path / "loader.py"), start]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


# scaled_dot_product_attention -----------------------------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", [None, "causal", "bool", "row", "float", "heads", "nothing"])
@pytest.mark.parametrize(
    ("query", "key", "gqa"),
    [
        ((5, 16), (7, 16), False),
        ((4, 5, 16), (4, 7, 16), False),
        ((2, 4, 5, 16), (2, 4, 7, 16), False),
        ((2, 4, 5, 16), (2, 2, 7, 16), True),
        ((2, 4, 5, 16), (2, 1, 7, 16), True),
        ((2, 4, 1, 16), (2, 4, 7, 16), False),
        ((2, 4, 7, 16), (2, 4, 1, 16), False),
        ((3, 2, 4, 5, 16), (3, 2, 4, 5, 16), False),
        ((1, 4, 5, 16), (2, 4, 7, 16), False),
    ],
    ids=str,
)
def test_against_torchs_attention(query: Any, key: Any, gqa: bool, mask: str | None, dtype: Any) -> None:
    length, keys = query[-2], key[-2]
    q, k, v = normal(*query, dtype=dtype), normal(*key, dtype=dtype), normal(*key[:-1], 9, dtype=dtype)
    masks = {
        "bool": normal(length, keys) > 0,
        "row": (normal(keys) > 0).expand(length, keys),
        "float": normal(length, keys, dtype=dtype),
        "heads": normal(*query[:-2], length, keys, dtype=dtype),
        "nothing": torch.zeros(length, keys, dtype=torch.bool),
    }
    for scale in (None, 0.1):
        options = {"attn_mask": masks.get(mask or ""), "is_causal": mask == "causal", "scale": scale, "enable_gqa": gqa}
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        got = ht.scaled_dot_product_attention(q, k, v, **options)
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype])


def test_the_signature_is_torchs() -> None:
    import inspect

    own = list(inspect.signature(ht.scaled_dot_product_attention).parameters.values())
    assert [(p.name, p.default) for p in own] == [
        ("query", inspect.Parameter.empty),
        ("key", inspect.Parameter.empty),
        ("value", inspect.Parameter.empty),
        ("attn_mask", None),
        ("dropout_p", 0.0),
        ("is_causal", False),
        ("scale", None),
        ("enable_gqa", False),
    ]


def test_what_torchs_attention_refuses_is_refused() -> None:
    sdpa = ht.scaled_dot_product_attention
    x, mask = normal(2, 4, 5, 8), torch.ones(5, 5, dtype=torch.bool)
    refused("^dropout_p: expected 0, got 0.5", lambda: sdpa(x, x, x, dropout_p=0.5))
    refused("^is_causal: expected False beside attn_mask", lambda: sdpa(x, x, x, mask, is_causal=True))
    refused("^key: expected the 4 heads of query, got 2 .*enable_gqa=True", lambda: sdpa(x, x[:, :2], x[:, :2]))
    refused("^query: expected shape", lambda: sdpa(x[0, 0, 0], x, x))
    refused("^query: expected a tensor", lambda: sdpa(x.numpy(), x, x), TypeError)
    nested = torch.nested.nested_tensor([x[0], x[1]])
    refused("^query: expected a dense tensor", lambda: sdpa(nested, nested, nested), TypeError)
    refused("^q: .*forward only", lambda: sdpa(x.clone().requires_grad_(), x, x), TypeError)


def test_compiled_inside_torchs_signature() -> None:
    attend = ht.scaled_dot_product_attention
    compiled = torch.compile(lambda x: attend(x, x, x, is_causal=True), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), hw.attention(X, X, X, causal=True))
    own = ht.from_torch(torch.nn.MultiheadAttention(8, 2).eval())
    with torch.no_grad():
        mask = torch.ones(2, 2).triu(1).bool()
        got = torch.compile(own, fullgraph=True, backend="aot_eager")(X, X, X, attn_mask=mask)
        same(got, own(X, X, X, attn_mask=mask))
        program = torch.export.export(own, (X, X, X), {"attn_mask": mask})
        same(program.module()(X, X, X, attn_mask=mask), own(X, X, X, attn_mask=mask))


# MultiheadAttention ---------------------------------------------------------------------------------------------------

MODULES: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"kdim": 6, "vdim": 10},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True, "dtype": torch.float64},
]


@pytest.mark.parametrize(
    "masks", list(itertools.product([None, "bool", "float"], [None, "bool", "float", "heads"])), ids=str
)
@pytest.mark.parametrize("options", MODULES, ids=str)
def test_against_torchs_module(options: dict[str, Any], masks: tuple[str | None, str | None]) -> None:
    module = torch.nn.MultiheadAttention(8, 2, **options).eval()
    dtype = options.get("dtype", torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(normal(*parameter.shape, dtype=dtype) / 2)
    own = ht.from_torch(module)
    batch, length, keys = 3, 4, 5
    padding = {
        "bool": torch.arange(keys)[None] >= torch.tensor([[5], [3], [4]]),
        "float": normal(batch, keys, dtype=dtype),
    }
    mask = {"bool": torch.ones(length, keys).triu(2).bool(), "float": normal(length, keys, dtype=dtype)}
    mask["heads"] = normal(batch * 2, length, keys) > 1.5
    mask["heads"][..., 0] = False  # rows that may attend to nothing are NaN in torch

    def given(batched: bool) -> dict[str, Any]:
        shapes = (length, 8), (keys, options.get("kdim", 8)), (keys, options.get("vdim", 8))
        arrays = [normal(batch, *shape, dtype=dtype) if batched else normal(*shape, dtype=dtype) for shape in shapes]
        if batched and not options.get("batch_first"):
            arrays = [x.transpose(0, 1) for x in arrays]
        made = padding.get(masks[0] or "")
        over = mask.get(masks[1] or "")
        return {
            **dict(zip(("query", "key", "value"), arrays)),
            "key_padding_mask": made if made is None or batched else made[1],
            "attn_mask": over if batched or over is None or over.ndim == 2 else over[:2],
        }

    for batched in (True, False):
        call = given(batched)
        for need, average in ((True, True), (True, False), (False, True)):
            with torch.no_grad():
                want, theirs = module(**call, need_weights=need, average_attn_weights=average)
                got, ours = own(**call, need_weights=need, average_attn_weights=average)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
            assert (ours is None) == (theirs is None)
            if need:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_module_shares_its_weights_and_refuses_dropout() -> None:
    module = torch.nn.MultiheadAttention(8, 2, dropout=0.1)
    refused("^module: expected no dropout", lambda: ht.from_torch(module))
    refused("^module: expected torch.nn.MultiheadAttention", lambda: ht.from_torch(torch.nn.Linear(2, 2)), TypeError)
    own = ht.from_torch(module.eval())
    x = normal(4, 1, 8)
    with torch.no_grad():
        before = own(x, x, x)[0]
        module.in_proj_weight.mul_(2)
        assert not torch.equal(own(x, x, x)[0], before)
        refused("^attn_mask: expected a mask", lambda: own(x, x, x, is_causal=True))
