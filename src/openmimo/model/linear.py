"""The linear map that the model's products go through."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from openmimo.kernels import invariant


class Linear(nn.Linear):
    """Without bias. `invariant` (see `MiMoModel.set_invariant`) takes sums in an order that no shape changes."""

    invariant = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., out)."""
        return invariant.linear(input, self.weight) if self.invariant else F.linear(input, self.weight)
