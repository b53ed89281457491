"""Which kind a layer is of, and what is refused."""

import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from dvora import DVoRAConfig
from dvora.peft.layer_types import FORWARD_ONLY, LAYER_TYPES, layer_type_of, padding_column, parameter_type

LAYERS = {
    nn.Linear: lambda: nn.Linear(3, 5),
    Conv1D: lambda: Conv1D(5, 3),
    nn.Conv1d: lambda: nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv2d: lambda: nn.Conv2d(4, 6, 3, groups=2),
    nn.Conv3d: lambda: nn.Conv3d(4, 6, 3, groups=2),
    nn.Embedding: lambda: nn.Embedding(9, 4),
}


class Halved(nn.Linear):
    """A linear layer that computes something else than its type does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Squared(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def test_every_row_of_the_table_is_tried_here() -> None:
    assert LAYERS.keys() == LAYER_TYPES.keys()


@pytest.mark.parametrize("layer_type", LAYERS, ids=lambda t: t.__name__)
def test_a_layer_is_of_the_kind_of_its_type(layer_type: type[nn.Module]) -> None:
    assert layer_type_of(LAYERS[layer_type](), "layer") is LAYER_TYPES[layer_type]


def test_a_subclass_that_computes_the_same_is_of_its_parents_kind() -> None:
    class Named(nn.Linear):
        pass

    assert layer_type_of(Named(3, 5), "layer") is LAYER_TYPES[nn.Linear]
    assert layer_type_of(parametrizations.weight_norm(nn.Linear(3, 5)), "layer") is LAYER_TYPES[nn.Linear]


def test_a_subclass_that_computes_something_else_is_read_through_its_forward() -> None:
    assert layer_type_of(Halved(3, 5), "layer") is FORWARD_ONLY


def test_a_forward_that_was_replaced_is_read_as_it_is() -> None:
    layer = nn.Linear(3, 5)
    layer.forward = Halved(3, 5).forward
    assert layer_type_of(layer, "layer") is FORWARD_ONLY
    assert layer_type_of(add_hook_to_module(nn.Linear(3, 5), ModelHook()), "layer") is LAYER_TYPES[nn.Linear]


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_a_layer_without_values_is_refused_by_name(sizes: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of initializing nothing
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(*sizes))
    with pytest.raises(ValueError, match=r"1: the base weight has shape \(\d, \d\): there is nothing to adapt"):
        get_peft_model(model, DVoRAConfig(r=2, target_modules=["0", "1"]))
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_a_convolution_that_computes_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="a of type Squared is not supported"):
        layer_type_of(Squared(2, 2, 1), "a")


def test_another_type_is_refused_with_the_supported_types() -> None:
    with pytest.raises(
        TypeError, match=r"a\.b of type ConvTranspose1d is not supported; .*torch's Linear, .*transformers's Conv1D"
    ):
        layer_type_of(nn.ConvTranspose1d(1, 1, 1), "a.b")


def test_a_scaled_embedding_is_an_embedding() -> None:
    assert (
        layer_type_of(BartScaledWordEmbedding(9, 4, padding_idx=0, embed_scale=2.0), "layer")
        is LAYER_TYPES[nn.Embedding]
    )


def test_an_embedding_that_does_more_than_look_up_is_refused() -> None:
    with pytest.raises(TypeError, match=r"p of type BartLearnedPositionalEmbedding does more than look its entries up"):
        layer_type_of(BartLearnedPositionalEmbedding(9, 4), "p")


def test_an_embedding_that_changes_its_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"e: the embedding renormalises .*max_norm=1.0"):
        layer_type_of(nn.Embedding(9, 4, max_norm=1.0), "e")


def test_only_the_padding_entry_of_an_embedding_is_skipped() -> None:
    assert padding_column(nn.Embedding(9, 4, padding_idx=2)) == 2
    assert padding_column(nn.Embedding(9, 4)) is None
    assert padding_column(nn.Linear(3, 5)) is None


def test_a_vector_is_no_parameter_to_adapt() -> None:
    with pytest.raises(TypeError, match=r"m\.scale has shape \(4,\)"):
        parameter_type(nn.Module(), torch.ones(4), "m.scale")
