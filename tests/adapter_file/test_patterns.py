"""Regular expressions of a configuration: ordinary ones work, and those of a file take no longer than the limit."""

import json
import shutil
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

import dvora
from dvora import DVoRAConfig
from tests.peft.kinds import CONFIG, edit_config, save_bert
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import LAYERS, MODELS, dvora_layers

ENDLESS = (
    "(.*)*x",
    "(a|a|.)*!",
    "(.*.*.*.*.*.*.*)x",
    "(x+x+)+y|(?:(?:.?)*)*!",
    r"([\w.]|[\w.][\w.])*!",
    "(?:){4294967294}",
    "(a+)+$",
    r"(\w+\w+)+\1$",
    "x?" * 40,
    "(.|.)" * 30,
)


@pytest.mark.parametrize(
    "expression",
    [
        r".*\.(q|v)_proj",
        # Of unsloth, for models that see.
        r"(?:.*?(?:language|model).*?(?:self_attn|attention).*?(?:q_proj|v_proj|query).*?)",
        r"(?i)MODEL\..*(q|v)_PROJ",
        r"model\.layers\.(\d|1\d)\.(self_attn|mlp)\.(q|v)_proj",
        r"^(?!.*vision).*(?:q_proj|v_proj).*$",
        r"^((?!vision|audio).)*(q|v)_proj$",
    ],
)
def test_ordinary_expressions_are_let_through_in_files_too(expression: str, tmp_path: Path) -> None:
    model = get_peft_model(MODELS["llama"](), DVoRAConfig(r=2, target_modules=expression))
    names = [name for name, _ in dvora_layers(model)]
    assert [name.rpartition(".")[2] for name in names] == ["q_proj", "v_proj"] * 2
    model.save_pretrained(tmp_path)
    assert names == [name for name, _ in dvora_layers(PeftModel.from_pretrained(MODELS["llama"](), tmp_path))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {f"lin{k}": 1 for k in range(5000)}}, "rank_pattern has 5000"),
        ({"modules_to_save": [f"lin{k}" for k in range(257)]}, "modules_to_save has 257"),
        ({"target_modules": "a|b" * 100_000}, "target_modules has .* 300000 characters"),
        ({"exclude_modules": "[Ā-退]" * 20_000}, "exclude_modules has .* 20000 sets"),
        ({"rank_pattern": {"(?i)query": 3}}, r"rank_pattern: '\(\?i\)query' is not a regular expression"),
        ({"rank_pattern": {"a)|(b": 3}}, r"rank_pattern: .* is not a regular expression: unbalanced parenthesis"),
        ({"layers_to_transform": [0], "layers_pattern": "(?P<idx>h)"}, "layers_pattern: .* redefinition of group name"),
        ({"target_modules": "(" * 5000}, "target_modules: .* is not a regular expression"),
        ({"exclude_modules": "(?<=a*)b"}, "exclude_modules: .* look-behind requires fixed-width pattern"),
    ],
)
def test_what_cannot_be_read_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DVoRAConfig(r=2, **{"target_modules": ["h"], **settings})


def test_the_first_pattern_that_ends_a_name_is_taken() -> None:
    config = DVoRAConfig(r=9, rank_pattern={"lin1": 1, r"layers\.\d+\.query": 2, "query": 3})
    names = ("lin1", "a.lin1", "lin11", "olin1", "x.layers.3.query", "a.query")
    assert [config.rank_of(name) for name in names] == [1, 1, 9, 9, 2, 3]


def test_expressions_of_one_s_own_need_no_bound() -> None:
    own = DVoRAConfig(r=6, target_modules=r"((?:\w+\.)*)query")
    names = [name for name, _ in dvora_layers(get_peft_model(MODELS["bert"](), own))]
    assert names
    assert all(name.endswith("query") for name in names)


# What a stranger's file may have, for a name as long as their models have.

ENDLESS_SETTINGS = {
    "target_modules": "(.+)+!|.*query|.*value|.*dense",
    "magnitude_modules": "(.+)+!",
    "rank_pattern": {"(.+)+!": 6},
    "alpha_pattern": {"(.+)+!": 6.0},
    "strength": {"(.+)+!": 0.5},
    "modules_to_save": ["(.+)+!"],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize(
    ("setting", "value"), [*ENDLESS_SETTINGS.items(), *(("exclude_modules", e) for e in ENDLESS)], ids=str
)
def test_neither_loading_nor_swapping_hangs(setting: str, value: object, sound: Path, tmp_path: Path) -> None:
    base, folder = MODELS["bert"](), shutil.copytree(sound, tmp_path / "folder")
    edit_config(folder, **{"target_modules": LAYERS["bert"], setting: value})
    base.add_module("a" * 60, nn.Identity())
    before = snapshot(base)
    with pytest.raises(ValueError, match=f"{setting}: "):
        PeftModel.from_pretrained(base, folder)
    assert_unchanged(base, before)
    model = get_peft_model(base, DVoRAConfig(r=6, target_modules=LAYERS["bert"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{setting}: "):
        model.load_adapter(folder, "loaded")
    with pytest.raises(ValueError, match=f"{setting}: "):
        dvora.hotswap_adapter(model, folder)
    assert list(model.peft_config) == ["default"]
    assert_unchanged(model, before)


def test_a_configuration_alone_is_refused_before_there_is_a_model(tmp_path: Path) -> None:
    """For some models PEFT matches expressions before it asks any method."""
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "DVORA", "target_modules": "(.+)+!"}))
    with pytest.raises(ValueError, match="target_modules: "):
        DVoRAConfig.from_pretrained(str(tmp_path))
