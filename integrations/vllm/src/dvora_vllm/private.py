"""All of vLLM 0.32.0 that is used and that no release promises to keep; nothing else of it is imported elsewhere.

Public are `LoRARequest`, `LoRAResolver`, `LoRAResolverRegistry` and the entry point `vllm.general_plugins`. For another
version, compare these names, then change `VERSION` in `__init__.py` and run `make vllm`.
"""

from vllm.config import CompilationMode, VllmConfig
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper import PunicaWrapperBase
from vllm.lora.utils import replace_submodule
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase
from vllm.v1.worker import lora_model_runner_mixin
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

__all__ = [
    "BaseLayerWithLoRA",
    "CompilationMode",
    "LRUCacheLoRAModelManager",
    "LRUCacheWorkerLoRAManager",
    "LinearBase",
    "LoRALayerWeights",
    "LoRAModel",
    "VllmConfig",
    "install",
    "replace_submodule",
]

MEMBERS = {
    LRUCacheLoRAModelManager: (
        # Replaced.
        *("_create_lora_modules", "create_dummy_lora"),
        # Called or read; also the attributes `model`, `device`, `packed_modules_mapping`.
        *("_get_punica_wrapper", "register_module", "get_adapter", "remove_all_adapters", "lora_slots"),
    ),
    # Replaced; also the attribute `_adapter_manager`.
    LRUCacheWorkerLoRAManager: ("_manager_cls", "_load_adapter", "add_adapter"),
    # What `activate_adapter` calls of a layer.
    BaseLayerWithLoRA: ("set_lora", "reset_lora", "set_mapping"),
    # The slot of each token's adapter, -1 for the base.
    PunicaWrapperBase: ("token_lora_indices",),
    # Replaced: what vLLM calls when the base's weights were replaced.
    LoRAModelRunnerMixin: ("reset_lora_state",),
}
"""What is replaced or called of these classes.

Attributes of instances: of a `LinearBase` `output_size`, `output_sizes`, `skip_bias_add` and `bias`; of `VllmConfig`
what `check_served` and `factor_rows` of `manager.py` read.
"""


def install(manager: type[LRUCacheWorkerLoRAManager]) -> None:
    """Have every worker of this process manage its adapters by another class, which the runner does not let choose.

    Args:
        manager: with a method `base_replaced`, called when the base's weights were.
    """
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = manager
    LoRAModelRunnerMixin.reset_lora_state = lambda runner: runner.lora_manager.base_replaced()
