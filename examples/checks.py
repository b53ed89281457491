"""What the examples check, and how they report it; a program of your own needs none of this.

The base is unchanged, a reloaded adapter gives the same bits, its folder is small. The report is one line of JSON on
standard output, the last that an example writes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OTHER_OUTCOMES = ("refused", "base cannot")


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


@torch.no_grad()
def log_probabilities(model: nn.Module, tokens: list[int]) -> Tensor:
    """A language model's, of every token of a text after the first."""
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids).logits[:, :-1]
    result: Tensor = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    return result


def trained_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def folder_bytes(folder: Path, pattern: str = "*.safetensors") -> int:
    """The size of an adapter's files."""
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def report(result: Mapping[str, Any]) -> None:
    """Print what an example found.

    Args:
        result: `works`, true or false; `figures`, the metrics to show, by name; `versions` of packages, by name.
            Where it does not work also `outcome`, "refused" (by dvora) or "base cannot" (nor can other methods there),
            and `reason`. A claim that does not hold is no outcome: leave with `raise SystemExit("what is wrong")`.

    Raises:
        ValueError: `works` is missing, or what has to come with false.
    """
    if not isinstance(result.get("works"), bool):
        raise ValueError(f"result['works'] must be True or False, got {result.get('works')!r}")
    if not result["works"] and (result.get("outcome") not in OTHER_OUTCOMES or not result.get("reason")):
        raise ValueError(
            f"a result that does not work needs an outcome, one of {OTHER_OUTCOMES}, and a reason; got "
            f"{result.get('outcome')!r} and {result.get('reason')!r}"
        )
    print(json.dumps({"works": result["works"], **result}), flush=True)


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
