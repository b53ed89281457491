"""Tiny random models with their tokenizers and image processors, saved as folders that from_pretrained reads."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = ["good", "bad", "fine", "poor", "a", "the", "movie", "book", "was", "very", "not", "great", "awful", "it", "is"]
CHAT_TEMPLATE = (
    "{% for message in messages %}[CLS] {{ message['role'] }} {{ message['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant{% endif %}"
)


def bert(folder: Path, layers: int = 2) -> Path:
    """A base without a head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    _tokenizer(WORDS, ends=True).save_pretrained(folder)
    return folder


def classifier(folder: Path) -> Path:
    """A base with a head of three classes."""
    bert(folder)
    torch.manual_seed(1)
    BertForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    return folder


def roberta(folder: Path) -> Path:
    """A base without a head; classifiers get one of two layers."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=33,
        type_vocab_size=2,
        initializer_range=0.3,
        pad_token_id=0,
    )
    RobertaModel(config).save_pretrained(folder)
    _tokenizer(WORDS, ends=True).save_pretrained(folder)
    return folder


def distilbert(folder: Path) -> Path:
    """A base without a head; classifiers get one of two modules."""
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(SPECIAL + WORDS),
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
    )
    DistilBertModel(config).save_pretrained(folder)
    _tokenizer(WORDS, ends=True).save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    """A language model of letters."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(32, 127)] + ["\n", "system", "user", "assistant"]
    config = LlamaConfig(
        vocab_size=len(SPECIAL + letters),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = _tokenizer(letters, ends=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def vit(folder: Path, layers: int = 2) -> Path:
    """An image model without a head."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def _tokenizer(words: list[str], ends: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(SPECIAL + words)}, unk_token="[UNK]"))
    # Words by spaces, or single letters, line ends among them.
    pattern, behaviour = (r"\s+", "removed") if ends else (r"[\s\S]", "isolated")
    tokenizer.pre_tokenizer = Split(Regex(pattern), behaviour)
    if not ends:
        tokenizer.decoder = Fuse()
    else:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]" if ends else None,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=32 if ends else 64,
    )
