"""The trunk: trained values are those of training without its cache, and its blocks compute a text once."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvBertConfig,
    ConvBertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from dvora import DVoRAConfig
from dvora.blocks import block_lists
from dvora.training import cached_trunk

COMMON: dict[str, Any] = {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0, "initializer_range": 0.3}
WIDE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


def bert(dropout: float = 0.0) -> nn.Module:
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(**COMMON, **WIDE, **dropouts, classifier_dropout=0.0))


def roberta() -> nn.Module:
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return RobertaForSequenceClassification(RobertaConfig(**COMMON, **WIDE, **dropouts))


def distilbert() -> nn.Module:
    sizes = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24}
    dropouts = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    return DistilBertForSequenceClassification(DistilBertConfig(**COMMON, **sizes, **dropouts))


def llama() -> nn.Module:
    return LlamaForSequenceClassification(LlamaConfig(**COMMON, **WIDE, num_key_value_heads=1))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2ForSequenceClassification(GPT2Config(**COMMON, **sizes, **dropouts))


def adapted(make: Callable[[], nn.Module], blocks: Sequence[int] = (1, 2), **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    base = make()
    ((_, first),) = [(name, list_of[0]) for name, list_of in block_lists(base)]
    layers = {name.rpartition(".")[2] for name, module in first.named_modules() if hasattr(module, "weight")}
    names = sorted(name for name in layers if "norm" not in name.lower() and "ln" not in name)
    heads = ["classifier", "score"]
    config = DVoRAConfig(r=8, target_modules=names, layers_to_transform=[*blocks], modules_to_save=heads, **settings)
    return get_peft_model(base, config)


def texts(count: int = 12) -> list[Tensor]:
    """Of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 40, (3 + number,), generator=generator) for number in range(count)]


def batch(rows: list[Tensor], padding_side: str = "right") -> dict[str, Tensor]:
    ids = pad_sequence(rows, batch_first=True, padding_side=padding_side)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([len(r) % 3 for r in rows])}


def train(model: nn.Module, epochs: int = 3, after_epoch: Callable[[], None] = lambda: None) -> Tensor:
    """The trained values after some epochs, whose batches differ, with an evaluation after each."""
    generator, rows = torch.Generator().manual_seed(2), texts()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(len(rows), generator=generator).split(4):
            model(**batch([rows[row] for row in chosen])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.inference_mode():
            model(**batch(rows))
        after_epoch()
    return torch.cat([p.detach().flatten() for p in trained])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; none may be left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("memory", [2**20, 2000], ids=["in memory", "on disk"])
@pytest.mark.parametrize("make", [bert, roberta, distilbert, llama, gpt2])
def test_what_is_trained_is_the_same_and_the_trunk_computes_a_text_once(
    make: Callable[[], nn.Module], memory: int, folder: Path
) -> None:
    expected, model, counts = train(adapted(make)), adapted(make), list[int]()
    ((_, blocks),) = block_lists(model)
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    for module in (blocks[0], embedding, blocks[1]):
        module.calls = 0
        inside = next(m for m in module.modules() if not [*m.children()])
        inside.register_forward_hook(lambda *_, of=module: setattr(of, "calls", of.calls + 1))
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    with cached_trunk(model, memory=memory) as trunk:
        actual = train(model, after_epoch=lambda: counts.append(blocks[0].calls))
        assert f"12 texts, 0.0 MB {'in memory' if memory > 2000 else 'on disk'}" in str(trunk)
    # Of a pass that is checked it computes twice.
    assert counts == [4, 4, 4]
    assert blocks[1].calls > 12
    # Of a decoder it is called by the model itself, and gives what is cached.
    assert make in (llama, gpt2) or embedding.calls == 4
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {
        name: attributes.keys() for name, attributes in before.items()
    }


def test_the_trunk_has_no_dropout_and_what_is_above_has(folder: Path) -> None:
    model = adapted(lambda: bert(0.5)).train()
    entered, left = list[Tensor](), list[Tensor]()
    ((_, blocks),) = block_lists(model)
    blocks[1].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    blocks[2].register_forward_pre_hook(lambda _, args: left.append(args[0]))
    with cached_trunk(model):
        for _ in range(2):
            model(**batch(texts()[:2]))
    model.eval()
    model(**batch(texts()[:2]))
    first, second, evaluated = (states[1] for states in entered[-3:])
    assert torch.equal(first, second)
    torch.testing.assert_close(first, evaluated)
    assert not torch.equal(left[-3][1], left[-2][1])


def test_images_have_a_trunk_too(folder: Path) -> None:
    sizes = {"image_size": 8, "patch_size": 4, "num_labels": 2}
    model = adapted(lambda: ViTForImageClassification(ViTConfig(**WIDE, **sizes))).eval()
    pixels, calls = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), list[int]()
    expected = model(pixel_values=pixels).logits
    with cached_trunk(model) as trunk:
        assert trunk is not None
        trunk.store({"pixel_values": pixels})
        block_lists(model)[0][1][0].attention.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(model(pixel_values=pixels[2:]).logits, expected[2:])
    assert not calls


def test_a_text_with_other_token_types_is_another_text(folder: Path) -> None:
    model, inputs = adapted(bert).eval(), batch(texts()[:2])
    with cached_trunk(model) as trunk:
        model(**inputs)
        model(**inputs, token_type_ids=torch.ones_like(inputs["input_ids"]))
        assert "4 texts" in str(trunk)
        types = torch.zeros_like(inputs["input_ids"])
        actual = model(**inputs, token_type_ids=types).logits
    torch.testing.assert_close(actual, model(**inputs, token_type_ids=types).logits)


def test_an_error_leaves_the_model_and_no_file(folder: Path) -> None:
    model = adapted(bert).eval()
    expected = model(**batch(texts())).logits
    wrong = {**batch(texts()), "labels": torch.full((12,), 7)}
    with pytest.raises(IndexError), cached_trunk(model, memory=1, folder=folder):
        model(**wrong)
    assert torch.equal(model(**batch(texts())).logits, expected)


def test_other_calls_are_computed_as_ever(folder: Path) -> None:
    model, others = adapted(bert).eval(), batch(texts()[::-1])
    states, logits = model(**batch(texts()), output_hidden_states=True).hidden_states, model(**others).logits
    with cached_trunk(model):
        for _ in range(2):
            model(**batch(texts()))
            torch.testing.assert_close(model(**batch(texts()), output_hidden_states=True).hidden_states, states)
            model(**batch(texts()))
            # A part of the model by itself.
            torch.testing.assert_close(model.get_base_model()(**others).logits, logits)


class Skipping(nn.Module):
    """A model whose head reads what comes before its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 16), nn.Linear(16, 3)
        self.layers = bert().bert.encoder.layer
        self.layers[0].requires_grad_(False)
        self.embedding.requires_grad_(False)

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded = self.embedding(input_ids)
        x = embedded + 1
        for layer in self.layers:
            x = layer(x)
        return self.head(x + embedded)


def mixing() -> nn.Module:
    """Whose convolutions carry padding into a text, so that its states depend on the batch that it comes in."""
    config = ConvBertConfig(**COMMON, **WIDE, embedding_size=16, conv_kernel_size=3)
    return adapted(lambda: ConvBertForSequenceClassification(config))


def without_blocks() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2))


def checkpointed() -> nn.Module:
    model = adapted(bert)
    block_lists(model)[0][1][2].gradient_checkpointing = True
    return model


def compiled() -> nn.Module:
    model = adapted(bert)
    block_lists(model)[0][1][2].compile()
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (without_blocks, "the model has 0 lists of blocks (none)"),
        (lambda: adapted(bert, range(3)), "no block comes before the first that is trained"),
        (checkpointed, "gradient checkpointing"),
        (compiled, "compiled"),
        (lambda: nn.DataParallel(adapted(bert)), "several devices"),
        (mixing, "nobody knows whether a text in a ConvBertLayer depends on others in its batch"),
    ],
    ids=["no blocks", "all blocks", "checkpointed", "compiled", "parallel", "mixing"],
)
def test_where_nothing_can_be_cached_one_line_says_why(make: Callable[[], nn.Module], reason: str) -> None:
    notes, model = list[str](), make()
    with cached_trunk(model, note=notes.append) as trunk:
        assert trunk is None
    (note,) = notes
    assert reason in note


@pytest.mark.parametrize(
    ("make", "inputs", "reason"),
    [
        (lambda: adapted(bert, trainable_token_indices=[5]), batch(texts()), "such as embeddings"),
        (lambda: adapted(llama), batch(texts(), "left"), "padding_side"),
        (Skipping, {"input_ids": torch.stack([texts()[0], texts()[0] + 1])}, "depend on more than"),
    ],
    ids=["trained embeddings", "left padding", "skips"],
)
def test_what_only_a_batch_shows_ends_the_cache(
    make: Callable[[], nn.Module], inputs: dict[str, Tensor], reason: str
) -> None:
    notes, model = list[str](), make().eval()
    expected = model(**inputs)
    with cached_trunk(model, note=notes.append) as trunk:
        actual = [model(**inputs) for _ in range(2)]
        assert trunk is not None
        assert not trunk.is_used
    (note,) = notes
    assert reason in note
    for outputs in actual:
        assert torch.equal(outputs[0], expected[0])
