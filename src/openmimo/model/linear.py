"""Modules with an invariant form (see `MiMoModel.set_invariant`), and the linear map of all products."""

from __future__ import annotations

from torch import Tensor, nn

from openmimo.kernels import invariant, products


class HasInvariantForm:
    """`invariant` chooses the form whose bits depend on a token's own operands alone."""

    invariant: bool = False


class Linear(HasInvariantForm, nn.Linear):
    """Without bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., out)."""
        return invariant.linear(input, self.weight) if self.invariant else products.linear(input, self.weight)
