"""The settings: what is accepted, what is refused with which words, what is written; and PEFT knows their type."""

import copy
import dataclasses
import json
import pickle
from enum import Enum
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from dvora import DVoRAConfig, DVoRAModel
from dvora.peft import register
from tests.peft.kinds import edit_config
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import LAYERS, MODELS

BAD_VALUES: list[tuple[dict[str, object], type[Exception], str]] = [
    *[({"r": r}, ValueError, f"rank.*{r}") for r in (0, -1)],
    *[({"r": r}, TypeError, f"rank.*{r!r}") for r in (2.5, True, "8", None)],
    *[({"lambda_d_groups": g}, ValueError, f"lambda_d_groups.*{g}") for g in (0, -1)],
    *[({"lambda_d_groups": g}, TypeError, f"lambda_d_groups.*{g!r}") for g in (2.5, 1.0, True, "4", None)],
    ({"rank_pattern": {"query": 0}}, ValueError, "rank.*0"),
    ({"rank_pattern": {"query": "8"}}, TypeError, "rank.*'8'"),
    ({"rank_pattern": ["query"]}, TypeError, "rank_pattern"),
    *[({"alpha": alpha}, ValueError, f"alpha.*{alpha}") for alpha in (0, -1.5, float("inf"), float("nan"))],
    *[({"alpha": alpha}, TypeError, f"alpha.*{alpha!r}") for alpha in ("8", True)],
    ({"alpha_pattern": {"query": -1}}, ValueError, "alpha.*-1"),
    ({"alpha_pattern": 3}, TypeError, "alpha_pattern"),
    ({"direction": "rows"}, ValueError, "direction 'rows'.*unit, weight"),
    ({"direction": None}, ValueError, "direction None.*unit, weight"),
    ({"projection_init": "uniform"}, ValueError, "distribution 'uniform'.*kaiming_uniform"),
    ({"bias": "lora_only"}, ValueError, "bias 'lora_only'.*none, all, dvora_only"),
    *[({"projection_seed": seed}, ValueError, f"seed.*{seed}") for seed in (-1, 2**64)],
    ({"projection_seed": "0"}, TypeError, "seed.*'0'"),
    ({"d_initial": "0.1"}, TypeError, "d_initial.*'0.1'"),
    ({"d_initial": float("nan")}, ValueError, "d_initial.*nan"),
    *[({"dvora_dropout": p}, ValueError, f"dvora_dropout.*{p}") for p in (1.0, -0.1)],
    *[({"dvora_dropout": p}, TypeError, f"dvora_dropout.*{p!r}") for p in ("0", False)],
    *[({name: 1}, TypeError, f"{name}.*1") for name in ("detach_norm", "init_weights", "fan_in_fan_out")],
    ({"layers_pattern": "layers"}, ValueError, "layers_pattern.*layers_to_transform"),
    ({"target_modules": "query", "layers_to_transform": [0]}, ValueError, "layers_to_transform.*'query'"),
    ({"target_modules": ["query"], "layers_to_transform": "0"}, TypeError, "layers_to_transform.*'0'"),
    ({"target_modules": ["query", 5]}, TypeError, "target_modules.*5"),
    ({"exclude_modules": 5}, TypeError, "exclude_modules.*5"),
    ({"modules_to_save": "head"}, TypeError, "modules_to_save.*'head'"),
    *[({"projection_format": f}, ValueError, f"projection_format is {f!r}.*format 1") for f in (2, "1")],
    ({"projection_fingerprint": "0" * 16}, ValueError, "projection_fingerprint is '0000"),
    ({"base_probes": [1.0]}, TypeError, "base_probes"),
    ({"base_probes": {"query": ["1"]}}, TypeError, "base_probes.*'1'"),
]


def edited(folder: Path, **values: object) -> Path:
    DVoRAConfig(r=4).save_pretrained(folder)
    edit_config(folder, **values)
    return folder


@pytest.mark.parametrize(("values", "error", "message"), BAD_VALUES, ids=str)
def test_a_bad_value_is_refused_by_name_in_code_and_in_a_file(
    values: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        DVoRAConfig(**values)
    with pytest.raises(error, match=message):
        PeftConfig.from_pretrained(edited(tmp_path, **values))


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
        projection_init="peft_vera(r=7, in=9, out=8)",
        bias="dvora_only",
        modules_to_save=["head"],
        rank_pattern={"a": 9},
        alpha_pattern={"b": 2.0},
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        init_weights=False,
        lambda_d_groups=4,
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_a_file_of_one_group_says_nothing_of_groups_and_the_config_stays_as_it_was(tmp_path: Path) -> None:
    for groups, written in ((1, None), (4, 4)):
        config = DVoRAConfig(r=4, lambda_d_groups=groups)
        before = dataclasses.asdict(config)
        config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text()).get("lambda_d_groups") == written
        assert dataclasses.asdict(config) == before
        assert PeftConfig.from_pretrained(tmp_path).lambda_d_groups == groups


def test_fingerprints_of_saved_adapters_stay_valid() -> None:
    """Literal values: if one changes, the adapters that were saved with it can no longer be loaded."""
    assert DVoRAConfig().projection_fingerprint == "b5e24f8bbf66c072"


def test_a_file_whose_seed_was_edited_is_refused(tmp_path: Path) -> None:
    DVoRAConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "projection_seed": 1}))
    with pytest.raises(ValueError, match=r"projection_fingerprint is 'b5e24f8bbf66c072'.*projection_seed=1 and"):
        PeftConfig.from_pretrained(tmp_path)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"r": -1}, r"rank .*-1", id="rank"),
        pytest.param({"lambda_d_groups": 0}, r"lambda_d_groups .*0", id="groups"),
        pytest.param({"lambda_d_groups": 33}, r"query: lambda_d_groups=33 .* has 32; use fewer", id="many groups"),
        pytest.param({"alpha_pattern": {"value": -1}}, r"alpha .*-1", id="alpha of one layer"),
        pytest.param({"projection_seed": 7}, r"projection_fingerprint .* projection_seed=7", id="seed"),
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


def test_a_config_can_be_copied_pickled_and_changed() -> None:
    config = DVoRAConfig(r=4, target_modules=["query"], projection_seed=3, lambda_d_groups=2)
    for clone in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert clone == config
    changed = dataclasses.replace(config, r=8, lambda_d_groups=1)
    assert changed == DVoRAConfig(r=8, target_modules=["query"], projection_seed=3)


# PEFT knows the method by name, once.


def test_peft_finds_config_model_and_prefix_by_the_type_however_often_it_is_registered() -> None:
    members = list(PeftType)
    register()
    assert list(PeftType) == members
    kind = PeftType["DVORA"]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is DVoRAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[kind] is DVoRAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == "dvora_"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is peft.LoraConfig


def test_the_type_is_a_member_like_any_other() -> None:
    kind = PeftType["DVORA"]
    assert isinstance(kind, PeftType)
    assert isinstance(kind, Enum)
    assert PeftType("DVORA") is PeftType.DVORA is kind
    assert [member.name for member in PeftType].count("DVORA") == 1
    assert kind in PeftType
    assert kind == "DVORA"
    assert (kind.name, kind.value) == ("DVORA", "DVORA")
    assert repr(kind) == repr(PeftType.LORA).replace("LORA", "DVORA")
    assert str(kind) == str(PeftType.LORA).replace("LORA", "DVORA")
    assert len({PeftType.LORA, kind, PeftType["DVORA"]}) == 2
    assert json.dumps(kind) == '"DVORA"'
    assert copy.copy(kind) is copy.deepcopy(kind) is kind
    assert all(pickle.loads(pickle.dumps(kind, protocol)) is kind for protocol in range(pickle.HIGHEST_PROTOCOL + 1))
