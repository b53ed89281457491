"""accelerate launch: two processes train what one does; checkpoints of the adapter only; a run goes on bit for bit.

Start it with accelerate launch --multi_gpu --num_processes 2 --main_process_port 0 -m examples.accelerate_launch
On CPUs too: with --cpu, accelerate 1.15 leaves starting processes to MPI, and starts one.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import accelerate
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import dvora
from dvora.training import check_ranks_agree, parameter_groups
from examples.checks import folder_bytes, frozen_digest, report, require, same_bits, trained_parameters
from examples.reviews import Batch, batches, classifier, largest_difference, loss_of, score, trained

STEPS, SAVED_AFTER, BATCH = 6, 3, 32


def adapted() -> tuple[PeftModel, AdamW]:
    config = dvora.DVoRAConfig(r=256, target_modules="all-linear", modules_to_save=["classifier"])
    model = get_peft_model(classifier(), config)
    check_ranks_agree(model)
    return model, AdamW(parameter_groups(model, 0.01, learning_rates={"magnitude": 0.001}))


def step(model: nn.Module, optimizer: AdamW, batch: Batch, accelerator: Accelerator) -> None:
    accelerator.backward(loss_of(model, batch))
    optimizer.step()
    optimizer.zero_grad()


def keep_adapters_only(accelerator: Accelerator) -> None:
    """`save_state` writes, and `load_state` reads, adapters in the place of whole models."""

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights.clear()
        for model in models:
            accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process)

    def load(models: list[nn.Module], folder: str) -> None:
        while models:
            set_peft_model_state_dict(accelerator.unwrap_model(models.pop()), load_peft_weights(folder, device="cpu"))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def in_parallel(accelerator: Accelerator, data: Iterable[Batch], folder: Path) -> PeftModel:
    """What every process does: train, saving half-way, and go on from there with a new model."""
    keep_adapters_only(accelerator)
    loader = accelerator.prepare(DataLoader(data, batch_size=BATCH))
    model, optimizer = accelerator.prepare(*adapted())
    for number, batch in enumerate(loader, start=1):
        step(model, optimizer, batch, accelerator)
        if number == SAVED_AFTER:
            accelerator.save_state(str(folder))
    whole = trained(model)
    accelerator.free_memory(model, optimizer)

    model, optimizer = accelerator.prepare(*adapted())
    accelerator.load_state(str(folder))
    for batch in accelerator.skip_first_batches(loader, SAVED_AFTER):
        step(model, optimizer, batch, accelerator)
    for copy in gather_object([trained(model)]):
        same = all(same_bits(copy[name], whole[name]) for name in whole)
        require(same, "a run goes on bit for bit, on all processes")
    return accelerator.unwrap_model(model)


def main(own_folder: str) -> None:
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # A, B and the norms' constants are buffers, and the same in all processes: no step has to send them.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    # The main process's, for all of them.
    folder = Path(broadcast_object_list([own_folder])[0])
    data = TensorDataset(*batches(1, STEPS * BATCH)[0])
    model = in_parallel(accelerator, data, folder)
    checkpoint_bytes = folder_bytes(folder, "*.*")
    processes = accelerator.num_processes
    require(processes == 2, f"there are two processes, not {processes}")
    accelerator.end_training()
    if not accelerator.is_main_process:
        return

    held_out = batches(4, 32, "validation")
    require(frozen_digest(model.encoder) == frozen_digest(classifier().encoder), "the base keeps every bit")
    (one, optimizer), alone = adapted(), Accelerator(cpu=True)
    start, start_loss = trained(one), score(one, held_out)[0]
    for batch in DataLoader(data, batch_size=BATCH):
        step(one, optimizer, batch, alone)
    difference, loss = largest_difference(trained(model), trained(one), start), score(model, held_out)[0]
    require(loss < start_loss, f"the loss falls: {start_loss} to {loss}")
    require(difference < 0.01, f"{processes} processes train what one does, to rounding: {difference}")
    report(
        {
            "works": True,
            "figures": {
                "held_out_loss": [start_loss, loss],
                "trained_values": trained_parameters(model),
                "checkpoint_with_optimizer_bytes": checkpoint_bytes,
                "resumed_bit_for_bit": True,
                "difference_from_one_process": difference,
            },
            "versions": {"accelerate": accelerate.__version__},
        }
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as own_folder:
        main(own_folder)
