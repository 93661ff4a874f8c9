"""One token for each row, and the distribution that it is drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np

from .call import through_stages
from .masses import AnyArray, floats
from .rng import draw_from


def sample(
    logits: Any, params: Any = None, *, num_samples: int | None = None, replacement: bool = True, **options: Any
) -> Any:
    """Draw one token for each row of logits, or several.

    Args:
        logits: (..., V).
        params: `headway.SamplingParams`, or None.
        num_samples: how many tokens to draw for each row; None draws one and adds no axis.
        replacement: whether a token that was drawn may be drawn again.
        **options: those of `headway.SamplingParams`.

    Returns:
        The id of the token: an int for (V,), else int64 (...), or (..., n) for n samples.

    Raises:
        ValueError: NaN or +inf in the logits, or a row in which every token is banned.

    >>> from headway import reference
    >>> reference.sample([1.0, 3.0, 2.0], temperature=0)
    1
    >>> reference.sample([1.0, 3.0, 2.0], uniform=0.05)  # the interval of token 0 is [0, 0.09)
    0
    >>> reference.sample([1.0, 3.0, 2.0], uniform=0.05, num_samples=3, replacement=False)
    array([0, 1, 2])
    """
    array = floats(logits)
    n = 1 if num_samples is None else num_samples
    shape = array.shape[:-1] if num_samples is None else (*array.shape[:-1], n)
    uniform = options.get("uniform", getattr(params, "uniform", None))
    if uniform is not None:
        uniform = np.broadcast_to(np.asarray(uniform, np.float64), shape).reshape(*array.shape[:-1], n)
        options["uniform"] = uniform[..., 0]
        uniform = uniform.reshape(-1, n)
    tokens = []
    for i, row in enumerate(through_stages(array, params, options)):
        masses = row.final_masses()
        for j in range(n):
            word = row.words(j)[0] if uniform is None else int(uniform[i, j] * 2.0**64)
            tokens.append(draw_from(masses, word))
            if not replacement:
                masses[tokens[-1]] = 0
    return tokens[0] if not shape else np.array(tokens, np.int64).reshape(shape)


def masses(logits: Any, params: Any = None, **options: Any) -> AnyArray:
    """Return the whole numbers that `sample` draws by.

    Args:
        logits: (..., V).
        params: `headway.SamplingParams`, or None.
        **options: those of `headway.SamplingParams`.

    Returns:
        int64 (..., V): 2^s for the best token, s being 44, or less where V of them would exceed 2^62; 0 where a token
        was removed.

    Raises:
        ValueError: as `sample`.

    >>> from headway import reference
    >>> reference.masses([3.0, 2.0, 1.0], top_k=2) / 2**44
    array([1.        , 0.36787945, 0.        ])
    """
    array = floats(logits)
    rows = through_stages(array, params, options)
    return np.array([row.final_masses() for row in rows], np.int64).reshape(array.shape)


def probabilities(logits: Any, params: Any = None, **options: Any) -> AnyArray:
    """Return the distribution that `sample` draws from.

    Args:
        logits: (..., V).
        params: `headway.SamplingParams`, or None.
        **options: those of `headway.SamplingParams`.

    Returns:
        (..., V), float32, or float64 for float64 logits.

    Raises:
        ValueError: as `sample`.

    >>> from headway import reference
    >>> reference.probabilities([3.0, 2.0, 1.0], temperature=0.5, top_k=2).round(4)
    array([0.8808, 0.1192, 0.    ])
    """
    array = floats(logits)
    out = np.zeros(array.shape, np.float64 if array.dtype == np.float64 else np.float32)
    for row, target in zip(through_stages(array, params, options), out.reshape(-1, array.shape[-1]), strict=True):
        masses = row.final_masses()
        target[:] = masses.astype(np.float64) / float(masses.sum())
    return out


def filter_logits(logits: Any, params: Any = None, **options: Any) -> AnyArray:
    """Return the logits as given, -inf where a token was removed.

    Args:
        logits: (..., V).
        params: `headway.SamplingParams`, or None.
        **options: those of `headway.SamplingParams`.

    Returns:
        (..., V), in the dtype of logits. With a bias they are z, the numbers that decide: float32, or float64 for
        float64 logits.

    Raises:
        ValueError: as `sample`.

    >>> from headway import reference
    >>> reference.filter_logits([3.0, 2.0, 1.0], temperature=0.5, top_p=0.9)
    array([  3.,   2., -inf])
    """
    array = floats(logits)
    biased = options.get("logit_bias", getattr(params, "logit_bias", None)) is not None
    narrow = biased and array.dtype != np.float64
    out = np.full(array.shape, -np.inf, np.float32 if narrow else array.dtype)
    for row, target in zip(through_stages(array, params, options), out.reshape(-1, array.shape[-1]), strict=True):
        target[row.ids] = row.z if biased else row.given.logits[row.ids]
    return out
