"""What clients send of an adapter (a file of values, a pack of one, a flat vector), as the two files of one."""

from __future__ import annotations

import tempfile
from math import prod
from typing import NamedTuple

import torch
from safetensors.torch import save

from .packs import FORMAT, Pack
from .values import Description
from .values_file import SETTINGS, VALUES, header_length

LARGEST_HEADER = 2**21
"""Bytes of a header in a request: those of some 20,000 tensors. They are parsed while others wait for the processor."""


class Upload(NamedTuple):
    """An adapter in a request."""

    body: bytes
    is_vector: bool = False
    labels: tuple[str, ...] = ()

    def files(self, like: Description | None) -> dict[str, bytes]:
        """The files of the adapter; a ValueError, if it is none.

        Args:
            like: what a vector is of, and the settings of a vector or a file of values; None: nobody can say.
        """
        if not self.is_vector and f'"{FORMAT}"'.encode() in self.body[:200]:
            return _of_pack(self.body)
        if like is None:
            raise ValueError(
                "there is no adapter yet whose layout a vector could have, or a file of values its settings; send a "
                "pack of one (`dvora bank pack`)"
            )
        if self.is_vector:
            return {SETTINGS: like.settings, VALUES: self._values_of_vector(like)}
        if (length := header_length(self.body, len(self.body))) > LARGEST_HEADER:
            raise ValueError(f"its header has {length:,} bytes, expected at most {LARGEST_HEADER:,}")
        if b".lora_A." in self.body[:length] and not like.content.factors:
            raise ValueError("a file of LoRA does not say its alpha; send its folder as a pack (`dvora bank pack`)")
        return {SETTINGS: like.settings, VALUES: self.body}

    def _values_of_vector(self, like: Description) -> bytes:
        """The file of values whose flat vector this is, in the order of `dvora.flat.Layout`."""
        shapes = {key: like.entries[key][1] for key in like.names.values()}
        lengths = [prod(shape) for shape in shapes.values()]
        if len(self.body) != (size := 4 * sum(lengths)):
            raise ValueError(
                f"a flat vector is float32 and has {size:,} bytes here, got {len(self.body):,}; was its layout another "
                "one?"
            )
        parts = torch.frombuffer(bytearray(self.body), dtype=torch.float32).split(lengths)
        tensors = {key: part.view(shape).clone() for (key, shape), part in zip(shapes.items(), parts, strict=True)}
        return save(tensors, metadata={"format": "pt"})


def _of_pack(body: bytes) -> dict[str, bytes]:
    """The files of the one adapter in a pack."""
    # Of no name, so that it is gone with the process, however that ends.
    with tempfile.TemporaryFile() as file:
        file.write(body)
        file.seek(0)
        with Pack.of(file, "the pack", LARGEST_HEADER) as pack:
            if len(pack.entries) != 1:
                raise ValueError(f"the pack has {len(pack.entries)} adapters, expected one; send them one by one")
            source = pack.source(next(iter(pack.entries)))
            data, _ = source.data()
            return {SETTINGS: source.description.settings, VALUES: source.description.header + data}
