"""A plug-in of vLLM that serves adapters of DVoRA, each request its own, unmerged.

vLLM calls `register` in each of its processes. It does nothing unless the environment variable DVORA_ADAPTERS names a
folder of adapters; then adapters are DVoRA's, and LoRA's are refused.
"""

import os

import vllm

from .adapters import FOLDER, FolderResolver, adapters_folder, lora_request

__all__ = ["lora_request", "register"]

VERSION = "0.32.0"
"""Of vLLM, all of whose private names that are used stand in `private.py`."""


def register() -> None:
    """Have this process serve adapters of DVoRA.

    Raises:
        RuntimeError: it is another version of vLLM.
        ValueError: DVORA_ADAPTERS is no folder.
    """
    if FOLDER not in os.environ:
        return
    installed = vllm.__version__.partition("+")[0]
    if installed != VERSION:
        raise RuntimeError(
            f"dvora-vllm works with vLLM {VERSION}, and {installed} is installed; install that version, or merge the "
            "adapter (`dvora merge`)"
        )
    folder = adapters_folder()
    # Only now: another version may not have what they import.
    from vllm.lora.resolver import LoRAResolverRegistry

    from .manager import DVoRAWorkerManager
    from .private import install

    install(DVoRAWorkerManager)
    LoRAResolverRegistry.register_resolver("dvora", FolderResolver(folder))
