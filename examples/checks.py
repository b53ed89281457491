"""What the examples check: the base is unchanged, a reloaded adapter gives the same bits, its folder is small."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn


def require(holds: bool, claim: str) -> None:
    """End the example if something that it claims is not so.

    Raises:
        SystemExit: `holds` is false.
    """
    if not holds:
        raise SystemExit(f"not so: {claim}")


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal to the last bit."""
    return first.dtype == second.dtype and torch.equal(_bytes(first), _bytes(second))


def frozen_digest(model: nn.Module) -> str:
    """A hash over the bits of all parameters that belong to the base, by their names there.

    An adapter gives other names to what it wraps, and adds parameters of its own; neither changes the hash.
    """
    digest = hashlib.sha256()
    base = {_base_name(name): p for name, p in model.named_parameters() if ".dvora_" not in name}
    for name in sorted(base):
        digest.update(name.encode())
        digest.update(_bytes(base[name]).numpy())
    return digest.hexdigest()


def trained_values(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def folder_bytes(folder: Path, pattern: str = "*.safetensors") -> int:
    """The size of an adapter's files."""
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
