"""A text classifier of a few kilobytes with a tokenizer, and a table to train it on: python tiny_model.py FOLDER

Runs in any environment with dvora's extra `peft`; needs nothing else of this clone.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = {"good": ("warm", "funny", "brave"), "bad": ("dull", "long", "empty")}


def main(folder: Path) -> None:
    """Write `minilm`, a model in the place of the README's, and `reviews.csv`."""
    words = ["[PAD]", "[UNK]", "a", "film", *WORDS["good"], *WORDS["bad"]]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder / "minilm")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "minilm")
    rows = [f"a {one} {other} film,{label}" for label, ones in WORDS.items() for one in ones for other in words[2:]]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
