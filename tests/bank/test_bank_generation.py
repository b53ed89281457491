"""Generated text of mixed batches is that of each merged model alone: greedy, beams, padding, encoder-decoders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.bank.tenants import tenants
from tests.peft.kinds import GROUPS, Kind
from tests.peft.tiny import LAYERS, MODELS

NAMES: list[str | None] = ["b", None, "c", "a", "b"]
TEXTS = [[3, 4, 5, 6, 7], [30, 31], [12], [20, 19, 18, 17], [9, 8, 11]]


KINDS = {name: Kind(MODELS[name], {"r": 6, "target_modules": LAYERS[name]}) for name in ("llama", "gpt2", "t5")}
KINDS |= {f"{name}, groups": KINDS[name].by_groups(GROUPS) for name in ("llama", "t5")}
# Sampling from the one most likely token is greedy.
SAMPLED = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"use_cache": False}),
    ("llama", SAMPLED),
    ("gpt2", {"num_beams": 3, "num_return_sequences": 2}),
    ("t5", {}),
    ("t5", {"use_cache": False}),
    ("t5", {"num_beams": 3, "num_return_sequences": 2}),
    ("llama, groups", {}),
    ("t5, groups", {"num_beams": 3, "num_return_sequences": 2}),
]


def generate(model: nn.Module, texts: list[list[int]], **options: Any) -> Tensor:
    """Tokens after the prompts, which are padded on the left where there is no encoder."""
    longest, is_encoder = max(map(len, texts)), bool(model.config.is_encoder_decoder)
    pad = [[0] * (longest - len(text)) for text in texts]
    rows = [text + zeros if is_encoder else zeros + text for text, zeros in zip(texts, pad, strict=True)]
    ids = torch.tensor(rows)
    # All different: tiny random models would repeat one token whatever the adapter.
    plain = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "no_repeat_ngram_size": 1, "pad_token_id": 0}
    found = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), **{**plain, **options})
    return found[:, 1:] if is_encoder else found[:, longest:]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_generated_rows_are_those_of_the_merged_models(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    these = tenants(KINDS[name], tmp_path, 3, torch.float64)
    models = {each: these.alone(each) for each in (None, *these.names)}
    # Each adapter says something else, so that the comparison sees which one it was.
    assert len({str(generate(model, TEXTS)) for model in models.values()}) == 4
    # Each text by itself, without padding.
    alone = [generate(models[each], [text], **options) for each, text in zip(NAMES, TEXTS, strict=True)]
    repeats = options.get("num_beams") or options.get("num_return_sequences", 1)
    with these.bank() as served, served.bank.rows(NAMES, repeats):
        assert torch.equal(generate(served.model, TEXTS, **options), torch.cat(alone))
