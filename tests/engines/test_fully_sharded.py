"""FSDP2: processes that each hold a part of every parameter, against one process that holds all."""

import os
from collections import Counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from dvora import DVoRAConfig
from dvora.peft import DVoRALayer
from tests.engines.processes import Sent, run
from tests.engines.training import adapted, assert_trained_as_by_one, batch, train, vectors
from tests.peft.tiny import LAYERS, MODELS


def shard(model: PeftModel) -> PeftModel:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def adapted_layers(model: nn.Module) -> list[DVoRALayer]:
    return [module for module in model.modules() if isinstance(module, DVoRALayer)]


CASES: dict[str, dict[str, object]] = {
    "dense": {},
    "groups": {"lambda_d_groups": 3},
}


def trained_in_parts() -> dict[str, dict[str, Any]]:
    """What training did in every case, in which steps constants were kept, and what a step sends."""
    found = {case: trained(settings) for case, settings in CASES.items()}
    lora = LoraConfig(r=6, target_modules=LAYERS["llama"])
    sent = sent_in_a_step(shard(get_peft_model(MODELS["llama"](), lora)))
    return {**found, "LoRA": {"sent": sent}}


def trained(settings: dict[str, object]) -> dict[str, Any]:
    model = shard(adapted(**settings))
    constants = []
    hook = model.register_forward_hook(
        lambda *_: constants.append([layer.adapted("default").w for layer in adapted_layers(model)])
    )
    losses = train(model, dist.get_rank(), dist.get_world_size())
    hook.remove()
    named = {name: vector for name, vector in model.named_parameters() if "dvora_" in name}
    return {
        "losses": losses,
        "vectors": {name: vector.detach().full_tensor().numpy() for name, vector in named.items()},
        "sharded": all(vector.to_local().numel() < vector.numel() for vector in named.values()),
        "kept": [
            all(now is before for now, before in zip(*steps, strict=True))
            for steps in zip(constants[1:], constants[:-1], strict=True)
        ],
        "sent": sent_in_a_step(model),
    }


def sent_in_a_step(model: nn.Module) -> Counter[str]:
    """How often each collective runs in one training step."""
    tokens = batch(0)
    with torch.enable_grad(), Sent() as sent:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return sent.operations


def test_processes_with_parts_train_what_one_does() -> None:
    found = run(trained_in_parts, 2)
    for case, settings in CASES.items():
        parts = [rank[case] for rank in found]
        losses = [part["losses"] for part in parts]
        assert_trained_as_by_one(adapted(**settings), *(part["vectors"] for part in parts), losses=losses)
        for rank, part in zip(found, parts, strict=True):
            assert part["sharded"]
            # Measured from the gathered weights in the first pass only.
            assert part["kept"] == [True] * 4
            assert part["sent"] == rank["LoRA"]["sent"]
            assert part["sent"].total() > 0


def other_base() -> nn.Module:
    """The tiny Llama with other weights in its linear layers."""
    model = MODELS["llama"]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(torch.linspace(0.5, 2, module.in_features))
    return model


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a base under the names that they have in an adapted one."""
    found = {}
    for name, value in state.items():
        layer, _, parameter = name.rpartition(".")
        inner = ".base_layer" if layer.rpartition(".")[2] in LAYERS["llama"] else ""
        found[f"base_model.model.{layer}{inner}.{parameter}"] = value
    return found


def outputs_after_loading() -> list[np.ndarray]:
    model = shard(adapted(init_weights=False).eval())
    found = []
    for load in (False, False, True, False):
        if load:
            model.reshard()
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(model, renamed(other_base().state_dict()), options=options)
        with torch.no_grad():
            found.append(model(input_ids=batch(0)).logits.numpy())
    return found


def test_constants_follow_a_base_that_is_loaded_after_sharding() -> None:
    model = adapted(init_weights=False).eval()
    with torch.no_grad():
        before = model(input_ids=batch(0)).logits
        model.load_state_dict(renamed(other_base().state_dict()), strict=False)
        after = model(input_ids=batch(0)).logits
    assert (before - after).abs().max() > 0.1
    for outputs in run(outputs_after_loading, 2):
        for found, expected in zip(outputs, (before, before, after, after), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


def adapted_after_sharding() -> str:
    model = MODELS["llama"]()
    fully_shard(model.model.layers[0])
    try:
        adapted_model = get_peft_model(model, adapted().peft_config["default"])
    except ValueError as error:
        return str(error)
    return type(adapted_model).__name__


def test_to_adapt_a_sharded_model_is_refused_on_every_rank() -> None:
    for message in run(adapted_after_sharding, 2):
        assert message.startswith("model.layers.0 is sharded already (fully_shard)")
        assert "adapt the model first" in message


# Prepared by accelerate.


def trained_by_accelerate() -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and vectors of an adapted model that accelerate has given to FSDP2.

    Only the first rank has read the base model; the others have memory with anything in it.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    # This process's place in the group, as a launcher would set it.
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    made = Accelerator(cpu=True, fsdp_plugin=plugin)
    # On CPUs `prepare` takes DDP and says nothing; this is what it calls where there are GPUs.
    made.state.fsdp_plugin = plugin
    base = MODELS["llama"]()
    if dist.get_rank() != 0:
        for parameter in base.parameters():
            nn.init.constant_(parameter, 0.5)
    model = get_peft_model(base, DVoRAConfig(r=6, target_modules=LAYERS["llama"]))
    prepared = fsdp2_prepare_model(made, model)
    losses = train(prepared, dist.get_rank(), dist.get_world_size())
    return losses, {name: vector.full_tensor().numpy() for name, vector in vectors(prepared).items()}


def test_a_model_prepared_for_fsdp2_trains_what_one_process_does() -> None:
    losses, ranks = zip(*run(trained_by_accelerate, 2), strict=True)
    assert_trained_as_by_one(adapted(), *ranks, losses=list(losses))
