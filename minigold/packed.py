# SPDX-License-Identifier: Apache-2.0
"""A module's matrices, copied into the layout in which a CPU reads them fastest for few rows.

Decoding multiplies a few rows by every matrix of a model, so that reading the matrices is most of
its time; torch's plain layout takes up to twice as long. While `packed` is open, a `Linear` takes
its copy for the products of single tokens: once more the memory of the weights.

Only on x86 CPUs in float32. Torch has these products for its compiler alone, under private names:
where they are missing, all works as before. Under autocast the copy of a frozen matrix is one in the
lower precision: autocast itself keeps those of trained matrices alone, and makes the others each time.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PACKS", "PACK_FROM", "Linear", "pack", "packed", "product"]

PACK_FROM = 32  # steps of decoding that pay for the copies; fewer do not
FEW = 32  # rows for which the layout is chosen; it serves others as well
REORDER = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
MULTIPLY = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
PACKS = bool(
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and REORDER
    and MULTIPLY
)


class Linear(nn.Linear):
    """`nn.Linear`, with a packed copy of its weight or None."""

    packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, out] of [B, S, in]; the copy is used where S is 1."""
        return product(x, self.weight, self.bias, self.packed if x.shape[1] == 1 else None)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, copy: Tensor | None) -> Tensor:
    """`F.linear`, by the packed copy of the weight if there is one; without gradients then."""
    if copy is None:
        return F.linear(x, weight, bias)
    if not copy.is_mkldnn:
        return F.linear(x, copy, bias)
    found: Tensor = MULTIPLY(x, copy, bias, "none", [], "")  # type: ignore[misc]
    return found


def pack(weight: Tensor) -> Tensor | None:
    """The copy of a matrix [out, in], or None where there is no faster layout."""
    kind = weight.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return None if weight.requires_grad else weight.to(torch.get_autocast_dtype(kind))
    if not PACKS or kind != "cpu" or weight.dtype != torch.float32:
        return None
    found: Tensor = REORDER(weight.detach(), FEW)  # type: ignore[misc]
    return found


@contextmanager
def packed(module: nn.Module) -> Iterator[None]:
    """Copies for every `Linear` in a module, as long as this is open; no weight may change then."""
    layers = [one for one in module.modules() if isinstance(one, Linear)]
    try:
        for layer in layers:
            layer.packed = pack(layer.weight)
        yield
    finally:
        for layer in layers:
            layer.packed = None
