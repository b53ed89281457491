"""transformers' Trainer: MiniLM learns to classify movie reviews, and a run that ends early is resumed.

The Trainer takes an adapted model as any other; its checkpoints hold the adapter, the optimizer and the random state.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import dvora
from dvora.training import fit_head, parameter_groups
from examples.checks import folder_bytes, frozen_digest, report, require, same_bits, trained_parameters
from materials.data import movie_reviews
from materials.models import minilm
from materials.splits import Texts

STEPS, SAVED_AT, BATCH = 40, 20, 16


def base() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)


def tokenized(texts: Texts, count: int) -> Dataset:
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    ids = tokenizer(list(texts.texts[:count]), truncation=True, max_length=64)["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "labels": [int(label) for label in texts.labels[:count]]})


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def trainer(folder: Path, train: Dataset, held_out: Dataset) -> Trainer:
    """An adapted model in a Trainer, with learning rates of its own for each kind of vector."""
    config = dvora.DVoRAConfig(r=256, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(base(), config)
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(minilm()))
    # As `dvora train` starts, from half of the rows.
    fit_head(model, DataLoader(train, 64, collate_fn=collator), share=0.5)
    groups = parameter_groups(model, 0.01, learning_rates={"magnitude": 0.001, "head": 0.003})
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=SAVED_AT,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    return Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collator,
        compute_metrics=accuracy,
        optimizers=(torch.optim.AdamW(groups), None),
    )


def main(folder: Path) -> None:
    reviews = movie_reviews()
    train, held_out = tokenized(reviews.train, STEPS * BATCH), tokenized(reviews.validation, 256)
    whole = trainer(folder / "whole", train, held_out)
    before = whole.evaluate()
    whole.train()
    after = whole.evaluate()
    require(after["eval_loss"] < before["eval_loss"], f"the loss falls: {before} to {after}")
    encoder = whole.model.base_model.model.bert
    require(frozen_digest(encoder) == frozen_digest(base().bert), "the base keeps every bit")

    resumed = trainer(folder / "whole", train, held_out)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{SAVED_AT}"))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    require(all(same_bits(one, other) for one, other in pairs), "a run from the checkpoint ends at the same bits")

    whole.save_model(str(folder / "adapter"))
    loaded = PeftModel.from_pretrained(base(), folder / "adapter").eval()
    batch = whole.data_collator([held_out[row] for row in range(8)])
    with torch.no_grad():
        same = same_bits(loaded(**batch).logits, whole.model.eval()(**batch).logits)
    require(same, "the saved adapter gives the same outputs on a new base")
    report(
        {
            "works": True,
            "figures": {
                "held_out_loss": [before["eval_loss"], after["eval_loss"]],
                "held_out_accuracy": after["eval_accuracy"],
                "trained_values": trained_parameters(whole.model),
                "adapter_bytes": folder_bytes(folder / "adapter"),
            },
            "versions": {"transformers": version("transformers")},
        }
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
