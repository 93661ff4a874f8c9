"""The other operations of a layer: linear maps, rotary positions, RMSNorm, SwiGLU."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .attention import Array, ieee


@ieee
def linear(x: ArrayLike, w: ArrayLike | None, b: ArrayLike | None = None) -> Array:
    """Compute x w + b. x (..., in), w (in, out), b (out,) -> (..., out)."""
    y = np.asarray(x, np.float64)
    if w is not None:
        y = y @ np.asarray(w, np.float64)
    if b is not None:
        y = y + np.asarray(b, np.float64)
    return y


@ieee
def rotary(
    x: ArrayLike,
    *,
    positions: ArrayLike | None = None,
    base: float = 10000.0,
    frequencies: ArrayLike | None = None,
) -> Array:
    """Rotary position embedding (Su et al., 2021): turn each pair (x_i, x_{i + D/2}) by an angle.

        angle_i     = position * frequency_i,     frequency_i = base^(-2 i / D)
        y_i         = x_i cos(angle_i) - x_{i + D/2} sin(angle_i)
        y_{i + D/2} = x_{i + D/2} cos(angle_i) + x_i sin(angle_i)

    Turned so, q . k depends on the distance of their positions alone. Llama's checkpoints pair the same way.

    x (..., L, D); positions (L,) or (..., L), by default 0, 1, 2, ...; frequencies (D / 2,), else as above.
    """
    x = np.asarray(x, np.float64)
    L, D = x.shape[-2:]
    if positions is None:
        positions = np.arange(L)
    if frequencies is None:
        frequencies = base ** (-2 * np.arange(D // 2) / D)
    angle = np.asarray(positions)[..., None] * np.asarray(frequencies, np.float64)
    cosine, sine = np.cos(angle), np.sin(angle)
    first, second = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


@ieee
def rms_norm(x: ArrayLike, weight: ArrayLike, *, eps: float = 1e-6) -> Array:
    """Compute x / sqrt(mean(x^2) + eps) * weight along the last axis (Zhang and Sennrich, 2019)."""
    x = np.asarray(x, np.float64)
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    y: Array = x / np.sqrt(mean_square + eps) * np.asarray(weight, np.float64)
    return y


@ieee
def swiglu(gate: ArrayLike, up: ArrayLike) -> Array:
    """Compute gate * sigmoid(gate) * up, where sigmoid(x) = 1 / (1 + exp(-x)) (Shazeer, 2020)."""
    gate, up = np.asarray(gate, np.float64), np.asarray(up, np.float64)
    sigmoid = 1 / (1 + np.exp(-gate))
    y: Array = gate * sigmoid * up
    return y
