"""LoRA's and VeRA's cases, translated to DVoRA."""

import pytest
from peft import LoraConfig, VeraConfig

from conformance.counterparts import NoCounterpartError, counterpart, options
from dvora import DVoRAConfig


def test_options_are_renamed() -> None:
    of_lora = {"r": 4, "lora_alpha": 2, "lora_dropout": 0.1, "init_lora_weights": False, "use_dora": True}
    assert options(of_lora) == {"r": 4, "alpha": 2, "dvora_dropout": 0.1, "init_weights": False}
    of_vera = {"projection_prng_key": 3, "d_initial": 0.2, "vera_dropout": 0.1, "bias": "vera_only"}
    assert options(of_vera) == {"projection_seed": 3, "d_initial": 0.2, "dvora_dropout": 0.1, "bias": "dvora_only"}


@pytest.mark.parametrize("of_lora", [{"lora_bias": True}, {"init_lora_weights": "pissa"}])
def test_options_of_lora_alone_have_no_counterpart(of_lora: dict[str, object]) -> None:
    with pytest.raises(NoCounterpartError):
        options(of_lora)


def test_an_option_that_nobody_has_read_about_stops_the_run() -> None:
    with pytest.raises(KeyError, match="an_option_of_tomorrow"):
        options({"an_option_of_tomorrow": 1})


def test_rows_of_cases() -> None:
    lora = ("MLP 1 LoRA", "MLP", LoraConfig, {"target_modules": ["lin0"], "lora_alpha": 4})
    assert counterpart(lora) == ("MLP 1 DVoRA", "MLP", DVoRAConfig, {"r": 8, "alpha": 4, "target_modules": ["lin0"]})
    assert counterpart(("Same", "vera", VeraConfig, {"r": 2})) == ("Same", "dvora", DVoRAConfig, {"r": 2})
    assert counterpart(LoraConfig) is DVoRAConfig
    config = counterpart(LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    assert (config.r, config.alpha, config.target_modules, config.init_weights) == (8, 8, {"lin0"}, False)
