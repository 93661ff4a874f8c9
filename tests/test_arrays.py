"""Kinds of arrays: what goes in as it is meant, and comes back as the same kind."""

import copy
import importlib
import importlib.util
import itertools
import pickle

import numpy as np
import pytest
from oracles import DTYPES

import headway as hw

LOGITS = [1.0, 3.0, 2.0]


def test_a_masked_array_is_refused_before_its_mask_is_lost():
    with pytest.raises(TypeError, match="logits: expected a plain array, got a masked one"):
        hw.sample(np.ma.array(LOGITS, mask=[False, True, False]), temperature=0)


def test_the_version_is_there():
    assert hw.__version__ == hw.info().version
    with pytest.raises(AttributeError, match="no attribute 'versions'"):
        _ = hw.versions


def test_a_conversion_does_not_write_out_what_was_repeated():
    bias = np.broadcast_to(np.arange(5.0), (3, 4, 5))
    q, k = np.ones((3, 4, 8), np.float32), np.ones((3, 5, 8), np.float32)
    np.testing.assert_array_equal(
        hw.attention(q, k, k, bias=bias), hw.attention(q, k, k, bias=np.ascontiguousarray(bias).astype(np.float32))
    )
    mask = np.broadcast_to(np.array([1, 0, 1, 1, 0]), (3, 4, 5))
    np.testing.assert_array_equal(hw.attention(q, k, k, mask=mask), hw.attention(q, k, k, mask=mask.astype(bool)))


def test_params_keep_the_numbers_of_bfloat16():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    numbers = np.array([0.5, 2.0])
    want = hw.SamplingParams(temperature=numbers.astype(np.float32), logit_bias={1: 0.5})
    kinds = [numbers.astype(bfloat16)]
    if importlib.util.find_spec("torch"):
        torch = importlib.import_module("torch")
        kinds.append(torch.tensor(numbers, dtype=torch.bfloat16))
    if importlib.util.find_spec("jax"):
        kinds.append(importlib.import_module("jax.numpy").asarray(numbers, bfloat16))
    for given in kinds:
        params = hw.SamplingParams(temperature=given, logit_bias={1: given[0]})
        for one in (params, pickle.loads(pickle.dumps(params)), copy.deepcopy(params)):
            assert one == want
            assert hash(one) == hash(want)
            assert repr(one).startswith("SamplingParams(temperature=array([0.5, 2. ], dtype=float32), logit_bias={1: ")
            assert hw.sample([LOGITS] * 2, one, seed=1).tolist() == hw.sample([LOGITS] * 2, want, seed=1).tolist()
    assert hw.SamplingParams(temperature=[kinds[-1][0], 2.0]) == hw.SamplingParams(temperature=[np.float32(0.5), 2.0])


class TestTorch:
    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch", reason="PyTorch is not installed")

    def test_same_kind_and_type_back(self, torch):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            x = torch.ones(1, 3, 8, dtype=dtype)
            out, lse = hw.attention(x, x, x, return_lse=True)
            assert isinstance(out, torch.Tensor)
            assert out.dtype == dtype
            assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    def test_a_subclass_counts_as_torch(self, torch):
        kind = type("Tagged", (torch.Tensor,), {})
        assert isinstance(hw.filter_logits(torch.tensor(LOGITS).as_subclass(kind)), torch.Tensor)

    def test_the_sign_that_a_conjugate_keeps_apart(self, torch):
        z = torch.conj(torch.tensor([1 + 2j, 1 - 3j, 1 + 1j])).imag
        assert z.is_neg()
        assert hw.filter_logits(z).tolist() == z.tolist() == [-2, 3, -1]

    def test_a_device_without_memory_is_refused(self, torch):
        with pytest.raises(TypeError, match="q: expected an array in CPU memory"):
            hw.attention(torch.ones(1, 2, 4, device="meta"), np.ones((1, 2, 4)), np.ones((1, 2, 4)))


class TestJax:
    def test_same_kind_and_type_back(self):
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        for dtype in (jax.numpy.float32, jax.numpy.float16, jax.numpy.bfloat16):
            x = jax.numpy.ones((1, 3, 8), dtype)
            out, lse = hw.attention(x, x, x, return_lse=True)
            assert isinstance(out, jax.Array)
            assert out.dtype == dtype
            assert lse.dtype == jax.numpy.float32
        assert hw.sample(jax.numpy.array(LOGITS), temperature=0) == 1
        assert isinstance(hw.sample(jax.numpy.array([LOGITS]), temperature=0), jax.Array)


@pytest.mark.parametrize("wide", ["float64", "float32"])
def test_both_16_bit_types_beside_a_wider_one_promote_to_that(wide: str) -> None:
    x = np.ones((1, 2, 4))
    for q, k, v in itertools.permutations(("float16", "bfloat16", wide)):
        assert hw.attention(*(x.astype(DTYPES[name]) for name in (q, k, v))).dtype == wide
