"""TRL's SFTTrainer: a `DVoRAConfig` is its `peft_config`. SmolLM2-135M learns to write like Shakespeare.

A second trainer goes on with the saved adapter and an optimizer of its own, in which each vector has its own rate.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import SFTConfig, SFTTrainer

import dvora
from dvora.training import parameter_groups
from examples.checks import folder_bytes, frozen_digest, report, require, same_bits, trained_parameters
from materials.data import shakespeare
from materials.models import smollm2

TOKENS, BATCH, STEPS, MORE_STEPS = 48, 4, 9, 3


def base() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


def passages(plays: dict[str, str], count: int) -> Dataset:
    """The same number of passages, each from another place of the plays."""
    text = "\n".join(plays.values())
    starts = range(0, len(text) - 400, len(text) // count)
    return Dataset.from_dict({"text": [text[start : start + 400] for start in starts][:count]})


def settings(folder: Path, steps: int) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        max_length=TOKENS,
        learning_rate=0.01,  # ten to a hundred times what a LoRA gets
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_steps=3,
        save_strategy="no",
        # TRL's defaults are bfloat16 autocast and gradient checkpointing. Both work; on a CPU both are slow.
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to=[],
    )


def main(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    library = shakespeare()
    train, held_out = passages(library.train, BATCH * (STEPS + MORE_STEPS)), passages(library.test, 3 * BATCH)
    model = base()
    untouched = frozen_digest(model)

    # The five lines that matter.
    trainer = SFTTrainer(
        model=model,
        args=settings(folder, STEPS),
        train_dataset=train.select(range(BATCH * STEPS)),
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=dvora.DVoRAConfig(r=256, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    frozen_loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    trained_loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "adapter"))

    batch = torch.tensor(tokenizer("To be, or not to be")["input_ids"])[None]
    with torch.no_grad():
        logits = trainer.model.eval()(batch).logits
    require(frozen_digest(trainer.model) == untouched, "the base keeps every bit")
    model = PeftModel.from_pretrained(base(), folder / "adapter", is_trainable=True)
    with torch.no_grad():
        require(same_bits(model.eval()(batch).logits, logits), "the saved adapter gives the same outputs on a new base")

    # A model that is adapted already goes on, here with a rate for each vector.
    groups = parameter_groups(model, 0.01, learning_rates={"magnitude": 0.001})
    again = SFTTrainer(
        model=model,
        args=settings(folder, MORE_STEPS),
        train_dataset=train.select(range(BATCH * STEPS, BATCH * (STEPS + MORE_STEPS))),
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizers=(torch.optim.AdamW(groups), None),
    )
    again.train()
    final_loss = again.evaluate()["eval_loss"]
    require(trained_loss < frozen_loss, f"the loss on Hamlet and The Tempest falls: {frozen_loss} to {trained_loss}")
    require(final_loss < trained_loss, f"it falls further: {trained_loss} to {final_loss}")
    report(
        {
            "works": True,
            "figures": {
                "held_out_loss": [frozen_loss, trained_loss, final_loss],
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
