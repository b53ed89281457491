"""Chats as token ids, of which the assistant's are to be learned."""

from collections.abc import Sequence
from typing import Any

IGNORED = -100
"""The label of a token that nothing is learned from."""

Message = dict[str, str]


def chat_features(messages: Sequence[Message], tokenizer: Any, max_length: int) -> dict[str, Any]:
    """One chat through the tokenizer's template, cut at `max_length` tokens.

    Returns:
        `input_ids`, `labels` (of the assistant's words and what ends them), the `bytes` that these stand for, and how
        many `tokens` the chat has before it is cut.

    Raises:
        ValueError: the tokenizer has no template, or one that changes earlier messages when later ones follow.
    """
    text, spans = rendered(messages, tokenizer)
    encoded = tokenizer(
        text, add_special_tokens=False, truncation=True, max_length=max_length, return_offsets_mapping=True
    )
    learned = [any(start < to and end > since for since, to in spans) for start, end in encoded["offset_mapping"]]
    labels = [token if wanted else IGNORED for token, wanted in zip(encoded["input_ids"], learned, strict=True)]
    cut = max((end for _, end in encoded["offset_mapping"]), default=0)
    count = sum(len(text[since : min(to, cut)].encode()) for since, to in spans if since < cut)
    tokens = len(encoded["input_ids"])
    if tokens >= max_length:
        tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return {"input_ids": encoded["input_ids"], "labels": labels, "bytes": count, "tokens": tokens}


def prompt_text(messages: Sequence[Message], tokenizer: Any) -> str:
    """The text of a chat up to where the assistant is to answer.

    Raises:
        ValueError: the tokenizer has no template.
    """
    _check_template(tokenizer)
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return text


def rendered(messages: Sequence[Message], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat, and the spans of the assistant's messages."""
    _check_template(tokenizer)
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = index and tokenizer.apply_chat_template(
            list(messages[:index]), tokenize=False, add_generation_prompt=True
        )
        upto = tokenizer.apply_chat_template(list(messages[: index + 1]), tokenize=False)
        if not (text.startswith(before or "") and text.startswith(upto)):
            raise ValueError(
                "the tokenizer's chat template changes earlier messages when later ones follow, so the assistant's "
                "messages cannot be located; keep one answer in each chat"
            )
        spans.append((len(before or ""), len(upto)))
    return text, spans


def _check_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, so chats cannot be written as text; take an instruction model, or set "
            "`tokenizer` to one that has a template"
        )
