"""AdamW for many adapters that are rows of one parameter: each with its own state, steps, learning rate and clipping.

A step moves the adapters that a gradient has come for since the last one, and no others: for each it is the step that
`torch.optim.AdamW` would take for that adapter alone. An adapter whose gradient is not finite is stopped, and keeps its
values.

Dimensions: N adapters, n that step, S values of an adapter's vectors, H of its heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import checked_not_negative
from ..tensors import Float
from ..training import GROUPS, HEAD_RATE, LAMBDA_RATE, Group, magnitude_rate
from .training import TrainableAdapters


class TenantAdamW(torch.optim.Optimizer):
    """AdamW, adapter by adapter.

    Args:
        adapters: in training.
        learning_rate: of lambda_b and lambda_d, and what schedulers change.
        learning_rates: by kind ("magnitude", "lambda_b", "lambda_d", "head"); what is left out is as
            `dvora.training.recommended_rates` has it.
        shares: factors on all rates of an adapter, by name; one for those left out.
        betas, eps, weight_decay: as for `torch.optim.AdamW`; magnitudes do not decay.
        max_grad_norm: clips the norm of each adapter's own gradient; None does not.

    Raises:
        ValueError: a number is negative or not finite, or a kind or a name is unknown.
    """

    def __init__(
        self,
        adapters: TrainableAdapters,
        learning_rate: float = LAMBDA_RATE,
        *,
        learning_rates: Mapping[Group, float] | None = None,
        shares: Mapping[str, float] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        self.adapters = adapters
        for kind, rate in (learning_rates or {}).items():
            if kind not in GROUPS:
                raise ValueError(f"learning_rates names {kind!r}, expected some of {', '.join(GROUPS)}")
            checked_not_negative(rate, f"learning_rates[{kind!r}]")
        if checked_not_negative(learning_rate, "learning_rate") == 0:
            raise ValueError("learning_rate must not be zero; use learning_rates for kinds that are not to change")
        for argument, value in (("eps", eps), ("weight_decay", weight_decay), ("max_grad_norm", max_grad_norm or 0)):
            checked_not_negative(value, argument)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {betas}")
        rates: dict[str, float] = _usual_rates(adapters, learning_rate)
        rates.update({str(kind): rate for kind, rate in (learning_rates or {}).items()})
        defaults = {"lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # In the group, so that a checkpoint has them.
        super().__init__(adapters.parameters(), {**defaults, "max_grad_norm": max_grad_norm, "stopped": {}})
        relative = torch.zeros_like(adapters.vectors[0])
        trained = torch.zeros_like(relative, dtype=torch.bool)
        for vector in adapters.config.train:
            trained |= adapters.values_of(vector)
            relative[adapters.values_of(vector)] = rates[vector] / learning_rate
        decays = torch.where(adapters.values_of("magnitude"), 0.0, 1.0)
        heads = torch.full_like(adapters.heads[0], rates["head"] / learning_rate, dtype=torch.float32)
        self._relative = {adapters.vectors: (relative, decays), adapters.heads: (heads, torch.ones_like(heads))}
        self._trained = {adapters.vectors: trained, adapters.heads: torch.ones_like(heads, dtype=torch.bool)}
        self._shares = torch.ones(len(adapters.names), 1, device=adapters.vectors.device)
        for name, share in (shares or {}).items():
            self._shares[adapters.place(name)] = checked_not_negative(share, f"shares[{name!r}]")

    @property
    def stopped(self) -> dict[str, int]:
        """Adapters whose gradient was not finite, and after how many steps of their own."""
        (group,) = self.param_groups
        return dict(group["stopped"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, and for which adapters they came."""
        self.adapters.stepped.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every adapter that a gradient has come for since the last step.

        Args:
            closure: computes the loss again, with gradients; None takes the gradients that there are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stopped = {self.adapters.place(name) for name in self.stopped}
        places = torch.tensor(sorted(self.adapters.stepped - stopped), dtype=torch.long, device=self._shares.device)
        self.adapters.stepped.clear()
        (group,) = self.param_groups
        with_gradient = [p for p in group["params"] if p.grad is not None]
        if not with_gradient or not len(places):
            return loss
        gradients = {p: torch.where(self._trained[p], p.grad.index_select(0, places), 0.0) for p in with_gradient}
        norms = torch.stack([g.float().square().sum(1) for g in gradients.values()]).sum(0).sqrt()
        finite = norms.isfinite()
        self._stop(places[~finite].tolist())
        most = group["max_grad_norm"]
        clip = torch.ones_like(norms) if most is None else (most / (norms + 1e-6)).clamp(max=1.0)
        for parameter, gradient in gradients.items():
            self._step(parameter, gradient[finite] * clip[finite, None].to(gradient.dtype), places[finite], group)
        return loss

    def _step(
        self, parameter: nn.Parameter, gradient: Float[Tensor, "n S"], places: Tensor, group: dict[str, Any]
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(len(parameter), 1, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        (beta1, beta2), (relative, decays) = group["betas"], self._relative[parameter]
        state["step"][places] += 1
        steps = state["step"][places]
        mean = torch.lerp(state["exp_avg"][places], gradient, 1 - beta1)
        square = (state["exp_avg_sq"][places] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"][places], state["exp_avg_sq"][places] = mean, square
        rates = group["lr"] * self._shares[places] * relative
        decayed = parameter[places] * (1 - rates * group["weight_decay"] * decays)
        root = (square / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        parameter[places] = (decayed - rates / (1 - beta1**steps) * mean / root).to(parameter.dtype)

    def _stop(self, places: list[int]) -> None:
        state, (group,) = self.state[self.adapters.vectors], self.param_groups
        for place in places:
            name, steps = self.adapters.names[place], int(state["step"][place]) if state else 0
            # Another dictionary: a checkpoint may hold the one before.
            group["stopped"] = {**group["stopped"], name: steps}
            warnings.warn(
                f"adapter {name!r} has a gradient that is not finite after {steps} steps; it is stopped with the "
                "values that it has, and the others go on",
                stacklevel=4,
            )


def _usual_rates(adapters: TrainableAdapters, learning_rate: float) -> dict[str, float]:
    """Those of `recommended_rates`, from the base's rows, which all adapters share."""
    magnitude = magnitude_rate(torch.cat([layer.adapted.w for layer in adapters.served.layers]), learning_rate)
    return {"magnitude": magnitude, "lambda_b": learning_rate, "lambda_d": learning_rate, "head": HEAD_RATE}
