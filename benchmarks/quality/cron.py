"""The task with generated answers: SmolLM2 writes cron expressions, and a program checks them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.quality.evaluation import Evaluation
from benchmarks.quality.grid import TaskPlan
from benchmarks.quality.models import LOADERS, TextModel
from materials.models import smollm2
from materials.schedules import described, schedules

ANSWER = 18
"""Tokens that a schedule's expression needs at most, with the one that ends it."""
ANSWERED_TOGETHER = 50


class CronExpressions:
    """Cron expressions for described schedules; an answer is right if it describes the schedule that was asked for."""

    reference = None

    def __init__(self, plan: TaskPlan) -> None:
        self.plan = plan
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(smollm2(), padding_side="left")
        self.rows = schedules()
        self.rows = {name: rows.first(getattr(plan, name)) for name, rows in self.rows.items()}
        self.questions = {
            name: self._ids([f"Schedule: {each}\nCron:" for each in rows.descriptions])
            for name, rows in self.rows.items()
        }
        self.answers = {
            name: [[*ids, self._end] for ids in self._ids([f" {each}" for each in rows.expressions])]
            for name, rows in self.rows.items()
        }

    def model(self, base: str) -> TextModel:
        """SmolLM2."""
        return TextModel(LOADERS["smollm2"](base)).eval()

    def batches(self, seed: int, steps: int) -> list[np.ndarray]:
        """Random rows, each once in a pass."""
        generator, count = np.random.default_rng(seed), len(self.rows["train"])
        passes = -(-steps * self.plan.batch // count)
        order = np.concatenate([generator.permutation(count) for _ in range(passes)])
        return list(order[: steps * self.plan.batch].reshape(steps, self.plan.batch))

    def loss(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        """Nats a token of the answers."""
        nats, answered = self._nats(model, "train", rows)
        return nats.sum() / answered.sum()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> Evaluation:
        """Nats a token of the answers; the share of generated answers that are right."""
        batches = np.array_split(np.arange(len(self.rows[part])), -(-len(self.rows[part]) // ANSWERED_TOGETHER))
        found = [self._nats(model, part, rows) for rows in batches]
        loss = sum(nats.double().sum().item() for nats, _ in found) / sum(mask.sum().item() for _, mask in found)
        asked = self.rows[part].descriptions
        answers = [answer for rows in batches for answer in self._generated(model, part, rows)]
        correct = np.array([described(answer) == wanted for answer, wanted in zip(answers, asked, strict=True)])
        return Evaluation(loss, float(correct.mean()), correct)

    def commonest(self, part: str) -> Evaluation:
        """One answer for all, which is right once: no schedule is described twice."""
        correct = np.arange(len(self.rows[part])) == 0
        return Evaluation(float("nan"), float(correct.mean()), correct)

    def _nats(self, model: nn.Module, part: str, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """(rows, tokens - 1) nats, zero where there is no answer, and whether there is one."""
        questions, answers = ([each[row] for row in rows] for each in (self.questions[part], self.answers[part]))
        longest = max(len(question) + len(answer) for question, answer in zip(questions, answers, strict=True))
        ids = torch.full((len(rows), longest), self._end)
        answered = torch.zeros(len(rows), longest, dtype=torch.bool)
        # Padding on the right of causal attention changes nothing before it.
        for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            end = len(question) + len(answer)
            ids[place, :end] = torch.tensor(question + answer)
            answered[place, len(question) : end] = True
        kept = answered[:, 1:]
        return model({"ids": ids}) * kept, kept

    def _generated(self, model: nn.Module, part: str, rows: np.ndarray) -> list[str]:
        asked = self.tokenizer.pad({"input_ids": [self.questions[part][row] for row in rows]}, return_tensors="pt")
        assert isinstance(model, TextModel)
        made = model.backbone.generate(  # type: ignore[operator]
            **asked, max_new_tokens=ANSWER, do_sample=False, pad_token_id=self._end, eos_token_id=self._end
        )
        answers = self.tokenizer.batch_decode(made[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    @property
    def _end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.tokenizer(list(texts))["input_ids"])
