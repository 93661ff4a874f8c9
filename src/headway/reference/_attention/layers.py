"""The other operations of a layer: linear maps, rotary positions, RMSNorm, SwiGLU."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .attention import Array, ieee


@ieee
def linear(x: ArrayLike, w: ArrayLike | None, b: ArrayLike | None = None) -> Array:
    """Compute x w + b.

    Args:
        x: (..., in).
        w: (in, out); None is the identity.
        b: (out,); None is 0.

    Returns:
        (..., out).

    >>> from headway import reference
    >>> reference.linear([[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]], [0.5, 0.5])
    array([[13.5, 16.5]])
    """
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

    Args:
        x: (..., L, D).
        positions: (L,) or (..., L); None is 0, 1, 2, ...
        base: see above.
        frequencies: (D / 2,), instead of those above.

    Returns:
        (..., L, D).

    >>> from headway import reference
    >>> reference.rotary([[1.0, 0.0]], positions=[1]).round(4)
    array([[0.5403, 0.8415]])
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
    """Compute x / sqrt(mean(x^2) + eps) * weight along the last axis (Zhang and Sennrich, 2019).

    Args:
        x: (..., M).
        weight: (M,).
        eps: keeps a row of zeros finite.

    Returns:
        (..., M).

    >>> from headway import reference
    >>> reference.rms_norm([3.0, -3.0], [1.0, 2.0], eps=1e-12).round(6)
    array([ 1., -2.])
    """
    x = np.asarray(x, np.float64)
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    y: Array = x / np.sqrt(mean_square + eps) * np.asarray(weight, np.float64)
    return y


@ieee
def swiglu(gate: ArrayLike, up: ArrayLike) -> Array:
    """Compute gate * sigmoid(gate) * up, where sigmoid(x) = 1 / (1 + exp(-x)) (Shazeer, 2020).

    Args:
        gate: (...), of any shape.
        up: of the same shape.

    Returns:
        Of that shape.

    >>> from headway import reference
    >>> reference.swiglu([0.0, 1.0], [2.0, 2.0]).round(6)
    array([0.      , 1.462117])
    """
    gate, up = np.asarray(gate, np.float64), np.asarray(up, np.float64)
    sigmoid = 1 / (1 + np.exp(-gate))
    y: Array = gate * sigmoid * up
    return y
