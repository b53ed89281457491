"""A pack is every adapter byte for byte, the same whoever wrote it, and never half of anything."""

import gc
import json
import os
import random
import shutil
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dvora.bank.pack_index import Entry, Index, RowFormat, check_name, checksum
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from dvora.bank.adapters import SETTINGS, VALUES, AdapterValues, FolderSource
from dvora.bank.packs import Pack, unpack, write_pack
from tests.bank.adapters import HEADED, WIDE, HalfRows, change_values, contents, many
from tests.peft.kinds import mlp, saved


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters; never written to."""
    return many(tmp_path_factory.mktemp("adapters"), 3)


def rows_of(folders: dict[str, Path]) -> HalfRows:
    return HalfRows(FolderSource(next(iter(folders.values()))).read())


def written(folders: dict[str, Path], path: Path, rows: bool = True) -> bytes:
    write_pack(path, folders, rows_of(folders) if rows else None)
    return path.read_bytes()


@pytest.mark.parametrize("rows", [False, True])
def test_a_pack_gives_what_the_folders_give(rows: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    written(folders, tmp_path / "pack", rows)
    with Pack.open(tmp_path / "pack") as pack:
        assert pack.names == tuple(folders)
        for name, folder in folders.items():
            source, expected = pack.source(name), FolderSource(folder)
            values = source.read()
            assert source.name == name
            assert source.content == values.content == expected.content
            assert source.digest == values.digest == expected.read().digest
            assert torch.equal(values.vector, expected.read().vector)
            assert source.factors("another key") is None
            found = source.factors("halves")
            assert (found is not None) == rows
            if found is not None:
                factors, heads = found
                assert torch.equal(factors, values.vector.half())
                assert torch.equal(heads, values.whole["lin2.weight"].flatten())


def test_adapters_without_heads_have_empty_rows_of_heads(tmp_path: Path) -> None:
    folders = many(tmp_path / "adapters", 2, mlp())
    written(folders, tmp_path / "pack")
    with Pack.open(tmp_path / "pack") as pack:
        found = pack.source("0001").factors("halves")
    assert found is not None
    assert found[1].shape == (0,)
    with safe_open(tmp_path / "pack", "pt") as opened:
        assert {*opened.keys()} == {"factors", "files"}


def test_any_program_reads_it_as_safetensors(folders: dict[str, Path], tmp_path: Path) -> None:
    written(folders, tmp_path / "pack")
    with safe_open(tmp_path / "pack", "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in ("factors", "heads", "files")}
    values = [FolderSource(folder).read() for folder in folders.values()]
    assert torch.equal(tensors["factors"], torch.stack([each.vector.half() for each in values]))
    assert torch.equal(tensors["heads"], torch.stack([each.whole["lin2.weight"].flatten() for each in values]))
    files = [(folder / name).read_bytes() for folder in folders.values() for name in (SETTINGS, VALUES)]
    assert bytes(tensors["files"].numpy()) == b"".join(files)


def test_equal_adapters_make_equal_files_whatever_their_order(folders: dict[str, Path], tmp_path: Path) -> None:
    first = written(folders, tmp_path / "first")
    backwards = dict(reversed(folders.items()))
    copies = {name: Path(shutil.copytree(folder, tmp_path / "copies" / name)) for name, folder in backwards.items()}
    assert written(copies, tmp_path / "second") == first
    assert written(folders, tmp_path / "first") == first


NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20)


def is_name(name: str) -> bool:
    try:
        check_name(name)
    except ValueError:
        return False
    return True


@given(names=st.sets(NAMES.filter(is_name), min_size=1, max_size=4), which=st.randoms(use_true_random=False))
def test_unpacked_is_byte_for_byte_what_was_packed_under_any_names(
    names: set[str], which: random.Random, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    desk = tmp_path_factory.mktemp("desk")
    packed = {name: which.choice([*folders.values()]) for name in names}
    write_pack(desk / "pack", packed)
    unpack(desk / "pack", desk / "out")
    expected = {f"{name}/{file}": (packed[name] / file).read_bytes() for name in names for file in (SETTINGS, VALUES)}
    assert contents(desk / "out") == expected
    assert not [path for path in (desk / "out").rglob("*") if path.is_file() and path.name not in (SETTINGS, VALUES)]
    shutil.rmtree(desk)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a\\b", "C:a", "a\0", "a\nb", "\ud800", "x" * 256, "é" * 128]
)
def test_a_name_that_leads_elsewhere_is_no_name(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name of a"):
        write_pack(tmp_path / "pack", {**folders, name: folders["0000"]})
    assert not [*tmp_path.iterdir()]


def test_a_truncated_pack_is_refused_wherever_it_ends(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = written(folders, tmp_path / "pack")
    for length in reversed(range(len(whole))):
        os.truncate(tmp_path / "pack", length)
        with pytest.raises(ValueError, match="pack is truncated" if length >= 8 else "pack is no pack"):
            Pack.open(tmp_path / "pack")
    (tmp_path / "pack").write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="truncated or damaged"):
        Pack.open(tmp_path / "pack")


def test_a_pack_that_is_cut_off_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    # Larger than what reading the index reads ahead.
    whole = written(many(tmp_path / "adapters", 3, WIDE), tmp_path / "pack")
    with Pack.open(tmp_path / "pack") as pack:
        source = pack.source("0002")
        os.truncate(tmp_path / "pack", len(whole) - 1)
        with pytest.raises(ValueError, match="pack was cut off while it was open"):
            source.read()
        assert pack.source("0000").read()


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_damaged_bit_is_noticed_wherever_it_is(
    place: float, bit: int, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "pack"
    damaged = bytearray(written(folders, path))
    damaged[int(place * len(damaged))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        pack = Pack.open(path)
    except ValueError:
        return
    with pack:
        assert pack.names == tuple(folders)
        assert sum(is_refused(pack, name, folder) for name, folder in folders.items()) == 1


def is_refused(pack: Pack, name: str, folder: Path) -> bool:
    """Whether reading an adapter is refused; what is not refused is what was packed."""
    expected, refused = FolderSource(folder).read(), False
    try:
        assert pack.source(name).read().digest == expected.digest
    except ValueError:
        refused = True
    try:
        found = pack.source(name).factors("halves")
    except ValueError:
        return True
    assert found is not None
    assert torch.equal(found[0], expected.vector.half())
    assert torch.equal(found[1], expected.whole["lin2.weight"].flatten())
    return refused


def test_damaged_settings_and_headers_are_noticed_before_they_are_used(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    whole = written(folders, tmp_path / "pack", rows=False)
    files = [(folder / name).read_bytes() for folder in folders.values() for name in (SETTINGS, VALUES)]
    begin = len(whole) - sum(map(len, files))
    header = int.from_bytes(files[1][:8], "little")
    for place in range(begin, begin + len(files[0]) + 8 + header, 13):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        (tmp_path / "pack").write_bytes(damaged)
        with Pack.open(tmp_path / "pack") as pack, pytest.raises(ValueError, match="adapter '0000'"):
            pack.source("0000")


def test_a_damaged_digest_is_noticed(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = written(folders, tmp_path / "pack")
    with Pack.open(tmp_path / "pack") as pack:
        digest = pack.source("0001").digest.encode()
    (tmp_path / "pack").write_bytes(whole.replace(digest, digest[::-1]))
    with pytest.raises(ValueError, match="its checksum is another one"):
        Pack.open(tmp_path / "pack")
    (tmp_path / "pack").write_bytes(whole)
    forged(tmp_path / "pack", with_entry(3, digest[::-1].decode()))
    with (
        Pack.open(tmp_path / "pack") as pack,
        pytest.raises(ValueError, match="adapter '0001': it is damaged: its values have another digest"),
    ):
        pack.source("0001").read()


def forged(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the index of a pack, and make its header anew, with a right checksum."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    metadata = header["__metadata__"]
    index = change(json.loads(metadata["index"]))
    metadata["index"] = json.dumps(index)
    metadata["checksum"] = checksum(metadata["index"].encode())
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


def with_entry(field: int, value: object) -> Callable[[Any], Any]:
    def change(index: Any) -> Any:
        index[1][1][field] = value
        return index

    return change


@pytest.mark.parametrize(
    "change",
    [
        with_entry(0, "../elsewhere"),
        with_entry(0, "0000"),
        with_entry(0, "z"),
        with_entry(0, 1),
        with_entry(1, -1),
        with_entry(1, True),
        with_entry(1, 10**30),
        with_entry(2, 0),
        with_entry(2, 1.5),
        with_entry(3, "digest"),
        with_entry(4, None),
        lambda index: [index[0], []],
        lambda index: [index[0], index[1][:2]],
        lambda index: [None, index[1]],
        lambda index: [["key", "F64", 1, "F32", 1], index[1]],
        lambda index: [["key", "F32", -1, "F32", 1], index[1]],
        lambda index: [["key", "F32", 10**30, "F32", 1], index[1]],
        lambda index: {"rows": None},
        lambda index: 1,
    ],
)
def test_a_forged_index_is_refused(change: Callable[[Any], Any], folders: dict[str, Path], tmp_path: Path) -> None:
    written(folders, tmp_path / "pack")
    forged(tmp_path / "pack", lambda index: index)
    Pack.open(tmp_path / "pack").close()
    forged(tmp_path / "pack", change)
    with pytest.raises(ValueError, match="pack is damaged"):
        Pack.open(tmp_path / "pack")


def test_other_files_are_no_packs(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("name,value\n" * 100)
    for path, message in (
        (folders["0000"] / VALUES, "is no pack, but another safetensors file"),
        (tmp_path / "text", "is no pack"),
        (tmp_path, "is not a file"),
        (tmp_path / "absent", "is not a file"),
    ):
        with pytest.raises(ValueError, match=message):
            Pack.open(path)


def test_another_version_says_what_to_do(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = written(folders, tmp_path / "pack")
    (tmp_path / "pack").write_bytes(whole.replace(b'"dvora_pack":"1"', b'"dvora_pack":"9"'))
    with pytest.raises(ValueError, match="a pack of format '9', expected '1'; pack the adapters again"):
        Pack.open(tmp_path / "pack")


def test_an_open_pack_stays_what_it_was(folders: dict[str, Path], tmp_path: Path) -> None:
    written(folders, tmp_path / "pack")
    with Pack.open(tmp_path / "pack") as pack:
        write_pack(tmp_path / "pack", {"0000": folders["0001"]})
        assert pack.source("0000").read().digest == FolderSource(folders["0000"]).read().digest
    with Pack.open(tmp_path / "pack") as pack:
        assert pack.names == ("0000",)
        source = pack.source("0000")
        with pytest.raises(KeyError, match="has no adapter '0001'"):
            pack.source("0001")
    with pytest.raises(ValueError, match="was closed"):
        source.read()


def test_threads_read_one_pack_at_once(folders: dict[str, Path], tmp_path: Path, hasty_threads: None) -> None:
    written(folders, tmp_path / "pack")
    wrong: list[str] = []

    def read(name: str) -> None:
        for _ in range(50):
            # Both checked by their digests.
            if pack.source(name).read().digest != digests[name] or pack.source(name).factors("halves") is None:
                wrong.append(name)

    with Pack.open(tmp_path / "pack") as pack:
        digests = {name: pack.source(name).digest for name in pack.names}
        threads = [threading.Thread(target=read, args=(name,)) for name in [*pack.names] * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_thousand_adapters_are_never_held_together(tmp_path: Path) -> None:
    folders = many(tmp_path / "adapters", 1000, WIDE)
    total = sum(map(len, contents(tmp_path / "adapters").values()))
    rows, alive, most, told = rows_of(folders), weakref.WeakSet[Tensor](), 0, []

    class Watched(HalfRows):
        def of(self, values: AdapterValues) -> tuple[Tensor, Tensor]:
            nonlocal most
            alive.add(values.vector)
            most = max(most, len(alive))
            return super().of(values)

    rows.__class__ = Watched
    gc.collect()
    tracemalloc.start()
    write_pack(tmp_path / "pack", folders, rows, lambda done, of: told.append((done, of)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most <= 2
    assert peak < total / 20
    assert told == [(number, 1000) for number in range(1, 1001)]
    tracemalloc.start()
    unpack(tmp_path / "pack", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < total / 20
    assert contents(tmp_path / "out") == contents(tmp_path / "adapters")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / VALUES, 100), "0002: adapter_model.safetensors"),
        (lambda folder: (folder / SETTINGS).unlink(), "0002: there is no file"),
    ],
)
def test_a_damaged_adapter_leaves_the_old_pack(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folders = many(tmp_path / "adapters", 3)
    before = written(folders, tmp_path / "pack")
    damage(folders["0002"])
    with pytest.raises(ValueError, match=message):
        write_pack(tmp_path / "pack", folders)
    assert (tmp_path / "pack").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "pack"]


def test_rows_are_of_one_content(folders: dict[str, Path], tmp_path: Path) -> None:
    other = saved(HEADED.trained(alpha=2), tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: lin0 is .* scaling 1.0 here and .* scaling 0.5 there"):
        write_pack(tmp_path / "pack", {**folders, "other": other}, rows_of(folders))
    assert not (tmp_path / "pack").exists()
    write_pack(tmp_path / "pack", {**folders, "other": other})
    with Pack.open(tmp_path / "pack") as pack:
        assert pack.source("other").content == FolderSource(other).content


@pytest.mark.parametrize("settings", [{}, {"strength": 0.25}])
def test_a_folder_that_changes_while_it_is_packed_is_whole_or_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folders = many(tmp_path / "adapters", 2)
    new = saved(HEADED.trained(**settings), tmp_path / "new")
    change_values(new, 7)

    def change(done: int, of: int) -> None:
        for name in (SETTINGS, VALUES):
            shutil.copyfile(new / name, folders["0001"] / "coming")
            (folders["0001"] / "coming").replace(folders["0001"] / name)

    sizes_change = bool(settings)
    if sizes_change:
        with pytest.raises(ValueError, match="0001: it changed while it was packed"):
            write_pack(tmp_path / "pack", folders, on_progress=change)
        assert not (tmp_path / "pack").exists()
        return
    write_pack(tmp_path / "pack", folders, on_progress=change)
    with Pack.open(tmp_path / "pack") as pack:
        assert pack.source("0001").read().digest == FolderSource(new).read().digest


def test_what_cannot_be_packed_is_refused_before_anything_is_written(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no adapters to pack"):
        write_pack(tmp_path / "pack", {})
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is a folder, a pipe or a device"):
            write_pack(path, folders)
    with pytest.raises(FileNotFoundError):
        write_pack(tmp_path / "absent" / "pack", folders)
    entry = Entry("x" * 255, 1, 1, *("0" * 32,) * 4)
    with pytest.raises(ValueError, match="too many for one pack"):
        Index(RowFormat("key", "F32", 1, "F32", 0), (entry,) * 300_000).header()


def test_a_damaged_pack_is_not_unpacked_in_part(folders: dict[str, Path], tmp_path: Path) -> None:
    damaged = bytearray(written(folders, tmp_path / "pack"))
    damaged[-1] ^= 1
    (tmp_path / "pack").write_bytes(damaged)
    with pytest.raises(ValueError, match="adapter '0002': it is damaged"):
        unpack(tmp_path / "pack", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]
