"""TRL's DPOTrainer: SmolLM2-135M comes to prefer kind film critics; the reference is the model without its adapter.

The preferences are made from ratings: a well rated sentence of a review is "chosen", a badly rated one "rejected".
Nobody compared the two, so this shows that DPO works, not what people prefer.
"""

import math
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, DPOTrainer

import dvora
from examples.checks import folder_bytes, frozen_digest, report, require, same_bits, trained_parameters
from materials.data import movie_ratings
from materials.models import smollm2
from materials.splits import Texts

PAIRS, STEPS, LONGEST = 2, 8, 60


def base() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


def preferences(rated: Texts, count: int) -> Dataset:
    """Pairs of short sentences, the better rated one chosen."""
    short = [(text, rating) for text, rating in zip(rated.texts, rated.labels, strict=True) if len(text) <= LONGEST]
    good = [f" {text}" for text, rating in short if rating > 1.5][:count]
    bad = [f" {text}" for text, rating in short if rating < -1.5][:count]
    return Dataset.from_dict({"prompt": ["I saw the film."] * count, "chosen": good, "rejected": bad})


def settings(folder: Path) -> DPOConfig:
    return DPOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS,
        per_device_eval_batch_size=2 * PAIRS,
        learning_rate=0.003,
        lr_scheduler_type="constant",
        logging_steps=2,
        save_strategy="no",
        # TRL's defaults are bfloat16 autocast and gradient checkpointing. Both work; on a CPU both are slow.
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to=[],
    )


def reference(trainer: DPOTrainer) -> torch.Tensor:
    """Log-probabilities that the trainer compares with, of the held-out pairs."""
    batch = next(iter(trainer.get_eval_dataloader()))
    return torch.cat(trainer.compute_ref_log_probs(trainer.model.eval(), batch))


def main(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    task = movie_ratings()
    data = {
        "train_dataset": preferences(task.train, PAIRS * STEPS),
        "eval_dataset": preferences(task.test, 4 * PAIRS),
        "processing_class": tokenizer,
    }
    model = base()
    untouched = frozen_digest(model)

    # The lines that matter: without a `ref_model`, the reference is this model with its adapter switched off.
    config = dvora.DVoRAConfig(r=256, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(model=model, args=settings(folder), peft_config=config, **data)
    reference_at_start, start = reference(trainer), trainer.evaluate()
    trainer.train()
    end = trainer.evaluate()
    trainer.save_model(str(folder / "adapter"))

    require(start["eval_loss"] == float(torch.tensor(math.log(2))), f"training starts at log 2: {start['eval_loss']}")
    require(start["eval_rewards/margins"] == 0.0, "it starts as its reference, to the last bit")
    require(end["eval_loss"] < start["eval_loss"], f"the loss on held-out pairs falls: {end['eval_loss']}")
    require(same_bits(reference(trainer), reference_at_start), "the reference is the same after training")
    require(frozen_digest(trainer.model) == untouched, "the base keeps every bit")

    # An adapter that is trained already is its own reference: TRL adds a frozen copy of it, called "ref". It finds the
    # values to copy by their names, and not those of DVoRA (nor of VeRA): copy them, or the base is the reference.
    model = PeftModel.from_pretrained(base(), folder / "adapter", is_trainable=True)
    again = DPOTrainer(model=model, args=settings(folder), **data)
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="default"), adapter_name="ref")
    restart = again.evaluate()
    require(restart["eval_rewards/margins"] == 0.0, "a trained adapter starts as its own reference")
    require(not same_bits(reference(again), reference_at_start), "which is another one than the base")
    report(
        {
            "works": True,
            "figures": {
                "held_out_loss": [start["eval_loss"], end["eval_loss"]],
                "held_out_margin": [start["eval_rewards/margins"], end["eval_rewards/margins"]],
                "held_out_accuracy": end["eval_rewards/accuracies"],
                "trained_values": trained_parameters(model),
                "adapter_bytes": folder_bytes(folder / "adapter"),
            },
            "versions": {"trl": version("trl")},
        }
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
