"""The models are the ones meant. The two that need a conversion are tried only where it has been made."""

import torch
from transformers import AutoModel, AutoTokenizer

from materials import models


def test_minilm_tells_sentences_apart() -> None:
    folder = models.minilm()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(["A cat sleeps.", "A kitten naps.", "Shares fell on Monday."], return_tensors="pt", padding=True)
    mask = batch["attention_mask"][:, :, None]
    with torch.no_grad():
        sentences = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    cat, kitten, shares = torch.nn.functional.normalize(sentences)
    assert cat @ kitten > 0.6 > 0.3 > cat @ shares
