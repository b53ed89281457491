"""TRL's GRPOTrainer with a generating copy of the model in another process, to which only the vectors are sent.

The copy stands for the inference engine of a larger set-up: it has the base model already, and takes the vectors of
every step as bytes through a pipe. TRL lets others generate through `rollout_func`, which it calls experimental.
"""

import os
import tempfile
from pathlib import Path
from statistics import median

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import dvora
from examples.checks import folder_bytes, frozen_digest, report, require, same_bits, trained_parameters
from examples.generating import GeneratingCopy, as_bytes, logits
from materials.models import smollm2

STEPS, ANSWERS, TOKENS = 8, 8, 10
BEGINNINGS = ["The sea is", "My cat and I", "In the morning we", "A train to the city"]
SHORT = 3


def base() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


def config() -> PeftConfig:
    return dvora.DVoRAConfig(r=256, target_modules="all-linear", task_type="CAUSAL_LM")


def adapted() -> PeftModel:
    return get_peft_model(base(), config())


def settings(folder: Path) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ANSWERS,
        num_generations=ANSWERS,
        max_completion_length=TOKENS,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )


def reward(completions: list[str], **_: object) -> list[float]:
    """The share of short words."""
    words = [text.split() for text in completions]
    return [sum(len(word) <= SHORT for word in each) / max(1, len(each)) for each in words]


def main(folder: Path, copy: GeneratingCopy) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    probe = tokenizer(BEGINNINGS[0], return_tensors="pt")["input_ids"]

    def generate(prompts: list[str], trainer: GRPOTrainer) -> dict[str, object]:
        """Every prompt comes as often as an answer is wanted, and one prompt makes a batch."""
        copy.synchronise(trainer.model, probe)
        tokens = tokenizer(prompts)["input_ids"]
        made = copy.generate(tokens, seed=len(copy.sizes))
        ended = [ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids for ids in made]
        return {"prompt_ids": tokens, "completion_ids": ended, "logprobs": None}

    trainer = GRPOTrainer(
        model=base(),
        reward_funcs=reward,
        args=settings(folder),
        train_dataset=Dataset.from_dict({"prompt": BEGINNINGS}),
        processing_class=tokenizer,
        peft_config=config(),
        rollout_func=generate,
    )
    untouched = frozen_digest(trainer.model)

    def mean_reward() -> float:
        """Of answers to all beginnings, drawn with the same seed each time."""
        copy.synchronise(trainer.model, probe)
        made = [ids for text in BEGINNINGS for ids in copy.generate(tokenizer([text] * ANSWERS)["input_ids"], seed=0)]
        found = reward(tokenizer.batch_decode(made, skip_special_tokens=True))
        return sum(found) / len(found)

    before = mean_reward()
    trainer.train()
    after = mean_reward()
    require(after > before, f"the reward rises: {before} to {after}")
    require(frozen_digest(trainer.model) == untouched, "the base keeps every bit")
    trainer.save_model(str(folder / "adapter"))
    loaded = PeftModel.from_pretrained(base(), folder / "adapter")
    require(same_bits(logits(loaded, probe), logits(trainer.model, probe)), "the saved adapter gives the same outputs")
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    metrics = {
        "mean_reward": [before, after],
        "synchronisations_bit_for_bit": len(copy.sizes),
        "each_bytes": copy.sizes[-1],
        "each_ms": 1000 * median(copy.seconds),
        "LoRA_r16_bytes": len(as_bytes(get_peft_model(base(), lora))),
        "full_weights_bytes": folder_bytes(smollm2()),
        "trained_values": trained_parameters(trainer.model),
    }
    report({"works": True, "figures": metrics, "versions": {"trl": trl.__version__}})


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), GeneratingCopy(adapted, TOKENS))
