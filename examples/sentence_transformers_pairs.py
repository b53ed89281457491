"""sentence-transformers' trainer: MiniLM's sentence vectors learn that reviews of the same mood are alike.

Two reviews should be as similar as their ratings are. An adapted model is saved as its adapter, and loads as usual.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CoSENTLoss

import dvora
from dvora.training import parameter_groups
from examples.checks import folder_bytes, frozen_digest, report, require, trained_parameters
from materials.data import movie_ratings
from materials.models import minilm
from materials.splits import Texts

BATCH, STEPS, LONGEST = 16, 40, 70


def pairs(rated: Texts, count: int) -> Dataset:
    """Short sentences, each with the next; the score is 1 for two of the same mood, else 0."""
    short = [(t, r) for t, r in zip(rated.texts, rated.labels, strict=True) if len(t) <= LONGEST and abs(r) > 1]
    first, second = short[: 2 * count : 2], short[1 : 2 * count : 2]
    return Dataset.from_dict(
        {
            "sentence1": [text for text, _ in first],
            "sentence2": [text for text, _ in second],
            "score": [float(a * b > 0) for (_, a), (_, b) in zip(first, second, strict=True)],
        }
    )


def vectors(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    return model.encode(list(texts), batch_size=64, show_progress_bar=False)


def agreement(model: SentenceTransformer, data: Dataset) -> float:
    """Pearson's correlation of the cosine of two sentences with their score."""
    cosines = (vectors(model, data["sentence1"]) * vectors(model, data["sentence2"])).sum(1)
    return float(np.corrcoef(cosines, data["score"])[0, 1])


def main(folder: Path) -> None:
    ratings = movie_ratings()
    train, test = pairs(ratings.train, BATCH * STEPS), pairs(ratings.test, 192)
    model = SentenceTransformer(str(minilm()), device="cpu")
    untouched, start = frozen_digest(model[0].model), agreement(model, test)

    # The lines that matter. `model.add_adapter(config)` would ask transformers, which may want a newer PEFT.
    config = dvora.DVoRAConfig(r=256, target_modules="all-linear", exclude_modules=["pooler.dense"])
    model[0].model = get_peft_model(model[0].model, config)
    groups = parameter_groups(model, 0.02, learning_rates={"magnitude": 0.002})
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder / "run"),
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=train,
        loss=CoSENTLoss(model),
        optimizers=(torch.optim.AdamW(groups), None),
    )
    trainer.train()
    model.save(str(folder / "adapter"))

    model.eval()
    end = agreement(model, test)
    loaded = SentenceTransformer(str(folder / "adapter"), device="cpu")
    few = test["sentence1"][:32]
    require(np.array_equal(vectors(model, few), vectors(loaded, few)), "the saved adapter gives the same vectors")
    require(frozen_digest(model[0].model) == untouched, "the base keeps every bit")
    require(end > start + 0.1, f"cosines agree better with the ratings of other reviews: {start} to {end}")
    report(
        {
            "works": True,
            "figures": {
                "test_correlation": [start, end],
                "trained_values": trained_parameters(model),
                "adapter_bytes": folder_bytes(folder / "adapter"),
            },
            "versions": {"sentence-transformers": version("sentence-transformers")},
        }
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
