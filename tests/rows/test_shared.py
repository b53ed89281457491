"""Rows that are equal are computed once, and every row is what it is alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    ViTForImageClassification,
)

import dvora
from dvora.rows import shared as shared_module
from dvora.rows.shared import Groups, equal_rows
from tests.peft.tiny import VOCABULARY, llama, train_vectors
from tests.rows.products import Products

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_labels": 3,
    "initializer_range": 0.2,
}
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 4},
    "llama": {"use_cache": False},
}
TARGETS = {
    "bert": ["query", "dense"],
    "roberta": ["query", "dense"],
    "distilbert": ["q_lin", "lin1"],
    "modernbert": ["Wqkv", "mlp.Wo"],
    "llama": ["q_proj", "down_proj"],
    "mpnet": ["attn.q", "intermediate.dense"],
}
DEPTHS: dict[str, list[int] | None] = {"two": [2, 3], "also two": [2, 3], "one": [3], "all": None}


class Shared:
    """A bank of adapters at different depths, that counts the rows of each block."""

    def __init__(self, model: nn.Module, bank: dvora.AdapterBank, blocks: nn.ModuleList) -> None:
        self.model, self.bank = model, bank
        self.products = Products(blocks)

    @property
    def rows(self) -> Counter[int]:
        """Of the first product of each block, in the last call."""
        return self.products.rows

    @torch.inference_mode()
    def __call__(self, names: Sequence[str | None], **inputs: Any) -> Any:
        self.rows.clear()
        with self.bank.rows(names), self.products:
            return self.model(**inputs)

    def alone(self, names: Sequence[str | None], **inputs: Tensor) -> Tensor:
        """Each row in a batch of its own."""
        rows = [self([n], **{key: x[i : i + 1] for key, x in inputs.items()}).logits for i, n in enumerate(names)]
        return torch.cat(rows)


def classifier(kind: str) -> nn.Module:
    config = AutoConfig.for_model(kind, **{**SIZES, **OTHER_SIZES.get(kind, {})})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)


@contextmanager
def shared(
    base: Callable[[], nn.Module], targets: Sequence[str], folder: Path, blocks: str, **config: Any
) -> Iterator[Shared]:
    for seed, (name, layers) in enumerate(DEPTHS.items()):
        adapted = get_peft_model(
            base(), dvora.DVoRAConfig(r=4, target_modules=[*targets], layers_to_transform=layers, **config)
        )
        train_vectors(adapted, seed=seed)
        adapted.save_pretrained(folder / name)
    model = base()
    with dvora.AdapterBank(model, like=folder / "all", own_heads=True) as bank:
        bank.add_folder(folder)
        yield Shared(model, bank, model.get_submodule(blocks))


def blocks_of(kind: str) -> str:
    lists = [name for name, module in classifier(kind).named_modules() if isinstance(module, nn.ModuleList)]
    return min(lists, key=len)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("bert")
    with shared(lambda: classifier("bert"), TARGETS["bert"], folder, blocks_of("bert"), task_type="SEQ_CLS") as found:
        yield found


def texts(*rows: int) -> dict[str, Tensor]:
    """Two texts of other lengths, by row."""
    ids = torch.arange(3, 3 + 2 * 9).view(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": (ids * mask)[[*rows]], "attention_mask": mask[[*rows]]}


@pytest.mark.parametrize("kind", TARGETS)
def test_rows_part_where_their_own_adapter_begins(kind: str, tmp_path: Path) -> None:
    with shared(lambda: classifier(kind), TARGETS[kind], tmp_path, blocks_of(kind), task_type="SEQ_CLS") as model:
        for names, rows, counts in (
            (["two", "also two", "one"], [0, 0, 0], [1, 1, 3, 3]),
            (["two", "one", "all", None], [0, 0, 0, 0], [2, 2, 3, 4]),
            (["two", "one", "two", "one"], [0, 0, 1, 1], [2, 2, 4, 4]),
            (["two", "one", "two", "also two"], [0, 1, 0, 1], [2, 2, 3, 3]),
            (["two", "one"], [0, 1], [2, 2, 2, 2]),
            ([None, None, None], [0, 0, 0], [1, 1, 1, 1]),
        ):
            expected = model.alone(names, **texts(*rows))
            output = model(names, **texts(*rows))
            assert [model.rows[block] for block in range(4)] == counts, (names, rows)
            torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_all_that_a_model_gives_is_of_all_rows(kind: str, tmp_path: Path) -> None:
    names, asked = ["two", "one", "all", None], {"output_hidden_states": True, "output_attentions": True}
    with shared(lambda: classifier(kind), TARGETS[kind], tmp_path, blocks_of(kind), task_type="SEQ_CLS") as model:
        model.model.set_attn_implementation("eager")
        outputs = model(names, **texts(0, 0, 0, 0), **asked)
        assert (len(outputs.hidden_states), len(outputs.attentions)) == (5, 4)
        for row, name in enumerate(names):
            alone = model([name], **texts(0), **asked)
            for part in ("hidden_states", "attentions"):
                for found, expected in zip(outputs[part], alone[part], strict=True):
                    torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from([*DEPTHS, None]), st.integers(0, 1)), min_size=1, max_size=9),
)
def test_any_batch_is_its_rows_alone(bert: Shared, rows: list[tuple[str | None, int]]) -> None:
    names, inputs = [name for name, _ in rows], texts(*(text for _, text in rows))
    torch.testing.assert_close(bert(names, **inputs).logits, bert.alone(names, **inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [["all", "two", None], ["two", "two", "one"]], ids=["all differ", "some are equal"])
def test_long_rows_go_through_a_block_in_portions(names: list[str | None], tmp_path: Path) -> None:
    def base() -> nn.Module:
        # One row has more values than a portion.
        config = AutoConfig.for_model("bert", **{**SIZES, "hidden_size": 512, "max_position_embeddings": 1024})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)

    ids = torch.randint(3, VOCABULARY, (1, 1024)).repeat(3, 1)
    with shared(base, TARGETS["bert"], tmp_path, blocks_of("bert"), task_type="SEQ_CLS") as model:
        expected = model.alone(names, input_ids=ids)
        outputs = model(names, input_ids=ids)
        assert model.products.largest == 1
        torch.testing.assert_close(outputs.logits, expected, rtol=1e-5, atol=1e-5)


def test_equal_tokens_with_other_masks_are_not_equal(bert: Shared) -> None:
    inputs = texts(0, 0, 0)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1, 5:] = 0
    names = ["two", "two", "one"]
    torch.testing.assert_close(bert(names, **inputs).logits, bert.alone(names, **inputs), rtol=1e-5, atol=1e-5)


def test_a_block_that_fails_leaves_the_batch_as_it_was(bert: Shared) -> None:
    names, inputs = ["two", "one", None], texts(0, 0, 0)
    expected = bert(names, **inputs).logits
    layer = bert.model.get_submodule(blocks_of("bert"))[1].output.dense
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.inference_mode(), bert.bank.rows(names):
        with pytest.raises(ZeroDivisionError):
            bert.model(**inputs)
        handle.remove()
        torch.testing.assert_close(bert.model(**inputs).logits, expected)


def test_nothing_is_shared_with_gradients_or_dropout(bert: Shared) -> None:
    names, inputs = ["two", "two"], texts(0, 0)
    with bert.bank.rows(names), bert.products:
        bert.rows.clear()
        bert.model(**inputs)
        assert bert.rows[0] == 2
        bert.model.train()
        with torch.no_grad():
            logits = bert.model(**inputs).logits
    bert.model.eval()
    assert bert.rows[0] == 4
    assert not torch.equal(logits[0], logits[1])


def test_dropout_alone_in_training_mode_is_of_each_row(bert: Shared) -> None:
    """As of those who sample with it: some modules in training mode, the block that has them not."""
    dropouts = [module for module in bert.model.modules() if isinstance(module, nn.Dropout)][3:]
    for module in dropouts:
        module.train()
    logits = bert(["two", "two"], **texts(0, 0)).logits
    for module in dropouts:
        module.eval()
    assert bert.rows[0] == 2
    assert not torch.equal(logits[0], logits[1])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor, lengths: list[float]) -> Tensor:
        return self.linear(x) * torch.tensor(lengths[: len(x)])[:, None, None]


class ListedTwice(nn.Module):
    """BERT with a feed-forward that its blocks share, run in another order by another list, which has lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.feed_forward = classifier("bert").bert.encoder.layer[0].intermediate
        self.inner = classifier("bert")
        self.blocks = nn.ModuleList([*self.inner.bert.encoder.layer[2:], *self.inner.bert.encoder.layer[:2]])
        for block in self.blocks:
            block.intermediate = self.feed_forward
        self.scaled = nn.ModuleList([Scaled() for _ in range(2)])

    def forward(self, input_ids: Tensor, lengths: list[float]) -> Tensor:
        x = self.inner.bert.embeddings(input_ids)
        for block in self.blocks:
            x = block(x)
        for scaled in self.scaled:
            x = scaled(x, lengths)
        return x


@pytest.mark.parametrize(
    "target", ["feed_forward.dense", r"inner\.bert\.encoder\.layer\.3\.output\.dense", "scaled.1.linear"]
)
def test_what_is_around_and_within_blocks_may_be_anything(target: str, tmp_path: Path) -> None:
    def base() -> ListedTwice:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return ListedTwice().eval().requires_grad_(False)

    for seed, name in enumerate(("a", "b")):
        targets = target if "layer" in target else [target]
        adapted = get_peft_model(base(), dvora.DVoRAConfig(r=4, target_modules=targets))
        train_vectors(adapted, seed=seed)
        adapted.save_pretrained(tmp_path / name)
    model, names, lengths = base(), ["a", "b", None, "a"], [1.0, 2.0, 3.0, 4.0]
    with dvora.AdapterBank(model, like=tmp_path / "a") as bank, torch.inference_mode():
        bank.add_folder(tmp_path)
        ids = torch.arange(3, 12).repeat(4, 1)
        with bank.rows(names):
            found = model(ids, lengths)
        for row, name in enumerate(names):
            with bank.rows([name]):
                expected = model(ids[:1], lengths[row : row + 1])
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-5, atol=1e-5)


def test_a_hook_within_a_block_sees_all_rows(bert: Shared) -> None:
    names, inputs, steering = ["two", "one"], texts(0, 0), torch.randn(2, 1, 32)
    block = bert.model.get_submodule(blocks_of("bert"))[0]
    handle = block.attention.register_forward_hook(lambda _module, _args, y: (y[0] + steering, *y[1:]))
    found = bert(names, **inputs).logits
    handle.remove()
    for row, name in enumerate(names):
        handle = block.attention.register_forward_hook(lambda _, __, y, row=row: (y[0] + steering[row], *y[1:]))
        torch.testing.assert_close(found[row], bert([name], **texts(0)).logits[0], rtol=1e-5, atol=1e-5)
        handle.remove()
    assert bert(names, **inputs) is not None
    assert bert.rows[0] == 1


def test_a_closed_bank_leaves_the_blocks_their_own_forward(tmp_path: Path) -> None:
    with shared(lambda: classifier("bert"), ["query"], tmp_path, blocks_of("bert"), task_type="SEQ_CLS") as model:
        block = model.model.get_submodule(blocks_of("bert"))[0]
        assert "forward" in vars(block)
    assert "forward" not in vars(block)


def test_images_share_too(tmp_path: Path) -> None:
    def base() -> nn.Module:
        config = AutoConfig.for_model(
            "vit", image_size=8, patch_size=4, **{k: v for k, v in SIZES.items() if k != "vocab_size"}
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return ViTForImageClassification(config).eval().requires_grad_(False)

    blocks = next(name for name, module in base().named_modules() if isinstance(module, nn.ModuleList))
    with shared(base, ["q_proj"], tmp_path, blocks, modules_to_save=["classifier"]) as model:
        images = torch.randn(1, 3, 8, 8).repeat(3, 1, 1, 1)
        names = ["two", "one", None]
        expected = model.alone(names, pixel_values=images)
        torch.testing.assert_close(model(names, pixel_values=images).logits, expected, rtol=1e-5, atol=1e-5)
        assert [model.rows[block] for block in range(4)] == [1, 1, 2, 3]


def test_with_a_cache_each_row_is_computed(tmp_path: Path) -> None:
    def base() -> nn.Module:
        return llama().requires_grad_(False)

    adapted = get_peft_model(base(), dvora.DVoRAConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]))
    train_vectors(adapted)
    adapted.save_pretrained(tmp_path)
    model = base()
    with dvora.AdapterBank(model, like=tmp_path) as bank, torch.no_grad():
        bank.add("a", tmp_path)
        counts = Shared(model, bank, model.model.layers)
        counts(["a", None, "a"], input_ids=torch.arange(3, 10).repeat(3, 1), use_cache=True)
        assert counts.rows[0] == 3


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_groups_are_repeated_as_they_were_narrowed(keys: list[int]) -> None:
    groups, x = Groups(keys, torch.device("cpu")), torch.tensor(keys).float()[:, None]
    assert len(groups) == len({*keys})
    assert torch.equal(groups.repeated(groups.narrowed(x)), x)
    assert groups.are_equal_in(x)
    assert groups.are_equal_in(torch.arange(len(keys))) == (len(groups) == len(keys))


def test_rows_of_equal_sums_are_compared() -> None:
    x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
    assert equal_rows(x) == [0, 1, 0]
    assert equal_rows(x[:1]) is None


def test_as_many_images_as_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DINOv3's rotary positions have an entry a patch, and none a row."""

    def base() -> nn.Module:
        sizes = {"image_size": 12, "patch_size": 4, "num_register_tokens": 0, "hidden_size": 32}
        config = AutoConfig.for_model(
            "dinov3_vit", **sizes, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModel.from_config(config).eval().requires_grad_(False)

    monkeypatch.setattr(shared_module, "PORTION", 2 * 10 * 32)
    check_alone(base, "q_proj", "pixel_values", torch.randn(9, 3, 12, 12), tmp_path)


def test_blocks_whose_arguments_have_a_row_for_each_head(tmp_path: Path) -> None:
    """Bloom's positions."""

    def base() -> nn.Module:
        config = AutoConfig.for_model("bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
        config.use_cache = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModel.from_config(config).eval().requires_grad_(False)

    check_alone(base, "query_key_value", "input_ids", torch.arange(3, 12).repeat(4, 1), tmp_path)


def check_alone(base: Callable[[], nn.Module], target: str, argument: str, inputs: Tensor, folder: Path) -> None:
    """Compare rows of an adapter and of the base with each by itself."""
    adapted = get_peft_model(base(), dvora.DVoRAConfig(r=4, target_modules=rf".*\.1\..*{target}"))
    train_vectors(adapted)
    adapted.save_pretrained(folder)
    model, names = base(), (["a", None] * len(inputs))[: len(inputs)]
    with dvora.AdapterBank(model, like=folder) as bank, torch.inference_mode():
        bank.add("a", folder)
        alone = []
        for row, name in enumerate(names):
            with bank.rows([name]):
                alone.append(model(**{argument: inputs[row : row + 1]}).last_hidden_state)
        with bank.rows(names):
            found = model(**{argument: inputs}).last_hidden_state
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-5)
