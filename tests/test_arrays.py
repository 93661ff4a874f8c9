"""Kinds of arrays: what goes in as it is meant, and comes back as the same kind."""

import numpy as np
import pytest

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
