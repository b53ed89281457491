"""A language model whose top layers are adapted: what the layers below make of a row never changes, so it is kept."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from materials.models import smollm2


class TopLayers(NamedTuple):
    """The top layers and the head, and what goes into them."""

    model: PreTrainedModel
    hidden: dict[str, Tensor]
    """Of every part of the data, (speakers, rows, tokens, width)."""
    targets: dict[str, Tensor]
    """The tokens, as numbers of a head that has only those that occur, (speakers, rows, tokens)."""

    @classmethod
    @torch.no_grad()
    def of(cls, parts: dict[str, Tensor], layers: int) -> "TopLayers":
        """So many of SmolLM2's.

        Args:
            parts: tokens, each (speakers, rows, tokens).
            layers: at the top.
        """
        model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16).eval().requires_grad_(False)
        kept, hidden = torch.cat([ids.flatten() for ids in parts.values()]).unique(), {}
        for part, ids in parts.items():
            passes = (model.model(input_ids=rows, output_hidden_states=True) for rows in ids.flatten(0, 1).split(32))
            below = torch.cat([each.hidden_states[-1 - layers] for each in passes])
            hidden[part] = below.view(*ids.shape, -1)
        model.model.layers = model.model.layers[-layers:]
        model.lm_head.weight = nn.Parameter(model.lm_head.weight[kept], requires_grad=False)
        return cls(model, hidden, {part: torch.searchsorted(kept, ids) for part, ids in parts.items()})

    def losses(self, part: str, speakers: Tensor, rows: Tensor) -> Tensor:
        """The loss of some rows, each a mean over its tokens but the first.

        Args:
            part: of the data.
            speakers, rows: which, both (B,).
        """
        logits = self.model(inputs_embeds=self.hidden[part][speakers, rows], use_cache=False).logits[:, :-1]
        targets = self.targets[part][speakers, rows][:, 1:]
        return cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").mean(1)
