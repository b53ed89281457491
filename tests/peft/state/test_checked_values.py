"""Files that must not be loaded: damaged, edited, or of another rank."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import safetensors
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dvora import DVoRAConfig
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.state.adapter_files import CONFIG, WEIGHTS, edit_config, edit_weights, save_bert
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, outputs, same_bits, train_vectors

QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_bert(tmp_path)


def dense(**settings: object) -> DVoRAConfig:
    """For the layers of the saved adapter, with matrices of its kind."""
    return DVoRAConfig(target_modules=LAYERS["bert"], projection_init="kaiming_uniform", **settings)


def refuse(folder: Path, error: type[Exception], message: str, *, base: str = "bert") -> None:
    """Neither a fresh model nor one that has an adapter takes the files; both go on as they were."""
    fresh = MODELS[base]()
    before = snapshot(fresh)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(fresh, folder)
    assert_unchanged(fresh, before)
    model = get_peft_model(MODELS[base](), DVoRAConfig(r=3, target_modules=LAYERS[base]))
    train_vectors(model)
    before, expected = snapshot(model.eval()), outputs(model)
    with pytest.raises(error, match=message):
        model.load_adapter(folder, "loaded")
    assert model.active_adapters == list(model.peft_config) == ["default"]
    assert same_bits(outputs(model), expected)
    assert_unchanged(model, before)


def change(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def resize_all(tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        if key.endswith("lambda_d"):
            tensors[key] = value.repeat(2)


def poison(value: float) -> Callable[[Tensor], Tensor]:
    def poisoned(vector: Tensor) -> Tensor:
        vector = vector.clone()
        vector[1] = value
        return vector

    return poisoned


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(
            lambda t: t.pop(f"{QUERY}.dvora_magnitude"),
            r"lacks .*0\.attention\.self\.query\.dvora_magnitude",
            id="missing",
        ),
        pytest.param(lambda t: t.clear(), r"lacks vectors of adapted layers: bert", id="no tensor"),
        pytest.param(
            rename(f"{QUERY}.dvora_lambda_b", f"{QUERY}.dvora_lambda_c"), r"query\.dvora_lambda_", id="renamed vector"
        ),
        pytest.param(
            rename(f"{QUERY}.dvora_lambda_b", f"{QUERY[:-5]}quary.dvora_lambda_b"),
            r"quary\.dvora_lambda_b",
            id="renamed layer",
        ),
        pytest.param(
            lambda t: t.update({f"{QUERY[:-5]}key.dvora_magnitude": torch.ones(32)}),
            r"not adapted here: .*key\.dvora_magnitude",
            id="extra",
        ),
        pytest.param(
            change(f"{QUERY}.dvora_lambda_d", lambda v: v.repeat(2)),
            r"query\.dvora_lambda_d.* shape \(12,\).*\(6,\)",
            id="another rank",
        ),
        pytest.param(
            resize_all,
            r"shape \(12,\) in the adapter and \(6,\) in its configuration.*rank",
            id="another rank everywhere",
        ),
        pytest.param(
            change(f"{QUERY}.dvora_magnitude", lambda v: v[:, None]),
            r"query\.dvora_magnitude.* \(32, 1\)",
            id="reshaped",
        ),
        pytest.param(
            change(f"{QUERY}.dvora_magnitude", lambda v: v[:0]), r"query\.dvora_magnitude.* \(0,\)", id="empty vector"
        ),
        pytest.param(
            change(f"{QUERY}.dvora_lambda_b", lambda v: v.long()),
            r"query\.dvora_lambda_b.* torch\.int64",
            id="integers",
        ),
        pytest.param(
            change(f"{QUERY}.dvora_lambda_b", lambda v: v.bool()), r"query\.dvora_lambda_b.* torch\.bool", id="booleans"
        ),
        pytest.param(
            change(f"{QUERY}.dvora_lambda_b", lambda v: v.cfloat()),
            r"query\.dvora_lambda_b.* torch\.complex64",
            id="complex",
            marks=pytest.mark.skipif(
                Version(safetensors.__version__) < Version("0.7"), reason="safetensors writes complex numbers since 0.7"
            ),
        ),
        pytest.param(
            change(f"{QUERY}.dvora_lambda_d", poison(float("nan"))), r"query\.dvora_lambda_d.* not finite", id="NaN"
        ),
        pytest.param(
            change(f"{QUERY}.dvora_magnitude", poison(float("inf"))), r"query\.dvora_magnitude.* not finite", id="inf"
        ),
        pytest.param(
            change("base_model.dvora_projections.stream_1", lambda m: m.roll(1, 0)),
            r"projection matrix stream_1 differs",
            id="tampered projection",
        ),
        pytest.param(
            rename("base_model.dvora_projections.stream_0", "base_model.dvora_projections.stream_7"),
            r"projection matrix stream_7",
            id="renamed projection",
        ),
    ],
)
def test_an_edited_file_is_refused(folder: Path, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    edit_weights(folder, edit)
    refuse(folder, ValueError, message)


def test_one_changed_bit_of_a_saved_projection_is_noticed(folder: Path) -> None:
    def flip(matrix: Tensor) -> Tensor:
        matrix = matrix.clone()
        matrix.view(torch.int32)[3, 5] ^= 1
        return matrix

    edit_weights(folder, change("base_model.dvora_projections.stream_0", flip))
    refuse(folder, ValueError, "projection matrix stream_0 differs")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:-7], id="truncated"),
        pytest.param(lambda data: data[:100], id="truncated header"),
        pytest.param(lambda data: b"\xff" * 64 + data[64:], id="corrupted header"),
        pytest.param(lambda data: b"not safetensors", id="something else"),
    ],
)
def test_a_damaged_file_is_refused(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    refuse(folder, SafetensorError, r"(?i)header|incomplete|deserializ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(
            {"projection_fingerprint": "0123456789abcdef"},
            "projection_fingerprint is '0123456789abcdef'",
            id="fingerprint",
        ),
        pytest.param({"projection_seed": 1}, "projection_seed=1 .* trained with other shared matrices", id="seed"),
        pytest.param(
            {"projection_init": "structured"},
            "projection_init='structured' .* other shared matrices",
            id="distribution",
        ),
        pytest.param({"projection_format": 99}, "projection_format is 99, this version makes format 1", id="format"),
        pytest.param({"r": 7}, r"lambda_d has shape \(6,\) in the adapter and \(7,\) in its configuration", id="rank"),
        pytest.param(
            {"rank_pattern": {"query": 5}}, r"query.*shape \(6,\) in the adapter and \(5,\)", id="rank pattern"
        ),
        pytest.param({"target_modules": ["query"]}, r"not adapted here: .*dense", id="fewer targets"),
        pytest.param(
            {"target_modules": ["query", "value", "dense", "key"]},
            r"lacks vectors of adapted layers: .*key",
            id="more targets",
        ),
    ],
)
def test_an_edited_configuration_is_refused(folder: Path, values: dict[str, object], message: str) -> None:
    edit_config(folder, **values)
    refuse(folder, ValueError, message)


def test_a_configuration_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / CONFIG).write_text("{not json")
    refuse(folder, ValueError, "(?i)expecting|json")


def test_a_base_of_another_architecture_is_refused(folder: Path) -> None:
    refuse(folder, ValueError, "nothing in the model is named 'dense'", base="llama")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_vectors_saved_in_another_dtype_are_loaded_in_the_layers_own(
    folder: Path, dtype: torch.dtype, low_cpu_mem_usage: bool
) -> None:
    edit_weights(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items() if "projections" not in k}))
    loaded = PeftModel.from_pretrained(MODELS["bert"](), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {p.dtype for name, p in loaded.named_parameters() if ".dvora_" in name} == {torch.float32}


def test_loading_over_an_adapter_of_another_rank_is_refused_and_changes_nothing(folder: Path) -> None:
    model = get_peft_model(MODELS["bert"](), dense(r=5))
    train_vectors(model)
    before, expected = snapshot(model.eval()), outputs(model)
    with pytest.raises(ValueError, match=r"shape \(6,\) in the adapter and \(5,\) in the model"):
        model.load_adapter(folder, "default")
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)


def test_loading_over_an_adapter_of_another_seed_is_refused(folder: Path) -> None:
    model = get_peft_model(MODELS["bert"](), dense(r=6, projection_seed=3))
    with pytest.raises(ValueError, match="projection"):
        model.load_adapter(folder, "default")


def test_ignore_mismatched_sizes_leaves_the_vectors_of_another_shape_and_says_which(folder: Path) -> None:
    model = get_peft_model(MODELS["bert"](), dense(r=5))
    saved = load_file(folder / WEIGHTS)
    with pytest.warns(UserWarning, match=r"lambda_d\.default: found shape .*6.* in the checkpoint and .*5"):
        model.load_adapter(folder, "default", ignore_mismatched_sizes=True)
    for name, layer in dvora_layers(model):
        magnitude, lambda_b, lambda_d = layer.vectors("default")
        assert same_bits(magnitude, saved[f"base_model.model.{name}.dvora_magnitude"])
        assert same_bits(lambda_b, saved[f"base_model.model.{name}.dvora_lambda_b"])
        assert torch.equal(lambda_d, torch.full((5,), 0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_vectors_stay_in_float32_and_a_wish_for_less_is_answered(folder: Path, dtype: torch.dtype) -> None:
    base = MODELS["bert"]().to(dtype)
    half = pytest.warns(UserWarning, match="autocast_adapter_dtype=False is ignored: the vectors stay in float32")
    with half if dtype == torch.bfloat16 else nullcontext():
        model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    assert {vector.dtype for _, layer in dvora_layers(model) for vector in layer.vectors("default")} == {torch.float32}


@pytest.mark.parametrize("vector", ["magnitude", "lambda_b", "lambda_d"])
def test_finite_values_that_would_give_others_are_refused(folder: Path, vector: str) -> None:
    # A base and a file whose product overflows, though each is finite.
    edit_weights(folder, change(f"{QUERY}.dvora_{vector}", lambda values: torch.full_like(values, 3e38)))
    if vector == "magnitude":
        edit_weights(folder, change(f"{QUERY}.dvora_lambda_d", lambda values: torch.full_like(values, 1e30)))
    elif vector == "lambda_b":
        edit_config(folder, alpha=1e3)
    refuse(folder, ValueError, "are so large that outputs would not be finite")


def test_large_values_that_give_finite_ones_are_loaded(folder: Path) -> None:
    edit_weights(folder, change(f"{QUERY}.dvora_magnitude", lambda values: 1e20 * values))
    model = PeftModel.from_pretrained(MODELS["bert"](), folder)
    assert outputs(model).isfinite().all()
