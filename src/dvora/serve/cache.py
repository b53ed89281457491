"""Keys and values of the texts that are being generated: a row for each, every row with a length of its own.

Rows are without gaps: the texts that run are rows 0 to n - 1, so a step takes a slice of each layer and copies nothing.
Row i holds its tokens from position 0 on, and zeros behind them: what is masked has weight zero, and zero times what
an adapter that diverged has left there would not be zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from .scheduler import BLOCK


class RowCache(Cache):
    """The cache of one model.

    `reserve` makes room when texts come, of so many tokens in all; before a pass `begin` says which rows it is of.
    """

    def __init__(self, layers: int, tokens: int) -> None:
        self.tokens, self.rows, self.room = tokens, 0, 0
        self.first, self.positions, self.seen = 0, torch.empty(0, 0, dtype=torch.long), 0
        self.padding = self.positions > 0
        self.of_layers = [_Layer(self) for _ in range(layers)]
        super().__init__(layers=[*self.of_layers])

    def reserve(self, rows: int, room: int) -> None:
        """Have room for so many texts of so many tokens, no more of which than the cache may hold.

        What is there is kept where this leaves room for it: texts come and go without their keys and values moving.
        """
        if rows > self.rows or room > self.room:
            # By a part of what there is, so that growing texts are not copied again and again.
            more = self.room if room <= self.room else room + max(BLOCK, self.room // 2)
            rows = max(rows, min(self.rows, self.tokens // room))
            room = max(room, min(more, self.tokens // rows))
            # Nothing, if it fails half-way for want of memory, so that the next ones do it again.
            self.rows = self.room = 0
            for layer in self.of_layers:
                layer.resize(rows, room)
            self.rows, self.room = rows, room

    def begin(self, first: int, positions: Tensor, lengths: Tensor) -> None:
        """Say which rows a pass is of, from the first one on.

        Args:
            first: row.
            positions: of the tokens that each row gets, (rows, tokens).
            lengths: of the rows with them, (rows,); what stands behind is padding, and written as zeros.
        """
        self.first, self.positions, self.seen = first, positions, int(positions.max()) + 1
        self.padding = (positions >= lengths.unsqueeze(-1))[:, None, :, None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to the attention of a pass: every token sees its row up to itself, (rows, 1, tokens, seen)."""
        hidden = torch.arange(self.seen, device=self.positions.device) > self.positions.unsqueeze(-1)
        return hidden.new_zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)

    def free(self, row: int, length: int, last: int, last_length: int) -> None:
        """Forget the tokens of a row, whose place the last row takes."""
        for layer in self.of_layers:
            for held in layer.held:
                held[row, :, :length] = 0
                if row != last:
                    held[row, :, :last_length] = held[last, :, :last_length]
                    held[last, :, :last_length] = 0


class _Layer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache
        self.held: list[Tensor] = []
        """Keys and values of all rows, (rows, heads, room, width) each; none before the first pass."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room, now that heads and widths are known."""
        self.held = [states[:0] for states in (key_states, value_states)]
        self.resize(self.cache.rows, self.cache.room)
        self.is_initialized = True

    def resize(self, rows: int, room: int) -> None:
        """Make more room, or room of another shape."""
        resized = [held.new_zeros(rows, held.shape[1], room, held.shape[3]) for held in self.held]
        for old, new in zip(self.held, resized, strict=True):
            new[: len(old), :, : old.shape[2]] = old[:rows, :, :room]
        self.held = resized

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens of the pass's rows, and give all that these rows have."""
        cache = self.cache
        if not self.held:
            self.lazy_initialization(key_states, value_states)
        rows = slice(cache.first, cache.first + len(cache.positions))
        for states, held in zip((key_states, value_states), self.held, strict=True):
            if states.shape[2] == 1:
                index = cache.positions.view(-1, 1, 1, 1).expand(-1, states.shape[1], 1, states.shape[3])
                held[rows].scatter_(2, index, states)
            else:
                # Of new texts, which begin at 0.
                held[rows, :, : states.shape[2]] = states.masked_fill(cache.padding, 0)
        keys, values = (held[rows, :, : cache.seen] for held in self.held)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: passes bring their masks."""
        return self.cache.seen, 0

    def get_seq_length(self) -> int:
        """Unused: passes bring their positions."""
        return self.cache.seen

    def get_max_length(self) -> int:
        """Tokens of a row at most."""
        return self.cache.room


def check_cacheable(config: PreTrainedConfig) -> None:
    """Refuse models whose layers remember otherwise than by the keys and values of all tokens, with a ValueError."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    # Absent where a model has no such layers.
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or window or text.is_encoder_decoder:
        raise ValueError(
            f"{config.model_type} has layers of {', '.join(sorted(kinds))}"
            f"{f' with a window of {window}' if window else ''}, and only models that attend to all tokens are served; "
            "merge the adapter, and serve the model with another engine"
        )
