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
        """Begin with no token. dtype and capacity matter to the compiled library; here all is float64."""
        self.keys = np.zeros((*batch_shape, num_kv_heads, 0, head_dim))
        self.values = np.zeros((*batch_shape, num_kv_heads, 0, head_dim if value_dim is None else value_dim))

    def append(self, k: ArrayLike, v: ArrayLike) -> None:
        """Add the keys (..., G, L, D) and the values (..., G, L, E) of L more tokens."""
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
        """Attend from q to all that was appended; by default the last query stands at the last token."""
        settings: Options = {"causal": "bottom_right", **options}
        return attention(q, self.keys, self.values, sinks=sinks, return_lse=return_lse, **settings)

    def __len__(self) -> int:
        """Count the tokens held."""
        return self.keys.shape[-2]

    def truncate(self, n: int) -> None:
        """Keep the first n tokens."""
        self.keys, self.values = self.keys[..., :n, :], self.values[..., :n, :]

    def fork(self) -> KVCache:
        """Make a second cache that holds the same and goes its own way from here."""
        twin = KVCache(0, 0)
        twin.keys, twin.values = self.keys, self.values
        return twin
