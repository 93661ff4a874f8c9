"""Next-token sampling: one token, the distribution it is drawn from, and the logits that are left.

Every function takes logits of shape (..., V), V the vocabulary, and the same options. Biases and bans come first, then
the stages of `stages.py` in the order of `dialects.py`; then the draw. docs/semantics.md says what each means to the
last bit, `headway.reference` says it in NumPy, and the kernels in `src/core/sampling/sampling.h` give those same bits.
docs/architecture.md says where a new filter goes.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _arrays, _check
from .._signatures import AnyArray, NumPyLike, Tensor, Unpack
from .call import prepare
from .params import SamplingOptions, SamplingParams, shows_sampling_options

__all__ = ["filter_logits", "probabilities", "sample"]


@typing.overload
def sample(
    logits: Sequence[float], params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
) -> int: ...
@typing.overload
def sample(
    logits: Sequence[Sequence[Any]], params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
) -> NDArray[np.int64]: ...
@typing.overload
def sample(
    logits: NumPyLike,
    params: SamplingParams | None = None,
    *,
    num_samples: int,
    replacement: bool = True,
    **options: Unpack[SamplingOptions],
) -> NDArray[np.int64]: ...
@typing.overload
def sample(
    logits: Tensor,
    params: SamplingParams | None = None,
    *,
    num_samples: int,
    replacement: bool = True,
    **options: Unpack[SamplingOptions],
) -> Tensor: ...
@typing.overload
def sample(
    logits: AnyArray,
    params: SamplingParams | None = None,
    *,
    num_samples: int | None = None,
    replacement: bool = True,
    **options: Unpack[SamplingOptions],
) -> Any: ...
@_check.public
@shows_sampling_options
def sample(
    logits: AnyArray,
    params: SamplingParams | None = None,
    *,
    num_samples: int | None = None,
    replacement: bool = True,
    **options: Unpack[SamplingOptions],
) -> Any:
    """Draw one token per row of logits, or several.

    A draw depends on nothing but the row's logits, its options, seed and position. With one seed for many rows, row i
    draws from stream i of the seed, so row 0 draws what it would alone. Random numbers are those of Philox4x64-10
    (Salmon et al., 2011), as numpy.random.Philox has them for the same key and counter.

    Args:
        logits: (V,) or (..., V), of any kind of array; -inf bans a token.
        params: options that many calls share; a keyword wins over what params say of it.
        num_samples: how many tokens to draw per row, the first of which is the one that a lone call draws; None draws
            one and adds no axis. uniform, where given, is then one number per draw, (..., n).
        replacement: whether the tokens of a row are drawn independently; False draws each from what the earlier ones
            left, so that all differ.
        **options: those of `SamplingParams`, which explains them.

    Returns:
        The token: an int for logits (V,), else int64 (...), or (..., n) for n samples, the kind of array that logits
        are.

    Raises:
        TypeError: what is no number or no array.
        ValueError: NaN or +inf in the logits; a row in which every token is banned, or fewer are left than are to be
            drawn without replacement; an option out of range.

    >>> import headway as hw
    >>> hw.sample([1.0, 3.0, 2.0], temperature=0)
    1
    >>> hw.sample([[1.0, 3.0, 2.0], [4.0, 1.0, 0.0]], temperature=0.7, top_p=0.9, seed=7)
    array([2, 0])
    >>> hw.sample([1.0, 3.0, 2.0], num_samples=3, replacement=False, seed=7)
    array([2, 1, 0])
    """
    run = prepare(logits, params, **options)
    replacement = _check.boolean(replacement, "replacement")
    draws = () if num_samples is None else (_check.integer(num_samples, "num_samples", 1, 2**31 - 1),)
    tokens = np.empty((*run.lead, *draws), np.int64)
    run(tokens=tokens, draws=math.prod(draws), replacement=replacement, **run.source(*draws))
    return int(tokens) if not tokens.ndim else run.operand.wrap(tokens, "int64")


@typing.overload
def probabilities(
    logits: NumPyLike, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
) -> NDArray[Any]: ...
@typing.overload
def probabilities(
    logits: Tensor, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
) -> Tensor: ...
@_check.public
@shows_sampling_options
def probabilities(logits: AnyArray, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]) -> Any:
    """Return the distribution that `sample` draws from, exactly.

    Args:
        logits: (V,) or (..., V), as `sample` takes them.
        params: options that many calls share; a keyword wins over what params say of it.
        **options: those of `SamplingParams`; seed and position matter to xtc's coin alone.

    Returns:
        (..., V), the kind of array that logits are: float32, or float64 for float64 logits. A removed token has 0.

    Raises:
        TypeError, ValueError: as `sample`.

    >>> import headway as hw
    >>> hw.probabilities([3.0, 2.0, 1.0], temperature=0.5, top_k=2).round(4)
    array([0.8808, 0.1192, 0.    ])
    """
    run = prepare(logits, params, **options)
    dtype = _arrays.compute_dtype(run.operand.dtype)
    out = np.empty(run.data.shape, dtype)
    run(probabilities=out, **run.coin())
    return run.operand.wrap(out, dtype)


@typing.overload
def filter_logits(
    logits: NumPyLike, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
) -> NDArray[Any]: ...
@typing.overload
def filter_logits(
    logits: Tensor, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
) -> Tensor: ...
@_check.public
@shows_sampling_options
def filter_logits(logits: AnyArray, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]) -> Any:
    """Return the logits plus logit_bias, with -inf where a stage removed the token.

    They are not divided by the temperature, which only has its part in what top_p and min_p remove: sampling them at
    the same temperature draws the same token.

    Args:
        logits: (V,) or (..., V), as `sample` takes them.
        params: options that many calls share; a keyword wins over what params say of it.
        **options: those of `SamplingParams`; seed and position matter to xtc's coin alone.

    Returns:
        (..., V), the kind of array that logits are and of their dtype. With a logit_bias they are the sums that decide,
        float32, or float64 for float64 logits.

    Raises:
        TypeError, ValueError: as `sample`.

    >>> import headway as hw
    >>> hw.filter_logits([3.0, 2.0, 1.0], temperature=0.5, top_p=0.9)
    array([  3.,   2., -inf])
    """
    run = prepare(logits, params, **options)
    dtype = run.operand.dtype if run.settings.logit_bias is None else _arrays.compute_dtype(run.operand.dtype)
    out = np.empty(run.data.shape, _arrays.storage(dtype))
    run(filtered=out, **run.coin())
    return run.operand.wrap(out, dtype)
