"""The layers and heads of a base model that a bank serves: found from an adapter's settings, checked, hooked.

A layer is hooked rather than wrapped, so that the model keeps its modules and their names; what is never called,
because the module around it reads its weight, cannot be served.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping, Sequence
from math import prod
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapter_file.content import Content, LayerSizes, LowRankSizes, SavedWhole, head_of
from ..adapter_file.lora import check_named, with_targets
from ..adapter_file.settings import DVoRAConfig
from ..adapter_file.values_file import Shape, plain_key
from ..blocks import known_lists, with_rows_first
from ..peft.base_weight import measured_bias
from ..peft.injecting import Target, check_adapter, check_settings, find_targets
from ..peft.layer_types import is_linear, linear_sizes
from ..peft.model import DVoRAModel
from ..peft.saving import check_same_values
from ..rows.batch import Batch, Batches
from ..rows.gathered import RowsFirst, ServedHead
from ..rows.shared import KnownBlocks, SharedPass
from ..tensors import is_dtensor, is_partitioned
from ..weight import AdaptedWeight
from .hooks import (
    BlockForward,
    HeadHook,
    LayerHook,
    LowRankHook,
    ModulePlace,
    OutputHook,
    ServedLayer,
    check_without_bank,
    frozen_tensors,
)


class ServedModel:
    """The layers and heads of a model that a bank serves. Nothing of the model is changed before `hook`.

    Args:
        model: the base, without adapters.
        config: of an adapter, whose settings all share; it is not written to.
        content: of that adapter.
        advice: what else to do where an adapter beside it lacks some, the end of a sentence.

    Raises:
        TypeError, ValueError: the model has adapters, is another base, is spread over devices or processes, or has a
            layer that no bank can serve, or the adapter lacks one; the message names it.
    """

    def __init__(self, model: nn.Module, config: DVoRAConfig, content: Content, advice: str = "") -> None:
        check_without_bank(model)
        _check_plain(model)
        if content.settings.tokens:
            raise ValueError(
                "the adapter trains tokens (trainable_token_indices), which is no vector of a layer; merge it"
            )
        self.model, self.config, self._advice = model, copy.deepcopy(config), advice
        _check_complete(model, self.config, content)
        self.layers = _layers(model, self.config, content) if content.layers else []
        """In the order of the content."""
        self.heads = _heads(model, self.config, content)
        self._known = known_lists(model)
        # The first block that a module is in, wherever else it is: the last entry of a key stays.
        self._block_of = [
            {module: at for at in reversed(range(len(blocks))) for module in blocks[at].modules()}
            for blocks in self._known
        ]
        self.modules: list[ModulePlace] = [
            (parent._modules, name, child)
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]
        self.linears = _linears(model, [head.name for head in self.heads])
        """All that can have factors of LoRA, by name."""
        self._modules = [name for name, _ in model.named_modules() if name]
        self._checked: DVoRAConfig | None = None
        # Fingerprints of the model as it is here, not of the base that the adapter was trained on.
        self.content = content._replace(base=tuple((layer.name, layer.fingerprint) for layer in self.layers))
        devices = {layer.adapted.w.device: layer.name for layer in self.layers}
        devices = devices or {next(model.parameters()).device: ""}
        if len(devices) > 1:
            raise ValueError(f"model: its layers are on several devices ({devices}), a bank is on one")
        self.device = next(iter(devices))
        floating = (tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())
        self.dtype = torch.promote_types(next(floating, torch.float32), torch.float32)
        """Of products with factors of LoRA, as in PEFT."""
        values = model.state_dict() if self.heads else {}
        parts = [part.name for head in self.heads for part in head.parts]
        self.own_heads = {name: values[name].detach().to("cpu", copy=True) for name in parts}
        """The model's own heads, by name."""
        if len({value.dtype for value in self.own_heads.values()}) > 1:
            raise ValueError("model: its heads have several dtypes; cast them to one")

    def hook(self, batches: Batches) -> list[RemovableHandle | BlockForward]:
        """Register forward hooks on all layers and heads, and on the model."""
        if "torch._dynamo" in sys.modules:
            # A graph of the model that was compiled before asks for no new hooks, and would answer with the base.
            torch.compiler.reset()
        rows_first = with_rows_first(self.model)
        # The last to be put before all others comes first: LoRA is added to what DVoRA gives.
        hooks: list[tuple[nn.Module, LowRankHook | LayerHook | HeadHook]] = [
            (module, LowRankHook(name, RowsFirst(name, module in rows_first), batches))
            for name, module in self.linears.items()
        ]
        for position, layer in enumerate(self.layers):
            # The dimensions of a convolution say what they are.
            is_known = layer.module in rows_first or layer.layer_type.spatial > 0
            hooks.append((layer.module, LayerHook(layer, position, RowsFirst(layer.name, is_known), batches)))
        for head in self.heads:
            hooks.append((head.module, HeadHook(head, RowsFirst(head.name, head.module in rows_first), batches)))
        # First of all hooks: those that were there see the adapters' outputs, as they would those of a merged model.
        handles: list[RemovableHandle | BlockForward] = [
            module.register_forward_hook(hook, prepend=True, with_kwargs=True) for module, hook in hooks
        ]
        for number, known in enumerate(map(KnownBlocks, self._known)):
            passes: WeakKeyDictionary[Batch, SharedPass] = WeakKeyDictionary()
            for place, module in enumerate(known.blocks):
                handles.append(BlockForward(module, number, place, known, passes, batches))
        return [*handles, self.model.register_forward_hook(OutputHook(batches))]

    def first_blocks(self, modules: Collection[nn.Module]) -> list[int]:
        """Of each list of known blocks the first that one of the modules is in; the number of blocks, if none is."""
        return [
            min((block_of[module] for module in modules if module in block_of), default=len(blocks))
            for blocks, block_of in zip(self._known, self._block_of, strict=True)
        ]

    def unhook(self, handles: Sequence[RemovableHandle | BlockForward]) -> None:
        """Take the hooks back."""
        for handle in handles:
            handle.remove()

    def check_fits(
        self,
        content: Content,
        beside: Mapping[str, Shape],
        config: DVoRAConfig | None = None,
        allow_partial: bool = False,
    ) -> None:
        """Refuse an adapter of another content or base, before its values are read.

        Args:
            content: of the adapter. Its heads may have other numbers of outputs than the model's.
            beside: shapes of what its file has besides the adapter.
            config: of the adapter, which may lack layers that it does not name; None: it has to have them all.
            allow_partial: whether layers and heads may be missing, which are then the base's.

        Raises:
            ValueError: what differs.
        """
        for sizes in content.factors:
            self._check_linear(sizes)
        # Adapters of one recipe share it, and come one after another.
        if config is not None and config.lora is not None and config is not self._checked:
            lacking = check_named(with_targets(config.lora, self.model), content.factors, self._modules)
            if lacking and not allow_partial:
                raise ValueError(
                    f"the adapter lacks {lacking[0]}, which its settings name; save it again{self._advice}"
                )
            self._checked = None if lacking else config
        if content.layers and not self.layers:
            raise ValueError(
                "it is of DVoRA, and the layers served are those of an adapter that is not; begin with like= of one of "
                "DVoRA (dvora serve: --like)"
            )
        expected, names = self.content, _names(content)
        if content.factors:
            # What layers of DVoRA have in common.
            expected = expected._replace(settings=content.settings)
        absent = sorted(_names(expected) - names)
        if config is not None:
            layers_here = {layer.name for layer in expected.layers}
            absent = [name for name in absent if name not in layers_here or _is_named(name, config)]
        if absent and not allow_partial:
            raise ValueError(
                f"the adapter lacks {absent[0]}, and {len(absent)} of the others' layers and heads in all; use "
                f"adapters of the same layers together{self._advice}"
            )
        layers = tuple(layer for layer in expected.layers if layer.name in names)
        heads = tuple(part for part in expected.whole if part.name in names)
        comparable = content._replace(whole=self._with_own_outputs(content.whole))
        if difference := expected._replace(layers=layers, whole=heads).difference(comparable):
            raise ValueError(f"the adapter is another one than those beside it: {difference}")
        here = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()} if beside else {}
        for key, shape in beside.items():
            if here.get(name := plain_key(key)) != shape:
                raise ValueError(f"the adapter's file has {key!r} of shape {shape}, and the model {here.get(name)}")

    def _check_linear(self, sizes: LowRankSizes) -> None:
        """Refuse factors that fit no layer."""
        if (layer := self.linears.get(sizes.name)) is None:
            raise ValueError(f"the adapter has factors of {sizes.name}, which is no linear layer of the model")
        here = linear_sizes(layer)
        there = sizes.out_features, sizes.in_features
        if here != there:
            raise ValueError(
                f"{sizes.name} has {here[0]} outputs and {here[1]} inputs in the model, and {there[0]} and {there[1]} "
                "in the adapter: another base"
            )

    def check_beside(self, entries: Mapping[str, Tensor]) -> None:
        """Refuse what a file has besides the adapter, unless the model has the same: tables, biases.

        Args:
            entries: of shapes that `check_fits` has seen.

        Raises:
            ValueError: an entry differs.
        """
        state = self.model.state_dict() if entries else {}
        for key, value in entries.items():
            check_same_values(key, value, state[plain_key(key)])

    def heads_of(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The heads of an adapter in the model's dtype; the model's own where it has none.

        Raises:
            ValueError: the dtype cannot hold them.
        """
        # Copies: views would keep all that was read with them.
        heads = {name: whole.get(name, values).to(values.dtype, copy=True) for name, values in self.own_heads.items()}
        for name, values in heads.items():
            if not values.isfinite().all():
                raise ValueError(
                    f"the adapter has values in its head, {name}, that {values.dtype}, the base's, cannot hold"
                )
        return heads

    def head_bytes(self, content: Content) -> int:
        """Bytes of an adapter's heads, and of its factors of LoRA, as they are on the device."""
        of_heads: int = sum(prod(part.shape) * self.own_heads[part.name].itemsize for part in content.whole)
        return of_heads + sum(layer.size for layer in content.factors) * self.dtype.itemsize

    def _with_own_outputs(self, whole: Sequence[SavedWhole]) -> tuple[SavedWhole, ...]:
        """Parts of heads as if they had as many outputs as the model's, where all of a head agree on another number."""
        shapes: dict[str, Shape] = {part.name: part.shape for part in self.content.whole}
        numbers: dict[str, set[tuple[int, int]]] = {}
        alike = {}
        for part in whole:
            here = shapes.get(part.name, part.shape)
            if here and part.shape and here != part.shape and here[1:] == part.shape[1:]:
                numbers.setdefault(self._head_of(part.name), set()).add((here[0], part.shape[0]))
                alike[part.name] = here
        for head, pairs in numbers.items():
            if len(pairs) > 1:
                raise ValueError(
                    f"{head} has {sorted(pairs)} outputs in the model and in the adapter, of which one was expected"
                )
        return tuple(part._replace(shape=alike.get(part.name, part.shape)) for part in whole)

    def _head_of(self, part: str) -> str:
        return next(head.name for head in self.heads if any(own_part.name == part for own_part in head.parts))


def _check_complete(model: nn.Module, config: DVoRAConfig, content: Content) -> None:
    """Refuse an adapter without vectors of a layer that its settings name: others would be compared with that."""
    names = {layer.name for layer in content.layers}
    targets = find_targets(model, lambda name: _is_named(name, config), config)
    for target in targets:
        if target.name not in names and head_of(f"{target.name}.weight", config.modules_to_save) is None:
            raise ValueError(f"the adapter lacks {target.name}, which its settings name; save it again")


def _is_named(layer: str, config: DVoRAConfig) -> bool:
    """Whether settings name a layer as one to adapt."""
    return bool(DVoRAModel._check_target_module_exists(config, layer))


def _layers(model: nn.Module, config: DVoRAConfig, content: Content) -> list[ServedLayer]:
    """The layers that an adapter has vectors of."""
    check_settings(config, "bank", model)
    names = {layer.name for layer in content.layers}
    targets = find_targets(model, lambda name: name in names, config)
    _check_called(targets, names, model)
    prepared = check_adapter(targets, config, model)
    by_name = {target.name: target for target in targets}
    layers = []
    for sizes in content.layers:
        target, adapted = by_name[sizes.name], prepared[sizes.name].adapted
        _check_sizes(sizes, adapted)
        base = target.base()
        layers.append(
            ServedLayer(
                sizes.name,
                base,
                target.layer_type,
                adapted,
                measured_bias(base, target.layer_type),
                tuple(prepared[sizes.name].fingerprint),
                frozen_tensors(base, target.layer_type),
            )
        )
    return layers


def _heads(model: nn.Module, config: DVoRAConfig, content: Content) -> list[ServedHead]:
    """The modules that an adapter saves whole."""
    by_head: dict[str, list[SavedWhole]] = {}
    values = model.state_dict() if content.whole else {}
    for part in content.whole:
        if (head := head_of(part.name, config.modules_to_save)) is None:
            raise ValueError(
                f"the adapter saves {part.name} (bias={config.bias!r}), and only vectors and heads (modules_to_save) "
                "switch here; merge it, or train with bias='none'"
            )
        if part.name not in values or tuple(values[part.name].shape)[1:] != part.shape[1:]:
            shape = tuple(values[part.name].shape) if part.name in values else None
            raise ValueError(f"{part.name} has shape {part.shape} in the adapter and {shape} in the model")
        # As the model has it: adapters may have other numbers of outputs.
        by_head.setdefault(head, []).append(part._replace(shape=tuple(values[part.name].shape)))
    return [
        ServedHead(name, module := model.get_submodule(name), copy.deepcopy(module), tuple(parts))
        for name, parts in by_head.items()
    ]


def _linears(model: nn.Module, heads: Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers of a model that are called, but for those in its heads."""
    within = tuple(f"{head}." for head in heads)
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and not f"{name}.".startswith(within)
    }


def _check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise ValueError(
                f"model: {name} has an adapter already; pass the base model itself (model.unload() of a PeftModel)"
            )
    for name, tensor in model.named_parameters():
        if tensor.is_meta or is_dtensor(tensor) or is_partitioned(tensor):
            raise ValueError(
                f"model: {name} is not whole and in the memory of this process (it is sharded, offloaded or on the "
                "meta device); a bank serves models that are"
            )


def _check_called(targets: Sequence[Target], names: set[str], model: nn.Module) -> None:
    """Refuse weights that the module around them reads, and layers that are not there."""
    targeted = {target.name for target in targets}
    read = sorted(target.name for target in targets if target.layer_type.low_rank is None)
    read += sorted((names - targeted) & {name for name, _ in model.named_parameters()})
    if read:
        raise ValueError(
            f"{read[0]} is a weight that the module around it reads (a parameter, or of an attention), so its outputs "
            "cannot have an adapter for each row; leave it out of target_modules"
        )
    if missing := sorted(names - targeted):
        raise ValueError(f"the adapter has vectors of {missing[0]}, which is no layer of the model: another base")


def _check_sizes(sizes: LayerSizes, adapted: AdaptedWeight) -> None:
    here, there = ((of.out_features, of.rank, of.groups) for of in (adapted, sizes))
    if here != there:
        raise ValueError(
            f"{sizes.name}: rows, rank and groups of lambda_d are {there} in the adapter, and {here} by its layer and "
            "settings; another base model"
        )


def _names(content: Content) -> set[str]:
    return {layer.name for layer in content.layers} | {part.name for part in content.whole}
