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
BY_ROW = frozenset(("attention_mask", "position_bias", "position_embeddings", "position_ids"))
"""Arguments of known blocks, behind hidden states (B, T, H), that have an entry for each row, or one for all rows.

With any other argument a block is none that is known: a cache of keys, or the states of an encoder.
"""


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


def file_of(module: nn.Module) -> str:
    """The file that a module's type is of, as a name for imports."""
    return type(module).__module__


def is_of(module: nn.Module, file: str) -> bool:
    """Whether a module does what its type does, which is PyTorch's or of a file of transformers."""
    plain = file_of(module) in (file, "transformers.activations") or file_of(module).startswith("torch.nn.modules.")
    return plain and not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _is_known(parent: nn.Module, blocks: nn.ModuleList) -> bool:
    """Whether all modules in blocks are of transformers and as they were made, as that is which calls them."""
    file = file_of(blocks[0])
    family = file.removeprefix("transformers.models.").partition(".")[0]
    known = getattr(sys.modules.get(file), KNOWN.get(family, ""), None)
    if file != f"transformers.models.{family}.modeling_{family}" or {*map(type, blocks)} != {known}:
        return False
    values = [*blocks.parameters(), *blocks.buffers()]
    return (
        file_of(parent) == file
        and "forward" not in vars(parent)
        and all(is_of(module, file) for module in blocks.modules())
        and all(type(value) in (Tensor, nn.Parameter) for value in values)
    )
