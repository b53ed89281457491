"""The settings: what is accepted, what is refused with which words, and what is written."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import BertForQuestionAnswering, BertForTokenClassification

from dvora import DVoRAConfig, SharedProjections
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import LAYERS, MODELS, same_bits

BAD_VALUES = [
    *[pytest.param({"r": r}, ValueError, f"rank.*{r}", id=f"r {r}") for r in (0, -1)],
    *[pytest.param({"r": r}, TypeError, f"rank.*{r!r}", id=f"r {r!r}") for r in (2.5, True, "8", None)],
    pytest.param({"rank_pattern": {"query": 0}}, ValueError, "rank.*0", id="rank_pattern 0"),
    pytest.param({"rank_pattern": {"query": "8"}}, TypeError, "rank.*'8'", id="rank_pattern '8'"),
    pytest.param({"rank_pattern": ["query"]}, TypeError, "rank_pattern", id="rank_pattern list"),
    pytest.param({"rank_pattern": None}, TypeError, "rank_pattern", id="rank_pattern None"),
    *[
        pytest.param({"alpha": alpha}, ValueError, f"alpha.*{alpha}", id=f"alpha {alpha}")
        for alpha in (0, -1.5, float("inf"), float("nan"))
    ],
    *[pytest.param({"alpha": alpha}, TypeError, f"alpha.*{alpha!r}", id=f"alpha {alpha!r}") for alpha in ("8", True)],
    pytest.param({"alpha_pattern": {"query": -1}}, ValueError, "alpha.*-1", id="alpha_pattern -1"),
    pytest.param({"alpha_pattern": 3}, TypeError, "alpha_pattern", id="alpha_pattern 3"),
    pytest.param({"direction": "rows"}, ValueError, "direction 'rows'.*unit, weight", id="direction"),
    pytest.param({"direction": None}, ValueError, "direction None.*unit, weight", id="direction None"),
    pytest.param(
        {"projection_init": "uniform"},
        ValueError,
        "distribution 'uniform'.*kaiming_uniform, structured",
        id="distribution",
    ),
    pytest.param({"bias": "lora_only"}, ValueError, "bias 'lora_only'.*none, all, dvora_only", id="bias"),
    pytest.param({"projection_seed": -1}, ValueError, "seed.*-1", id="seed -1"),
    pytest.param({"projection_seed": 2**64}, ValueError, f"seed.*{2**64}", id="seed too large"),
    pytest.param({"projection_seed": "0"}, TypeError, "seed.*'0'", id="seed '0'"),
    pytest.param({"d_initial": "0.1"}, TypeError, "d_initial.*'0.1'", id="d_initial '0.1'"),
    pytest.param({"d_initial": float("nan")}, ValueError, "d_initial.*nan", id="d_initial nan"),
    pytest.param({"dvora_dropout": 1.0}, ValueError, "dvora_dropout.*1.0", id="dropout 1"),
    pytest.param({"dvora_dropout": -0.1}, ValueError, "dvora_dropout.*-0.1", id="dropout -0.1"),
    pytest.param({"dvora_dropout": "0"}, TypeError, "dvora_dropout.*'0'", id="dropout '0'"),
    pytest.param({"dvora_dropout": False}, TypeError, "dvora_dropout.*False", id="dropout False"),
    *[
        pytest.param({name: 1}, TypeError, f"{name}.*1", id=f"{name} 1")
        for name in ("detach_norm", "save_projection", "init_weights", "fan_in_fan_out")
    ],
    pytest.param({"layers_pattern": "layers"}, ValueError, "layers_pattern.*layers_to_transform", id="layers_pattern"),
    pytest.param(
        {"target_modules": "query", "layers_to_transform": [0]},
        ValueError,
        "layers_to_transform.*'query'",
        id="indices",
    ),
    pytest.param({"target_modules": 5}, TypeError, "target_modules.*5", id="target_modules 5"),
    pytest.param({"target_modules": ["query", 5]}, TypeError, "target_modules.*5", id="target_modules ['query', 5]"),
    pytest.param({"exclude_modules": 5}, TypeError, "exclude_modules.*5", id="exclude_modules 5"),
    pytest.param({"modules_to_save": "head"}, TypeError, "modules_to_save.*'head'", id="modules_to_save 'head'"),
    pytest.param(
        {"target_modules": ["query"], "layers_to_transform": "0"}, TypeError, "layers_to_transform.*'0'", id="index '0'"
    ),
    pytest.param({"projection_format": 2}, ValueError, "projection_format is 2.*format 1", id="format"),
    pytest.param({"projection_format": "1"}, ValueError, "projection_format is '1'.*format 1", id="format '1'"),
    pytest.param({"projection_fingerprint": "0" * 16}, ValueError, "projection_fingerprint is '0000", id="fingerprint"),
    pytest.param({"base_probes": [1.0]}, TypeError, "base_probes", id="base_probes list"),
    pytest.param({"base_probes": {"query": ["1"]}}, TypeError, "base_probes.*'1'", id="base_probes '1'"),
]


@pytest.mark.parametrize(("values", "error", "message"), BAD_VALUES)
def test_a_bad_value_is_refused_by_name(values: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DVoRAConfig(**values)


@pytest.mark.parametrize(("values", "error", "message"), BAD_VALUES)
def test_a_bad_value_in_a_saved_file_is_refused_by_name(
    values: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    DVoRAConfig(r=4).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises(error, match=message):
        PeftConfig.from_pretrained(tmp_path)


def test_every_setting_comes_back_from_its_file(tmp_path: Path) -> None:
    config = DVoRAConfig(
        r=7,
        alpha=3.5,
        target_modules=["b", "a"],
        exclude_modules=["c"],
        direction="weight",
        d_initial=0.2,
        detach_norm=True,
        dvora_dropout=0.1,
        projection_seed=2**64 - 1,
        projection_init="structured",
        save_projection=True,
        bias="dvora_only",
        modules_to_save=["head"],
        rank_pattern={"a": 9},
        alpha_pattern={"b": 2.0},
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        init_weights=False,
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_the_file_holds_the_projections_format_and_fingerprint(tmp_path: Path) -> None:
    DVoRAConfig(projection_seed=5, projection_init="structured").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "DVORA"
    assert saved["projection_format"] == 1
    assert saved["projection_fingerprint"] == SharedProjections(5, "structured").fingerprint()


def test_fingerprints_of_saved_adapters_stay_valid() -> None:
    """Literal values: if one changes, the adapters that were saved with it can no longer be loaded."""
    known = {"kaiming_uniform": "b5e24f8bbf66c072", "structured": "a1c8de466114cc5f"}
    assert {init: DVoRAConfig(projection_init=init).projection_fingerprint for init in known} == known


def test_a_file_of_dense_matrices_is_not_read_as_the_default(tmp_path: Path) -> None:
    DVoRAConfig(projection_init="kaiming_uniform").save_pretrained(tmp_path)
    assert DVoRAConfig().projection_init == "structured"
    assert PeftConfig.from_pretrained(tmp_path).projection_init == "kaiming_uniform"
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    del settings["projection_init"]
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"projection_fingerprint is 'b5e24f8bbf66c072'.*'structured' give"):
        PeftConfig.from_pretrained(tmp_path)


def test_sets_are_written_in_order(tmp_path: Path) -> None:
    DVoRAConfig(target_modules={"c", "a", "b"}, exclude_modules={"z", "y"}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["a", "b", "c"]
    assert saved["exclude_modules"] == ["y", "z"]


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_config_can_be_copied(clone: Callable[[DVoRAConfig], DVoRAConfig]) -> None:
    config = DVoRAConfig(r=4, target_modules=["query"], projection_seed=3)
    assert clone(config) == config


def test_a_setting_can_be_replaced() -> None:
    config = DVoRAConfig(r=4, target_modules=["query"])
    assert dataclasses.replace(config, r=8).r == 8


def test_get_peft_model_changes_the_callers_config_no_more_than_lora_does() -> None:
    changed = {}
    for kind in (DVoRAConfig, LoraConfig):
        config = kind(r=4, target_modules=LAYERS["bert"])
        before = dataclasses.asdict(config)
        get_peft_model(MODELS["bert"](), config)
        changed[kind] = {name for name, value in dataclasses.asdict(config).items() if value != before[name]}
    assert changed[DVoRAConfig] <= changed[LoraConfig] | {"base_model_name_or_path"}


def test_one_config_serves_several_bases_and_each_adapter_knows_its_own(tmp_path: Path) -> None:
    config = DVoRAConfig(r=4, target_modules=["lin0", "lin1"])
    bases = [MODELS["mlp"](), MODELS["mlp"]()]
    with torch.no_grad():
        bases[1].lin0.weight.normal_(generator=torch.Generator().manual_seed(1))
    models = [get_peft_model(copy.deepcopy(base), config) for base in bases]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    for number, base in enumerate(bases):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(number))
        with pytest.raises(ValueError, match="lin0: the adapter was made for another base model"):
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(1 - number))


def test_the_model_holds_the_config_that_it_was_given_as_peft_expects() -> None:
    config = DVoRAConfig(r=4, target_modules=["lin0"])
    assert get_peft_model(MODELS["mlp"](), config).peft_config["default"] is config


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_heads_that_peft_adds_to_the_config_are_trained_saved_and_loaded(task: str, tmp_path: Path) -> None:
    make = {"TOKEN_CLS": BertForTokenClassification, "QUESTION_ANS": BertForQuestionAnswering}[task]
    settings = MODELS["bert"]().config
    settings.num_labels = 2
    base = make(settings).eval()
    model = get_peft_model(copy.deepcopy(base), DVoRAConfig(r=4, target_modules=["query"], task_type=task))
    heads = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    assert heads
    with torch.no_grad():
        for head in heads:
            head.add_(1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ids = torch.arange(6)[None]
    assert same_bits(loaded(ids)[0], model.eval()(ids)[0])


def test_ranks_and_alphas_of_a_layer_follow_the_patterns() -> None:
    config = DVoRAConfig(r=4, alpha=2, rank_pattern={"query": 8, r"layer\.1\..*": 16}, alpha_pattern={"^head": 1.5})
    assert [config.rank_of(name) for name in ("layer.0.query", "layer.1.key", "layer.0.key")] == [8, 16, 4]
    assert [config.alpha_of(name) for name in ("head", "a.head")] == [1.5, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"r": -1}, r"rank .*-1", id="rank"),
        pytest.param({"rank_pattern": {"value": -1}}, r"rank .*-1", id="rank of one layer"),
        pytest.param({"alpha_pattern": {"value": -1}}, r"alpha .*-1", id="alpha of one layer"),
        pytest.param({"direction": "rows"}, r"direction 'rows'", id="direction"),
        pytest.param({"projection_seed": 7}, r"projection_fingerprint .* projection_seed=7", id="seed"),
        pytest.param({"bias": "some"}, r"bias 'some'", id="bias"),
    ],
)
def test_a_config_changed_afterwards_is_checked_again_before_the_model_is_touched(
    change: dict[str, object], message: str
) -> None:
    config = DVoRAConfig(r=4, target_modules=["query", "value"])
    for name, value in change.items():
        setattr(config, name, value)
    base = MODELS["bert"]()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)
    assert_unchanged(base, before)


@pytest.mark.parametrize("value", ["auto", True, False])
@pytest.mark.parametrize("reader", [DVoRAConfig, PeftConfig])
def test_a_file_of_an_older_version_with_norm_cache_is_read_without_a_warning(
    reader: type[PeftConfig], value: bool | str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    config = DVoRAConfig(r=4)
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "norm_cache": value}))
    assert reader.from_pretrained(tmp_path) == config
    assert not recwarn.list
    config.save_pretrained(tmp_path)
    assert "norm_cache" not in json.loads(file.read_text())
