"""Compiled models of a bank: one graph, whichever adapters a batch has and whoever runs it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dvora
from tests.bank.tenants import HEADED, LLAMA, Served, row_by_row, tenants
from tests.bank.test_heads import kind
from tests.bank.versions import in_threads
from tests.peft.kinds import Kind, saved
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import outputs

pytestmark = pytest.mark.usefixtures("compiler")
MIXES: list[list[str | None]] = [["a", None, "b", "a"], ["c", "c", "d", None], [None] * 4, ["a", "b", "c", "d"]]


class Graphs:
    """A compiler that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.made: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.made.append(graph)
        return graph.forward


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield Graphs()


@pytest.mark.parametrize(
    ("kind", "matrices"), [(HEADED, "kaiming_uniform"), (LLAMA, "structured")], ids=["mlp with a head", "llama"]
)
def test_one_graph_serves_every_mix_set_of_slots_and_thread(
    kind: Kind, matrices: str, graphs: Graphs, tmp_path: Path
) -> None:
    these = tenants(kind, tmp_path, 4, projection_init=matrices)
    alone = {name: outputs(these.alone(name)) for name in (None, *these.names)}
    with these.bank(slots=4) as served:
        compiled = Served(torch.compile(served.model, backend=graphs, fullgraph=True, dynamic=False), served.bank)
        for names in MIXES:
            (other,) = in_threads(lambda names=names: compiled(names))
            for found in (compiled(names), other):
                assert worst_difference(found, row_by_row(alone.__getitem__, names)) < 1e-5
        # Others come into the slots, and values change under the same name.
        served.bank.replace("a", these.path("b"))
        served.bank.remove("b")
        found = compiled(["a", "a", None, "d"])
        assert worst_difference(found, row_by_row(alone.__getitem__, ["b", "b", None, "d"])) < 1e-5
    assert len(graphs.made) == 1


@pytest.mark.usefixtures("inductor")
def test_inductor_gives_the_same(tmp_path: Path) -> None:
    these = tenants(HEADED, tmp_path, 2, projection_init="structured")
    with these.bank() as served:
        compiled = Served(torch.compile(served.model, fullgraph=True, dynamic=False), served.bank)
        names = ["a", None, "b", "a"]
        assert worst_difference(compiled(names), served(names)) < 1e-5


def test_a_graph_asks_whose_batch_it_runs_in(tmp_path: Path) -> None:
    these = tenants(HEADED, tmp_path, 2)
    with these.bank() as served, torch.no_grad():
        expected = {name: served([name] * 4) for name in ("a", "b")}
        model = torch.compile(served.model, backend="aot_eager", fullgraph=True, dynamic=False)

        def streamed(name: str) -> Iterator[Tensor]:
            with served.bank.rows([name] * 4):
                for _ in range(2):
                    yield outputs(model)

        of_a = streamed("a")
        assert worst_difference(next(of_a), expected["a"]) < 1e-6
        with pytest.raises(ValueError, match="from another thread, task or generator"):
            outputs(model)
        assert worst_difference(list(streamed("b"))[-1], expected["b"]) < 1e-6
        assert worst_difference(next(of_a), expected["a"]) < 1e-6
        of_a.close()
        with pytest.raises(ValueError, match=r"called outside of bank\.rows"):
            outputs(model)
        with (
            pytest.raises(ValueError, match=r"bank\.rows got 3 names, and the layer a batch of 4 rows"),
            served.bank.rows(["a", "b", "a"]),
        ):
            outputs(model)


def test_a_graph_serves_heads_of_its_own_number_of_outputs(graphs: Graphs, tmp_path: Path) -> None:
    saved(kind(2).trained(0), tmp_path / "two")
    saved(kind(5).trained(0), tmp_path / "five")
    model = kind(2).base()
    with dvora.AdapterBank(model, like=tmp_path / "two") as bank:
        bank.add_folder(tmp_path)
        compiled = Served(torch.compile(model, backend=graphs, fullgraph=True, dynamic=False), bank)
        for _ in range(2):
            compiled(["two", "two"])
            with pytest.raises(ValueError, match="several numbers of outputs run without"):
                compiled(["two", "five"])
    assert len(graphs.made) == 1
