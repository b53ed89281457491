"""Regular expressions of a configuration: ordinary ones work, and none takes longer than the limit."""

import json
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model

import dvora
from dvora import DVoRAConfig
from dvora.peft import expressions
from dvora.peft.expressions import check_expressions, first_match
from tests.peft.adapter_files import CONFIG, edit_config, save_bert
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import LAYERS, MODELS, dvora_layers

NONE = {
    **dict.fromkeys(("target_modules", "magnitude_modules", "exclude_modules", "modules_to_save", "layers_pattern")),
    **{name: {} for name in ("rank_pattern", "alpha_pattern", "strength")},
}
PARTS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm")
NAMES = [f"model.language_model.layers.{layer}.{part}" for layer in range(32) for part in PARTS]
ENDLESS = (
    "(.*)*x",
    "(.+)+!",
    "(a|a|.)*!",
    "(.*.*.*.*.*.*.*)x",
    "(x+x+)+y|(?:(?:.?)*)*!",
    r"([\w.]|[\w.][\w.])*!",
    "(?:){4294967294}",
    "(a+)+$",
    "(a|aa)+$",
    r"(\w+\w+)+\1$",
    "x?" * 40,
    "(.|.)" * 30,
    r"((?:\w+\.)*)q_proj",
)


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "TIME_LIMIT", 0.15)


@pytest.mark.parametrize(
    "expression",
    [
        r".*\.(q|v)_proj",
        # Of unsloth, for models that see.
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj|gate_proj).*?)",
        r"(?i)MODEL\..*",
        r"model\.language_model\.layers\.(\d|1\d)\.(self_attn|mlp)\.(q|k|v|up|down)_proj",
        r"^(?!.*vision).*(?:q_proj|v_proj).*$",
        r"(?:.*)(?P<name>q)_proj",
        r"^((?!vision|audio).)*_proj$",
        "|".join(name.replace(".", r"\.") for name in NAMES),
    ],
)
def test_ordinary_expressions_are_let_through(expression: str) -> None:
    check_expressions({**NONE, "target_modules": expression, "exclude_modules": expression}, NAMES)


@pytest.mark.parametrize(
    ("setting", "expression"), [*((setting, "(.+)+!") for setting in NONE), *(("exclude_modules", e) for e in ENDLESS)]
)
def test_an_expression_without_end_is_refused_by_its_setting(setting: str, expression: str) -> None:
    one = setting in ("target_modules", "magnitude_modules", "exclude_modules")
    value = expression if one else [expression] if NONE[setting] is None else {expression: 1}
    with pytest.raises(ValueError, match=f"{setting}: .* could take more than 100,000,000 steps"):
        check_expressions({**NONE, setting: value}, [f"{name}{'a' * 30}" for name in NAMES])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {f"lin{k}": 1 for k in range(5000)}}, "rank_pattern has 5000 expressions .* at most 4096"),
        ({"modules_to_save": [f"lin{k}" for k in range(257)]}, "modules_to_save has 257 expressions .* at most 256"),
        ({"target_modules": "a|b" * 100_000}, "target_modules has 1 expressions of 300000 characters"),
        ({"rank_pattern": {"(?i)query": 3}}, r"rank_pattern: '\(\?i\)query' is not a regular expression: global flags"),
        ({"rank_pattern": {"a)|(b": 3}}, r"rank_pattern: .* is not a regular expression: unbalanced parenthesis"),
        ({"layers_pattern": "(?P<idx>h)"}, "layers_pattern: .* redefinition of group name"),
        ({"exclude_modules": "[Ā-退]" * 20_000}, "exclude_modules has 1 expressions .* and 20000 sets .* and 256"),
        ({"target_modules": "(" * 5000}, "target_modules: .* is not a regular expression"),
        ({"exclude_modules": "(?<=a*)b"}, "exclude_modules: .* look-behind requires fixed-width pattern"),
    ],
)
def test_what_cannot_be_read_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_expressions({**NONE, **settings})


def test_matching_all_names_has_a_limit_too(short_limit: None) -> None:
    with pytest.raises(ValueError, match=r"exclude_modules: .* cannot be matched against 160 names in 0.15 s"):
        check_expressions({**NONE, "exclude_modules": ".*.*.*.*.*x"}, NAMES)


def test_the_first_pattern_that_ends_a_name_is_taken() -> None:
    patterns = {"lin1": 1, r"layers\.\d+\.query": 2, "query": 3}
    names = ("lin1", "a.lin1", "lin11", "olin1", "x.layers.3.query", "a.query")
    found = [first_match(patterns, name) for name in names]
    assert found == ["lin1", "lin1", "lin11", "olin1", r"layers\.\d+\.query", "query"]


def test_expressions_of_one_s_own_need_no_bound() -> None:
    own = DVoRAConfig(r=6, target_modules=r"((?:\w+\.)*)query")
    names = [name for name, _ in dvora_layers(get_peft_model(MODELS["bert"](), own))]
    assert names
    assert all(name.endswith("query") for name in names)


ENDLESS_SETTINGS = {
    "target_modules": "(.+)+!|.*query|.*value|.*dense",
    "magnitude_modules": "(.+)+!",
    "exclude_modules": "(.+)+!",
    "rank_pattern": {"(.+)+!": 6},
    "alpha_pattern": {"(.+)+!": 6.0},
    "strength": {"(.+)+!": 0.5},
    "modules_to_save": ["(.+)+!"],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("setting", ENDLESS_SETTINGS)
def test_neither_loading_nor_swapping_hangs(setting: str, sound: Path, tmp_path: Path) -> None:
    settings = {"target_modules": LAYERS["bert"], setting: ENDLESS_SETTINGS[setting]}
    base = MODELS["bert"]()
    before = snapshot(base)
    message = f"{setting}: .* could take more than"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((sound / name).read_bytes())
    edit_config(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    model = get_peft_model(base, DVoRAConfig(r=6, target_modules=LAYERS["bert"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "loaded")
    with pytest.raises(ValueError, match=message):
        dvora.hotswap_adapter(model, tmp_path)
    assert list(model.peft_config) == ["default"]
    assert_unchanged(model, before)


def test_a_configuration_alone_is_refused_before_there_is_a_model(tmp_path: Path) -> None:
    """For some models PEFT matches expressions before it asks any method."""
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "DVORA", "target_modules": "(.+)+!"}))
    with pytest.raises(ValueError, match=r"target_modules: .* could take more than"):
        DVoRAConfig.from_pretrained(str(tmp_path))
