"""All of vLLM 0.32.0 that is used and that no release promises to keep; nothing else of it is imported elsewhere.

Public are `LoRARequest`, `LoRAResolver`, `LoRAResolverRegistry` and the entry point `vllm.general_plugins`. For another
version, compare these names, then change `VERSION` and run `make vllm`.
"""

import vllm
from vllm.config import VllmConfig
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper import PunicaWrapperBase
from vllm.lora.utils import replace_submodule
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase
from vllm.v1.worker import lora_model_runner_mixin

__all__ = [
    "VERSION",
    "BaseLayerWithLoRA",
    "LRUCacheLoRAModelManager",
    "LRUCacheWorkerLoRAManager",
    "LinearBase",
    "LoRALayerWeights",
    "LoRAModel",
    "PunicaWrapperBase",
    "VllmConfig",
    "check_version",
    "install",
    "replace_submodule",
    "token_slots",
]

VERSION = "0.32.0"
MEMBERS = {
    LRUCacheLoRAModelManager: (
        # Replaced.
        *("_create_lora_modules", "create_dummy_lora"),
        # Called or read; also the attributes `model`, `device`, `packed_modules_mapping`.
        *("_get_punica_wrapper", "register_module", "lora_slots"),
    ),
    # Replaced; also the attribute `_adapter_manager`.
    LRUCacheWorkerLoRAManager: ("_manager_cls", "_load_adapter"),
    # What `activate_adapter` calls of a layer, and how it learns whose tokens there are.
    BaseLayerWithLoRA: ("set_lora", "reset_lora", "set_mapping"),
}
"""What is replaced or called of these classes."""


def check_version() -> None:
    """Refuse another vLLM than the one that this package was tested with.

    Raises:
        RuntimeError: it is another one.
    """
    installed = vllm.__version__.partition("+")[0]
    missing = [
        f"{owner.__name__}.{name}" for owner, names in MEMBERS.items() for name in names if name not in dir(owner)
    ]
    if installed != VERSION or missing:
        raise RuntimeError(
            f"dvora-vllm works with vLLM {VERSION}, and {installed} is installed"
            f"{f' without {missing[0]}' if missing else ''}; install that version, or serve with `dvora serve`"
        )


def install(manager: type[LRUCacheWorkerLoRAManager]) -> None:
    """Have every worker of this process manage its adapters by another class, which the runner does not let choose."""
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = manager


def token_slots(punica: PunicaWrapperBase, tokens: int):
    """The slot of each token's adapter, -1 for the base."""
    # The public property is cut to the tokens that are scheduled, and a pass may be padded.
    return punica._token_lora_indices[:tokens]
