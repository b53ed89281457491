"""The file of an adapter's values: the names in it, and what it holds.

It is safetensors, a header and the data behind it. The header says which tensors there are; it is read and checked by
itself, before anything of their sizes is made.
"""

import json
import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Entries = Mapping[str, tuple[torch.dtype, Shape]]
"""Dtypes and shapes by name, in the order of the data."""
SETTINGS, VALUES, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LARGEST_SETTINGS, LARGEST_HEADER = 2**24, 100_000_000
"""Bytes; the second is safetensors' own limit."""
PEFT_PREFIX = "base_model.model."
VECTOR_PREFIX = ".dvora_"
OF_SAVED_MODULES = re.compile(r"\.(modules_to_save|original_module)\.")
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def layer_and_vector(key: str) -> tuple[str, str]:
    """A key of a file as the name of the layer in it, and that of the vector without its prefix."""
    layer, _, vector = key.removeprefix(PEFT_PREFIX).rpartition(VECTOR_PREFIX)
    return layer, vector


def plain_name(name: str) -> str:
    """A layer's name without the modules that some models have around their layers."""
    for around in ("_orig_mod.", "_fsdp_wrapped_module.", "base_layer."):
        name = name.replace(around, "")
    return name


def plain_key(key: str) -> str:
    """A key of a file by the name that its value would have in the bare base model."""
    return plain_name(key.removeprefix(PEFT_PREFIX))


def is_vector(key: str) -> bool:
    """Whether an entry of a file is a vector of a layer."""
    return VECTOR_PREFIX in key


def shapes_in(folder: Path) -> dict[str, Shape] | None:
    """The shapes of the values in the folder of an adapter, by name; None if it has no such file.

    Raises:
        ValueError: the file is damaged, or a pickle.
        OSError: it cannot be read.
    """
    check_not_pickled(folder)
    if not (folder / VALUES).exists():
        return None
    with open_values(folder / VALUES) as file:
        return {name: shape for name, (_, shape) in read_entries(file).items()}


def check_not_pickled(folder: Path) -> None:
    """Refuse an adapter whose values are in a pickle.

    Raises:
        ValueError: they are.
    """
    if (folder / PICKLED).exists() and not (folder / VALUES).exists():
        raise ValueError(
            f"the adapter's values are in a pickled {PICKLED}, which can run any code and is never loaded. If you "
            f"trust its author: safetensors.torch.save_file(torch.load({PICKLED!r}, weights_only=True), {VALUES!r})"
        )


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """The values in the folder of an adapter, on the CPU, by name.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    # Header and data by one opening: another file may take this one's name meanwhile.
    with open_values(folder / VALUES) as file:
        return tensors_of(read_entries(file), bytearray(file.read()))


def open_values(file: Path) -> BinaryIO:
    """A file of values, open at its beginning.

    Raises:
        ValueError: it is a folder, or a pipe that might never end.
        OSError: it cannot be read.
    """
    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    return file.open("rb")


def read_entries(file: BinaryIO) -> Entries:
    """What the header of a safetensors file says; the file is at its data then.

    Raises:
        ValueError: it is none, truncated or damaged.
    """
    header, size = read_header(file)
    check_size(data_size(entries := header_entries(header)), size)
    return entries


def read_header(file: BinaryIO) -> tuple[bytes, int]:
    """The header of a safetensors file, with the eight bytes that have its length, and how many bytes follow it.

    Raises:
        ValueError: it is none, or truncated.
    """
    first, size = file.read(8), os.fstat(file.fileno()).st_size
    header = first + file.read(header_length(first, size) - 8)
    return header, size - len(header)


def header_entries(header: bytes) -> Entries:
    """Dtypes and shapes in the header of a safetensors file, in the order of the data, which they cover.

    Raises:
        ValueError: it is damaged, or a dtype is none of an adapter.
    """
    try:
        if header_length(header, LARGEST_HEADER) != len(header):
            raise ValueError("its length is another one")
        saved = json.loads(header[8:])
        saved.pop("__metadata__", None)
        entries, end = dict[str, tuple[torch.dtype, Shape]](), 0
        for name, entry in sorted(saved.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, stop) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
            if min(shape, default=0) < 0 or start != end or stop - start != _DTYPES[dtype].itemsize * prod(shape):
                raise ValueError(f"{name} has {stop - start} bytes at {start}")
            entries[name], end = (_DTYPES[dtype], shape), stop
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{VALUES} is damaged: its header cannot be read ({error!r:.200})") from error
    return entries


def header_length(first: bytes, size: int) -> int:
    """Bytes of the header of a safetensors file, with the eight that have its length.

    Args:
        first: the first eight bytes of the file, or more.
        size: of the file.

    Raises:
        ValueError: the file is too short, or is none.
    """
    length = 8 + int.from_bytes(first[:8], "little")
    if len(first) < 8 or not 8 < length <= min(size, LARGEST_HEADER):
        raise ValueError(f"{VALUES} is truncated, or no safetensors file: it has {size:,} bytes and no whole header")
    return length


def tensors_of(entries: Entries, data: bytearray) -> dict[str, Tensor]:
    """The tensors in the data behind a header, of which they are views.

    Raises:
        ValueError: the data is of another size.
    """
    check_size(data_size(entries), len(data))
    buffer = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    parts = buffer.split([dtype.itemsize * prod(shape) for dtype, shape in entries.values()])
    # Where a part does not lie at a multiple of its dtype's size it is copied.
    return {
        name: (part if part.storage_offset() % dtype.itemsize == 0 else part.clone()).view(dtype).view(shape)
        for (name, (dtype, shape)), part in zip(entries.items(), parts, strict=True)
    }


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, not copied if it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def data_size(entries: Entries) -> int:
    """Bytes of the data behind a header."""
    size = 0
    for dtype, shape in entries.values():
        size += dtype.itemsize * prod(shape)
    return size


def check_size(expected: int, size: int) -> None:
    """Refuse data of another size than its header says.

    Raises:
        ValueError: it is.
    """
    if size != expected:
        raise ValueError(
            f"{VALUES} has {size:,} bytes of data, and {expected:,} by its header: it is truncated or damaged"
        )


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuse a plain tensor that claims more values than it has, or stores them in another format."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return
    dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
    if not dense or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        raise ValueError(f"{name}, of shape {tuple(tensor.shape)}, has not as many values of its own in the adapter")
