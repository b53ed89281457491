"""What a training step keeps: counted tensor by tensor, so that it is exact and the same on every machine."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Storages = dict[int, int]
"""Bytes of each storage, by its address."""


class Saved(NamedTuple):
    """What autograd saves, each storage once, without parameters and constants."""

    values: int
    bytes: int
    keeps_input: bool


class _Kept:
    """Alive as long as the graph that keeps the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Live(NamedTuple):
    """Bytes of the live tensors of a step, without constants."""

    after_forward: int
    """Without the output."""
    at_most: int
    """In forward and backward pass together; temporaries inside one operation are not seen."""


class Constants(NamedTuple):
    """Bytes that a method keeps besides the base and the trained parameters."""

    per_layer: int
    shared: int
    """What more than one layer refers to."""
    trained: int


def saved_for_backward(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Saved:
    """What a forward pass saves for the backward pass.

    Args:
        model: of which parameters and constants are not counted.
        forward: from inputs to outputs.
        x: inputs; needs a gradient.
    """
    known = storages(tensors_of(model))
    packed: list[weakref.ref[_Kept]] = []

    def pack(tensor: Tensor) -> _Kept:
        # Detached, or a saved output would keep its own graph alive.
        kept = _Kept(tensor.detach())
        packed.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = forward(x)
    # A graph that no output needs is gone by now, with all that it saved.
    alive = [kept.tensor for reference in packed if (kept := reference()) is not None]
    found = {_address(tensor): tensor for tensor in alive if tensor.numel() and _address(tensor) not in known}
    del output
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in found.items()}
    return Saved(
        values=sum(size // found[address].element_size() for address, size in sizes.items()),
        bytes=sum(sizes.values()),
        keeps_input=_address(x) in found,
    )


def live_memory(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Live:
    """Bytes alive after a forward pass and at most in a training step; counts also what hooks are not shown.

    A warm-up step comes first: buffers that it leaves, which all layers share, belong to no layer.
    """
    known = storages([x, *tensors_of(model)])
    with _LiveTensors(known) as before:
        torch.autograd.backward(output := forward(x), torch.ones_like(output))
    del output
    for tensor in (x, *model.parameters()):
        tensor.grad = None
    with _LiveTensors(known | before.storages()) as live:
        output = forward(x)
        after_forward = live.now() - output.untyped_storage().nbytes()
        torch.autograd.backward(output, torch.ones_like(output))
    return Live(after_forward, live.at_most)


def constants(base: nn.Module, model: nn.Module, layer_names: Sequence[str]) -> Constants:
    """What a method keeps besides the base and the trained parameters.

    Args:
        base: the frozen model.
        model: the adapted one, on the base's own tensors.
        layer_names: ends of the names of the adapted layers.
    """
    trained = storages(parameter for parameter in model.parameters() if parameter.requires_grad)
    own = storages(tensors_of(base)).keys() | trained.keys()
    layers = [module for name, module in model.named_modules() if name.endswith(tuple(layer_names))]
    owners: dict[int, int] = {}
    for layer in layers:
        for address in storages(tensors_of(layer)):
            owners[address] = owners.get(address, 0) + 1
    found = {address: size for address, size in storages(tensors_of(model)).items() if address not in own}
    per_layer = sum(size for address, size in found.items() if owners.get(address) == 1)
    return Constants(per_layer, sum(found.values()) - per_layer, sum(trained.values()))


def storages(tensors: Iterable[Tensor]) -> Storages:
    """The storages behind tensors."""
    return {_address(t): t.untyped_storage().nbytes() for t in tensors if not t.is_meta and t.numel()}


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that modules keep as attributes or in dictionaries, lists and tuples of them."""
    yield from chain(model.parameters(), model.buffers())
    for module in model.modules():
        plain = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        yield from (leaf for leaf in tree_leaves(plain) if isinstance(leaf, Tensor))


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


class _LiveTensors(TorchDispatchMode):
    """Watches every operation's outputs."""

    def __init__(self, known: Storages) -> None:
        super().__init__()
        self.known = known
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.at_most = 0

    def now(self) -> int:
        """Bytes alive, of storages that were not known when the mode was entered."""
        return sum(self.storages().values())

    def storages(self) -> Storages:
        """The same, each by itself."""
        self.alive = {a: (ref, size) for a, (ref, size) in self.alive.items() if not ref.expired()}
        return {address: size for address, (_, size) in self.alive.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.now()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _address(leaf) not in self.known:
                storage = leaf.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.at_most = max(self.at_most, self.now())
        return result
