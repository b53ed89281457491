"""What is read of adapters: equal to what Layout reads, checked, and never a mixture of two."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import dvora
from dvora.bank.adapters import SETTINGS, VALUES, AdapterValues, FolderSource, VectorSource, adapters_in
from dvora.flat import Layout
from tests.bank.adapters import HEADED, change_values, many
from tests.peft.kinds import KINDS, bits, mlp, saved
from tests.peft.tiny import MODELS

# What PEFT says of an adapter on embeddings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(HEADED.trained(), tmp_path / "customer-17")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_what_layout_reads(kind: str, tmp_path: Path) -> None:
    folder = saved(KINDS[kind].trained(), tmp_path)
    layout, source = Layout.of(folder), FolderSource(folder)
    assert source.content == layout.content
    values, expected = source.read(), layout.to_vector(folder)
    assert values.content == layout.content
    assert list(values.whole) == [each.name for each in layout.content.whole]
    flat = torch.cat([values.vector, *(each.flatten().float() for each in values.whole.values())])
    assert torch.equal(bits(flat), bits(expected))
    vector = VectorSource(layout.content, values.config, expected).read()
    assert vector.digest == values.digest


def test_what_is_not_the_adapter_s_own_is_kept_beside_it(tmp_path: Path) -> None:
    values = FolderSource(saved(KINDS["embeddings"].trained(), tmp_path)).read()
    (name,) = values.beside
    assert name.endswith("embed_tokens.base_layer.weight")
    assert not values.whole


def test_strengths_are_those_of_the_layers_and_part_of_the_digest(tmp_path: Path) -> None:
    weak = FolderSource(saved(mlp(strength={"lin1": 0.5}).trained(), tmp_path / "weak")).read()
    plain = FolderSource(saved(mlp().trained(), tmp_path / "plain")).read()
    assert weak.strengths == (1.0, 0.5, 1.0)
    assert torch.equal(weak.vector, plain.vector)
    assert weak.digest != plain.digest
    assert weak.content == plain.content


@given(index=st.integers(0, 10**6), bit=st.integers(0, 22))
def test_every_bit_of_every_value_is_in_the_digest(index: int, bit: int) -> None:
    layout = Layout.of(HEADED.fresh())
    vector = torch.linspace(0.5, 2, layout.size)
    config = dvora.DVoRAConfig(target_modules=["lin0", "lin1"], r=4)
    changed = vector.clone()
    bits(changed)[index % layout.size] ^= 1 << bit
    digests = [VectorSource(layout.content, config, each).read().digest for each in (vector, vector.clone(), changed)]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 32


def test_a_vector_is_copied() -> None:
    layout = Layout.of(model := HEADED.trained())
    vector = layout.to_vector(model)
    source = VectorSource(layout.content, model.peft_config["default"], vector)
    before = source.read().digest
    vector.zero_()
    assert source.read().digest == before


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda vector: vector.double(), TypeError, "torch.float64, expected a tensor of torch.float32"),
        (lambda vector: vector.tolist(), TypeError, "vector is list"),
        (lambda vector: vector[1:], ValueError, r"vector has shape \(\d+,\), expected"),
        (lambda vector: vector[None], ValueError, r"vector has shape \(1, "),
        (lambda vector: vector.index_fill(0, torch.tensor([30]), torch.nan), ValueError, "lin0.dvora_lambda_b has"),
    ],
)
def test_a_wrong_vector_is_refused(wrong: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    layout = Layout.of(model := mlp().trained())
    with pytest.raises(error, match=message):
        VectorSource(layout.content, model.peft_config["default"], wrong(layout.to_vector(model)))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    values = load_file(folder / VALUES)
    change(values)
    save_file(values, folder / VALUES)


def settings(folder: Path, **changed: Any) -> None:
    found = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({**found, **changed}))


LAYER = "base_model.model.lin1.dvora_"
AT_ONCE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no settings": (lambda folder: (folder / SETTINGS).unlink(), "there is no file adapter_config.json"),
    "no values": (lambda folder: (folder / VALUES).unlink(), "there is no file adapter_model.safetensors"),
    "a pipe": (lambda folder: ((folder / VALUES).unlink(), os.mkfifo(folder / VALUES)), "there is no file"),
    "settings that are none": (lambda folder: (folder / SETTINGS).write_text("[1]"), "holds a list"),
    "settings of nothing": (lambda folder: (folder / SETTINGS).write_bytes(b"\xff{"), "cannot be read as JSON"),
    "deep settings": (lambda folder: (folder / SETTINGS).write_text("[" * 10**5), "cannot be read as JSON"),
    "endless settings": (lambda folder: os.truncate(folder / SETTINGS, 2**25), "expected at most"),
    "no method": (lambda folder: settings(folder, peft_type="NONE"), "which is no method that PEFT knows"),
    "an empty file": (lambda folder: (folder / VALUES).write_bytes(b""), "truncated, or no safetensors"),
    "an endless header": (lambda folder: (folder / VALUES).write_bytes(b"\xff" * 64), "truncated, or no safetensors"),
    "a header that is none": (lambda folder: (folder / VALUES).write_bytes(b"\2" + b"\0" * 7 + b"[]"), "is damaged"),
    "a deep header": (
        lambda folder: (folder / VALUES).write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5),
        "its header cannot be read",
    ),
    "another rank": (lambda folder: settings(folder, r=5), "another rank"),
    "a vector less": (lambda folder: rewrite(folder, lambda values: values.pop(f"{LAYER}lambda_b")), "lin1 has vec"),
}
LATER: dict[str, tuple[Callable[[Path], object], str]] = {
    "not finite": (
        lambda folder: rewrite(folder, lambda values: values[f"{LAYER}lambda_b"].fill_(torch.inf)),
        "lin1.dvora_lambda_b has values that are not finite",
    ),
    "a head that is not finite": (
        lambda folder: rewrite(folder, lambda values: values["base_model.model.lin2.weight"].fill_(torch.nan)),
        "lin2.weight has values that are not finite",
    ),
    "wide": (
        lambda folder: rewrite(
            folder, lambda values: values.update({f"{LAYER}magnitude": values[f"{LAYER}magnitude"].double()})
        ),
        "lin1.dvora_magnitude is torch.float64",
    ),
    "whole numbers": (
        lambda folder: rewrite(
            folder, lambda values: values.update({f"{LAYER}magnitude": values[f"{LAYER}magnitude"].int()})
        ),
        "lin1.dvora_magnitude is torch.int32",
    ),
    "twice": (
        lambda folder: rewrite(
            folder,
            lambda values: values.update(
                {"base_model.model._orig_mod.lin1.dvora_magnitude": values[f"{LAYER}magnitude"] + 1}
            ),
        ),
        "two entries of one name",
    ),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_damaged_folder_is_refused_at_once_with_its_name(name: str, folder: Path) -> None:
    damage, message = AT_ONCE[name]
    damage(folder)
    with pytest.raises(ValueError, match=message) as refused:
        FolderSource(folder)
    assert str(refused.value).startswith(f"{folder}: ")


@pytest.mark.parametrize("name", LATER)
def test_a_wrong_value_is_refused_when_it_is_read(name: str, folder: Path) -> None:
    damage, message = LATER[name]
    damage(folder)
    with pytest.raises(ValueError, match=message) as refused:
        FolderSource(folder).read()
    assert str(refused.value).startswith(f"{folder}: ")


def test_another_method_is_refused(tmp_path: Path) -> None:
    get_peft_model(MODELS["mlp"](), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LORA; only adapters of DVoRA"):
        FolderSource(tmp_path)


def test_a_truncated_file_is_refused_wherever_it_ends(folder: Path) -> None:
    whole = (folder / VALUES).read_bytes()
    for length in range(0, len(whole), 7):
        (folder / VALUES).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            FolderSource(folder)


def test_half_precision_is_read_exactly_and_heads_keep_it(folder: Path) -> None:
    rewrite(folder, lambda values: values.update({key: value.bfloat16() for key, value in values.items()}))
    values = FolderSource(folder).read()
    assert values.vector.dtype == torch.float32
    assert {each.dtype for each in values.whole.values()} == {torch.bfloat16}
    exact = torch.cat([each.flatten().float() for each in load_file(folder / VALUES).values()])
    assert torch.isin(values.vector, exact).all()


def test_values_that_were_saved_anew_are_read_as_they_are_now(folder: Path) -> None:
    source = FolderSource(folder)
    before = source.read()
    change_values(folder, 1)
    assert source.read().digest == FolderSource(folder).read().digest != before.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: saved(HEADED.trained(projection_seed=1), folder), "projection_seed is 0 here and 1 there; add"),
        (lambda folder: settings(folder, strength=0.5), "adapter_config.json has other settings"),
        (lambda folder: saved(mlp().trained(), folder), "lin2"),
        (shutil.rmtree, "no longer there"),
    ],
)
def test_a_folder_of_something_else_is_refused(change: Callable[[Path], object], message: str, folder: Path) -> None:
    source = FolderSource(folder)
    change(folder)
    with pytest.raises(ValueError, match=message):
        source.read()


def with_change_at(
    moment: int, change: Callable[[], object], call: Callable[[], AdapterValues]
) -> AdapterValues | None:
    """Call with a change of the folder before line number `moment` of the bank; None if it was refused.

    Raises:
        IndexError: the call has fewer lines.
    """
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(str(Path(dvora.__file__).parent / "bank")):
            return None
        if event == "line":
            if lines == moment:
                change()
            lines += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = call()
    except ValueError:
        found = None
    finally:
        sys.settrace(before)
    if lines <= moment:
        raise IndexError
    return found


def renamed(new: Path, folder: Path) -> None:
    for name in (SETTINGS, VALUES):
        shutil.copyfile(new / name, folder / "coming")
        (folder / "coming").replace(folder / name)


def overwritten(new: Path, folder: Path) -> None:
    for name in (SETTINGS, VALUES):
        written = (folder / name).stat().st_mtime_ns
        (folder / name).write_bytes((new / name).read_bytes())
        # Clocks of file systems may tick once in some milliseconds.
        os.utime(folder / name, ns=(written + 10**7, written + 10**7))


@pytest.mark.parametrize("written", [renamed, overwritten])
@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_a_folder_that_changes_while_it_is_read_is_the_old_one_the_new_one_or_refused(
    written: Callable[[Path, Path], None], strength: float, tmp_path: Path
) -> None:
    old, new = saved(HEADED.trained(), tmp_path / "old"), saved(HEADED.trained(), tmp_path / "new")
    change_values(new, 1)
    settings(old, strength=1.0)
    settings(new, strength=strength)
    whole = {FolderSource(each).read().digest for each in (old, new)}
    folder = tmp_path / "folder"
    found: list[str | None] = []
    try:
        for moment in range(10**6):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(old, folder)
            source = FolderSource(folder)
            values = with_change_at(moment, lambda: written(new, folder), source.read)
            found.append(values and values.digest)
    except IndexError:
        pass
    assert set(found) == {None, *whole} if strength == 1.0 else set(found) == {None, FolderSource(old).read().digest}


def test_the_adapters_of_a_folder_are_those_with_settings(tmp_path: Path) -> None:
    folders = many(tmp_path, 3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").touch()
    shutil.copytree(folders["0000"], tmp_path / ".0003.unfinished")
    assert adapters_in(tmp_path) == folders
    with pytest.raises(ValueError, match="it is an adapter itself, name the folder around it"):
        adapters_in(folders["0000"])
    with pytest.raises(ValueError, match="has no folders with adapters in it"):
        adapters_in(tmp_path / "notes")
