"""Arrays of real libraries: each gives its own kind."""

import jax
import mlx.core
import torch
from typing_extensions import assert_type

import headway as hw


def of_torch(x: torch.Tensor) -> None:
    assert_type(hw.attention(x, x, x, mask=x > 0), torch.Tensor)
    assert_type(hw.attention(x, x, x, return_lse=True), tuple[torch.Tensor, torch.Tensor])
    assert_type(hw.probabilities(x, temperature=x), torch.Tensor)
    assert_type(hw.linear(x, x.T), torch.Tensor)


def of_jax(x: jax.Array) -> None:
    assert_type(hw.attention(x, x, x), jax.Array)
    assert_type(hw.penalize(x, [1]), jax.Array)


def of_mlx(x: mlx.core.array) -> None:
    assert_type(hw.attention(x, x, x), mlx.core.array)
    assert_type(hw.rms_norm(x, x), mlx.core.array)
