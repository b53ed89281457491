"""What is read of adapters: equal to what Layout reads, checked, and never a mixture of two."""

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, IA3Config, PeftConfig, RoadConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file

import dvora
from dvora.adapter_file.values import FolderSource, VectorSource, adapters_in
from dvora.adapter_file.values_file import SETTINGS, VALUES
from dvora.flat import Layout
from tests.bank.tenants import HEADED, many
from tests.peft.kinds import KINDS, bits, edit_config, edit_weights, mlp, saved
from tests.peft.tiny import MODELS

# What PEFT says of an adapter on embeddings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
]
LAYER = "base_model.model.lin1.dvora_"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(HEADED.trained(), tmp_path / "customer-17")


@cache
def layout_of_headed() -> Layout:
    return Layout.of(HEADED.fresh())


def of_vector(vector: Any, layout: Layout | None = None) -> VectorSource:
    content = (layout or layout_of_headed()).content
    config = dvora.DVoRAConfig(target_modules=["lin0", "lin1"], r=4)
    return VectorSource(content, config, (1.0,) * len(content.layers), vector)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_what_layout_reads(kind: str, tmp_path: Path) -> None:
    folder = saved(KINDS[kind].trained(), tmp_path)
    layout, source = Layout.of(folder), FolderSource(folder)
    values, expected = source.read(), layout.to_vector(folder)
    assert source.content == values.content == layout.content
    assert list(values.whole) == [part.name for part in layout.content.whole]
    flat = torch.cat([values.vector, *(part.flatten().float() for part in values.whole.values())])
    assert torch.equal(bits(flat), bits(expected))
    assert of_vector(expected, layout).read().digest == values.digest


def test_strengths_are_those_of_the_layers_and_part_of_the_digest(tmp_path: Path) -> None:
    weak = FolderSource(saved(mlp(strength={"lin1": 0.5}).trained(), tmp_path / "weak")).read()
    plain = FolderSource(saved(mlp().trained(), tmp_path / "plain")).read()
    assert weak.strengths == (1.0, 0.5, 1.0)
    assert torch.equal(weak.vector, plain.vector)
    assert weak.digest != plain.digest


@given(index=st.integers(0, 10**6), bit=st.integers(0, 22))
def test_every_bit_of_every_value_is_in_the_digest(index: int, bit: int) -> None:
    vector = torch.linspace(0.5, 2, layout_of_headed().size)
    changed = vector.clone()
    bits(changed)[index % len(vector)] ^= 1 << bit
    digests = [of_vector(each).read().digest for each in (vector, vector.clone(), changed)]
    assert digests[0] == digests[1] != digests[2]


def test_a_vector_is_copied() -> None:
    source = of_vector(vector := torch.ones(layout_of_headed().size))
    before = source.read().digest
    vector.zero_()
    assert source.read().digest == before


def values(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: edit_weights(folder, change)


def written(content: bytes, file: str = VALUES) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def of(config: PeftConfig) -> Callable[[Path], object]:
    return lambda folder: get_peft_model(MODELS["mlp"](), config).save_pretrained(folder)


OTHERS = r"type {}, and only those of DVoRA and LoRA share a base .* merge it \(merge_and_unload\)"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no settings": (lambda folder: (folder / SETTINGS).unlink(), "there is no file adapter_config.json"),
    "no values": (lambda folder: (folder / VALUES).unlink(), "there is no file adapter_model.safetensors"),
    "a pipe": (lambda folder: ((folder / VALUES).unlink(), os.mkfifo(folder / VALUES)), "there is no file"),
    "deep settings": (written(b"[" * 10**5, SETTINGS), "cannot be read as JSON"),
    "endless settings": (lambda folder: os.truncate(folder / SETTINGS, 2**25), "expected at most"),
    "scales": (of(IA3Config(target_modules=["lin0"], feedforward_modules=[])), OTHERS.format("IA3")),
    "rotations": (of(RoadConfig(target_modules=["lin0"], group_size=8)), OTHERS.format("ROAD")),
    "another method": (of(VeraConfig(target_modules=["lin0"])), OTHERS.format("VERA")),
    "LoRA that gives ranks up": (of(AdaLoraConfig(target_modules=["lin0"], total_step=9)), OTHERS.format("ADALORA")),
    "an endless header": (written(b"\xff" * 64), "truncated, or no safetensors"),
    "a deep header": (written((10**5).to_bytes(8, "little") + b"[" * 10**5), "its header cannot be read"),
    "another rank": (lambda folder: edit_config(folder, r=5), "another rank"),
    "groups that no vector has": (
        lambda folder: edit_config(folder, lambda_d_groups=2),
        r"lambda_d has shape \(4,\) in the adapter and \(2, 4\) in its .* or other lambda_d_groups",
    ),
    "groups that the settings do not name": (
        values(lambda tensors: tensors.update({f"{LAYER}lambda_d": torch.ones(2, 4)})),
        r"lambda_d has shape \(2, 4\) in the adapter and \(4,\) in its",
    ),
    "a number for a vector": (
        values(lambda tensors: tensors.update({f"{LAYER}lambda_d": torch.tensor(1.0)})),
        r"lambda_d has shape \(\) in the adapter",
    ),
    "a vector less": (values(lambda tensors: tensors.pop(f"{LAYER}lambda_b")), "lin1 has vec"),
    "no vectors": (
        values(lambda tensors: [tensors.pop(k) for k in list(tensors) if ".dvora_" in k]),
        "has no vectors of",
    ),
    "not finite": (values(lambda tensors: tensors[f"{LAYER}lambda_b"].fill_(torch.inf)), "lambda_b has values that ar"),
    "a head that is not finite": (
        values(lambda tensors: tensors["base_model.model.lin2.weight"].fill_(torch.nan)),
        "lin2.weight has values that are not finite",
    ),
    "wide": (
        values(lambda tensors: tensors.update({f"{LAYER}magnitude": tensors[f"{LAYER}magnitude"].double()})),
        "lin1.dvora_magnitude is torch.float64",
    ),
    "twice": (
        values(lambda tensors: tensors.update({LAYER.replace("lin1", "_orig_mod.lin1") + "magnitude": torch.ones(24)})),
        "two entries of one name",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_with_its_name(name: str, folder: Path) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(ValueError, match=message) as refused:
        FolderSource(folder).read()
    assert str(refused.value).startswith(f"{folder}: ")


def test_a_truncated_file_is_refused_wherever_it_ends(folder: Path) -> None:
    whole = (folder / VALUES).read_bytes()
    for length in range(0, len(whole), 7):
        (folder / VALUES).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            FolderSource(folder)


def test_half_precision_is_read_exactly_and_heads_keep_it(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({key: value.bfloat16() for key, value in tensors.items()}))
    found = FolderSource(folder).read()
    assert found.vector.dtype == torch.float32
    assert {part.dtype for part in found.whole.values()} == {torch.bfloat16}
    exact = torch.cat([value.flatten().float() for value in load_file(folder / VALUES).values()])
    assert torch.isin(found.vector, exact).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: edit_config(folder, strength=0.5), "its settings or entries differ; add it again"),
        (shutil.rmtree, "there is no file|no longer there"),
    ],
    ids=["another strength", "gone"],
)
def test_a_folder_of_something_else_is_refused(change: Callable[[Path], object], message: str, folder: Path) -> None:
    source = FolderSource(folder)
    change(folder)
    with pytest.raises(ValueError, match=message):
        source.read()


class Changing(type(Path())):  # type: ignore[misc]
    """A folder whose files are those of another one as soon as its settings were read."""

    new: Path

    def read_bytes(self) -> bytes:
        read = super().read_bytes()
        if self.name == SETTINGS:
            for name in (SETTINGS, VALUES):
                shutil.copyfile(self.new / name, self.parent / "coming")
                (self.parent / "coming").replace(self.parent / name)
        return bytes(read)


def test_a_folder_that_changes_while_it_is_read_is_no_mixture(tmp_path: Path) -> None:
    folders = many(tmp_path, 2)
    Changing.new = folders["0001"]
    source = FolderSource(folders["0000"])
    source.folder = Changing(source.folder)
    with pytest.raises(ValueError, match="0000: it changed while it was read; read it again"):
        source.read()
    assert FolderSource(folders["0000"]).read().digest == FolderSource(folders["0001"]).read().digest


def test_the_adapters_of_a_folder_are_those_with_settings(tmp_path: Path) -> None:
    folders = many(tmp_path, 3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").touch()
    shutil.copytree(folders["0000"], tmp_path / ".0003.unfinished")
    assert adapters_in(tmp_path) == folders
    (tmp_path / "run").mkdir()
    in_run = folders.pop("0002").rename(tmp_path / "run" / "adapter")
    assert adapters_in(tmp_path) == {**folders, "run": in_run}
    with pytest.raises(ValueError, match="it is an adapter itself, name the folder around it"):
        adapters_in(folders["0000"])
    with pytest.raises(ValueError, match="has no folders with adapters in it"):
        adapters_in(tmp_path / "notes")
