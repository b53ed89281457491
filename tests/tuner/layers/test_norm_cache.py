"""The setting `norm_cache` of an adapter in a PEFT model."""

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model

from dvora import DVoRAConfig
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.weight.factors import factors_of
from tests.tuner.bases import FAMILIES
from tests.tuner.layer_cases import CASES
from tests.tuner.models_compared import worst_difference
from tests.tuner.subjects import Subject
from tests.tuner.tiny import MODELS, dvora_layers, gradients, outputs, train_vectors

# Training the magnitude only raises.
MAGNITUDE = "Linear, magnitude only"


@pytest.mark.parametrize("layer", CASES)
def test_every_layer_type_answers_the_same_with_and_without_constants(layer: str) -> None:
    subject = Subject(layer, "float64")
    models = [subject.adapted(norm_cache=norm_cache) for norm_cache in (True, False)]
    with torch.no_grad():
        kept, again = (model(subject.x()) for model in models)
    assert worst_difference(again, kept) < 1e-12
    kept, again = ([layer.adapted("default").C for _, layer in dvora_layers(model)] for model in models)
    assert all(C is not None for C in kept)
    assert all(C is None for C in again)


@pytest.mark.parametrize("layer", list(CASES))
def test_every_layer_type_trains_as_the_dense_method_without_constants(layer: str) -> None:
    subject = Subject(layer, "float64")
    assert subject.gradients_agree(subject.adapted(norm_cache=False))


@pytest.mark.parametrize("base", FAMILIES)
def test_a_quantised_layer_needs_constants(base: str) -> None:
    subject = Subject("Linear", base)
    with pytest.raises(ValueError, match=r"lin0: norm_cache=False .* quantised"):
        subject.adapted(norm_cache=False)
    for norm_cache in (True, "auto"):
        model = subject.adapted(norm_cache=norm_cache)
        assert all(layer.adapted("default").C is not None for _, layer in dvora_layers(model))


def offloaded(model: torch.nn.Module) -> torch.nn.Module:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def test_a_layer_that_was_offloaded_after_it_was_adapted_says_what_it_needs() -> None:
    model = Subject("Linear", "float32").adapted(norm_cache=False)
    layer = next(layer for _, layer in dvora_layers(model))
    layer.base_layer.to("meta")
    with pytest.raises(RuntimeError, match=r"the weight is not in memory .*norm_cache=True"):
        factors_of(layer.adapted("default"), layer.vectors("default"), layer.stored())


@pytest.mark.parametrize("norm_cache", ["auto", True])
def test_an_offloaded_base_answers_as_one_in_memory(norm_cache: bool | str) -> None:
    subject = Subject("Linear", "float32")
    expected = subject.adapted(norm_cache=norm_cache)
    model = get_peft_model(offloaded(subject.base()), subject.config(norm_cache=norm_cache)).eval()
    train_vectors(model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(subject.x()), expected(subject.x()))
            train_vectors(model, seed=1)
            train_vectors(expected, seed=1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_distribution_trains_the_same_with_and_without_constants(distribution: str) -> None:
    found = []
    for norm_cache in (True, False):
        config = DVoRAConfig(
            r=6, target_modules=["query", "dense"], projection_init=distribution, norm_cache=norm_cache
        )
        model = get_peft_model(MODELS["bert"]().double(), config).eval()
        train_vectors(model)
        found.append({"outputs": outputs(model), **gradients(model)})
    kept, again = found
    assert max(worst_difference(again[key], kept[key]) for key in kept) < 1e-11


@pytest.mark.parametrize("wrong", ["sometimes", None, 3, [True]])
def test_a_wrong_value_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match='norm_cache must be "auto", True or False, got '):
        DVoRAConfig(r=4, norm_cache=wrong)


def test_the_setting_is_part_of_the_configuration_file(tmp_path) -> None:
    DVoRAConfig(r=4, norm_cache=False).save_pretrained(tmp_path)
    assert DVoRAConfig.from_pretrained(tmp_path).norm_cache is False
