"""The layers of vLLM's model with the adapter of each token.

Every adapter is one row of numbers, its row factors `(g - 1, scale, lambda_d)` of all layers. The rows of the adapters
in slots are one table; A and B are shared by all. A layer takes its columns of the rows of a batch's tokens:

    y = y_b + (g - 1) (y_b - bias) + scale ((x A^T) lambda_d) B^T        y_b = x W^T + bias

With lambda_d by groups of columns, A' of each token's adapter takes the place of A and lambda_d, and is never formed.

vLLM packs layers that read the same inputs (query, key and value; gate and up) into one: the slices of its outputs.

Dimensions: T tokens, I in, O out, S slots, F values of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dvora import functional
from dvora.layer import project_scaled
from dvora.rows.gathered import LayerPlace
from dvora.weight import AdaptedWeight

from .private import BaseLayerWithLoRA


class SlotTable(BaseLayerWithLoRA):
    """The rows of the adapters in slots. For vLLM it is the one layer that an adapter has values of.

    Args:
        slots: how many.
        width: values of a row.
        device: of the model.
    """

    rows: Tensor
    """(S + 1, F), float32; the last row is the base's, which -1 names."""

    def __init__(self, slots: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(slots + 1, width, device=device), persistent=False)

    def set_lora(self, index: int, lora_a: Tensor, lora_b: Tensor) -> None:
        """Put an adapter into a slot.

        Args:
            index: the slot.
            lora_a: the adapter's row, (F,).
            lora_b: empty.
        """
        self.rows[index].copy_(lora_a, non_blocking=True)

    def reset_lora(self, index: int) -> None:
        """Make a slot the base's."""
        self.rows[index].zero_()


@dataclass(frozen=True)
class Slice:
    """The outputs of one adapted layer among those of a packed one.

    Args:
        outputs: which.
        place: its columns of a row.
        adapted: its frozen side, of which A and B are used.
    """

    outputs: slice
    place: LayerPlace
    adapted: AdaptedWeight


class DVoRALinear(BaseLayerWithLoRA):
    """A linear layer of vLLM, in one process, whose tokens have adapters.

    Args:
        base_layer: of vLLM.
        slices: those that adapters have values of.
        table: of the slots.
    """

    def __init__(self, base_layer: nn.Module, slices: list[Slice], table: SlotTable) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slices = slices
        # In a list, since a module would be registered once a layer.
        self.tables = [table]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """The outputs as the base layer returns them: with a bias that is yet to be added, or alone."""
        result = self.base_layer(x)
        outputs, *rest = result if isinstance(result, tuple) else (result,)
        self._adapt(outputs.view(-1, outputs.shape[-1]), x.reshape(-1, x.shape[-1]))
        return (outputs, *rest) if rest else outputs

    def _adapt(self, y: Tensor, x: Tensor) -> None:
        """Write the adapters' outputs over the base's.

        Args:
            y: (T, O).
            x: (T, I).
        """
        rows, slots = self.tables[0].rows, self.punica_wrapper.token_lora_indices
        bias = None if self.base_layer.skip_bias_add else self.base_layer.bias
        projected: dict[object, Tensor] = {}
        for part in self.slices:
            adapted, place = part.adapted, part.place
            gain_minus_one, scale, lambda_d = rows[slots, place.start : place.stop].split(place.lengths, -1)
            base = y[:, part.outputs]
            low = y.new_zeros(())
            if adapted.by_groups is not None:
                low = adapted.matrices.expand(project_scaled(adapted, x, lambda_d), adapted.out_features)
            elif adapted.rank:
                if (z := projected.get(adapted.update_key)) is None:
                    z = projected[adapted.update_key] = adapted.matrices.project(x, adapted.rank)
                low = adapted.matrices.expand(z * lambda_d.to(z.dtype), adapted.out_features)
            own_bias = None if bias is None else bias[part.outputs]
            base.copy_(functional.combine(base, low, gain_minus_one, scale, own_bias))
