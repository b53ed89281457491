"""Every layer type on every base, and what is tried on each: "works", or "refused" if that is the promise.

Operations fail where the outcome is anything else: a wrong number, another error, a model changed by a refusal.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dvora
from dvora import DVoRAConfig
from tests.peft import bases
from tests.peft.dense_weights import DenseModel, gradients_by_parameter
from tests.peft.layer_cases import CASES
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import same_bits, train_vectors

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.08, torch.float16: 0.01}
PAIRS = [
    *((layer, base) for layer in CASES for base in DTYPES),
    *(("Linear", base) for base in bases.QUANTISED),
]


class Subject(NamedTuple):
    layer: str
    base_name: str
    groups: int = 1
    """Of columns, each with a lambda_d of its own."""

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
        if self.quantised:
            return bases.quantised(bases.wide(), self.base_name)
        return CASES[self.layer].base(self.dtype)

    def x(self) -> Tensor:
        if self.quantised:
            return torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(self.dtype)
        return CASES[self.layer].inputs(self.dtype)

    def config(self, **settings: Any) -> DVoRAConfig:
        settings = {"lambda_d_groups": self.groups, **settings}
        if self.quantised:
            return DVoRAConfig(**{"r": 5, "target_modules": ["lin0", "lin1", "lin2"], **settings})
        return CASES[self.layer].config(**settings)

    def adapted(self, **settings: Any) -> PeftModel:
        """The base with an adapter as if trained, in evaluation mode."""
        model = get_peft_model(self.base(), self.config(**settings)).eval()
        train_vectors(model)
        return model

    def dense(self, model: PeftModel, adapter_names: tuple[str, ...] = ("default",)) -> DenseModel:
        if self.quantised:
            return bases.dense_twin(model, bases.wide(), self.base_name, adapter_names)
        return DenseModel(self.base(), model, adapter_names)

    def close(self, actual: Tensor, expected: Tensor) -> bool:
        return worst_difference(actual, expected) <= self.tolerance

    def gradients_agree(self, model: PeftModel) -> bool:
        dense = self.dense(model)
        outputs = dense(self.x())
        weights = torch.linspace(-1, 2, outputs.numel(), dtype=torch.float64).view_as(outputs)
        (outputs * weights).sum().backward()
        (model(self.x()).double() * weights).sum().backward()
        expected = dense.gradients()
        found = gradients_by_parameter(model)
        return all(worst_difference(found[name], expected[name]) <= 2 * self.tolerance for name in found)


def second(model: PeftModel, subject: Subject, name: str = "second") -> None:
    model.add_adapter(name, copy.deepcopy(subject.config()))
    train_vectors(model, name, seed=1)


WORKS, REFUSED, BASE_CANNOT = "works", "refused", "the base cannot"
READ_LAYERS = ("MultiheadAttention", "TransformerEncoderLayer", "experts", "Mixtral")
"""Beginnings and parts of the names of layers with weights that their modules read."""
NO_BACKWARD = ("torchao_int8_dynamic", "inference_only")


def is_read(subject: Subject) -> bool:
    """Whether some weight of the layer is read instead of a layer called."""
    return any(part in subject.layer for part in READ_LAYERS)


@torch.no_grad()
def identity(subject: Subject) -> str:
    base, x = subject.base(), subject.x()
    model = get_peft_model(subject.base(), subject.config()).eval()
    with model.disable_adapter():
        expected = model(x)
    assert same_bits(model(x), expected)
    assert subject.quantised or same_bits(expected, base(x))
    return WORKS


@torch.no_grad()
def outputs(subject: Subject) -> str:
    model = subject.adapted()
    assert subject.close(model(subject.x()), subject.dense(model)(subject.x()))
    with model.disable_adapter():
        unadapted = model(subject.x())
    assert not subject.close(model(subject.x()), unadapted)
    return WORKS


def gradients(subject: Subject) -> str:
    model = subject.adapted()
    if subject.base_name in NO_BACKWARD:
        before = snapshot(model)
        with pytest.raises(RuntimeError, match="has no backward pass"):
            model(subject.x())
        assert_unchanged(model, before)
        return REFUSED
    assert subject.gradients_agree(model)
    return WORKS


@torch.no_grad()
def merging(subject: Subject) -> str:
    model, x = subject.adapted(), subject.x()
    expected, before = model(x), snapshot(model)
    refusal = {
        subject.quantised: (TypeError, "keeps its weight in a format of its own"),
        "weight_norm" in subject.layer: (TypeError, "parametrized"),
        "tied" in subject.layer: (ValueError, "its weight is tied"),
    }.get(True)
    if refusal:
        error, message = refusal
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(error, match=message):
                merge()
        assert_unchanged(model, before)
        return REFUSED
    _merge_quietly(model)
    assert subject.close(model(x), expected)
    model.unmerge_adapter()
    assert_unchanged(model, before)
    assert same_bits(model(x), expected)
    return WORKS


@torch.no_grad()
def saving(subject: Subject) -> str:
    model, x = subject.adapted(), subject.x()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        for lean in (False, True):
            loaded = PeftModel.from_pretrained(subject.base(), folder, low_cpu_mem_usage=lean).eval()
            assert same_bits(loaded(x), model(x))
    return WORKS


@torch.no_grad()
def several_adapters(subject: Subject) -> str:
    model, x = subject.adapted(), subject.x()
    second(model, subject)
    model.base_model.set_adapter(["default", "second"])
    model.set_strength(0.3, "second")
    assert subject.close(model(x), subject.dense(model, ("default", "second"))(x))
    model.set_strength(0.0)
    with model.disable_adapter():
        expected = model(x)
    assert same_bits(model(x), expected)
    return WORKS


@torch.no_grad()
def adapter_by_row(subject: Subject) -> str:
    model, x = subject.adapted(), subject.x()
    second(model, subject)
    names = ["second", "default", "__base__", "second"]
    if is_read(subject):
        before = snapshot(model)
        with pytest.raises(ValueError, match="adapter_names needs a layer that is called row by row"):
            model(x, adapter_names=names)
        assert_unchanged(model, before)
        return REFUSED
    mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(x[row : row + 1])
        else:
            model.set_adapter(name)
            expected = model(x[row : row + 1])
        assert subject.close(mixed[row : row + 1], expected)
    return WORKS


@torch.no_grad()
def hot_swap(subject: Subject) -> str:
    model, other, x = subject.adapted(), subject.adapted(), subject.x()
    train_vectors(other, seed=2)
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder, save_embedding_layers=False)
        vectors = dict(model.named_parameters())
        dvora.hotswap_adapter(model, folder)
    assert all(parameter is vectors[name] for name, parameter in model.named_parameters())
    assert same_bits(model(x), other(x))
    return WORKS


def copying(subject: Subject) -> str:
    model, x = subject.adapted(), subject.x()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert same_bits(twin(x), model(x))
        train_vectors(twin, seed=3)
        assert not same_bits(twin(x), model(x))
    return WORKS


def compiling(subject: Subject) -> str:
    def compiled(model: nn.Module) -> Tensor:
        torch.compiler.reset()
        with torch.no_grad():
            return torch.compile(model, backend="aot_eager", fullgraph=True)(subject.x())

    return as_of_the_base(compiled, subject, subject.adapted())


def exporting(subject: Subject) -> str:
    def exported(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.export.export(model, (subject.x(),)).module()(subject.x())

    return as_of_the_base(exported, subject, subject.adapted().requires_grad_(False))


def as_of_the_base(way: Callable[[nn.Module], Tensor], subject: Subject, model: nn.Module) -> str:
    """Outputs that are computed in another way; a failure counts unless the base has it too, which takes seconds."""
    try:
        result = way(model)
    except Exception:
        if possible(way, subject.base()):
            raise
        return BASE_CANNOT
    with torch.no_grad():
        assert subject.close(result, model(subject.x()))
    return WORKS


def checkpointing(subject: Subject) -> str:
    if subject.base_name in NO_BACKWARD:
        return gradients(subject)
    model, x = subject.adapted(), subject.x()
    found = []
    for reentrant in (None, False, True):
        model.zero_grad()
        # Reentrant checkpoints ask for an input with a gradient, which indices cannot have.
        inputs = x.clone().requires_grad_() if x.is_floating_point() else x
        if reentrant is None or (reentrant and not x.is_floating_point()):
            model(inputs).double().square().sum().backward()
        else:
            checkpoint(model, inputs, use_reentrant=reentrant).double().square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert all(subject.close(value, found[0][name]) for each in found[1:] for name, value in each.items())
    return WORKS


def autocast(subject: Subject) -> str:
    if subject.base_name in NO_BACKWARD:
        return gradients(subject)

    def trained(model: nn.Module) -> Tensor:
        x = subject.x()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(x.requires_grad_() if x.is_floating_point() else x)
        if result.requires_grad:
            result.float().sum().backward()
        return result.detach()

    if not possible(trained, subject.base()):
        return BASE_CANNOT
    model = subject.adapted()
    result, expected = trained(model).double(), subject.dense(model)(subject.x()).detach()
    assert float((result - expected).norm() / expected.norm()) < 0.05
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    return WORKS


@torch.no_grad()
def offloading(subject: Subject) -> str:
    def offloaded() -> nn.Module:
        return cpu_offload(subject.base(), execution_device=torch.device("cpu"))

    if not possible(lambda base: base(subject.x()), offloaded):
        return BASE_CANNOT
    plain = subject.adapted()
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder, save_embedding_layers=False)
        base = offloaded()
        if is_read(subject):
            before = snapshot(base)
            with pytest.raises(ValueError, match="the base weight is on the meta device"):
                PeftModel.from_pretrained(base, folder)
            assert_unchanged(base, before)
            return REFUSED
        model = PeftModel.from_pretrained(base, folder).eval()
    # Without offloading the base and the update may be one product.
    torch.testing.assert_close(model(subject.x()), plain(subject.x()))
    return WORKS


def possible(run: Callable[[nn.Module], object], base: nn.Module | Callable[[], nn.Module]) -> bool:
    """Whether something can be done with the base model alone; if it cannot, no adapter is to blame."""
    try:
        run(base if isinstance(base, nn.Module) else base())
    except Exception:
        return False
    return True


def _merge_quietly(model: PeftModel) -> None:
    # In half precision the warning of what rounding took is the promise, and tested elsewhere.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dvora.MergePrecisionWarning)
        model.merge_adapter()


OPERATIONS: dict[str, Callable[[Subject], str]] = {
    "starts as the base": identity,
    "outputs": outputs,
    "gradients": gradients,
    "merge, unmerge": merging,
    "save, load": saving,
    "several at once, strength": several_adapters,
    "an adapter a row": adapter_by_row,
    "hot swap": hot_swap,
    "deepcopy": copying,
    "torch.compile": compiling,
    "torch.export": exporting,
    "gradient checkpointing": checkpointing,
    "autocast": autocast,
    "CPU offload": offloading,
}
