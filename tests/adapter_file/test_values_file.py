"""Files of values are read as safetensors reads them, and by their headers alone where no value is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from dvora.adapter_file.values_file import VALUES, open_values, read_entries, shapes_in, tensors_in

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
entries = st.dictionaries(
    st.text("ab.", min_size=1, max_size=3), st.tuples(st.sampled_from(DTYPES), shapes), max_size=6
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter")


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@given(entries=entries, seed=st.integers(0, 9))
def test_values_are_those_that_safetensors_reads(folder: Path, entries: dict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype) for name, (dtype, shape) in entries.items()
    }
    content = save(tensors)
    (folder / VALUES).write_bytes(content)
    read = tensors_in(folder)
    assert shapes_in(folder) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, expected in load(content).items():
        assert read[name].dtype == expected.dtype
        assert read[name].shape == expected.shape
        assert as_bytes(read[name]) == as_bytes(expected)


@given(entries=entries.filter(bool), data=st.data())
def test_a_file_of_another_length_is_refused(folder: Path, entries: dict, data: st.DataObject) -> None:
    content = save({name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in entries.items()})
    cut = data.draw(st.integers(0, len(content) - 1))
    for damaged in (content[:cut], content + b"x"):
        (folder / VALUES).write_bytes(damaged)
        for read in (shapes_in, tensors_in):
            with pytest.raises(ValueError, match=r"truncated|damaged"):
                read(folder)


@pytest.mark.parametrize("places", [((0, 4), (0, 4)), ((0, 4), (5, 9)), ((4, 8), (8, 12)), ((0, 4), (4, 3))], ids=str)
def test_values_that_do_not_follow_one_another_are_refused(places: Any, tmp_path: Path) -> None:
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": place} for name, place in zip("ab", places, strict=True)
    }
    header = json.dumps(entries).encode()
    (tmp_path / VALUES).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    for read in (shapes_in, tensors_in):
        with pytest.raises(ValueError, match="is damaged"):
            read(tmp_path)


def test_shapes_are_read_from_the_header_alone(tmp_path: Path) -> None:
    (tmp_path / VALUES).write_bytes(save({"a": torch.zeros(2**20)}))
    with open_values(tmp_path / VALUES) as file:
        assert read_entries(file) == {"a": (torch.float32, (2**20,))}
        assert file.tell() < 200


def test_a_folder_without_values_has_no_shapes(tmp_path: Path) -> None:
    assert shapes_in(tmp_path) is None
