"""What a stranger's adapter folder could do: only what its configuration trains is read, sizes come from the file."""

import contextlib
import copy
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import dvora
from dvora import DVoRAConfig
from tests.census import Census
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.state.adapter_files import CONFIG, WEIGHTS, edit_config, edit_weights
from tests.peft.tiny import LAYERS, MODELS, outputs, same_bits, train_vectors

TABLE = "base_model.model.model.embed_tokens.weight"


class Normalised(nn.Module):
    """With statistics that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.lin0(x))


def saved(folder: Path, base: nn.Module, **settings: object) -> Path:
    model = get_peft_model(base, DVoRAConfig(**{"r": 6, **settings}))
    train_vectors(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path, MODELS["llama"](), target_modules=LAYERS["llama"])


def adapted_llama() -> PeftModel:
    return get_peft_model(MODELS["llama"](), DVoRAConfig(r=6, target_modules=LAYERS["llama"]))


@contextlib.contextmanager
def small_tensors_only() -> Iterator[None]:
    """Nothing is made that is larger than the tiny models' weights."""
    with Census() as made:
        yield
    assert 0 < made.largest() <= 2**18


def refuse(folder: Path, base: nn.Module, message: str, error: type[Exception] = ValueError) -> None:
    """By a model with other adapters, which go on as they were."""
    targets = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)][:2]
    model = get_peft_model(base, DVoRAConfig(r=3, target_modules=targets), "own").eval()
    train_vectors(model, "own")
    before, expected = snapshot(model), outputs(model) if isinstance(base, PreTrainedModel) else None
    with pytest.raises(error, match=message):
        model.load_adapter(folder, "stranger")
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["own"]
    assert expected is None or same_bits(outputs(model), expected)
    assert model.active_adapters == ["own"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(TABLE, lambda: torch.ones(40, 32), id="input embedding"),
        pytest.param("base_model.model.lm_head.weight", lambda: torch.ones(40, 32), id="output embedding"),
        pytest.param(TABLE, lambda: torch.ones(50, 32), id="extended embedding"),
        pytest.param("base_model.model.model.norm.weight", lambda: torch.ones(32), id="normalisation"),
        pytest.param(
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
            lambda: torch.ones(32, 32),
            id="base weight",
        ),
    ],
)
def test_values_of_the_base_are_not_read(key: str, value: Callable[[], Tensor], folder: Path) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[key] = value()

    edit_weights(folder, poison)
    base = MODELS["llama"]()
    with torch.no_grad():
        base.model.norm.weight.add_(0.5)
    refuse(folder, base, f"does not train: .*{key.removeprefix('base_model.model.')}")


def test_statistics_of_the_base_are_not_read(tmp_path: Path) -> None:
    saved(tmp_path, Normalised(), target_modules=["lin0"])
    edit_config(tmp_path, base_probes=None)
    edit_weights(tmp_path, lambda t: t.update({"base_model.model.norm.running_mean": torch.full((6,), 1e3)}))
    refuse(tmp_path, Normalised(), r"does not train: 'norm\.running_mean'")


@pytest.mark.parametrize(
    "name", ["modules_to_save.other.weight", "original_module.weight", "modules_to_save.other.bias"]
)
def test_a_head_of_another_adapter_and_the_bases_own_are_not_read(name: str, tmp_path: Path) -> None:
    settings = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    saved(tmp_path, MODELS["bert"](), **settings)
    shape = (3,) if name.endswith("bias") else (3, 32)
    edit_weights(tmp_path, lambda t: t.update({f"base_model.model.classifier.{name}": torch.ones(shape)}))
    model = get_peft_model(MODELS["bert"](), DVoRAConfig(r=6, **settings), "other")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not train|classifier"):
        model.load_adapter(tmp_path, "stranger")
    assert all(same_bits(model.state_dict()[key], value) for key, value in before.items())


def test_biases_of_the_base_are_not_read_over_an_adapter_that_was_loaded(tmp_path: Path) -> None:
    """Where a folder is given, `check_file` refuses it before the model is changed."""
    saved(tmp_path, MODELS["bert"](), target_modules=["query"])
    model = PeftModel.from_pretrained(MODELS["bert"](), tmp_path)
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias"
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"does not train: .*query\.base_layer\.bias"):
        set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), name: torch.ones(32)})
    edit_weights(tmp_path, lambda tensors: tensors.update({name: torch.ones(32)}))
    with pytest.raises(ValueError, match=r"does not train: .*query\.base_layer\.bias"):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match=r"query\.base_layer\.bias', which its configuration does not train"):
        model.load_adapter(tmp_path, "second")
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_table_that_peft_wrote_is_taken_if_it_is_the_models_own(dtype: torch.dtype, tmp_path: Path) -> None:
    model = get_peft_model(MODELS["llama"](), DVoRAConfig(r=6, target_modules=["embed_tokens", "q_proj"])).eval()
    train_vectors(model)
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        model.save_pretrained(tmp_path)
    assert any("embed_tokens.base_layer.weight" in key for key in load_file(tmp_path / WEIGHTS))
    loaded = PeftModel.from_pretrained(MODELS["llama"]().to(dtype), tmp_path).eval()
    if dtype == torch.float32:
        assert same_bits(outputs(loaded), outputs(model))
    table = MODELS["llama"]().to(dtype).model.embed_tokens.weight
    assert same_bits(loaded.base_model.model.model.embed_tokens.base_layer.weight, table)


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 5]}],
    ids=lambda s: next(iter(s)),
)
def test_a_table_that_the_configuration_trains_is_read(settings: dict[str, object], tmp_path: Path) -> None:
    model = get_peft_model(MODELS["llama"](), DVoRAConfig(r=6, target_modules=["q_proj"], **settings)).eval()
    train_vectors(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert same_bits(outputs(PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()), outputs(model))


def test_a_rank_is_what_the_file_holds(folder: Path) -> None:
    edit_config(folder, r=65536)
    message = r"lambda_d has shape \(6,\) in the adapter and \(65536,\) in its configuration"
    with small_tensors_only():
        refuse(folder, MODELS["llama"](), message)
        with pytest.raises(ValueError, match=message):
            dvora.hotswap_adapter(adapted_llama(), folder)
        edit_config(folder, rank_pattern={".*_proj": 6}, target_modules=[*LAYERS["llama"], "lm_head", "gate_proj"])
        message = r"\w+ has rank 65536 in its configuration, and no lambda_d .* more than 6 values"
        refuse(folder, MODELS["llama"](), message)
        edit_weights(folder, dict.clear)
        edit_weights(folder, lambda tensors: tensors.update({TABLE: torch.ones(3)}))
        refuse(folder, MODELS["llama"](), r"has rank 6 in its configuration, and no lambda_d .* more than 0 values")


def test_a_configuration_that_was_read_serves_for_a_new_adapter_of_another_rank(folder: Path) -> None:
    config = DVoRAConfig.from_pretrained(str(folder))
    config.r, config.inference_mode = 4, False
    model = get_peft_model(MODELS["llama"](), config)
    assert {len(p) for name, p in model.named_parameters() if "lambda_d" in name} == {4}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            "r=6, in=22369600, out=22369600",
            "projection_init=.* is larger than any layer here: .* 48 features and rank 6",
        ),
        ("r=60000, in=2000, out=2000", "projection_init=.* is larger than any layer here: .* 48 features and rank 6"),
    ],
)
def test_matrices_of_vera_are_not_larger_than_the_model(sizes: str, message: str, folder: Path) -> None:
    edit_config(folder, projection_init=f"peft_vera({sizes})", projection_fingerprint="0" * 16)
    with small_tensors_only():
        refuse(folder, MODELS["llama"](), message)
        assert DVoRAConfig.from_pretrained(str(folder)).projection_fingerprint == "0" * 16
        with pytest.raises(ValueError, match=r"projection_init is '\w+' here"):
            dvora.hotswap_adapter(adapted_llama(), folder)


def pickled(folder: Path, value: object) -> None:
    (folder / WEIGHTS).unlink(missing_ok=True)
    torch.save(value, folder / "adapter_model.bin")


def compressed(folder: Path, value: object) -> None:
    pickled(folder, value)
    file = folder / "adapter_model.bin"
    with zipfile.ZipFile(file) as old:
        entries = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in entries:
            new.writestr(name, content)


LAMBDA_D = "base_model.model.model.layers.0.self_attn.q_proj.dvora_lambda_d"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda v: v[:1].expand(2**30), "lambda_d, of shape .* has not as many values", id="expanded"),
        pytest.param(lambda v: v.to_sparse(), "lambda_d, of shape .* has not as many values", id="sparse"),
        pytest.param(lambda v: v.to("meta"), "lambda_d, of shape .* has not as many values|cannot be read", id="meta"),
        pytest.param(
            lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.quint8),
            "lambda_d, of shape .* has not as many values|cannot be read",
            id="quantised",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated", "ignore:.*quantize_per_tensor")
def test_a_pickled_tensor_holds_its_values(change: Callable[[Tensor], Tensor], message: str, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    pickled(folder, {**tensors, LAMBDA_D: change(tensors[LAMBDA_D])})
    refuse(folder, MODELS["llama"](), message)


def test_a_compressed_pickle_is_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    compressed(folder, {**tensors, TABLE: torch.zeros(2**24)})
    assert (folder / "adapter_model.bin").stat().st_size < 2**18
    refuse(folder, MODELS["llama"](), "adapter_model.bin is compressed")


def test_an_expanded_tensor_of_a_state_dict_is_refused(folder: Path) -> None:
    model = get_peft_model(MODELS["llama"](), DVoRAConfig(r=6, target_modules=LAYERS["llama"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lambda_d.*, of shape .* has not as many values of its own"):
        set_peft_model_state_dict(model, {**load_file(folder / WEIGHTS), LAMBDA_D: torch.ones(1).expand(2**30)})
    assert_unchanged(model, before)


def test_a_head_that_is_missing_is_named_before_the_model_changes(tmp_path: Path) -> None:
    saved(tmp_path, MODELS["bert"](), target_modules=["query"], modules_to_save=["classifier"])
    edit_weights(tmp_path, lambda tensors: tensors.pop("base_model.model.classifier.weight"))
    base = MODELS["bert"]()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"file lacks classifier\.weight, which its configuration trains"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    refuse(tmp_path, base, r"file lacks classifier\.weight")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "NOPE"}', "peft_type is 'NOPE', which is no method that PEFT knows"),
        ('{"peft_type": ["DVORA"]}', r"peft_type is \['DVORA'\], which is no method"),
        ('{"peft_type": null}', "peft_type is None, which is no method"),
        ("[1]", "holds a list, expected settings by name"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"r": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    ],
)
def test_our_own_door_says_what_is_wrong_with_a_configuration(text: str, message: str, folder: Path) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=f"{CONFIG}.*{message}"):
        DVoRAConfig.from_pretrained(str(folder))
    model = get_peft_model(MODELS["llama"](), DVoRAConfig(r=6, target_modules=LAYERS["llama"]))
    with pytest.raises(ValueError, match=f"{CONFIG}.*{message}"):
        dvora.hotswap_adapter(model, folder)


BAD_NAMES = (
    *("a.b", ".", "..", "keys", "train", "type", "forward", "training", "_modules", "__class__", "pop", "copy"),
    *("weight", "bias", "base_layer", "/etc", "a\\b", "x" * 201, "a\nb", "\0", "\x1b[31m"),
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_no_model_could_keep_is_refused(name: str, folder: Path) -> None:
    base = MODELS["llama"]()
    before = snapshot(base)
    for adapt in (
        lambda: get_peft_model(base, DVoRAConfig(r=3, target_modules=["q_proj"]), adapter_name=name),
        lambda: PeftModel.from_pretrained(base, folder, adapter_name=name),
    ):
        with pytest.raises(ValueError, match="adapter_name"):
            adapt()
    assert_unchanged(base, before)
    model = get_peft_model(base, DVoRAConfig(r=3, target_modules=["q_proj"]))
    before = snapshot(model)
    for adapt in (
        lambda: model.load_adapter(folder, name),
        lambda: model.add_adapter(name, DVoRAConfig(r=3, target_modules=["q_proj"])),
        lambda: model.base_model.add_weighted_adapter(["default"], [0.5], name),
    ):
        with pytest.raises(ValueError, match="adapter_name"):
            adapt()
    assert list(model.peft_config) == ["default"]
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "name", ["a b", "é", "0", "lin0", "(", "org/name", "dvora_lambda_b", "modules_to_save", "x" * 200]
)
def test_a_name_that_is_accepted_keeps_everything(name: str, tmp_path: Path) -> None:
    settings = {"target_modules": ["lin0", "lin1"], "bias": "all", "modules_to_save": ["lin2"]}
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, **settings), name).eval()
    train_vectors(model, name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    for other in (name, "default"):
        assert same_bits(
            outputs(PeftModel.from_pretrained(MODELS["mlp"](), tmp_path / name, other).eval()), outputs(model)
        )


def test_a_refused_folder_leaves_the_base_as_it_was(folder: Path) -> None:
    """Whatever can be seen in names and shapes is seen before a layer is replaced."""
    sound = load_file(folder / WEIGHTS)
    for edit in (
        lambda t: t.pop(LAMBDA_D),
        lambda t: t.update({LAMBDA_D.replace("q_proj", "k_proj"): t[LAMBDA_D].clone()}),
        lambda t: t.update({LAMBDA_D: torch.ones(7)}),
        lambda t: t.update({LAMBDA_D.replace("lambda_d", "magnitude"): torch.ones(31)}),
    ):
        changed = copy.deepcopy(sound)
        edit(changed)
        edit_weights(folder, lambda t, c=changed: (t.clear(), t.update(c)))
        base = MODELS["llama"]()
        before = snapshot(base)
        with pytest.raises(ValueError, match=r"the adapter (has|lacks)|has shape"):
            PeftModel.from_pretrained(base, folder)
        assert_unchanged(base, before)
        model = get_peft_model(base, DVoRAConfig(r=3, target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"the adapter (has|lacks)|has shape"):
            model.load_adapter(folder, "stranger")
        assert list(model.peft_config) == ["default"]


def test_a_setting_that_the_file_says_twice_is_the_last_one(folder: Path) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings)[:-1] + ', "r": 65536}')
    refuse(folder, MODELS["llama"](), r"\(65536,\) in its configuration")


def test_a_head_of_another_shape_leaves_no_wrapper_behind(tmp_path: Path) -> None:
    saved(tmp_path, MODELS["bert"](), target_modules=["query"], modules_to_save=["classifier"])
    edit_weights(tmp_path, lambda t: t.update({"base_model.model.classifier.weight": torch.ones(300_000, 0)}))
    refuse(
        tmp_path, MODELS["bert"](), r"classifier\S* has shape \(300000, 0\) in the adapter and \(3, 32\) in the model"
    )
    base = MODELS["bert"]()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"has shape \(300000, 0\)"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


@pytest.mark.parametrize("beside", [True, False], ids=["beside an adapter", "alone"])
def test_refused_values_leave_no_wrapper_of_attention_behind(beside: bool, tmp_path: Path) -> None:
    """Its projections have wrappers around each other."""

    def base() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2, kdim=6, vdim=6))

    saved(tmp_path, base(), target_modules=["1"])
    edit_config(tmp_path, base_probes=None)
    edit_weights(tmp_path, lambda t: t.update({key: torch.full_like(value, torch.nan) for key, value in t.items()}))
    plain = base()
    model = get_peft_model(plain, DVoRAConfig(r=3, target_modules=["0"]), "own") if beside else plain
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match="not finite"):
        model.load_adapter(tmp_path, "bad") if beside else PeftModel.from_pretrained(plain, tmp_path)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert beside or "peft_config" not in vars(plain)


def test_a_trained_adapter_outlives_a_refused_load(folder: Path) -> None:
    """Even if its settings were read from a folder: what was trained since is not taken out again."""
    config = DVoRAConfig.from_pretrained(str(folder))
    model = get_peft_model(MODELS["llama"](), config)
    train_vectors(model)
    expected = outputs(model.eval())
    edit_weights(folder, lambda t: t.update({LAMBDA_D: torch.full((6,), torch.nan)}))
    with pytest.raises(ValueError, match="not finite"):
        model.load_adapter(folder, "default")
    assert same_bits(outputs(model), expected)
