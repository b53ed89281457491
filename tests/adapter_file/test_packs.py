"""A pack is every adapter byte for byte, never half of anything, and what a stranger puts in one stays that one's own.

A bank serves under a name what the vectors of that entry say, whatever else the file claims.
"""

import gc
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import dvora
from dvora.adapter_file import packs
from dvora.adapter_file.packs import FORMAT, Pack, unpack, write_pack
from dvora.adapter_file.values import FolderSource
from dvora.adapter_file.values_file import SETTINGS, VALUES
from tests.bank.tenants import HEADED, WIDE, Served, contents, many
from tests.census import little_more_memory
from tests.peft.kinds import Kind, edit_weights, mlp, saved

FILES = (SETTINGS, VALUES)
SPARSE = 2_000_000_000
"""Bytes that a file of a few kilobytes claims to have."""


@pytest.fixture(scope="module", params=[1, 3], ids=["one group", "groups"])
def folders(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Path]:
    """Three adapters; never written to."""
    kind = Kind(HEADED.base, {**HEADED.settings, "lambda_d_groups": request.param})
    return many(tmp_path_factory.mktemp("adapters"), 3, kind)


@pytest.fixture
def pack(folders: dict[str, Path], tmp_path: Path) -> Path:
    write_pack(tmp_path / "pack", folders)
    return tmp_path / "pack"


class Parts(NamedTuple):
    """What is in a pack: bytes of its tensors, and entries."""

    tensors: dict[str, bytes]
    entries: dict[str, list[Any]]

    @classmethod
    def of(cls, path: Path) -> "Parts":
        with safe_open(path, "pt") as opened:
            tensors = {name: opened.get_tensor(name).view(torch.uint8).numpy().tobytes() for name in opened.keys()}  # noqa: SIM118
            return cls(tensors, json.loads(opened.metadata()["adapters"]))

    def write(self, path: Path, form: str = FORMAT) -> None:
        """A pack that safetensors itself writes."""
        tensors = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in self.tensors.items()}
        save_file(tensors, path, {"format": form, "adapters": json.dumps(self.entries)})

    def with_values(self, name: str, data: bytes) -> None:
        """Give an adapter other values, with their digest."""
        settings, header, _ = self.entries[name]
        description = packs.described(self.tensors[f".settings.{settings}"], self.tensors[f".header.{header}"])
        self.tensors[name] = data
        self.entries[name][2] = description.digest(packs.values_of(description, data))


def served_by(folders: Mapping[str, Path], pack: Path | None = None) -> dict[str, torch.Tensor]:
    """What a bank serves under each name of a pack, or of folders."""
    model = HEADED.base().requires_grad_(False)
    with dvora.AdapterBank(model, like=folders["0000"]) as bank:
        if pack is not None:
            bank.add_pack(pack)
        else:
            for name, folder in folders.items():
                bank.add(name, folder)
        return {name: Served(model, bank)([name] * 4) for name in bank}


@contextmanager
def peak_of_memory() -> Iterator[Callable[[], int]]:
    """The most bytes that Python held within it."""
    gc.collect()
    tracemalloc.start()
    try:
        peak = 0
        yield lambda: peak
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_it_is_a_safetensors_file_with_one_tensor_an_adapter(folders: dict[str, Path], pack: Path) -> None:
    tensors = Parts.of(pack).tensors
    assert tensors.keys() == {*folders, ".settings.0", ".header.0"}
    for name, folder in folders.items():
        assert tensors[".settings.0"] == (folder / SETTINGS).read_bytes()
        assert tensors[".header.0"] + tensors[name] == (folder / VALUES).read_bytes()


def test_equal_adapters_make_equal_files_whatever_their_order(
    folders: dict[str, Path], pack: Path, tmp_path: Path
) -> None:
    backwards = dict(reversed(folders.items()))
    copies = {name: Path(shutil.copytree(folder, tmp_path / "copies" / name)) for name, folder in backwards.items()}
    write_pack(tmp_path / "second", copies)
    assert (tmp_path / "second").read_bytes() == pack.read_bytes()


NAMES = ["a", "Ann Lee", "a.b", "-", "日本", "x" * 200, "conan"]
NO_NAMES = ["", "..", "a/b", "a\0", "\ud800", "x" * 201, "é" * 101, "CON", "nul.txt", "a.", "a ", ".hid", "a?"]
NO_NAMES += ["__metadata__"]


def test_unpacked_is_byte_for_byte_what_was_packed(folders: dict[str, Path], tmp_path: Path) -> None:
    packed = dict(zip(NAMES, cycle(folders.values()), strict=False))
    write_pack(tmp_path / "pack", packed)
    unpack(tmp_path / "pack", tmp_path / "out")
    expected = {f"{name}/{file}": (packed[name] / file).read_bytes() for name in NAMES for file in FILES}
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "names", [*([name] for name in NO_NAMES), ["Ann", "ann"], ["straße", "STRASSE"], ["\u00e9", "e\u0301"]], ids=ascii
)
def test_names_that_some_system_cannot_give_to_folders_are_refused_in_writing_and_reading(
    names: list[str], folders: dict[str, Path], pack: Path, tmp_path: Path
) -> None:
    message = "are one folder on some systems" if len(names) > 1 else "an adapter's name must|cannot be that of a"
    with pytest.raises(ValueError, match=message):
        write_pack(tmp_path / "new", {**folders, **dict.fromkeys(names, folders["0000"])})
    forged = Parts.of(pack)
    for name in names:
        forged.entries[name], forged.tensors[name] = forged.entries["0000"], forged.tensors["0000"]
    if names[0] in ("\ud800", "a\0", "__metadata__"):
        return  # No header of safetensors can have it.
    forged.write(pack)
    for read in (Pack.open, lambda path: unpack(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=message):
            read(pack)
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_a_truncated_pack_is_refused_wherever_it_ends(pack: Path) -> None:
    whole = pack.read_bytes()
    for length in reversed(range(0, len(whole), 7)):
        os.truncate(pack, length)
        with pytest.raises(ValueError, match=r"pack: .*(truncated|is no pack)"):
            Pack.open(pack)
    pack.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="truncated or damaged"):
        Pack.open(pack)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_damaged_bit_is_refused_and_nothing_is_unpacked_or_changes_no_byte_of_an_adapter(
    place: float, bit: int, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    desk = tmp_path_factory.mktemp("damaged")
    write_pack(desk / "pack", folders)
    damaged = bytearray((desk / "pack").read_bytes())
    damaged[at := int(place * len(damaged))] ^= 1 << bit
    (desk / "pack").write_bytes(damaged)
    try:
        unpack(desk / "pack", desk / "out")
    except ValueError as error:
        assert str(error).startswith(f"{desk / 'pack'}: ")  # noqa: PT017
        assert [path.name for path in desk.iterdir()] == ["pack"]
    else:
        # Only the index has bytes that mean nothing.
        assert at < 8 + int.from_bytes(damaged[:8], "little")
        expected = {f"{name}/{file}": (folders[name] / file).read_bytes() for name in folders for file in FILES}
        assert contents(desk / "out") == expected


def test_damage_in_what_a_file_has_beside_the_adapter_is_refused(tmp_path: Path) -> None:
    folder = saved(mlp().trained(projection_init="kaiming_uniform"), tmp_path / "a")
    edit_weights(folder, lambda tensors: tensors.update({"base_model.model.lin0.base_layer.bias": torch.ones(24)}))
    write_pack(tmp_path / "pack", {"a": folder})
    description, damaged = FolderSource(folder).description, Parts.of(tmp_path / "pack")
    assert description.dtype == torch.float32
    place = next(place for place, name in enumerate(description.entries) if name in description.beside)
    data = bytearray(damaged.tensors["a"])
    data[4 * sum(prod(shape) for _, shape in [*description.entries.values()][:place])] ^= 1
    damaged.tensors["a"] = bytes(data)
    damaged.write(tmp_path / "damaged")
    with pytest.raises(ValueError, match="it is damaged"):
        unpack(tmp_path / "damaged", tmp_path / "out")


# What strangers send


def forged(change: Callable[[Parts], object]) -> Callable[[Path], None]:
    def forge(path: Path) -> None:
        change(parts := Parts.of(path))
        parts.write(path)

    return forge


def entry(field: int, value: object) -> Callable[[Path], None]:
    return forged(lambda parts: parts.entries["0001"].__setitem__(field, value))


def tensor(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return forged(lambda parts: parts.tensors.update({name: change(parts.tensors[name])}))


def index(header: bytes) -> Callable[[Path], object]:
    """A pack that consists of its index."""
    return lambda path: path.write_bytes(len(header).to_bytes(8, "little") + header)


def write_sparse(path: Path, parts: Parts, name: str, size: int) -> None:
    """A pack in which one tensor claims so many bytes, which take no place on the disk."""
    header, start = dict[str, Any](), 0
    for key in sorted(parts.tensors, key=lambda key: key == name):
        length = size if key == name else len(parts.tensors[key])
        header[key] = {"dtype": "U8", "shape": [length], "data_offsets": [start, start := start + length]}
    text = json.dumps({"__metadata__": {"format": FORMAT, "adapters": json.dumps(parts.entries)}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts.tensors[key] for key in header))
    os.truncate(path, 8 + len(text) + start)


def claims(name: str) -> Callable[[Path], object]:
    return lambda path: write_sparse(path, Parts.of(path), name, SPARSE)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (index(b"[]"), "pack: "),
    "an index of nothing": (index(b"{}"), "another safetensors file than a pack"),
    "a deep index": (index(b"[" * 10**5), "its index is damaged"),
    "an index that is no text": (index(b"\xff\xfe"), "pack: "),
    "metadata that is none": (index(b'{"__metadata__":3}'), "its index is damaged"),
    "a tensor of no place": (index(b'{"__metadata__":{"format":"%s"},"a":{}}' % FORMAT.encode()), "its index is dam"),
    "another version": (lambda path: Parts.of(path).write(path, "dvora pack 1"), r"this version \(dvora pack 2\)"),
    "text": (lambda path: path.write_text("name,value\n" * 100), "is no pack"),
    "settings that are not there": (entry(0, 7), "its index is damaged"),
    "a number that is none": (entry(1, "x"), "pack: "),
    "an entry with another length": (forged(lambda parts: parts.entries.update({"0001": [0, 0]})), "pack: "),
    "no entries": (forged(lambda parts: parts.entries.clear()), "its index is damaged"),
    "an adapter without an entry": (forged(lambda parts: parts.entries.pop("0001")), "its index is damaged"),
    "an entry without an adapter": (forged(lambda parts: parts.tensors.pop("0001")), "its index is damaged"),
    "the digest of another one": (
        forged(lambda parts: parts.entries.update({"0001": parts.entries["0000"]})),
        "adapter '0001': it is damaged: its files are not those that were packed",
    ),
    "values with a byte more": (tensor("0001", lambda data: data + b"\0"), "adapter '0001': .*it is damaged"),
    "values that are not finite": (tensor("0001", lambda data: b"\xff" * len(data)), "adapter '0001': .*not finite"),
    "deep settings": (tensor(".settings.0", lambda _: b"[" * 10**5), "adapter '0000': .*cannot be read"),
    "a header that says another length": (
        tensor(".header.0", lambda header: (5).to_bytes(8, "little") + header[8:]),
        "adapter '0000': .*damaged|truncated",
    ),
    "an infinite shape": (
        tensor(".header.0", lambda header: header.replace(b'"shape":[24]', b'"shape":[1e999]')),
        "adapter '0000': .*its header cannot be read",
    ),
    "other settings of training": (
        tensor(".settings.0", lambda text: text.replace(b'"dvora_dropout": 0.0', b'"dvora_dropout": 0.9')),
        "adapter '0000': .*its files are not those that were packed",
    ),
    "settings of gigabytes": (claims(".settings.0"), "2,000,000,000 bytes"),
    "a header of gigabytes": (claims(".header.0"), "2,000,000,000 bytes"),
    "values of gigabytes": (claims("0001"), "2,000,000,000 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pack_is_refused_in_little_memory(name: str, folders: dict[str, Path], pack: Path) -> None:
    change, message = HOSTILE[name]
    change(pack)
    with little_more_memory(), pytest.raises(ValueError, match=message):
        served_by(folders, pack)


@pytest.mark.parametrize("how", ["folder", "pack"])
def test_gigabytes_beside_an_adapter_are_refused_before_they_are_read(
    how: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["0001"], tmp_path / "x"))
    values = (folder / VALUES).read_bytes()
    length = 8 + int.from_bytes(values[:8], "little")
    end = len(values) - length
    entries = json.loads(values[8:length])
    entries["extra"] = {"dtype": "F32", "shape": [SPARSE // 4], "data_offsets": [end, end + SPARSE]}
    text = json.dumps(entries).encode()
    header = len(text).to_bytes(8, "little") + text
    if how == "folder":
        (folder / VALUES).write_bytes(header + values[length:])
        os.truncate(folder / VALUES, len(header) + end + SPARSE)
    else:
        tensors = {".settings.0": (folder / SETTINGS).read_bytes(), ".header.0": header, "x": values[length:]}
        write_sparse(tmp_path / "pack", Parts(tensors, {"x": [0, 0, "0" * 32]}), "x", end + SPARSE)
    with little_more_memory(), pytest.raises(ValueError, match="extra"):
        served_by({"0000": folders["0000"], "x": folder}, tmp_path / "pack" if how == "pack" else None)


def test_an_entry_that_claims_the_digest_of_another_one_is_never_served_under_its_name(
    folders: dict[str, Path], pack: Path
) -> None:
    forged = Parts.of(pack)
    forged.entries["0001"][2] = forged.entries["0000"][2]
    forged.write(pack)
    expected, model = served_by(folders), HEADED.base().requires_grad_(False)
    for order in (["0001", "0000"], ["0000", "0001"]):
        with dvora.AdapterBank(model, like=pack) as bank:
            bank.add_pack(pack)
            for name in order:
                if name == "0001":
                    with pytest.raises(ValueError, match="its files are not those that were packed"):
                        Served(model, bank)(["0001"] * 4)
                else:
                    assert torch.equal(Served(model, bank)(["0000"] * 4), expected["0000"])


def test_an_entry_with_the_values_of_another_one_serves_what_they_say(folders: dict[str, Path], pack: Path) -> None:
    forged, expected = Parts.of(pack), served_by(folders)
    forged.with_values("0001", forged.tensors["0002"])
    forged.write(pack)
    found = served_by(folders, pack)
    assert [torch.equal(found[name], expected[of]) for name, of in zip(folders, ["0000", "0002", "0002"], strict=True)]
    unpack(pack, pack.parent / "out")
    assert (pack.parent / "out" / "0001" / VALUES).read_bytes() == (folders["0002"] / VALUES).read_bytes()


# An open file


def test_an_open_pack_stays_what_it_was(folders: dict[str, Path], pack: Path) -> None:
    with pack.open("rb", buffering=0) as file, Pack.of(file, pack) as opened:
        write_pack(pack, {"0000": folders["0001"]})
        assert opened.source("0000").read().digest == FolderSource(folders["0000"]).read().digest
        source = opened.source("0002")
        # Whoever shares the position in the file, as a forked process does: no read moves it.
        position = file.tell()
        assert source.read()
        assert file.tell() == position
    with pytest.raises(ValueError, match="was closed; open it again"):
        source.read()
    with Pack.open(pack) as opened:
        assert list(opened.entries) == ["0000"]
        # Written over in place, which no writer of packs does.
        pack.write_bytes(b"\0" * pack.stat().st_size)
        with pytest.raises(ValueError, match="adapter '0000': "):
            opened.source("0000").read()


def test_a_pack_that_is_cut_off_while_it_is_open_is_an_error(pack: Path) -> None:
    with Pack.open(pack) as opened:
        source = opened.source("0002")
        os.truncate(pack, pack.stat().st_size - 1)
        with pytest.raises(ValueError, match="pack was cut off while it was open"):
            source.read()
        assert opened.source("0000").read()


def test_the_file_is_closed_with_the_last_adapter_that_is_in_it(folders: dict[str, Path], pack: Path) -> None:
    def is_open() -> bool:
        gc.collect()
        return any(each.resolve() == pack for each in Path("/proc/self/fd").iterdir())

    model = HEADED.base().requires_grad_(False)
    with dvora.AdapterBank(model, like=pack) as bank:
        assert not is_open()
        bank.add("0001", folders["0001"])
        with pytest.raises(ValueError, match="there is an adapter '0001' already"):
            bank.add_pack(pack)
        assert not is_open()
        bank.remove("0001")
        bank.add_pack(pack)
        for name in folders:
            Served(model, bank)([name] * 4)
            assert is_open()
            bank.remove(name)
        assert not is_open()
        pack.write_bytes(pack.read_bytes()[:-1])
        with pytest.raises(ValueError, match="truncated"):
            bank.add_pack(pack)
        assert not is_open()


# Writing


def test_hundreds_of_adapters_are_never_held_together(tmp_path: Path) -> None:
    folders, told = many(tmp_path / "adapters", 250, WIDE), []
    before = contents(tmp_path / "adapters")
    with peak_of_memory() as written:
        write_pack(tmp_path / "pack", folders, lambda done, of: told.append((done, of)))
    with peak_of_memory() as read:
        unpack(tmp_path / "pack", tmp_path / "out")
    assert max(written(), read()) < sum(map(len, before.values())) / 15
    assert told == [(number, 250) for number in range(1, 251)]
    assert contents(tmp_path / "out") == before


def test_an_adapter_that_is_found_damaged_while_it_is_packed_leaves_the_old_pack(tmp_path: Path) -> None:
    folders = many(tmp_path / "adapters", 3)
    write_pack(tmp_path / "pack", folders)
    before = (tmp_path / "pack").read_bytes()
    edit_weights(folders["0002"], lambda tensors: [tensor.fill_(torch.nan) for tensor in tensors.values()])
    with pytest.raises(ValueError, match=r"0002: .* not finite"):
        write_pack(tmp_path / "pack", folders)
    assert (tmp_path / "pack").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "pack"]


@pytest.mark.parametrize("link", [False, True])
def test_a_pack_does_not_take_the_place_of_what_is_packed(link: bool, tmp_path: Path) -> None:
    folders = many(tmp_path / "adapters", 2)
    before, path = contents(tmp_path), folders["0001"] / VALUES
    if link:
        (tmp_path / "pack").hardlink_to(path)
        path = tmp_path / "pack"
    with pytest.raises(ValueError, match=r"is a file of the adapter in .*0001, which is to be packed; name another"):
        write_pack(path, folders)
    assert contents(tmp_path) == before


def test_adapters_of_several_kinds_are_one_pack(folders: dict[str, Path], tmp_path: Path) -> None:
    other = saved(mlp(alpha=2).trained(), tmp_path / "other")
    write_pack(tmp_path / "pack", {**folders, "other": other})
    with Pack.open(tmp_path / "pack") as opened:
        assert opened.source("other").content == FolderSource(other).content
        assert opened.source("0002").read().digest == FolderSource(folders["0002"]).read().digest


def test_what_cannot_be_packed_is_refused_before_anything_is_written(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="there are no adapters to pack"):
        write_pack(tmp_path / "pack", {})
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is a folder, a pipe or a device"):
            write_pack(path, folders)
    with pytest.raises(FileNotFoundError):
        write_pack(tmp_path / "absent" / "pack", folders)
    monkeypatch.setattr(packs, "LARGEST_INDEX", 100)
    with pytest.raises(ValueError, match="3 adapters are more than a pack can index"):
        write_pack(tmp_path / "pack", folders)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
