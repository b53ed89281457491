"""Versions: whoever uses one keeps it, whatever becomes of its name, and it leaves when nobody does."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

import dvora
from dvora.adapter_file.values import VectorSource
from dvora.bank import UnknownAdapterError, Version
from tests.bank.tenants import HEADED
from tests.bank.versions import Versions, X
from tests.peft.kinds import saved


@dataclass(eq=False)
class Noting(Version):
    """Notes when nobody uses it any more."""

    ended_with: list[str] = field(default_factory=list)

    def ended(self) -> None:
        self.ended_with.append(self.name)


@pytest.fixture(scope="module")
def versions() -> Versions:
    return Versions(3)


@pytest.fixture
def model() -> nn.Module:
    return HEADED.base().requires_grad_(False)


@pytest.fixture
def bank(model: nn.Module, tmp_path: Path) -> Iterator[dvora.AdapterBank]:
    with dvora.AdapterBank(model, slots=1, host_bytes=2000, like=saved(HEADED.trained(), tmp_path / "like")) as bank:
        yield bank


def version(bank: dvora.AdapterBank, versions: Versions, number: int, name: str = "a") -> Noting:
    content = bank.layout.content
    config = HEADED.trained().peft_config["default"]
    return Noting(name, VectorSource(content, config, (1.0,) * len(content.layers), versions.vectors[number]))


@torch.no_grad()
def row_of(bank: dvora.AdapterBank, model: nn.Module, name: str | Version) -> torch.Tensor:
    with bank.rows([name]):
        return model(X[None])[0].double()


def test_a_version_that_is_used_answers_still_and_leaves_after_its_last_user(
    bank: dvora.AdapterBank, model: nn.Module, versions: Versions
) -> None:
    """Also out of its slot and the memory, where another one of the name is now."""
    first, second = version(bank, versions, 0), version(bank, versions, 1)
    with bank.loading(first):
        assert "a" not in bank
    with bank.using("a") as held, bank.using("a") as again:
        assert held is again is first is bank.version("a")
        with bank.loading(second):
            assert bank.version("a") is first
        for _ in range(2):
            torch.testing.assert_close(row_of(bank, model, "a"), versions.expected[1], atol=2e-5, rtol=0)
            torch.testing.assert_close(row_of(bank, model, first), versions.expected[0], atol=2e-5, rtol=0)
        bank.remove("a")
        torch.testing.assert_close(row_of(bank, model, first), versions.expected[0], atol=2e-5, rtol=0)
        assert (first.ended_with, second.ended_with) == ([], ["a"])
    assert (first.ended_with, first.users) == (["a"], 0)
    with pytest.raises(UnknownAdapterError, match=r"'a' has left the bank; hold it with bank\.using"):
        row_of(bank, model, first)
    with pytest.raises(UnknownAdapterError, match="there is no adapter 'a'"), bank.using("a"):
        pass
    assert bank.stats().host_adapters == 0


def test_a_running_batch_is_a_user(bank: dvora.AdapterBank, model: nn.Module, versions: Versions) -> None:
    with bank.loading(first := version(bank, versions, 0)):
        pass
    with bank.rows(["a"]):
        bank.replace("a", versions.vectors[1])
        assert first.ended_with == []
    assert first.ended_with == ["a"]
    torch.testing.assert_close(row_of(bank, model, "a"), versions.expected[1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("read", [True, False])
def test_what_fails_while_it_is_loaded_was_never_there(
    bank: dvora.AdapterBank, model: nn.Module, versions: Versions, read: bool
) -> None:
    bank.add("a", versions.vectors[0])
    failing = version(bank, versions, 1)
    with pytest.raises(OSError, match="disk"), bank.loading(failing, read=read):
        raise OSError("the disk is full")
    torch.testing.assert_close(row_of(bank, model, "a"), versions.expected[0], atol=2e-5, rtol=0)
    assert bank.stats().host_adapters == 1
    assert failing.users == 0


def test_equal_versions_share_their_rows_until_the_last_has_left(bank: dvora.AdapterBank, versions: Versions) -> None:
    for name in "ab":
        bank.add(name, versions.vectors[0])
    assert (bank.stats().host_adapters, bank.version("a").digest) == (1, bank.version("b").digest)
    bank.replace("a", versions.vectors[1])
    assert bank.stats().host_adapters == 2
    bank.remove("b")
    assert bank.stats().host_adapters == 1
