"""A graph would keep the adapters of one batch, or none: a bank's model is refused wherever one is recorded."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import dvora
from tests.bank.tenants import HEADED, LLAMA, tenants
from tests.peft.kinds import Kind
from tests.peft.tiny import inputs, outputs

pytestmark = pytest.mark.usefixtures("compiler")
REFUSED = "a model in an AdapterBank cannot be compiled, exported, traced or transformed"


def compiled(model: nn.Module, how: str) -> Any:
    """The model compiled whole, or each of its children, or each of its linear layers."""
    if how == "whole":
        return torch.compile(model, backend="eager", dynamic=False)
    for module in model.children() if how == "children" else model.modules():
        if how == "children" or isinstance(module, nn.Linear):
            module.compile(backend="eager", dynamic=False)
    return model


# What takes a second: all ways of one model; of another with attention the two that differ most.
WAYS = [(HEADED, how, before, before) for how in ("whole", "children", "layers") for before in (True, False)]
WAYS += [(LLAMA, "whole", True, False), (LLAMA, "children", False, True)]


@pytest.mark.parametrize(("kind", "how", "before", "outside_first"), WAYS)
def test_a_compiled_model_never_answers(
    kind: Kind, how: str, before: bool, outside_first: bool, tmp_path: Path
) -> None:
    """Compiled before the bank is made or after, called outside of a batch first or within one."""
    these, base = tenants(kind, tmp_path, 2), kind.base().eval().requires_grad_(False)
    model = compiled(base, how) if before else base
    rows = len(outputs(model))
    with dvora.AdapterBank(base, like=these.path("a")) as bank:
        bank.add("a", these.path("a"))
        model = model if before else compiled(base, how)
        for outside in (outside_first, not outside_first):
            for _ in range(2):
                batch = nullcontext() if outside else bank.rows(["a"] * rows)
                with pytest.raises(RuntimeError, match=REFUSED), batch:
                    outputs(model)
    # Without the bank it is a model again.
    assert torch.equal(outputs(model), outputs(kind.base().eval()))


RECORDED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "one graph": lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
    "torch.export": lambda model, x: torch.export.export(model, (x,)),
    "strict torch.export": lambda model, x: torch.export.export(model, (x,), strict=True),
    "make_fx": lambda model, x: make_fx(model)(x),
    "torch.func": lambda model, x: torch.func.vmap(model)(x),
}


@pytest.mark.parametrize("how", RECORDED)
def test_what_would_record_a_batch_is_refused_and_the_batch_goes_on(how: str, tmp_path: Path) -> None:
    these = tenants(HEADED, tmp_path, 2)
    with these.bank() as served, torch.no_grad(), served.bank.rows(["a", "b"]):
        x = inputs(served.model, 2)["x"]
        before = served.model(x)
        with pytest.raises(Exception, match=REFUSED):
            RECORDED[how](served.model, x)
        assert torch.equal(served.model(x), before)


def test_training_is_refused_too(tmp_path: Path) -> None:
    these = tenants(HEADED, tmp_path, 2)
    with these.bank() as served:
        model, trained = compiled(served.model, "whole"), served.bank.trainable(["a"])
        with pytest.raises(RuntimeError, match=REFUSED), trained.rows(["a"] * 2):
            model(**inputs(served.model, 2))
