"""The shape annotations: true in every call of the layer, and not needed by its users."""

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from dvora.matrices.interface import DISTRIBUTIONS
from tests.cases import DIRECTIONS, DTYPES, linear, randn
from tests.checked import checked

PLAIN_USER = """
import sys
sys.modules["jaxtyping"] = None  # an import of it fails
import dvora, torch
layer = dvora.DVoRAAdapter(torch.nn.Linear(6, 5), 3, shared=dvora.SharedProjections(seed=0))
layer.backward(layer(torch.ones(2, 6)).detach())
layer.update_parameters(0.1)
print(layer.merge_to_original_layer().weight.shape)
"""


def checked_layer(distribution: str = "kaiming_uniform", dtype: torch.dtype = torch.float32, **options: object):
    """A layer of the copy of the source in which every annotation is checked."""
    shared = checked("matrices.interface").SharedProjections(0, distribution)
    return checked("weight.adapter").DVoRAAdapter(linear(6, 5, dtype=dtype), 3, shared=shared, **options)


@pytest.mark.filterwarnings("ignore:merging into")
@pytest.mark.parametrize("freeze_base_layer", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_annotation_holds_in_the_life_of_a_layer(
    direction: str, dtype: torch.dtype, freeze_base_layer: bool
) -> None:
    layer = checked_layer(direction=direction, dtype=dtype, freeze_base_layer=freeze_base_layer)
    for shape in [(6,), (4, 6), (2, 0, 6), (2, 3, 6)]:
        x = randn(*shape, seed=0, dtype=dtype).requires_grad_()
        layer(x).sum().backward()
        layer.backward(layer(x).detach())
        layer.update_parameters(0.01)
    layer.set_parameters(layer.get_parameters())
    layer.diagnostics()
    assert layer.merge_to_original_layer().weight.dtype == dtype


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_annotation_of_the_projections_holds(distribution: str) -> None:
    shared = checked_layer(distribution).shared
    for rank, size in [(3, 6), (8, 6), (1, 1)]:
        shared.impl.project_transpose(shared.impl.project(torch.ones(2, size), rank), size)
        shared.impl.expand_transpose(shared.impl.expand(torch.ones(2, rank), size), rank)
        shared.impl.gram(rank, size, torch.float32)


@pytest.mark.parametrize(("rank", "skipped"), [(3, None), (0, None), (3, 2)], ids=["plain", "magnitude", "skipped"])
def test_every_annotation_of_weights_stored_otherwise_holds(rank: int, skipped: int | None) -> None:
    combining, layouts = checked("weight.weighted_sum"), checked("weight.layouts")
    shared = checked("matrices.interface").SharedProjections(0)
    adapted = checked("weight.adapted_weight").AdaptedWeight(
        randn(6, 5, seed=0), rank, shared=shared, layout=layouts.COLUMNS, padding_column=skipped
    )
    vectors = adapted.initial_vectors(0.1)
    adapted.delta(vectors, randn(6, 5, seed=0))
    checked("weight.diagnostics").diagnostics(adapted, vectors, None)
    combining.weighted_sum([combining.WeightedAdapter(torch.tensor(0.5), vectors, adapted)], None, adapted)
    if rank:
        shared.impl.expand(shared.impl.select(torch.tensor([[1, 4]]), rank, 6, torch.float32), 5)
    checked("weight.factors").factors_of(adapted, vectors, None, torch.tensor(0.5))


def test_the_check_is_on() -> None:
    with pytest.raises(TypeCheckError):
        checked("method.functional").row_norm(torch.ones(3))


def test_a_user_needs_no_jaxtyping() -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN_USER], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.Size([5, 6])"
