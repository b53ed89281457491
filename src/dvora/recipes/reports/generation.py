"""Continuations of prompts, by a language model with its adapter and by the same model without it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig

from ..data.chats import prompt_text
from ..models.bases import computing, device_of
from ..run_folder import Run
from ..settings import Sampling
from ..tasks.task import longest
from .run_model import load_trained

PROMPT_WORDS = 24
"""Of the beginning of a held-out text, which is continued."""


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt: the trained model's text, and the base's, where it was asked for."""

    prompt: str
    with_adapter: str
    without_adapter: str | None

    @property
    def row(self) -> dict[str, str]:
        """The texts that there are, by name."""
        return {name: text for name, text in asdict(self).items() if text is not None}


class Generator:
    """A language model with its adapter, ready to continue texts.

    Args:
        run: of causal-lm, or an adapter `as_run`.
        compares: also ask the base: the same model with the adapter off, or a second one for the method "full".

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
        """Continue a prompt: a text, or what the user says in a chat, with the chat's system message.

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
        start, ends, is_drawn = tokens.shape[1], model.generation_config.eos_token_id, sampling.temperature > 0
        drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
        # Greedy or sampled as asked for, whatever the model's own configuration does.
        config = GenerationConfig(
            max_new_tokens=min(sampling.max_new_tokens, self.positions - start),
            num_beams=1,
            do_sample=is_drawn,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=self.tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=self.tokenizer.pad_token_id,
            **(drawn if is_drawn else {}),
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


def continuations(run: Run, rows: Sequence[dict[str, Any]], count: int, tokens: int) -> list[Continuation]:
    """Beginnings of held-out rows, continued by a language model with and without its adapter."""
    generator, sampling = Generator(run), Sampling(max_new_tokens=tokens)
    prompts = islice(filter(None, map(_prompt, rows)), count)
    return [generator.continued(text, sampling, is_chat, system) for text, is_chat, system in prompts]


def _prompt(row: dict[str, Any]) -> tuple[str, bool, str | None] | None:
    """A prompt, whether it is of a chat, and the chat's system message."""
    if "messages" not in row:
        text = row.get("text") or row.get("passage") or ""
        words = text.split(" ")
        return (" ".join(words[:PROMPT_WORDS]), False, None) if len(words) > PROMPT_WORDS else None
    user = [message["content"] for message in row["messages"] if message["role"] == "user"]
    system = [message["content"] for message in row["messages"] if message["role"] == "system"]
    return (user[0], True, system[0] if system else None) if user else None
