# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens that a decoder has read, in tensors that are made once.

A pass writes its tokens to the next columns, the same ones in all rows, so that it is one copy;
which position in its row a column holds is kept beside them. Prompts of different lengths leave
columns that no query sees. Letters as in `model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NOWHERE", "Cache", "Store"]

NOWHERE = 2**40  # a position that no query reaches


class Store(NamedTuple):
    """One layer's columns in use: the new ones are the last, or the one in `column_1`."""

    keys_BGJE: Tensor
    values_BGJE: Tensor
    column_1: Tensor | None = None

    def put(self, key_BGSE: Tensor, value_BGSE: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens, rounded to the cache's precision; returns all."""
        dtype = self.keys_BGJE.dtype
        key_BGSE, value_BGSE = key_BGSE.to(dtype), value_BGSE.to(dtype)
        if self.column_1 is not None:
            self.keys_BGJE.index_copy_(2, self.column_1, key_BGSE)
            self.values_BGJE.index_copy_(2, self.column_1, value_BGSE)
            return self.keys_BGJE, self.values_BGJE
        n_new = key_BGSE.shape[2]
        self.keys_BGJE[:, :, -n_new:], self.values_BGJE[:, :, -n_new:] = key_BGSE, value_BGSE
        return self.keys_BGJE, self.values_BGJE


@dataclass
class Cache:
    """Of B rows.

    Args:
        keys, values: one tensor [B, G, J, E] per layer.
        position_BJ: int64, where in its row a column's token stands; `NOWHERE` if it has none.
        next_B: int64, the position of each row's next token.
        used: columns in use, or those that `fix` has fixed.
        column_1: int64, the last column that was written, after `fix`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    position_BJ: Tensor
    next_B: Tensor
    used: int = 0
    column_1: Tensor | None = None
    written: int = 0

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int, int], n_layers: int, *, dtype: torch.dtype,
        device: torch.device,
    ) -> Cache:  # fmt: skip
        """`shape`: B, G, J, E."""
        keys, values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
            for _ in range(2)
        )
        position_BJ = torch.full((shape[0], shape[2]), NOWHERE, device=device)
        return cls(keys, values, position_BJ, torch.zeros_like(position_BJ[:, 0]))

    def grow(self, ahead_1S: Tensor) -> tuple[Tensor, Tensor]:
        """Room for the next tokens: their positions [B, S], and those of all columns in use.

        The first tokens stand in all rows where they stand ahead: both are `ahead_1S` then.

        Args:
            ahead_1S: int64, how far each token stands ahead of `next_B`.

        Raises:
            ValueError: no room, or gradients are on.
        """
        n_new = ahead_1S.shape[1]
        if torch.is_grad_enabled():
            raise ValueError(
                "expected gradients off with a cache, got them on; "
                "use torch.no_grad(), or leave the cache out to train"
            )
        position_BS = self.next_B[:, None] + ahead_1S
        if self.column_1 is not None:
            self.column_1 += 1
            self.position_BJ.index_copy_(1, self.column_1, position_BS)
            self.next_B += 1
        else:
            self._check_room(self.used + n_new)
            self.used += n_new
            self.position_BJ[:, self.used - n_new : self.used] = position_BS
            self.next_B = self.next_B + n_new
            if self.used == n_new:
                return ahead_1S, ahead_1S
        return position_BS, self.position_BJ[:, : self.used]

    def fix(self, step: int) -> int:
        """Before a pass of one token a row, which then changes no shape and no address.

        From now on passes see a multiple of `step` columns, or all that there are; the number is
        returned. They are visible once they are written.
        """
        if self.column_1 is None:
            self.written = self.used
            self.column_1 = torch.tensor([self.used - 1], device=self.next_B.device)
        self.written += 1
        self._check_room(self.written)
        self.used = min(self.position_BJ.shape[1], -(-self.written // step) * step)
        return self.used

    def _check_room(self, needed: int) -> None:
        room = self.position_BJ.shape[1]
        if needed > room:
            raise ValueError(
                f"expected at most {room} tokens a row, the length of the cache, got "
                f"{needed}; make a longer one with empty_cache"
            )

    def store(self, layer: int) -> Store:
        """For the tokens that `grow` made room for."""
        keys, values = (side[layer][:, :, : self.used] for side in (self.keys, self.values))
        return Store(keys, values, self.column_1)

    def cut(self, length_B: Tensor) -> None:
        """Only the first `length_B` tokens of each row stay visible; the next one follows them."""
        self.position_BJ.masked_fill_(self.position_BJ >= length_B[:, None], NOWHERE)
        self.next_B = length_B

    def fill(self, rows_K: Tensor, other: Cache, from_K: Tensor) -> None:
        """Rows of another cache, copied into some of this one's; both int64."""
        used = other.used
        for mine, theirs in zip(
            (*self.keys, *self.values), (*other.keys, *other.values), strict=True
        ):
            mine[rows_K, :, :used] = theirs[from_K, :, :used]
        self.position_BJ[rows_K, :used] = other.position_BJ[from_K, :used]
        self.next_B[rows_K] = other.next_B[from_K]
        self.used = max(self.used, used)

    def keep(self, rows_K: Tensor) -> None:
        """Only these rows (int64, ascending) stay, moved to the front."""
        n, used = len(rows_K), self.used
        for side in (self.keys, self.values):
            for i, rows_BGJE in enumerate(side):
                rows_BGJE[:n, :, :used] = rows_BGJE[rows_K, :, :used]
                side[i] = rows_BGJE[:n]
        self.position_BJ, self.next_B = self.position_BJ[rows_K], self.next_B[rows_K]
