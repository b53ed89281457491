"""transformers' own adapter methods, without a PeftModel: `add_adapter`, `disable_adapters`, `load_adapter`.

transformers asks for a version of PEFT here, 5.24 for one that may not be out yet (5.23 works with PEFT 0.21). Where it
refuses, the example reports that, after doing the same with PEFT's functions that these methods are made of.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import dvora
from dvora.training import parameter_groups
from examples.checks import folder_bytes, frozen_digest, report, require, same_bits, trained_parameters
from materials.data import movie_reviews
from materials.models import minilm

BATCH, STEPS = 16, 16


def base() -> PreTrainedModel:
    torch.manual_seed(0)  # of the new head
    return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2).eval()


def config() -> dvora.DVoRAConfig:
    # Like every method, DVoRA freezes what it does not adapt: the new head is trained because it is named.
    return dvora.DVoRAConfig(r=256, target_modules=["query", "value", "dense"], modules_to_save=["classifier"])


def batch(texts: tuple[str, ...]) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    return tokenizer(list(texts), truncation=True, max_length=32, padding=True, return_tensors="pt")


def train(model: PreTrainedModel) -> None:
    data = movie_reviews().train
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.03, learning_rates={"magnitude": 0.003, "head": 0.02}))
    model.train()
    for first in range(0, BATCH * STEPS, BATCH):
        texts, labels = data.texts[first : first + BATCH], torch.from_numpy(data.labels[first : first + BATCH])
        cross_entropy(model(**batch(texts)).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def with_the_model_s_methods(folder: Path, inputs: dict[str, Tensor]) -> PreTrainedModel:
    """The lines that matter, where transformers lets them through."""
    model = base()
    model.add_adapter(config(), "reviews")
    train(model)
    outputs = model(**inputs).logits
    model.disable_adapters()
    require(same_bits(model(**inputs).logits, base()(**inputs).logits), "without its adapter the model is the base")
    model.enable_adapters()
    # transformers switches `modules_to_save` off there, and not on again here, whatever the method (5.23 and before).
    switch_adapters(model, on=True)
    require(same_bits(model(**inputs).logits, outputs), "with it again, it is the adapted model")
    model.save_pretrained(folder)  # the adapter alone
    fresh = base()
    fresh.load_adapter(str(folder), "reviews")
    require(same_bits(fresh.eval()(**inputs).logits, outputs), "the loaded adapter gives the same outputs")
    return model


def with_peft_s_functions(folder: Path, inputs: dict[str, Tensor]) -> PreTrainedModel:
    """The same without transformers' methods."""
    model = base()
    inject_adapter_in_model(config(), model, "reviews")
    train(model)
    outputs = model(**inputs).logits
    switch_adapters(model, on=False)
    require(same_bits(model(**inputs).logits, base()(**inputs).logits), "without its adapter the model is the base")
    switch_adapters(model, on=True)
    require(same_bits(model(**inputs).logits, outputs), "with it again, it is the adapted model")
    # Not `model.save_pretrained`: transformers knows of no adapter, and would write the base under the wrappers' names.
    save_file(get_peft_model_state_dict(model, adapter_name="reviews"), folder / "adapter_model.safetensors")
    model.peft_config["reviews"].save_pretrained(folder)
    fresh = base()
    fresh.load_adapter(str(folder), "reviews")  # transformers' own: this one it does not refuse
    require(same_bits(fresh.eval()(**inputs).logits, outputs), "the loaded adapter gives the same outputs")
    return model


def switch_adapters(model: PreTrainedModel, *, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            module.enable_adapters(on)


def main(folder: Path) -> None:
    inputs = batch(movie_reviews().test.texts[:32])
    refusal = ""
    try:
        model = with_the_model_s_methods(folder, inputs)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        refusal = f"transformers {version('transformers')} with PEFT {version('peft')}: {error}"
        model = with_peft_s_functions(folder, inputs)
    require(frozen_digest(model.bert) == frozen_digest(base().bert), "the base keeps every bit")
    outcome = {"works": True} if not refusal else {"works": False, "outcome": "base cannot", "reason": refusal}
    metrics = {"trained_values": trained_parameters(model), "adapter_bytes": folder_bytes(folder)}
    report({**outcome, "figures": metrics, "versions": {"transformers": version("transformers")}})


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
