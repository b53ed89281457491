"""Continuations of prompts, by a language model with its adapter and by the same model without it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig

from ..data.chats import prompt_text
from ..models.bases import computing, device_of
from ..models.trained import load_trained
from ..run_folder import Run
from ..tasks.task import longest


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: after which a continuation ends, if the model does not end it before.
        temperature: 0: greedy, no randomness; else tokens are sampled, the more freely the higher.
        top_k: sample from so many of the likeliest tokens; None: from all.
        top_p: sample from the likeliest tokens that have this probability together; None: from all.
        repetition_penalty: above 1, tokens that occurred become less likely.
        seed: of the sampling for each prompt; the same with and without the adapter.

    Raises:
        ValueError: a value is out of its range, or is about sampling while the temperature is 0.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (the likeliest token) or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "seed": (0 <= self.seed < 2**32, "between 0 and 2**32 - 1"),
        }
        for name, (is_right, expected) in ranges.items():
            if not is_right:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")
        if self.temperature == 0 and (drawn := [n for n in ("top_k", "top_p") if getattr(self, n) is not None]):
            raise ValueError(
                f"{drawn[0]} is set but temperature is 0, so nothing is sampled; set a temperature, such as 0.8"
            )


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt.

    Args:
        prompt: as it was given.
        with_adapter: the trained model's text.
        without_adapter: the base's text; None if it was not asked for.
    """

    prompt: str
    with_adapter: str
    without_adapter: str | None


class Generator:
    """A language model with its adapter, ready to continue texts.

    Args:
        run: of causal-lm, or an adapter `as_run`.
        compares: also ask the base: the same model with the adapter switched off. A run of the method "full" needs a
            second model for it.

    Raises:
        ValueError: the run is of another task, or its model cannot be read.
    """

    def __init__(self, run: Run, compares: bool = True) -> None:
        if run.settings.task != "causal-lm":
            raise ValueError(f"the run in {run.folder} is of {run.settings.task}; use `dvora predict`")
        self.settings, self.compares = run.settings, compares
        self.device = device_of(run.settings)
        model, self.tokenizer = load_trained(run)
        self.model = self.base = model.to(self.device)
        if compares and not isinstance(model, PeftModel):
            self.base = load_trained(run, with_adapter=False)[0].to(self.device)
        self.positions = longest(run.settings.model_copy(update={"max_length": None}), self.tokenizer, model.config)

    def continued(
        self, prompt: str, sampling: Sampling, is_chat: bool = False, system: str | None = None
    ) -> Continuation:
        """Continue a prompt.

        Args:
            prompt: a text to continue, or the user's message of a chat.
            sampling: how tokens are chosen.
            is_chat: put the prompt into the tokenizer's chat template.
            system: the system message of the chat; None: none.

        Raises:
            ValueError: the prompt is empty, longer than the model can read, or the tokenizer has no chat template.
        """
        tokens = self._tokens(prompt, is_chat, system)
        with_adapter = self._text(self.model, tokens, sampling)
        if not self.compares:
            return Continuation(prompt, with_adapter, None)
        with self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext():
            return Continuation(prompt, with_adapter, self._text(self.base, tokens, sampling))

    def _tokens(self, prompt: str, is_chat: bool, system: str | None) -> Tensor:
        if is_chat:
            before = [{"role": "system", "content": system}] if system is not None else []
            text = prompt_text([*before, {"role": "user", "content": prompt}], self.tokenizer)
            # The template has written the special tokens.
            encoded = self.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
        else:
            encoded = self.tokenizer(prompt, return_tensors="pt", verbose=False)
        tokens: Tensor = encoded["input_ids"]
        if not tokens.shape[1]:
            raise ValueError("the prompt is empty; give it at least a word")
        if tokens.shape[1] >= self.positions:
            raise ValueError(
                f"the prompt has {tokens.shape[1]} tokens, but the model reads {self.positions} with what it adds"
            )
        return tokens.to(self.device, torch.long)

    def _text(self, model: Any, tokens: Tensor, sampling: Sampling) -> str:
        """The text that a model generates after a prompt's tokens."""
        start, own = tokens.shape[1], model.generation_config
        drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
        # Greedy or sampled as asked for, whatever the model's own configuration does.
        config = GenerationConfig(
            max_new_tokens=min(sampling.max_new_tokens, self.positions - start),
            num_beams=1,
            do_sample=sampling.temperature > 0,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=self.tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **(drawn if sampling.temperature > 0 else {}),
        )
        mask = torch.ones_like(tokens)
        with computing(self.settings), _seeded(sampling.seed, self.device):
            generated = model.generate(input_ids=tokens, attention_mask=mask, generation_config=config)[0]
        return text_after(generated, start, self.tokenizer)


def text_after(tokens: Tensor, start: int, tokenizer: Any) -> str:
    """The text of the tokens from `start` on, with the space that it may begin with."""
    # Decoded alone it would lose that space, which many tokenizers drop from the beginning of a text.
    before, text, alone = (
        str(tokenizer.decode(part, skip_special_tokens=True)) for part in (tokens[:start], tokens, tokens[start:])
    )
    return text.removeprefix(before) if text.startswith(before) else alone


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """transformers samples from the global generators: seed them, and restore them afterwards."""
    devices = [device] if device.type in ("cuda", "xpu") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield
