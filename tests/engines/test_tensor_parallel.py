"""Tensor parallelism: processes with sharded weights, against one process that holds them whole."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from dvora import DVoRAConfig
from tests.engines.processes import Sent, run
from tests.engines.training import assert_trained_as_by_one, batch, train, vectors
from tests.peft import tiny

COLUMNS, ROWS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj", "down_proj"]


def llama() -> LlamaForCausalLM:
    """A tiny Llama whose four heads of keys can be sharded."""
    return tiny.llama(key_value_heads=4)


def adapted(base: nn.Module, **settings: object) -> PeftModel:
    return get_peft_model(base, DVoRAConfig(**{"r": 6, "target_modules": [*COLUMNS, *ROWS], **settings}))


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the linear layers of all blocks, adapted or not."""
    for layer in (module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"):
        plan = {}
        for name, module in layer.named_modules():
            parts = name.removesuffix(".base_layer").split(".")
            if isinstance(module, nn.Linear) and parts[-1] in (*COLUMNS, *ROWS):
                plan[name] = ColwiseParallel() if parts[-1] in COLUMNS else RowwiseParallel()
        parallelize_module(layer, mesh, plan)


CASES: list[tuple[str, dict[str, object]]] = [
    ("adapted first", {}),
    ("sharded first", {}),
    ("adapted first", {"target_modules": COLUMNS}),
    ("sharded first", {"r": 40, "direction": "weight"}),
    ("adapted first", {"detach_norm": True}),
    ("sharded by transformers", {}),
    # Both processes have columns of the second group.
    ("adapted first", {"lambda_d_groups": 3}),
    ("sharded first", {"lambda_d_groups": 5, "direction": "weight"}),
    ("sharded by transformers", {"lambda_d_groups": 4}),
]


def trained_in_parts(folder: Path) -> list[tuple[list[float], dict[str, np.ndarray]]]:
    """Losses and vectors of every case; the folder has the base model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for order, settings in CASES:
        model: nn.Module = llama()
        if order == "sharded by transformers":
            plan = DistributedConfig(tp_size=dist.get_world_size())
            model = LlamaForCausalLM.from_pretrained(folder, distributed_config=plan, dtype=torch.float32).eval()
        if order == "sharded first":
            shard(model, mesh)
        model = adapted(model, **settings)
        if order == "adapted first":
            shard(model, mesh)
        losses = train(model)
        found.append((losses, {name: vector.numpy() for name, vector in vectors(model).items()}))
    return found


def test_processes_that_divide_the_weights_train_what_one_does(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    found = run(trained_in_parts, 2, tmp_path)
    for case, (_, settings) in enumerate(CASES):
        losses, ranks = zip(*(rank[case] for rank in found), strict=True)
        assert_trained_as_by_one(adapted(llama(), **settings), *ranks, losses=list(losses))


def one_step(model: nn.Module) -> None:
    tokens = batch(0)
    model(input_ids=tokens, labels=tokens).loss.backward()


GROUPS = (1, 3, 5)


def gradients_in_parts() -> dict[int, dict[str, np.ndarray]]:
    """By numbers of groups, of vectors that are not at their start."""
    return {groups: gradients(groups, init_device_mesh("cpu", (2,))) for groups in GROUPS}


def gradients(groups: int, mesh: DeviceMesh | None = None) -> dict[str, np.ndarray]:
    model = adapted(llama().double(), lambda_d_groups=groups, init_weights=False)
    if mesh is not None:
        shard(model, mesh)
    one_step(model)
    return {name: p.grad.numpy() for name, p in model.named_parameters() if "dvora_" in name}


def test_gradients_are_those_of_one_process() -> None:
    for found in run(gradients_in_parts, 2):
        for groups in GROUPS:
            expected = gradients(groups)
            assert found[groups].keys() == expected.keys()
            for name, gradient in expected.items():
                np.testing.assert_allclose(found[groups][name], gradient, rtol=1e-9, atol=1e-14, err_msg=name)


def sent_and_saved(folder: Path, groups: int) -> Counter[str]:
    """What a training step sends; the first rank saves the adapter, alone."""
    mesh = init_device_mesh("cpu", (2,))
    model = adapted(llama(), init_weights=False, lambda_d_groups=groups)
    shard(model, mesh)
    one_step(model)
    with Sent() as sent:
        one_step(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    return sent.operations


@pytest.mark.parametrize("groups", [1, 3])
def test_a_step_gathers_no_weight_and_any_rank_saves_the_whole_adapter(groups: int, tmp_path: Path) -> None:
    for sent in run(sent_and_saved, 2, tmp_path, groups):
        assert not [operation for operation in sent if "gather" in operation]
        # Two blocks: z of two row-wise layers, gradients of the vectors of five column-wise ones, and of their z (by
        # groups of their input) but for the first three, whose input is a frozen embedding. By groups, the gradients of
        # lambda_d of the row-wise ones too.
        assert sent["c10d.allreduce_"] == 2 * (2 + 5 + 5) - 3 + (0 if groups == 1 else 2 * 2)
    expected = adapted(llama(), init_weights=False, lambda_d_groups=groups)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert vectors(loaded).keys() == vectors(expected).keys()
    for name, vector in vectors(expected).items():
        assert torch.equal(vectors(loaded)[name], vector)


def parallelize(style: ParallelStyle, targets: list[str], inner: str = "mlp.down_proj") -> Callable[[], object]:
    """An adapted model with one layer sharded in this way, and a pass through it."""

    def attempt() -> object:
        model = adapted(llama(), target_modules=targets).train()
        layer = model.get_submodule(f"base_model.model.model.layers.0.{inner}.base_layer")
        parallelize_module(layer, init_device_mesh("cpu", (2,)), style)
        return model(input_ids=batch(0))

    return attempt


def sharded(**settings: object) -> PeftModel:
    model = adapted(llama(), **settings)
    shard(model, init_device_mesh("cpu", (2,)))
    return model.train()


def trained_base() -> object:
    model = sharded()
    model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight.requires_grad_()
    return model(input_ids=batch(0))


def on_two_dimensions() -> object:
    model = llama()
    layer = model.model.layers[0].mlp.down_proj
    mesh = init_device_mesh("cpu", (2, 1))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0), Replicate()]), False)
    return adapted(model, target_modules=["down_proj"])(input_ids=batch(0))


def in_turns() -> object:
    model = llama()
    layer, mesh = model.model.layers[0].mlp.down_proj, init_device_mesh("cpu", (2,))
    rows = layer.weight.detach().chunk(4)[dist.get_rank() :: 2]
    placements = [_StridedShard(0, split_factor=2)]
    layer.weight = nn.Parameter(DTensor.from_local(torch.cat(rows), mesh, placements), False)
    return adapted(model, target_modules=["down_proj"])(input_ids=batch(0))


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "whole outputs": (
        parallelize(ColwiseParallel(output_layouts=Replicate()), ["down_proj"]),
        "the layer's output is not (32 of 32 features, expected 16)",
    ),
    "whole inputs": (
        parallelize(RowwiseParallel(input_layouts=Replicate()), ["down_proj"]),
        "the layer's input is not (48 of 48 features, expected 24)",
    ),
    "distributed outputs": (
        parallelize(ColwiseParallel(use_local_output=False), ["down_proj"]),
        "the output is a DTensor",
    ),
    "two dimensions": (on_two_dimensions, "supports weights of torch.nn.Linear sharded by"),
    "in turns": (in_turns, "supports weights of torch.nn.Linear sharded by"),
    "dropout": (lambda: sharded(dvora_dropout=0.1)(input_ids=batch(0)), "set dvora_dropout=0"),
    "a trained base": (trained_base, "cannot be trained"),
    "merge": (lambda: sharded().merge_and_unload(), "merge there"),
}


def messages() -> list[str]:
    found = []
    for attempt, _ in MISTAKES.values():
        try:
            found.append(f"nothing, but returned {type(attempt()).__name__}")
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def test_what_is_not_supported_is_refused_on_every_rank() -> None:
    for found in run(messages, 2):
        for (what, (_, expected)), message in zip(MISTAKES.items(), found, strict=True):
            assert expected in message, what
