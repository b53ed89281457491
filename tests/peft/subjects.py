"""Every pair of a layer type and a base that the table of what works has a row for, ready to be tried."""

import copy
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from tests.peft import bases
from tests.peft.dense_weights import DenseModel, gradients_by_parameter
from tests.peft.layer_cases import CASES
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import train_vectors

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.08, torch.float16: 0.01}
PAIRS = [
    *((layer, base) for layer in CASES for base in DTYPES),
    *(("Linear", base) for base in bases.QUANTISED),
]


class Subject(NamedTuple):
    """One layer type on one base."""

    layer: str
    base_name: str

    @property
    def quantised(self) -> bool:
        """Whether the base keeps no weight of numbers."""
        return self.base_name in bases.BASES and self.base_name not in DTYPES

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs and outputs."""
        return bases.BASES[self.base_name].dtype if self.quantised else DTYPES[self.base_name]

    @property
    def tolerance(self) -> float:
        """Of outputs and gradients relative to their largest value, against float64."""
        if self.quantised:
            base = bases.BASES[self.base_name]
            return 3 * max(base.tolerance, base.eval_tolerance, TOLERANCES[base.compute])
        return TOLERANCES[self.dtype]

    def base(self) -> nn.Module:
        """The model that is adapted."""
        if self.quantised:
            return bases.quantised(bases.wide(), self.base_name)
        return CASES[self.layer].base(self.dtype)

    def x(self) -> Tensor:
        """Its inputs."""
        if self.quantised:
            return torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(self.dtype)
        return CASES[self.layer].inputs(self.dtype)

    def config(self, **settings: Any) -> DVoRAConfig:
        """Settings that adapt it."""
        if self.quantised:
            return DVoRAConfig(**{"r": 5, "target_modules": ["lin0", "lin1", "lin2"], **settings})
        return CASES[self.layer].config(**settings)

    def adapted(self, **settings: Any) -> PeftModel:
        """The base with an adapter as if trained, in evaluation mode."""
        model = get_peft_model(self.base(), self.config(**settings)).eval()
        train_vectors(model)
        return model

    def dense(self, model: PeftModel, adapter_names: tuple[str, ...] = ("default",)) -> DenseModel:
        """The dense float64 model with the adapters of an adapted one."""
        if self.quantised:
            return bases.dense_twin(model, bases.wide(), self.base_name, adapter_names)
        return DenseModel(self.base(), model, adapter_names)

    def close(self, actual: Tensor, expected: Tensor) -> bool:
        """Whether outputs agree as far as the base's precision goes."""
        return worst_difference(actual, expected) <= self.tolerance

    def gradients_agree(self, model: PeftModel) -> bool:
        """Whether the gradients of all vectors agree with those of the dense model."""
        dense = self.dense(model)
        outputs = dense(self.x())
        weights = torch.linspace(-1, 2, outputs.numel(), dtype=torch.float64).view_as(outputs)
        (outputs * weights).sum().backward()
        (model(self.x()).double() * weights).sum().backward()
        expected = dense.gradients()
        found = gradients_by_parameter(model)
        return all(worst_difference(found[name], expected[name]) <= 2 * self.tolerance for name in found)


def second(model: PeftModel, subject: Subject, name: str = "second") -> None:
    """Add another adapter as if trained."""
    model.add_adapter(name, copy.deepcopy(subject.config()))
    train_vectors(model, name, seed=1)
