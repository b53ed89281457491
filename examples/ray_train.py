"""Ray Train: a TorchTrainer with two workers; the checkpoints that Ray keeps hold the adapter only."""

import os
import tempfile
from pathlib import Path

import torch

# Before Ray is imported: it reports how it is used to its makers, and warns of what it will change one day.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "1"}

import ray
import ray.train
from peft import PeftModel, get_peft_model
from ray.train import Checkpoint, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model

import dvora
from dvora.training import check_ranks_agree, parameter_groups
from examples.checks import folder_bytes, frozen_digest, report, require
from examples.reviews import batches, classifier, loss_of, part_of, score

STEPS, BATCH, WORKERS = 6, 32, 2


def train_in_worker() -> None:
    torch.set_num_threads(1)
    config = dvora.DVoRAConfig(r=256, target_modules="all-linear", modules_to_save=["classifier"])
    adapted = get_peft_model(classifier(), config)
    untouched = frozen_digest(adapted.encoder)
    check_ranks_agree(adapted)
    # A, B and the norms' constants are buffers, and the same in all workers: no step has to send them.
    model = prepare_model(adapted, parallel_strategy_kwargs={"broadcast_buffers": False})
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01, learning_rates={"magnitude": 0.001}))
    context = ray.train.get_context()
    rank, processes = context.get_world_rank(), context.get_world_size()
    held_out = batches(4, 32, "validation")
    start_loss = score(adapted, held_out)[0]
    for batch in batches(STEPS, BATCH):
        loss_of(model, part_of(batch, rank, processes)).backward()
        optimizer.step()
        optimizer.zero_grad()
    require(frozen_digest(adapted.encoder) == untouched, "the base keeps every bit")
    metrics = {"held_out_loss": [start_loss, score(adapted, held_out)[0]], "processes": processes}
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            adapted.save_pretrained(folder)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)


def train(folder: Path) -> Result:
    # A small object store: nothing passes through it but metrics.
    ray.init(num_cpus=WORKERS, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    try:
        trainer = TorchTrainer(
            train_in_worker,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=WORKERS, use_gpu=False),
            run_config=RunConfig(name="reviews", storage_path=str(folder)),
        )
        return trainer.fit()
    finally:
        ray.shutdown()


def main(folder: Path) -> None:
    result = train(folder)
    start_loss, loss = result.metrics["held_out_loss"]
    with result.checkpoint.as_directory() as checkpoint:
        loaded = PeftModel.from_pretrained(classifier(), checkpoint)
        adapter_bytes = folder_bytes(Path(checkpoint), "*.*")
    require(result.metrics["processes"] == WORKERS, f"there were {WORKERS} workers")
    require(loss < start_loss, f"the loss falls: {start_loss} to {loss}")
    require(
        score(loaded, batches(4, 32, "validation"))[0] == loss,
        "the adapter of Ray's checkpoint gives the same outputs on a new base",
    )
    report(
        {
            "works": True,
            "figures": {
                "held_out_loss": [start_loss, loss],
                "workers": WORKERS,
                "checkpoint_bytes": adapter_bytes,
                "same_outputs_from_checkpoint": True,
            },
            "versions": {"ray": ray.__version__},
        }
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
