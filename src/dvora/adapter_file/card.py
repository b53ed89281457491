"""The README.md of a saved adapter: how to load it, and what a hub reads of it.

`library_name` stays PEFT's: transformers' Trainer and PEFT's own tests go by it. The tag says which method it is.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it has no list of its names

from ..extras import how_to_install

NEEDS = f"Once, {how_to_install('peft')}. Without `import dvora` PEFT ends with `KeyError: 'DVORA'`."
_LOADING = f"""\

## How to load it

{NEEDS}

```python
import dvora  # makes the method known to PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base, "NAME")  # of this repository, or a path to this folder
```

`base` is the model that the adapter was trained on; other models are refused.
"""


def write_card(folder: Path) -> None:
    """Say in the README.md of an adapter's folder how to load it, and what it is.

    What else stands there stays: PEFT's template, or what the user wrote. PEFT writes its metadata anew whenever it
    saves the adapter "default", and none for adapters of other names, which have folders of their own.
    """
    file = folder / "README.md"
    card = ModelCard.load(file) if file.exists() else ModelCard("---\nlibrary_name: peft\n---\n\n# An adapter\n")
    tags, base = {*(card.data.get("tags") or ()), "dvora"}, card.data.get("base_model")
    if isinstance(base, str) and not is_name_on_hub(base):
        # Hubs refuse a card that names a folder of this machine.
        card.data.pop("base_model")
        tags.discard(f"base_model:adapter:{base}")
    card.data["tags"] = sorted(tags)
    if "import dvora" not in card.text:
        title, end, rest = card.text.lstrip().partition("\n")
        card.text = f"\n{title}{end}{_LOADING}{rest}" if title.startswith("# ") else f"{_LOADING}\n{title}{end}{rest}"
    card.save(file)


def is_name_on_hub(base: str) -> bool:
    """Whether a model's name can be one on a hub: it is no folder here, and is spelt like one."""
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return not Path(base).exists()
