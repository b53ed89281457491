"""What each worker of vLLM has for adapters: the base's constants, adapted layers, and the way from a file to a slot.

The row factors of an adapter need the base's weights once, and vLLM packs, shards and drops them. So they are read from
the model's own files into the CPU's memory, the constants are computed, and the weights are let go.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest

from dvora.adapter_file.values import FolderSource, adapters_in, errors_of
from dvora.bank.factor_rows import FactorRows
from dvora.bank.served import ServedModel

from .adapters import FOLDER, adapters_folder, read
from .layers import DVoRALinear, Slice, SlotTable
from .private import (
    CompilationMode,
    LinearBase,
    LoRALayerWeights,
    LoRAModel,
    LRUCacheLoRAModelManager,
    LRUCacheWorkerLoRAManager,
    VllmConfig,
    replace_submodule,
)

_TABLE = "dvora"
"""What vLLM calls the one layer that adapters have values of."""


class Adapter(LoRAModel):
    """An adapter as vLLM keeps it: one layer, whose A is the row."""

    path: str | None = None
    """Where it came from; None for one of vLLM's warm-up."""

    @classmethod
    def of_row(cls, number: int, row: torch.Tensor, path: str | None = None) -> "Adapter":
        """An adapter with a row of factors.

        Args:
            number: vLLM's, of the adapter.
            row: of the bank's layers, (F,).
            path: where it came from.
        """
        adapter = cls(number, 1, {_TABLE: LoRALayerWeights(_TABLE, 1, 1, row, row.new_empty(0))})
        adapter.path = path
        return adapter


class DVoRAModelManager(LRUCacheLoRAModelManager):
    """Adapts the linear layers that the adapters in the folder have values of."""

    def __init__(self, *, vllm_config: VllmConfig, **settings: Any) -> None:
        check_served(vllm_config)
        self._factor_rows: FactorRows | None = factor_rows(vllm_config)
        super().__init__(vllm_config=vllm_config, **settings)

    def base_replaced(self) -> None:
        """Serve no adapters any longer: the constants are those of the weights that were."""
        self.remove_all_adapters()
        self._factor_rows = None

    def load(self, number: int, path: Path) -> Adapter:
        """Read an adapter.

        Args:
            number: vLLM's, of the adapter.
            path: of `content_path`.

        Raises:
            TypeError, ValueError: it is not at such a path, damaged, or of another base or kind.
        """
        if (rows := self._factor_rows) is None:
            raise ValueError("the base's weights were replaced, of which row factors are made; start vLLM again")
        with errors_of(path):
            values = read(path)
            check_vectors_only(values.content.whole, values.beside)
            rows.served.check_fits(values.content, {})
            row = rows.row(values, rows.of([values])[0])
        return Adapter.of_row(number, row.factors, str(path))

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: dict[str, str] | None = None) -> Adapter:
        """An adapter that changes nothing, for vLLM's warm-up."""
        return Adapter.of_row(lora_id, self._factor_rows.base().factors)

    def _create_lora_modules(self) -> None:
        rows = self._factor_rows
        layers = zip(rows.served.layers, rows.places, strict=True)
        missing = {layer.name: (layer.adapted, place) for layer, place in layers}
        table = SlotTable(self.lora_slots, rows.width, self.device)
        for name, module in list(self.model.named_modules()):
            if not isinstance(module, LinearBase):
                continue
            slices = []
            for part, outputs in self._parts(name, module).items():
                if part in missing:
                    adapted, place = missing.pop(part)
                    if outputs.stop - outputs.start != adapted.out_features:
                        raise ValueError(f"{part} has another size in vLLM's model, as {name}; it cannot be served")
                    slices.append(Slice(outputs, place, adapted))
            if slices:
                layer = DVoRALinear(module, slices, table)
                layer.set_mapping(self._get_punica_wrapper(name))
                replace_submodule(self.model, name, layer)
        if missing:
            raise ValueError(
                f"the adapters have vectors of {next(iter(missing))}, which is no linear layer of vLLM's "
                f"{type(self.model).__name__}; merge such adapters (`dvora merge`)"
            )
        self.register_module(_TABLE, table)

    def _parts(self, name: str, module: nn.Module) -> dict[str, slice]:
        """The layers that vLLM has packed into one, by their names in files, and their outputs."""
        parent, _, last = name.rpartition(".")
        names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(last, [last])]
        sizes = [module.output_size] if len(names) == 1 else module.output_sizes
        stops = torch.tensor(sizes).cumsum(0).tolist()
        return {part: slice(stop - size, stop) for part, size, stop in zip(names, sizes, stops, strict=True)}


class DVoRAWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads adapters of DVoRA in place of LoRA's."""

    _manager_cls = DVoRAModelManager

    def base_replaced(self) -> None:
        """What `install` needs."""
        self._adapter_manager.base_replaced()

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Load an adapter unless it is there, or refuse a number that is another adapter's."""
        held = self._adapter_manager.get_adapter(lora_request.lora_int_id)
        if held is not None and held.path not in (None, lora_request.lora_path):
            raise ValueError(
                f"{lora_request.lora_name!r} has the number of another adapter, {lora_request.lora_int_id}; use "
                "dvora_vllm.lora_request, or one process of the API server (--api-server-count 1)"
            )
        return super().add_adapter(lora_request)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        if lora_request.load_inplace:
            raise ValueError(
                f"load_inplace of {lora_request.lora_name!r}: vLLM would read the adapter again in every step; call "
                "/v1/unload_lora_adapter, then name it as the model"
            )
        return self._adapter_manager.load(lora_request.lora_int_id, Path(lora_request.lora_path))


def check_served(config: VllmConfig) -> None:
    """Refuse what was never tried with adapters of DVoRA, or cannot be right.

    Raises:
        ValueError: vLLM is to run so.
    """
    model, parallel = config.model_config, config.parallel_config
    compiled = config.compilation_config.mode != CompilationMode.NONE
    refused = {
        "tensor, pipeline and data parallelism": parallel.world_size_across_dp > 1,
        "compiled models and CUDA graphs (without --enforce-eager)": compiled,
        "quantised models": config.quant_config is not None,
        "pooling models (classification, embeddings)": model.runner_type != "generate",
        "models of images or sound": model.is_multimodal_model,
        "speculative decoding": config.speculative_config is not None,
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(
                f"dvora-vllm does not serve {what}. Start vLLM without that, or merge the adapter (`dvora "
                f"merge`) and start vLLM without {FOLDER}; encoders are served by `dvora serve`"
            )


def factor_rows(config: VllmConfig) -> FactorRows:
    """How adapters become rows on the base, which all have the layers, ranks and matrices of the first in the folder.

    Raises:
        TypeError, ValueError: there is no adapter in the folder, or the first one is damaged or of another base.
    """
    folder = next(iter(adapters_in(adapters_folder()).values()))
    model = config.model_config
    with errors_of(folder):
        source = FolderSource(folder)
        check_vectors_only(source.content.whole, source.beside)
        base = AutoModelForCausalLM.from_pretrained(
            model.model, revision=model.revision, dtype=model.dtype, trust_remote_code=model.trust_remote_code
        )
        rows = FactorRows(ServedModel(base, source.read().config, source.content), torch.float32)
        rows.of([source.read()])
    # With lambda_d by groups, row factors may need the weights of their layers.
    read = {id(layer.module.weight) for layer in rows.served.layers if layer.adapted.reads_weight}
    for parameter in base.parameters():
        if id(parameter) not in read:
            parameter.data = parameter.new_empty(0)
    return rows


def check_vectors_only(whole: Any, beside: Any) -> None:
    """Refuse adapters that have more than vectors.

    Args:
        whole: what an adapter saves whole.
        beside: what its file has besides.

    Raises:
        ValueError: there is something.
    """
    for name in (*(part.name for part in whole), *beside):
        raise ValueError(
            f"the adapter saves {name}, and dvora-vllm serves vectors of linear layers only: no heads, biases, tokens, "
            "tables or projections"
        )
