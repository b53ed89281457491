"""A plain loop with accelerate: accumulated gradients, clipping, and a run that goes on from its saved state.

MiniLM learns to classify movie reviews as good or bad. Steps are taken by an optimizer with a rate for each vector.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, PreTrainedModel

import dvora
from dvora.training import parameter_groups
from examples.checks import folder_bytes, frozen_digest, report, require, same_bits, trained_parameters
from materials.data import movie_reviews
from materials.models import minilm
from materials.splits import Texts

BATCH, ACCUMULATED, STEPS, SAVED_AFTER = 16, 2, 14, 7


def base() -> PreTrainedModel:
    torch.manual_seed(0)  # of the new head
    return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)


def reviews(texts: Texts, count: int) -> list[tuple[str, int]]:
    return [(text, int(label)) for text, label in zip(texts.texts[:count], texts.labels, strict=False)]


class Run:
    """A training run: everything that accelerate saves and loads, and the loop."""

    def __init__(self, train: list[tuple[str, int]]) -> None:
        set_seed(0)
        self.tokenizer = AutoTokenizer.from_pretrained(minilm())
        config = dvora.DVoRAConfig(r=256, target_modules="all-linear", task_type="SEQ_CLS", dvora_dropout=0.05)
        model = get_peft_model(base(), config)
        groups = parameter_groups(model, 0.03, learning_rates={"magnitude": 0.003, "head": 0.02})
        # A generator of its own, so that a run that goes on draws the same order, and none of dropout's numbers.
        order = torch.Generator().manual_seed(0)
        loader = DataLoader(train, BATCH, shuffle=True, generator=order, collate_fn=self.tokens)

        # The lines that matter, the same as without an adapter.
        self.accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED, cpu=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, torch.optim.AdamW(groups), loader)

    def tokens(self, rows: list[tuple[str, int]]) -> BatchEncoding:
        texts, labels = zip(*rows, strict=True)
        batch = self.tokenizer(list(texts), truncation=True, max_length=32, padding=True, return_tensors="pt")
        return BatchEncoding({**batch, "labels": torch.tensor(labels)})

    def train(self, first: int, last: int, folder: Path | None = None) -> list[Tensor]:
        """The losses of the optimizer's steps `first` to `last`; the state is saved to a folder after `SAVED_AFTER`."""
        self.model.train()  # `from_pretrained` leaves it in evaluation, without dropout
        losses = []
        loader = self.accelerator.skip_first_batches(self.loader, first * ACCUMULATED)
        for number, batch in enumerate(loader, start=first * ACCUMULATED + 1):
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
            if folder is not None and number == SAVED_AFTER * ACCUMULATED:
                self.accelerator.save_state(str(folder))
            if number == last * ACCUMULATED:
                break
        return losses

    @torch.no_grad()
    def logits(self, rows: list[tuple[str, int]]) -> Tensor:
        model = self.accelerator.unwrap_model(self.model).eval()
        return torch.cat([model(**self.tokens(rows[i : i + 64])).logits for i in range(0, len(rows), 64)])


def main(folder: Path) -> None:
    task = movie_reviews()
    train, test = reviews(task.train, BATCH * ACCUMULATED * STEPS), reviews(task.test, 192)
    labels = torch.tensor([label for _, label in test])
    whole = Run(train)
    untouched, start = frozen_digest(base().bert), whole.logits(test)
    losses = whole.train(0, STEPS, folder / "state")
    end = whole.logits(test)

    # As a new process would: everything is made again, and the state loaded.
    resumed = Run(train)
    resumed.accelerator.load_state(str(folder / "state"))
    again = resumed.train(SAVED_AFTER, STEPS)
    require(
        all(map(same_bits, losses[SAVED_AFTER * ACCUMULATED :], again)) and same_bits(end, resumed.logits(test)),
        "a run that goes on from its state is the uninterrupted run, bit for bit",
    )
    model = whole.accelerator.unwrap_model(whole.model)
    model.save_pretrained(folder / "adapter")
    require(frozen_digest(model.base_model.model.bert) == untouched, "the base keeps every bit")
    whole.model = PeftModel.from_pretrained(base(), folder / "adapter")
    require(same_bits(end, whole.logits(test)), "the saved adapter gives the same outputs on a new base")
    before, after = (torch.nn.functional.cross_entropy(logits, labels).item() for logits in (start, end))
    require(after < before, f"the loss on other reviews falls: {before} to {after}")
    report(
        {
            "works": True,
            "figures": {
                "test_loss": [before, after],
                "test_accuracy": (end.argmax(1) == labels).double().mean().item(),
                "trained_values": trained_parameters(model),
                "adapter_bytes": folder_bytes(folder / "adapter"),
            },
            "versions": {"accelerate": version("accelerate")},
        }
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
