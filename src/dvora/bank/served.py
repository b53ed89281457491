"""Which layers and heads of a base model a bank serves: found from an adapter's settings, checked, hooked.

A layer is hooked rather than wrapped, so that the model keeps its modules and their names; what is never called,
because the module around it reads its weight, cannot be served.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, device, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ..factors import add_factor_pass, remove_factor_pass
from ..peft.base_weight import measured_bias
from ..peft.config import DVoRAConfig
from ..peft.content import Content, LayerSizes, SavedWhole
from ..peft.injecting import Target, check_adapter, check_settings, find_targets
from ..peft.layer_types import LayerType
from ..peft.saving import MATRIX_PREFIX, PEFT_PREFIX, check_matrices, check_same_values, plain_name
from ..tensors import Float, TensorVersion, bias_of, is_dtensor, is_partitioned, weight_in_memory
from ..weight import AdaptedWeight


class ServedLayer(NamedTuple):
    """One layer, with the frozen side of all adapters."""

    name: str
    module: nn.Module
    layer_type: LayerType
    adapted: AdaptedWeight
    measured_bias: Tensor | None
    fingerprint: tuple[float, ...]
    frozen: tuple[TensorVersion, ...]
    """The weight as it was when the constants were computed, or what it is computed from; none of a quantised layer."""

    def refreshed(self) -> AdaptedWeight:
        """The frozen side, with the constants of the weight as it is now."""
        if (weight := self._weight()) is not None:
            self.adapted.refresh_if_stale(weight)
        return self.adapted

    def bias(self) -> Tensor | None:
        """The base's."""
        return bias_of(self.module, self.measured_bias)

    def is_unchanged(self) -> bool:
        """Whether the weight is still the one whose constants are kept, as far as PyTorch counts writes."""
        now = _frozen(self.module, self.layer_type)
        return len(now) == len(self.frozen) and all(map(TensorVersion.is_of, self.frozen, now))

    def _weight(self) -> Tensor | None:
        return weight_in_memory(self.module, "weight") if self.layer_type.has_weight else None


class ServedHead(NamedTuple):
    """One module that every adapter has as a whole, such as a classifier."""

    name: str
    module: nn.Module
    skeleton: nn.Module
    """A copy without hooks, which never runs itself."""
    parts: tuple[SavedWhole, ...]
    """Its parameters and buffers that adapters save, by their full names."""
    start: int
    """Of its values in a head row."""

    @property
    def lengths(self) -> list[int]:
        """How many values each part has."""
        return [prod(part.shape) for part in self.parts]

    def of_rows(self, heads: Float[Tensor, "B H"]) -> dict[str, Tensor]:
        """Its parts by their names in the module, each with one entry a row, from head rows."""
        lengths = self.lengths
        parts = heads[:, self.start : self.start + sum(lengths)].split(lengths, 1)
        return {
            part.name.removeprefix(f"{self.name}."): values.unflatten(1, part.shape) if part.shape else values[:, 0]
            for part, values in zip(self.parts, parts, strict=True)
        }


class ServedModel(NamedTuple):
    """The layers and heads of a model that a bank serves."""

    model: nn.Module
    config: DVoRAConfig
    """Settings that all adapters of the bank share; a copy."""
    content: Content
    layers: tuple[ServedLayer, ...]
    """In the order of the content."""
    heads: tuple[ServedHead, ...]
    device: device

    @classmethod
    def of(cls, model: nn.Module, config: DVoRAConfig, content: Content) -> ServedModel:
        """Find what an adapter's content names; nothing of the model is changed.

        Args:
            model: the base, without adapters.
            config: of the adapter; it is not written to.
            content: of the adapter.

        Raises:
            TypeError, ValueError: the model has adapters, is another base, is spread over devices or processes, or has
                a layer that no bank can serve; the message names it.
        """
        _check_plain(model)
        _check_content(content)
        config = copy.deepcopy(config)
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
                    tuple(map(TensorVersion.of, _frozen(base, target.layer_type))),
                )
            )
        # Those of the model as it is here, not of the base that the adapter was trained on.
        base_here = tuple((layer.name, layer.fingerprint) for layer in layers)
        return cls(
            model,
            config,
            content._replace(base=base_here),
            tuple(layers),
            _heads(model, config, content),
            _one_device(layers),
        )

    def hook(
        self,
        layer_hook: Callable[[ServedLayer], Callable[..., Any]],
        head_hook: Callable[[ServedHead], Callable[..., Any]],
    ) -> list[RemovableHandle]:
        """Register forward hooks on all layers and heads, and on the model, whose layers share inputs in a pass."""
        add_factor_pass(self.model)
        handles = [layer.module.register_forward_hook(layer_hook(layer), with_kwargs=True) for layer in self.layers]
        return handles + [head.module.register_forward_hook(head_hook(head), with_kwargs=True) for head in self.heads]

    def unhook(self, handles: Sequence[RemovableHandle]) -> None:
        """Take the hooks back."""
        for handle in handles:
            handle.remove()
        remove_factor_pass(self.model)

    def check_unchanged(self) -> None:
        """Refuse to serve over a base that was written to, cast or moved since: factors are of its rows.

        Raises:
            ValueError: a layer has another weight.
        """
        for layer in self.layers:
            if not layer.is_unchanged():
                raise ValueError(
                    f"{layer.name}: its weight was written to, cast or moved since the bank was made, and what the "
                    "bank holds belongs to the weight as it was; close the bank and make a new one"
                )

    def check_beside(self, entries: Mapping[str, Tensor]) -> None:
        """Refuse what a file has besides the adapter, unless the model has the same: tables, biases, projections.

        Raises:
            ValueError: an entry differs, or the model has none of that name.
        """
        matrices = {key.removeprefix(MATRIX_PREFIX): entries[key] for key in entries if key.startswith(MATRIX_PREFIX)}
        check_matrices(matrices, self.layers[0].adapted.shared)
        rest = {key: value for key, value in entries.items() if not key.startswith(MATRIX_PREFIX)}
        own = self.model.state_dict() if rest else {}
        for key, value in rest.items():
            name = plain_name(key.removeprefix(PEFT_PREFIX))
            if name not in own:
                raise ValueError(f"the adapter's file has {key!r}, of which the model has nothing")
            check_same_values(key, value, own[name])

    def head_values(self) -> Mapping[str, Tensor]:
        """The model's own heads, by name."""
        values = self.model.state_dict() if self.heads else {}
        return {part.name: values[part.name] for head in self.heads for part in head.parts}


def _frozen(layer: nn.Module, layer_type: LayerType) -> list[Tensor]:
    """The tensors that a layer's weight is, or is computed from in every pass."""
    if parametrize.is_parametrized(layer, "weight"):
        return list(layer.get_submodule("parametrizations.weight").parameters())
    weight = weight_in_memory(layer, "weight") if layer_type.has_weight else None
    return [] if weight is None else [weight]


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


def _check_content(content: Content) -> None:
    if content.settings.tokens:
        raise ValueError("the adapter trains tokens (trainable_token_indices), which a bank does not hold; merge it")


def _check_called(targets: Sequence[Target], names: set[str], model: nn.Module) -> None:
    """Refuse weights that the module around them reads, and layers that are not there."""
    found = {target.name for target in targets}
    read = sorted(target.name for target in targets if target.layer_type.low_rank is None)
    read += sorted((names - found) & {name for name, _ in model.named_parameters()})
    if read:
        raise ValueError(
            f"{read[0]} is a weight that the module around it reads (a parameter, or of an attention), so its outputs "
            "cannot have an adapter for each row; leave it out of target_modules"
        )
    if missing := sorted(names - found):
        raise ValueError(f"the adapter has vectors of {missing[0]}, which is no layer of the model: another base")


def _check_sizes(sizes: LayerSizes, adapted: AdaptedWeight) -> None:
    if (sizes.out_features, sizes.rank) != (adapted.out_features, adapted.rank):
        raise ValueError(
            f"{sizes.name}: the adapter has {sizes.out_features} rows at rank {sizes.rank}, its layer and settings "
            f"{adapted.out_features} at rank {adapted.rank}; another base model"
        )


def _heads(model: nn.Module, config: DVoRAConfig, content: Content) -> tuple[ServedHead, ...]:
    found: dict[str, list[SavedWhole]] = {}
    for part in content.whole:
        path = part.name.split(".")
        modules = [".".join(path[:end]) for end in range(1, len(path))]
        head = next((m for m in modules if any(m.endswith(n) for n in config.modules_to_save or ())), None)
        if head is None:
            raise ValueError(
                f"the adapter saves {part.name} (bias={config.bias!r}), and a bank holds vectors and heads "
                "(modules_to_save) only; merge it, or train with bias='none'"
            )
        found.setdefault(head, []).append(part)
    values, heads, start = model.state_dict(), list[ServedHead](), 0
    for name, parts in found.items():
        for part in parts:
            if part.name not in values or tuple(values[part.name].shape) != part.shape:
                shape = tuple(values[part.name].shape) if part.name in values else None
                raise ValueError(f"{part.name} has shape {part.shape} in the adapter and {shape} in the model")
        module = model.get_submodule(name)
        heads.append(ServedHead(name, module, copy.deepcopy(module), tuple(parts), start))
        start += sum(heads[-1].lengths)
    return tuple(heads)


def _one_device(layers: Sequence[ServedLayer]) -> device:
    devices = {layer.adapted.w.device: layer.name for layer in layers}
    if len(devices) > 1:
        raise ValueError(f"model: its layers are on several devices ({devices}), a bank is on one")
    return next(iter(devices))
