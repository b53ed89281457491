"""The lists of blocks in a model, and those of which it is known that a block computes each row by itself.

Known are some of transformers' classes, by type: the tests compare their rows in every kind of batch with rows alone.
Of any other block nobody can say which of its arguments have rows, whether they meet in it, or what it has besides.
"""

import sys
from collections.abc import Sequence

from torch import Tensor, nn

KNOWN = {
    "bert": "BertLayer",
    "camembert": "CamembertLayer",
    "clip": "CLIPEncoderLayer",
    "deit": "DeiTLayer",
    "dinov2": "Dinov2Layer",
    "distilbert": "TransformerBlock",
    "electra": "ElectraLayer",
    "eurobert": "EuroBertDecoderLayer",
    "gemma": "GemmaDecoderLayer",
    "gemma2": "Gemma2DecoderLayer",
    "gemma3": "Gemma3DecoderLayer",
    "gpt2": "GPT2Block",
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "modernbert": "ModernBertEncoderLayer",
    "mpnet": "MPNetLayer",
    "nomic_bert": "NomicBertLayer",
    "phi3": "Phi3DecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
    "roberta": "RobertaLayer",
    "siglip": "SiglipEncoderLayer",
    "smollm3": "SmolLM3DecoderLayer",
    "vit": "ViTLayer",
    "xlm_roberta": "XLMRobertaLayer",
}
"""The block of each family of models in transformers."""
ROWS_FIRST = frozenset(
    (
        *KNOWN,
        *("albert", "bart", "blenderbot", "bloom", "codegen", "cohere", "convbert", "deberta", "deberta_v2", "ernie"),
        *("falcon", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite", "m2m_100", "marian"),
        *("mbart", "mobilebert", "mpt", "mt5", "olmo", "olmo2", "pegasus", "phi", "roformer", "squeezebert"),
        *("stablelm", "starcoder2", "t5", "umt5", "xglm", "xlm"),
    )
)
"""Families of which the tests see that no layer gets tokens before rows."""
BY_ROW = frozenset(("attention_mask", "position_bias", "position_embeddings", "position_ids"))
"""Arguments of known blocks, behind hidden states (B, T, H), that have an entry for each row, or one for all rows.

With any other argument a block is none that is known: a cache of keys, or the states of an encoder.
"""

_PLAIN, _PARTS = "torch.nn.modules.", ("transformers.activations", "transformers.pytorch_utils")


def block_lists(model: nn.Module, heads: Sequence[str] = ()) -> list[tuple[str, nn.ModuleList]]:
    """The outermost lists of two modules or more, with their names, but for those in heads."""
    lists, within = list[tuple[str, nn.ModuleList]](), [f"{head}." for head in heads]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not f"{name}.".startswith(tuple(within)):
            lists.append((name, module))
            within.append(f"{name}.")
    return lists


def known_lists(model: nn.Module) -> list[nn.ModuleList]:
    """Those of known blocks."""
    return [
        blocks for name, blocks in block_lists(model) if _is_known(model.get_submodule(name.rpartition(".")[0]), blocks)
    ]


def with_rows_first(model: nn.Module) -> set[nn.Module]:
    """The modules of which it is known that their inputs have rows before tokens: those of families of transformers."""
    found = set[nn.Module]()
    # Outer ones first.
    for module in model.modules():
        if _family(module) in ROWS_FIRST:
            inner = [each for each in module.modules() if _file_of(each).startswith(_PLAIN)]
            found |= {module, *inner}
    return found


def _file_of(module: nn.Module) -> str:
    """The file that a module's type is of, as a name for imports."""
    return type(module).__module__


def _family(module: nn.Module) -> str:
    """The family in transformers whose file a module's type is of; empty for others."""
    family = _file_of(module).removeprefix("transformers.models.").partition(".")[0]
    return family if _file_of(module) == f"transformers.models.{family}.modeling_{family}" else ""


def _are_known(blocks: nn.ModuleList) -> bool:
    """Whether blocks are known by their types, and all that is in them by its own."""
    file = _file_of(blocks[0])
    known = getattr(sys.modules[file], KNOWN.get(_family(blocks[0]), ""), None)
    if {*map(type, blocks)} != {known}:
        return False
    others = {_file_of(module) for block in blocks for module in block.modules()} - {file, *_PARTS}
    return all(other.startswith(_PLAIN) for other in others)


def _is_known(parent: nn.Module, blocks: nn.ModuleList) -> bool:
    """Whether blocks are known and as they were made, as what calls them is."""
    values = [*blocks.parameters(), *blocks.buffers()]
    return (
        _are_known(blocks)
        and _file_of(parent) == _file_of(blocks[0])
        and "forward" not in vars(parent)
        and all(type(value) in (Tensor, nn.Parameter) for value in values)
        and not any(
            "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
            for module in blocks.modules()
        )
    )
