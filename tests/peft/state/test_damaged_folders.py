"""Damaged adapter folders: each loads what it holds, or is refused with an error and changes nothing.

`--fuzz` damages thousands of times. What strangers do on purpose is in `test_untrusted_adapters` and
`test_hostile_folders`.
"""

import copy
import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dvora import DVoRAConfig
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.state.adapter_files import CONFIG, WEIGHTS, edit_config, edit_weights
from tests.peft.tiny import LAYERS, MODELS, outputs, same_bits, train_vectors

Damage = Callable[[Path, random.Random], object]
SHORT, LONG = 40, 2000
"""Folders of each kind of damage."""
ERRORS = (ValueError, TypeError, KeyError, FileNotFoundError, SafetensorError, RecursionError)
"""KeyError and RecursionError are PEFT's, which reads the configuration before dvora."""
VALUES: tuple[object, ...] = (
    *(None, True, 0, -1, 1, 7, 2**31, 10**400, 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "6", "(", "[", "*", "\0", "all-linear", "unit", "CAUSAL_LM", "é" * 3000),
    *([], [None], [[]], ["("], ["x"], [10**400], {}, {"": 1}, {"(": 5}, {"lin0": 2**31}, {"lin0": -1}, {"x": None}),
    *({"lin0": [10**400] * 9}, {"lin0": [float("nan")] * 9}, {"lin0": 10**400}),
)


def bits(folder: Path, rng: random.Random) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    # Half of them in the header.
    limit = 8 + int.from_bytes(data[:8], "little") if rng.random() < 0.5 else len(data)
    data[rng.randrange(limit)] ^= 1 << rng.randrange(8)
    (folder / WEIGHTS).write_bytes(data)


def length(folder: Path, rng: random.Random) -> None:
    data = (folder / WEIGHTS).read_bytes()
    cut, more = rng.randrange(len(data)), rng.randbytes(rng.choice([1, 8, 1000]))
    (folder / WEIGHTS).write_bytes(rng.choice([data[:cut], data + more, more + data, data[:cut] + more + data[cut:]]))


def one_tensor(folder: Path, rng: random.Random) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        key, other = rng.sample(sorted(tensors), 2)
        value = tensors[key]
        rng.choice(
            [
                lambda: tensors.pop(key),
                lambda: tensors.update({key: tensors[other].clone()}),
                lambda: tensors.update({key + rng.choice([".default", "_", ".0"]): tensors.pop(key)}),
                lambda: tensors.update({key: torch.cat([value, value])}),
                lambda: tensors.update({key: value[: len(value) // 2].clone()}),
                lambda: tensors.update({key: value.to(rng.choice([torch.float16, torch.int32, torch.bool]))}),
                lambda: tensors.update({key: torch.full_like(value, rng.choice([torch.nan, torch.inf, 1e38]))}),
                lambda: tensors.update({key.replace("dvora_lambda_b", "base_layer.weight"): torch.ones(24, 24)}),
            ]
        )()

    edit_weights(folder, edit)


def one_setting(folder: Path, rng: random.Random) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    edit_config(folder, **{rng.choice([*settings, "unknown"]): rng.choice(VALUES)})


def no_setting(folder: Path, rng: random.Random) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    del settings[rng.choice(list(settings))]
    (folder / CONFIG).write_text(json.dumps(settings))


def files(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice([WEIGHTS, CONFIG])
    data = path.read_bytes()
    path.unlink()
    rng.choice([lambda: None, path.mkdir, lambda: path.write_bytes(b""), lambda: path.write_bytes(data[::-1])])()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    model = get_peft_model(
        MODELS["mlp"](),
        DVoRAConfig(r=5, target_modules=LAYERS["mlp"][:2], rank_pattern={"lin1": 4}, modules_to_save=["lin2"]),
    )
    train_vectors(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", [bits, length, one_tensor, one_setting, no_setting, files])
def test_a_damaged_folder_gives_what_it_holds_or_is_refused(
    damage: Damage, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    # PEFT looks on the hub for a file that it does not find.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    own = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=3, target_modules=["lin0"]), "mine").eval()
    train_vectors(own, "mine")
    before, expected, refused = snapshot(own), outputs(own), 0
    for seed in range(LONG if pytestconfig.getoption("--fuzz") else SHORT):
        folder, model = tmp_path / str(seed), copy.deepcopy(own)
        shutil.copytree(sound, folder)
        damage(folder, random.Random(f"{seed}"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model.load_adapter(str(folder), "loaded")
            except HFValidationError:
                # PEFT looks for the file of values when the adapter is complete, and knows no way back.
                assert not (folder / WEIGHTS).is_file(), seed
            except ERRORS:
                refused += 1
                assert list(model.peft_config) == ["mine"], seed
                assert_unchanged(model, before)
            else:
                check_loaded(model, folder, seed)
        assert model.active_adapters == ["mine"]
        assert same_bits(outputs(model), expected)
        shutil.rmtree(folder)
    assert refused


def check_loaded(model: PeftModel, folder: Path, seed: int) -> None:
    """All vectors of the adapter are those of the file, and finite."""
    file = load_file(folder / WEIGHTS)
    loaded = {name: p for name, p in model.named_parameters() if ".dvora_" in name and name.endswith(".loaded")}
    assert loaded
    for name, value in loaded.items():
        assert value.isfinite().all(), (seed, name)
        assert torch.equal(value, file[name.removesuffix(".loaded")].to(value.dtype)), (seed, name)
