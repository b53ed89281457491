"""TRL's GRPOTrainer, and `dvora serve` that generates: after every step it gets the adapter's vector over HTTP.

The server stands for the inference engine of a larger set-up: it has the base model, and the adapter of each step is a
version of its own there. Its answers are texts, which are split into tokens again. TRL lets others generate through
`rollout_func`, which it calls experimental.
"""

import os
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func

import torch
import trl
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import dvora
from dvora.sync import BankTarget, Publisher, ServerTarget
from examples.checks import frozen_digest, log_probabilities, report, require, trained_parameters
from examples.serving import TOKEN, continued, server
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
    words = [text.split() for text in completions]
    return [sum(len(word) <= SHORT for word in each) / max(1, len(each)) for each in words]


def main(folder: Path, address: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    seconds: list[float] = []
    ratios: list[float] = []

    def synchronise() -> str:
        """The name of the version that is served then."""
        start = time.perf_counter()
        version = publisher.publish()
        seconds.append(time.perf_counter() - start)
        beside.publish()
        return version.name

    def generate(prompts: list[str], trainer: GRPOTrainer) -> dict[str, object]:
        """Every prompt comes as often as an answer is wanted."""
        version = synchronise()
        answers = continued(address, version, prompts, TOKENS, seed=1000 * len(seconds))
        inputs = tokenizer(prompts)["input_ids"]
        outputs = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * ended for text, ended in answers]
        # A server of the same vectors gives every token the trainer's probability.
        for tokens in map(list.__add__, inputs, outputs):
            with bank.rows([version]):
                served = log_probabilities(bank_model, tokens)
            ratios.append(float((served - log_probabilities(trainer.model, tokens)).exp().sub(1).abs().max()))
        return {"prompt_ids": inputs, "completion_ids": outputs, "logprobs": None}

    def mean_reward() -> float:
        """Of answers to all beginnings, drawn with the same seed each time."""
        prompts = [text for text in BEGINNINGS for _ in range(ANSWERS)]
        rewards = reward([text for text, _ in continued(address, synchronise(), prompts, TOKENS)])
        return sum(rewards) / len(rewards)

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
    publisher = Publisher(trainer.model, ServerTarget(address, TOKEN), "policy")
    bank_model = base()
    bank = dvora.AdapterBank(bank_model, like=folder / "adapters" / "start")
    beside = Publisher(trainer.model, BankTarget(bank), "policy")

    before = mean_reward()
    trainer.train()
    after = mean_reward()
    require(after > before, f"the reward rises: {before} to {after}")
    require(frozen_digest(trainer.model) == untouched, "the base keeps every bit")
    require(max(ratios) < 1e-3, f"the ratio of importance is one to within 0.001: {max(ratios)}")
    trainer.save_model(str(folder / "adapter"))
    merged = PeftModel.from_pretrained(base(), folder / "adapter").merge_and_unload()
    for text, (answer, _) in zip(BEGINNINGS, continued(address, synchronise(), BEGINNINGS, TOKENS, 0.0), strict=True):
        ids = tokenizer(text, return_tensors="pt")
        greedy = merged.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
        require(answer == tokenizer.decode(greedy, skip_special_tokens=True), f"greedy answers agree: {answer}")
    metrics = {
        "mean_reward": [before, after],
        "synchronisations": len(seconds),
        "each_ms_over_HTTP": 1000 * median(seconds),
        "off_the_ratio_of_importance": max(ratios),
        "trained_values": trained_parameters(trainer.model),
    }
    for method, (size, milliseconds) in costs(base, adapted).items():
        metrics |= {f"{method}_bytes": size, f"{method}_ms_of_a_core_through_a_file": milliseconds}
    report({"works": True, "figures": metrics, "versions": {"trl": trl.__version__}})


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        adapted().save_pretrained(Path(name) / "adapters" / "start")
        with server(smollm2(), Path(name) / "adapters") as running:
            main(Path(name), running)
