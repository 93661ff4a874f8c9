"""The keys and values of a sequence, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..._signatures import Unpack
from .attention import Array, Options, attention


class KVCache:
    """The keys and values of all tokens so far, so that a new token has to compute its own alone.

    `attend` gives for the newest queries what `attention` over the whole sequence gives for them.

    Args:
        num_kv_heads: G.
        head_dim: D.
        value_dim: E; None is D.
        batch_shape: (...), the batch of keys and values.
        dtype: matters to the compiled library alone; here all is float64.
        capacity: matters to the compiled library alone.

    >>> import numpy as np
    >>> from headway import reference
    >>> cache = reference.KVCache(1, 4)
    >>> cache.append(np.zeros((1, 2, 4)), np.ones((1, 2, 4)))
    >>> len(cache), cache.keys.shape
    (2, (1, 2, 4))
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        batch_shape: Sequence[int] = (),
        dtype: DTypeLike = np.float64,
        capacity: int | None = None,
    ) -> None:
        self.keys = np.zeros((*batch_shape, num_kv_heads, 0, head_dim))
        self.values = np.zeros((*batch_shape, num_kv_heads, 0, head_dim if value_dim is None else value_dim))

    def append(self, k: ArrayLike, v: ArrayLike) -> None:
        """Add the keys and the values of L more tokens.

        Args:
            k: (..., G, L, D).
            v: (..., G, L, E).

        >>> import numpy as np
        >>> from headway import reference
        >>> cache = reference.KVCache(1, 2)
        >>> cache.append([[[1.0, 0.0]]], [[[3.0, 4.0]]])
        >>> cache.values
        array([[[3., 4.]]])
        """
        self.keys = np.concatenate([self.keys, np.asarray(k, np.float64)], axis=-2)
        self.values = np.concatenate([self.values, np.asarray(v, np.float64)], axis=-2)

    def attend(
        self,
        q: ArrayLike,
        *,
        sinks: ArrayLike | None = None,
        return_lse: bool = False,
        **options: Unpack[Options],
    ) -> Array | tuple[Array, Array]:
        """Attend from q to all that was appended; by default the last query stands at the last token.

        Args:
            q: (..., H, L, D).
            sinks: as `attention` takes them.
            return_lse: as `attention` takes it.
            **options: those of `scores`; causal is "bottom_right" unless given.

        Returns:
            What `attention` returns.

        >>> import numpy as np
        >>> from headway import reference
        >>> cache = reference.KVCache(1, 2)
        >>> cache.append(np.zeros((1, 2, 2)), [[[1.0, 0.0], [3.0, 4.0]]])
        >>> cache.attend(np.zeros((1, 1, 2)))
        array([[[2., 2.]]])
        """
        settings: Options = {"causal": "bottom_right", **options}
        return attention(q, self.keys, self.values, sinks=sinks, return_lse=return_lse, **settings)

    def __len__(self) -> int:
        """Count the tokens held."""
        return self.keys.shape[-2]

    def truncate(self, length: int) -> None:
        """Keep the first tokens.

        Args:
            length: how many.

        >>> import numpy as np
        >>> from headway import reference
        >>> cache = reference.KVCache(1, 2)
        >>> cache.append(np.zeros((1, 3, 2)), np.zeros((1, 3, 2)))
        >>> cache.truncate(1)
        >>> len(cache)
        1
        """
        self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]

    def fork(self) -> KVCache:
        """Make a second cache that holds the same and goes its own way from here.

        Returns:
            The second cache.

        >>> import numpy as np
        >>> from headway import reference
        >>> cache = reference.KVCache(1, 2)
        >>> twin = cache.fork()
        >>> twin.append(np.zeros((1, 3, 2)), np.zeros((1, 3, 2)))
        >>> len(cache), len(twin)
        (0, 3)
        """
        twin = KVCache(0, 0)
        twin.keys, twin.values = self.keys, self.values
        return twin
