"""One run: a fresh adapter, GRPO through TRL, the reward of every step, and greedy answers to held-out questions."""

import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.quality.adapting import saved_bytes
from benchmarks.quality.backbones import load_smollm2
from benchmarks.reinforcement.arms import ARMS, BASE
from benchmarks.reinforcement.plan import Plan
from benchmarks.reinforcement.problems import PROBLEMS, Question, reward
from dvora.training import parameter_groups, recommended_rates
from materials.models import smollm2

ANSWERS = 8
"""Sampled for each question."""
QUESTIONS = 4
"""Of a step."""


def carry_out(plan: Plan) -> dict[str, Any]:
    """The row of a run; what goes wrong in it is a row too."""
    start = perf_counter()
    try:
        row = run(**vars(plan))
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}", "solved": []}
    return {"key": plan.key, **vars(plan), **row, "seconds": round(perf_counter() - start, 1)}


def run(problem: str, arm: str, rate: float, seed: int, steps: int, part: str) -> dict[str, Any]:
    """What comes out of a run.

    Args:
        arm: one of `ARMS`, or `BASE`, which takes no steps.
        part: "validation" or "test", whose questions are answered in the end.
    """
    questions = PROBLEMS[problem]()
    tokenizer = AutoTokenizer.from_pretrained(smollm2(), padding_side="left")
    if arm == BASE:
        return {"solved": _solved(load_smollm2("float32"), tokenizer, getattr(questions, part), questions.tokens)}
    model = _adapted(arm, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model,
            args=_settings(Path(folder), questions.tokens, rate, seed, steps),
            train_dataset=_dataset(questions.train),
            reward_funcs=_rewards,
            processing_class=tokenizer,
            optimizers=(_optimizer(model, arm, rate), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        size = saved_bytes(model, Path(folder))
    solved = _solved(model, tokenizer, getattr(questions, part), questions.tokens)
    return {
        "trained_values": sum(each.numel() for each in model.parameters() if each.requires_grad),
        **size,
        "rewards": [round(each, 4) for each in rewards],
        "solved": solved,
    }


def _adapted(arm: str, seed: int) -> nn.Module:
    config = ARMS[arm](seed)
    if config is None:
        return load_smollm2("float32")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(load_smollm2("float32"), config)


def _optimizer(model: nn.Module, arm: str, rate: float) -> torch.optim.Optimizer:
    """AdamW; DVoRA's magnitude gets the rate that `recommended_rates` gives it beside the others'."""
    own = arm in ("structured_r64", "dvora_r256")
    groups = parameter_groups(model, rate, learning_rates=recommended_rates(model, rate) if own else None)
    return torch.optim.AdamW([{"params": group["params"], "lr": group["lr"]} for group in groups], weight_decay=0.0)


def _settings(folder: Path, tokens: int, rate: float, seed: int, steps: int) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=ANSWERS * QUESTIONS,
        num_generations=ANSWERS,
        max_completion_length=tokens,
        learning_rate=rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=max(1, steps // 10),
        max_grad_norm=1.0,
        weight_decay=0.0,
        beta=0.0,
        logging_steps=1,
        save_strategy="no",
        seed=seed,
        bf16=True,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )


def _dataset(questions: tuple[Question, ...]) -> Dataset:
    return Dataset.from_list([{"prompt": each.prompt, "answer": each.answer} for each in questions])


def _rewards(completions: list[str], answer: list[str], **_: object) -> list[float]:
    return [reward(each, right) for each, right in zip(completions, answer, strict=True)]


@torch.no_grad()
def _solved(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: tuple[Question, ...], tokens: int
) -> list[int]:
    """Whether the greedy answer to each question is right."""
    model.eval()
    solved: list[int] = []
    for first in range(0, len(questions), 50):
        some = questions[first : first + 50]
        asked = tokenizer([each.prompt for each in some], return_tensors="pt", padding=True)
        with torch.autocast("cpu", torch.bfloat16):
            made = model.generate(  # type: ignore[operator]
                **asked, do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id
            )
        answers = tokenizer.batch_decode(made[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        solved += [int(reward(answer, each.answer)) for answer, each in zip(answers, some, strict=True)]
    return solved
