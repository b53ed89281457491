"""A model that was trained for a while is what it was, to the last bit, also if that failed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dvora.recipes.training.fresh_start import as_it_was


class Net(nn.Module):
    """Something frozen, something trained, buffers of all kinds, and one parameter that starts at nan."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        self.unset = nn.Parameter(torch.full((2,), torch.nan))
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.norm.register_buffer("made_by_a_pass", torch.ones(1))
        return self.head(self.norm(self.frozen(x)))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def train(model: nn.Module) -> None:
    """As a trainer does: steps, another `forward`, a mark."""
    before = values(model)
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(3):
        (model(torch.randn(5, 3)).square().sum() + model.unset.sum()).backward()
        optimizer.step()
    model.forward = model.eval().forward
    model.is_prepared = True
    after = values(model)
    changed = {name for name, value in before.items() if not value.equal(after[name])}
    assert changed >= {"norm.running_mean", "norm.num_batches_tracked", "head.weight", "seen"}


def fail(model: nn.Module) -> None:
    train(model)
    raise KeyboardInterrupt


@pytest.mark.parametrize("what", [train, fail])
def test_everything_that_training_changes_is_put_back(what: Callable[[nn.Module], None]) -> None:
    model = Net()
    before, places, attributes = values(model), [id(each) for each in model.parameters()], {*vars(model)}
    try:
        with as_it_was(model):
            what(model)
    except KeyboardInterrupt:
        assert what is fail
    after = values(model)
    assert all(torch.equal(after[name].nan_to_num(7.0), before[name].nan_to_num(7.0)) for name in before)
    assert [id(each) for each in model.parameters()] == places
    assert {*vars(model)} == attributes
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_buffers_that_stay_the_same_are_not_written_to() -> None:
    model = Net()
    version = model.norm.running_mean._version
    with as_it_was(model):
        model.seen += 1
    assert model.norm.running_mean._version == version
    assert model.seen == 0
