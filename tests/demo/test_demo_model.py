"""The classifier averages tokens and not padding, and training splits its parameters into the right groups."""

import torch
from torch import nn
from transformers import BertConfig, BertModel

from demo.model import SentenceClassifier
from demo.train import Settings, parameter_groups


def small_classifier() -> SentenceClassifier:
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return SentenceClassifier(BertModel(config, add_pooling_layer=False)).eval()


@torch.no_grad()
def test_padding_does_not_change_a_sentence() -> None:
    model = small_classifier()
    ids, mask = torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.int64)
    padded, padded_mask = torch.tensor([[3, 4, 5, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(ids, mask), model(padded, padded_mask))


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in ("dvora_lambda_b", "dvora_lambda_d")})
    model["dvora_magnitude"] = nn.Parameter(torch.ones(2))
    model["classifier"] = nn.Parameter(torch.ones(2))
    model["frozen"] = nn.Parameter(torch.ones(2), requires_grad=False)
    settings = Settings(1, 32, lambda_rate=3.0, magnitude_rate=2.0, head_rate=1.0, warmup=0.1, evaluations=4)
    lambdas, magnitude, head = parameter_groups(model, settings)
    assert [len(group["params"]) for group in (lambdas, magnitude, head)] == [2, 1, 1]  # type: ignore[arg-type]
    assert (lambdas["lr"], magnitude["lr"], head["lr"]) == (3.0, 2.0, 1.0)
    assert magnitude["weight_decay"] == 0.0
