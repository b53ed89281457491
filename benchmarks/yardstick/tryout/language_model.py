"""A stand-in for Llama-3.2-3B: a Llama of 74,000 parameters with letters for tokens, trained for seconds.

PEFT's script wants a base whose loss on its encyclopedia lies between 1 and 2, so an untrained one would not do.
"""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.yardstick.tryout.text import encyclopedia, exercises

END, UNKNOWN = "<end>", "<unknown>"
LETTERS = (END, UNKNOWN, "\n", *(chr(code) for code in range(32, 127)))
WANTED_LOSS = 1.5
"""In the middle of what the script accepts."""
MOST_STEPS = 2_000
BATCH, LENGTH = 8, 128


def write_language_model(folder: Path) -> None:
    """Train the model and save it with its tokenizer.

    Raises:
        RuntimeError: the loss stays above what the script accepts.
    """
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config())
    _train(model, *(_as_tokens(tokenizer, texts) for texts in (encyclopedia() + exercises(), encyclopedia())))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(model: LlamaForCausalLM, tokens: Tensor, article: Tensor) -> None:
    """Train on pieces of the text until the loss on the encyclopedia is the wanted one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(MOST_STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        with torch.no_grad():
            if model(input_ids=article[None, :512], labels=article[None, :512]).loss < WANTED_LOSS:
                return
    raise RuntimeError(f"the tiny model's loss is still above {WANTED_LOSS} after {MOST_STEPS} steps")


def _as_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    return torch.tensor(tokenizer(END.join(texts))["input_ids"])


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = Tokenizer(WordLevel({letter: number for number, letter in enumerate(LETTERS)}, unk_token=UNKNOWN))
    letters.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    letters.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=END, unk_token=UNKNOWN)


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
