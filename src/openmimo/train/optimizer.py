"""AdamW on fp32 master weights, with the model itself in the compute dtype.

The model is cast once per step, when the new weights are written back, not in every layer of every forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from openmimo.config.train import OptimizerRecipe
from openmimo.kernels import optimizer as kernels
from openmimo.parallel.parts import like, local

if TYPE_CHECKING:
    from openmimo.parallel.ranks import Ranks


class MasterAdamW:
    """AdamW whose weights and moments are fp32 copies of the model's parameters.

    Matrices are decayed; norms and sinks are not. `step` clips the gradient's global norm first and refuses to
    touch anything when it is not finite. `zero_counts` then has, by parameter, how many gradient entries were exactly
    zero: the pass that takes the norm counts them. It is None where that pass is PyTorch's.
    Of parameters that are divided among `ranks`, each updates its part; norm and counts are those of all.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        grad_clip: float = 1.0,
        ranks: Ranks | None = None,
    ) -> None:
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.masters = [local(p.detach()).float().clone().requires_grad_() for p in self.parameters]
        self.grad_clip, self.ranks = grad_clip, ranks
        self.zero_counts: dict[str, int] | None = None
        decayed = [m for m in self.masters if m.ndim >= 2]
        plain = [m for m in self.masters if m.ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)

    @staticmethod
    def from_recipe(model: nn.Module, recipe: OptimizerRecipe, ranks: Ranks | None = None) -> MasterAdamW:
        """For all parameters of the model that learn."""
        return MasterAdamW(
            model.named_parameters(),
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            grad_clip=recipe.grad_clip,
            ranks=ranks,
        )

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """One update; returns the gradient norm before clipping. Does nothing when that norm is not finite."""
        slots = self.slots()
        if slots:
            return self._step_fused(slots, learning_rate)
        self.zero_counts = None
        present = [(m, local(p)) for m, p in zip(self.masters, self.parameters, strict=True) if p.grad is not None]
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if parameter.grad is not None:
                master.grad = local(parameter.grad).to(master.dtype, copy=True)
        norm = nn.utils.get_total_norm([m.grad for m, _ in present if m.grad is not None])
        if self.ranks is not None:
            norm = norm.new_tensor(self._norm_of_all(float(norm)))
        if bool(torch.isfinite(norm)):
            nn.utils.clip_grads_with_norm_([m for m, _ in present], self.grad_clip, norm)
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate
            self.adamw.step()
            for master, parameter in present:
                parameter.copy_(master)
        for master, _ in present:
            master.grad = None
        return float(norm)

    def slots(self) -> list[kernels.Slot]:
        """All parameters with a gradient, as the C++ kernels take them; none where they cannot."""
        present = [
            (m, local(p), local(p.grad))
            for m, p in zip(self.masters, self.parameters, strict=True)
            if p.grad is not None and m.numel()
        ]
        if not kernels.adamw_usable([t for _, *tensors in present for t in tensors]):
            return []
        decay = {id(m): float(g["weight_decay"]) for g in self.adamw.param_groups for m in g["params"]}
        slots: list[kernels.Slot] = []
        for master, parameter, grad in present:
            state = self.adamw.state[master] or {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
            moments = (state["exp_avg"], state["exp_avg_sq"])
            updates = int(state["step"]) + 1
            slots.append(kernels.Slot(parameter, grad, master, *moments, updates, decay[id(master)]))
        return slots

    def _step_fused(self, slots: list[kernels.Slot], learning_rate: float) -> float:
        """The same on the C++ kernels. Moments live in the state of `self.adamw` either way."""
        norm, zeros = kernels.gradient_norm(slots)
        norm = self._norm_of_all(norm)
        parts = {id(slot.master): count for slot, count in zip(slots, zeros, strict=True)}
        self.zero_counts = {
            name: parts.get(id(master), 0)
            for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True)
            if parameter.grad is not None
        }
        if not math.isfinite(norm):
            return norm
        group = self.adamw.param_groups[0]
        factor = min(1.0, self.grad_clip / (norm + 1e-6))
        kernels.adamw_update(
            slots, learning_rate=learning_rate, grad_factor=factor, betas=group["betas"], eps=group["eps"]
        )
        for slot in slots:
            step = torch.tensor(float(slot.num_updates))
            self.adamw.state[slot.master] = {"step": step, "exp_avg": slot.first, "exp_avg_sq": slot.second}
        return norm

    def _norm_of_all(self, norm: float) -> float:
        """From the norm of this rank's parts to that of the whole gradient."""
        return norm if self.ranks is None else math.sqrt(self.ranks.sums(norm * norm)[0])

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters and moments by parameter name, for a checkpoint; divided as the parameters are."""
        tensors: dict[str, Tensor] = {}
        for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
            tensors[f"master.{name}"] = like(master.detach(), parameter)
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"adamw.{key}.{name}"] = like(value, parameter) if value.ndim else value
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor], *, partial: bool = False) -> None:
        """Restore what `state_tensors` gave, and the model's parameters from the masters.

        With `partial`, parameters that the tensors do not know keep their weights and start without moments.
        """
        for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
            if partial and f"master.{name}" not in tensors:
                continue
            master.copy_(local(tensors[f"master.{name}"]))
            local(parameter).copy_(master)
            suffix = f".{name}"
            state = {
                key[len("adamw.") : -len(suffix)]: local(value).to(master.device, copy=True)
                for key, value in tensors.items()
                if key.startswith("adamw.") and key.endswith(suffix) and "." not in key[len("adamw.") : -len(suffix)]
            }
            if state:
                self.adamw.state[master] = state
