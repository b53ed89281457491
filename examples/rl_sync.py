"""TRL's GRPOTrainer, and a copy of the model that generates: after every step it gets the adapter's vector.

The copy stands for the inference engine of a larger set-up. A bank beside it serves each step's adapter as a version of
its own. TRL lets others generate through `rollout_func`, which it calls experimental.
"""

import os
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func

import torch
import trl
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import dvora
from dvora.sync import BankTarget, ModelTarget, Publisher
from examples.checks import frozen_digest, log_probabilities, report, require, trained_parameters
from examples.sync_costs import costs
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
    return [mean(len(word) <= SHORT for word in text.split() or ["nothing"]) for text in completions]


def continued(model: nn.Module, tokenizer: Any, prompts: list[str], seed: int | None = 0) -> list[list[int]]:
    """The tokens that a model adds to each prompt; without a seed the likeliest."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        outputs = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=seed is not None, top_k=0)
    answers, end = outputs[:, inputs["input_ids"].shape[1] :].tolist(), tokenizer.eos_token_id
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]


def main(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    seconds, ratios = list[float](), list[float]()

    def synchronise() -> str:
        """The name of the version that copy and bank have then."""
        start = time.perf_counter()
        publisher.publish()
        seconds.append(time.perf_counter() - start)
        return beside.publish().name

    def generate(prompts: list[str], trainer: GRPOTrainer) -> dict[str, object]:
        """Every prompt comes as often as an answer is wanted."""
        version = synchronise()
        inputs, outputs = tokenizer(prompts)["input_ids"], continued(copy, tokenizer, prompts, seed=len(seconds))
        for tokens in map(list.__add__, inputs, outputs):
            with bank.rows([version]):
                served = log_probabilities(bank_model, tokens)
            # A bank of the same vectors gives every token the trainer's probability.
            ratios.append(float((served - log_probabilities(trainer.model, tokens)).exp().sub(1).abs().max()))
        return {"prompt_ids": inputs, "completion_ids": outputs, "logprobs": None}

    def mean_reward() -> float:
        """Of answers to all beginnings, drawn with the same seed each time."""
        synchronise()
        answers = continued(copy, tokenizer, [text for text in BEGINNINGS for _ in range(ANSWERS)])
        return mean(reward(tokenizer.batch_decode(answers, skip_special_tokens=True)))

    trainer = GRPOTrainer(
        model=base(),
        reward_funcs=reward,
        args=settings(folder),
        train_dataset=Dataset.from_dict({"prompt": BEGINNINGS}),
        processing_class=tokenizer,
        peft_config=config(),
        rollout_func=generate,
    )
    untouched, copy, bank_model = frozen_digest(trainer.model), adapted(), base()
    publisher = Publisher(trainer.model, ModelTarget(copy), "policy")
    copy.save_pretrained(folder / "start")
    bank = dvora.AdapterBank(bank_model, like=folder / "start")
    beside = Publisher(trainer.model, BankTarget(bank), "policy")

    before = mean_reward()
    trainer.train()
    after = mean_reward()
    require(after > before, f"the reward rises: {before} to {after}")
    require(frozen_digest(trainer.model) == untouched, "the base keeps every bit")
    require(max(ratios) < 1e-3, f"the ratio of importance is one to within 0.001: {max(ratios)}")
    trainer.save_model(str(folder / "adapter"))
    merged = PeftModel.from_pretrained(base(), folder / "adapter").merge_and_unload()
    for text in BEGINNINGS:
        own, copied = (continued(model, tokenizer, [text], None) for model in (merged, copy))
        require(own == copied, f"greedy answers agree: {own}, {copied}")
    metrics = {
        "mean_reward": [before, after],
        "each_ms_into_a_copy": 1000 * median(seconds),
        "off_the_ratio_of_importance": max(ratios),
        "trained_values": trained_parameters(trainer.model),
    }
    for method, (size, milliseconds) in costs(base, adapted).items():
        metrics |= {f"{method}_bytes": size, f"{method}_ms_of_a_core_through_a_file": milliseconds}
    report({"works": True, "figures": metrics, "versions": {"trl": trl.__version__}})


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
