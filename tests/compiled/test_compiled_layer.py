"""What torch.compile and torch.export make of a layer gives what the layer gives, also when its values change."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from dvora import DVoRAAdapter
from tests.cases import DIRECTIONS, fresh_copy, randn, trained_layer
from tests.ops.test_tracing import IN, OUT, RANK, gradients
from tests.reference import worst_error


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("freeze_base_layer", [True, False], ids=["frozen", "trained base"])
def test_compiled_outputs_and_gradients_equal_eager_ones(freeze_base_layer: bool) -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=freeze_base_layer, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True)
    x = randn(4, IN, seed=0, dtype=torch.float64)
    assert worst_error(compiled(x), layer(x)) < 1e-12
    expected = gradients(layer, layer(x))
    for name, gradient in gradients(compiled, compiled(x)).items():
        assert worst_error(gradient, expected[name]) < 1e-12, name


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_whole_layer_is_one_graph_in_training_and_evaluation(direction: str) -> None:
    layer = trained_layer(IN, OUT, RANK, direction=direction)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        layer.train(training)
        for x in (randn(4, IN, seed=0), randn(2, 7, IN, seed=1)):
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.usefixtures("compiler")
def test_a_compiled_layer_follows_the_base_that_it_trained() -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    optimizer, x = torch.optim.SGD(layer.parameters(), lr=0.1), randn(4, IN, seed=0)
    compiled(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fresh_copy(layer)(x))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("change", ["load", "cast"])
def test_a_compiled_layer_follows_a_base_that_is_loaded_or_cast(change: str) -> None:
    layer = trained_layer(IN, OUT, RANK)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), randn(4, IN, seed=0)
    compiled(x)
    if change == "load":
        layer.load_state_dict({**layer.state_dict(), "base_layer.weight": randn(OUT, IN, seed=12)})
    else:
        layer.double()
        x = x.double()
    torch.testing.assert_close(compiled(x), fresh_copy(layer)(x))


@pytest.mark.usefixtures("compiler")
def test_a_compiled_layer_follows_an_optimizer_step_on_the_vectors() -> None:
    layer = trained_layer(IN, OUT, RANK)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), randn(4, IN, seed=0)
    compiled(x).square().sum().backward()
    layer.update_parameters(0.01)
    torch.testing.assert_close(compiled(x), fresh_copy(layer)(x))


def exported(layer: DVoRAAdapter, x: Tensor, **options: object) -> nn.Module:
    with warnings.catch_warnings():
        # torch.export's own use of what PyTorch has deprecated.
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        return torch.export.export(layer, (x,), **options).module()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_exported_layer_equals_the_layer(training: bool) -> None:
    layer = trained_layer(IN, OUT, RANK).train(training)
    x = randn(4, IN, seed=0)
    torch.testing.assert_close(exported(layer, x)(x), layer(x))


def test_an_exported_layer_takes_any_batch() -> None:
    layer = trained_layer(IN, OUT, RANK).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = exported(layer, randn(4, IN, seed=0), dynamic_shapes=({0: batch},))
    for tokens in (1, 2, 33):
        x = randn(tokens, IN, seed=tokens)
        torch.testing.assert_close(program(x), layer(x))
