"""Adapters by name, at paths that name their content.

vLLM keeps the blocks of prompts by name and path of an adapter, and never looks whether the files at a path are other
ones now. So the path of an adapter is a copy of it, in a folder named by the digest of both files: other content is
another path.
"""

import asyncio
import os
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from dvora.adapter_file.values import AdapterValues, FolderSource, adapters_in, values_of
from dvora.adapter_file.values_file import SETTINGS, VALUES
from dvora.whole_files import locked, new_folder

FOLDER = "DVORA_ADAPTERS"
"""The environment variable that names the folder of adapters; without it the plug-in does nothing."""
COPIES = ".vllm"
"""Where the copies are, in that folder."""
COPYING_SECONDS = 60.0
"""For which a process waits for others that copy."""


def adapters_folder() -> Path:
    """The folder of adapters.

    Raises:
        ValueError: it is no folder.
    """
    folder = Path(os.environ[FOLDER])
    if not folder.is_dir():
        raise ValueError(f"{FOLDER}={folder} is no folder; name the one that has a folder for each adapter")
    return folder.resolve()


def content_path(adapter: Path, copies: Path) -> Path:
    """A copy of an adapter, whose path names its content.

    Args:
        adapter: its folder.
        copies: where copies are; an adapter that is there already is not copied again.

    Raises:
        TypeError, ValueError: it is no adapter of DVoRA, or damaged.
        OSError: it cannot be read, or no copy can be written.
    """
    # Once, since the original may be written to meanwhile.
    source = FolderSource(adapter)
    description, data = source.description, source.data()
    path = copies / description.digest(values_of(description, data))
    copies.mkdir(exist_ok=True)
    with locked(copies, COPYING_SECONDS):
        if not path.is_dir():
            with new_folder(path) as filling:
                (filling / SETTINGS).write_bytes(description.settings)
                (filling / VALUES).write_bytes(description.header + data)
    return path


def read(path: Path) -> AdapterValues:
    """The values of an adapter at a path of `content_path`.

    Raises:
        TypeError, ValueError: the path does not name the content that is there, or the adapter is damaged.
        OSError: it cannot be read.
    """
    source = FolderSource(path)
    values = source.read()
    digest = source.description.digest(values)
    if path.name != digest:
        raise ValueError(
            f"{path}: an adapter's path must end in the digest of its content, {digest}, since vLLM keeps blocks of "
            f"prompts by path; put the adapter into {FOLDER} and name it as the model, or use dvora_vllm.lora_request"
        )
    return values


def lora_request(name: str, adapter: str | os.PathLike[str]) -> LoRARequest:
    """What `LLM.generate(lora_request=...)` takes, for the adapter in a folder as it is now.

    Args:
        name: of the adapter; one that is asked for again with other content is another adapter.
        adapter: its folder.

    Raises:
        TypeError, ValueError: it is no adapter of DVoRA, or damaged.
    """
    path = content_path(Path(adapter), adapters_folder() / COPIES)
    # vLLM's number of an adapter is positive and fits 64 bits; 60 of the digest's make a collision no concern.
    return LoRARequest(name, 1 + int(path.name[:15], 16), str(path))


class FolderResolver(LoRAResolver):
    """Finds the adapters of a folder by name, when a request names one for the first time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of a name; None if there is none.

        Raises:
            TypeError, ValueError: it is damaged, or of another method.
        """
        return await asyncio.to_thread(self._resolve, lora_name)

    def _resolve(self, name: str) -> LoRARequest | None:
        adapter = adapters_in(self.folder).get(name)
        return None if adapter is None else lora_request(name, adapter)
