"""Compiled models of a bank: one graph, whichever adapters a batch has and whichever are in the slots."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.bank.tenants import BERT, HEADED, LLAMA, Served, row_by_row, tenants
from tests.bank.versions import in_threads
from tests.peft.kinds import Kind
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
    found = Graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield found


def compiled(served: Served, graphs: Graphs) -> nn.Module:
    return torch.compile(served.model, backend=graphs, fullgraph=True, dynamic=False)


@pytest.mark.parametrize(
    ("kind", "matrices"),
    [(HEADED, "kaiming_uniform"), (BERT, "structured"), (LLAMA, "kaiming_uniform")],
    ids=["mlp with a head", "bert with a head", "llama"],
)
def test_one_graph_serves_every_mix_and_every_set_of_slots(
    kind: Kind, matrices: str, graphs: Graphs, tmp_path: Path
) -> None:
    these = tenants(kind, tmp_path, 4, projection_init=matrices)
    alone = {name: these.alone(name) for name in (None, *these.names)}
    with these.bank(slots=4) as served, torch.no_grad():
        model = compiled(served, graphs)
        for names in MIXES:
            with served.bank.rows(names):
                found = outputs(model)
            expected = row_by_row(lambda name: outputs(alone[name]), names)
            assert worst_difference(found, expected) < 1e-5
        # Others come into the slots, and values change under the same name.
        served.bank.replace("a", these.path("b"))
        served.bank.remove("b")
        with served.bank.rows(["a", "a", None, "d"]):
            found = outputs(model)
        assert worst_difference(found, row_by_row(lambda n: outputs(alone[n]), ["b", "b", None, "d"])) < 1e-5
    assert len(graphs.made) == 1


def test_another_thread_runs_the_same_graph(graphs: Graphs, tmp_path: Path) -> None:
    these = tenants(HEADED, tmp_path, 2)
    with these.bank() as served:
        model = compiled(served, graphs)

        def serve(names: list[str | None]) -> Tensor:
            with torch.no_grad(), served.bank.rows(names):
                return outputs(model)

        first = serve(["a", "b", None, "a"])
        (second,) = in_threads(lambda: serve(["a", "b", None, "a"]))
    assert torch.equal(first, second)
    assert len(graphs.made) == 1


def test_inductor_gives_the_same(tmp_path: Path) -> None:
    these = tenants(HEADED, tmp_path, 2, projection_init="structured")
    with these.bank() as served, torch.no_grad():
        model = torch.compile(served.model, fullgraph=True, dynamic=False)
        with served.bank.rows(["a", None, "b", "a"]):
            assert worst_difference(outputs(model), outputs(served.model)) < 1e-5


def test_what_is_refused_in_a_pass_is_refused_in_a_graph(graphs: Graphs, tmp_path: Path) -> None:
    these = tenants(HEADED, tmp_path, 2)
    with these.bank() as served:
        model = torch.compile(served.model, backend=graphs, dynamic=False)
        with (
            pytest.raises(Exception, match=r"bank\.rows got 3 names, and the layer a batch of 4 rows"),
            served.bank.rows(["a", "b", "a"]),
        ):
            outputs(model)
        with pytest.raises(Exception, match=r"outside of bank\.rows"):
            outputs(model)
