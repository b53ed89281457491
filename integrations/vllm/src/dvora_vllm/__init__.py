"""A plug-in of vLLM that serves adapters of DVoRA, each request its own, unmerged.

vLLM calls `register` in each of its processes. It does nothing unless the environment variable DVORA_ADAPTERS names a
folder of adapters; then adapters are DVoRA's, and LoRA's are refused.
"""

import os

from .adapters import FOLDER, FolderResolver, adapters_folder, lora_request

__all__ = ["lora_request", "register"]


def register() -> None:
    """Have this process serve adapters of DVoRA.

    Raises:
        RuntimeError: it is another version of vLLM.
        ValueError: DVORA_ADAPTERS is no folder.
    """
    if FOLDER not in os.environ:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from .manager import DVoRAWorkerManager
    from .private import check_version, install

    check_version()
    folder = adapters_folder()
    install(DVoRAWorkerManager)
    LoRAResolverRegistry.register_resolver("dvora", FolderResolver(folder))
