"""torchrun and DistributedDataParallel: two processes train what one does, and exchange the vectors' gradients only.

Start it with torchrun --standalone --nproc-per-node 2 -m examples.torchrun_ddp
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dvora
from dvora.training import check_ranks_agree, parameter_groups
from examples.checks import folder_bytes, frozen_digest, report, require, same_bits, trained_parameters
from examples.reviews import Batch, batches, classifier, largest_difference, loss_of, part_of, score, trained

STEPS, BATCH = 8, 32


def adapted() -> PeftModel:
    config = dvora.DVoRAConfig(r=256, target_modules="all-linear", modules_to_save=["classifier"])
    return get_peft_model(classifier(), config)


def train(model: nn.Module, data: list[Batch], rank: int = 0, processes: int = 1) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01, learning_rates={"magnitude": 0.001}))
    for batch in data:
        loss_of(model, part_of(batch, rank, processes)).backward()
        optimizer.step()
        optimizer.zero_grad()


def in_parallel(data: list[Batch]) -> PeftModel:
    """What every process does."""
    model = adapted()
    check_ranks_agree(model)
    # By default DDP also sends all buffers in every step: A, B and the norms' constants, the same on all ranks.
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    train(parallel, data, dist.get_rank(), dist.get_world_size())
    copies: list[dict[str, torch.Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(copies, trained(model))
    for copy in copies:
        require(all(same_bits(copy[name], copies[0][name]) for name in copy), "all processes hold the same bits")
    return model


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    processes, first = dist.get_world_size(), dist.get_rank() == 0
    data, held_out = batches(STEPS, BATCH), batches(4, 32, "validation")
    model = in_parallel(data)
    dist.destroy_process_group()
    if not first:
        return

    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(classifier(), folder)
    after, (loss, accuracy) = score(model, held_out), score(loaded, held_out)
    require(after == (loss, accuracy), "the saved adapter gives the same outputs on a new base")
    require(frozen_digest(model.encoder) == frozen_digest(classifier().encoder), "the base keeps every bit")
    one = adapted()
    start, start_loss = trained(one), score(one, held_out)[0]
    train(one, data)
    difference = largest_difference(trained(model), trained(one), start)
    require(loss < start_loss, f"the loss falls: {start_loss} to {loss}")
    require(difference < 0.01, f"{processes} processes train what one does, to rounding: {difference}")
    report(
        {
            "works": True,
            "figures": {
                "held_out_loss": [start_loss, loss],
                "trained_values": trained_parameters(model),
                "gradients_per_step_bytes": 4 * trained_parameters(model),
                "buffers_not_sent_bytes": sum(buffer.nbytes for buffer in model.buffers()),
                "adapter_bytes": folder_bytes(folder),
                "difference_from_one_process": difference,
            },
            "versions": {"torch": torch.__version__.partition("+")[0]},
        }
    )


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun --standalone --nproc-per-node 2 -m examples.torchrun_ddp")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
