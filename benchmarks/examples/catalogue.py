"""What examples there are, in the order of the README's table."""

from dataclasses import dataclass

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


@dataclass(frozen=True)
class Example:
    """One file of this folder.

    Args:
        name: of the file, without `.py`.
        trainer: whose training it is, for the table.
        shows: what it shows, in a few words, for the table.
        limit_seconds: after which it is killed.
        processes: how many of them train.
        needs: packages, by the names they are installed by, without which it is not started.
        launcher: arguments of Python that go before `-m examples.<name>`, where a launcher starts the processes.
    """

    name: str
    trainer: str
    shows: str
    limit_seconds: float = 240
    processes: int = 1
    needs: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()


CATALOGUE: tuple[Example, ...] = (
    Example(
        "transformers_trainer",
        "transformers' Trainer",
        "learning rates by group; a run goes on from its checkpoint bit for bit",
        needs=("datasets",),
    ),
    Example(
        "trl_sft",
        "TRL's SFTTrainer",
        "the configuration as `peft_config`; an adapted model with learning rates by group",
        limit_seconds=300,
        needs=("trl", "datasets", "gguf"),
    ),
    Example(
        "trl_dpo",
        "TRL's DPOTrainer",
        "the reference is the model with its adapter off; a trained adapter as its own reference",
        limit_seconds=300,
        needs=("trl", "datasets", "gguf"),
    ),
    Example(
        "accelerate_loop",
        "accelerate, a loop of one's own",
        "accumulation, clipping, groups; a run goes on bit for bit with dropout",
        needs=("accelerate",),
    ),
    Example(
        "lightning_module",
        "Lightning",
        "a checkpoint without the base; a run goes on bit for bit; grouped convolutions",
        needs=("lightning", "scikit-learn"),
    ),
    Example(
        "transformers_native",
        "transformers' `add_adapter`, `load_adapter`, `enable_adapters`",
        "the model's own methods, or PEFT's functions where they are refused",
        needs=("transformers",),
    ),
    Example(
        "diffusers_unet",
        "diffusers, a small UNet",
        "`add_adapter` and `disable_adapters` of its models; attention and convolutions",
        needs=("diffusers", "scikit-learn"),
    ),
    Example(
        "timm_vision", "timm, ConvNeXt", "depthwise convolutions; the merged model", needs=("timm", "scikit-learn")
    ),
    Example(
        "torchvision_vision",
        "torchvision, MobileNetV3",
        "depthwise and pointwise convolutions, squeeze and excitation; the merged model",
        needs=("torchvision", "scikit-learn"),
    ),
    Example(
        "sentence_transformers_pairs",
        "sentence-transformers",
        "its trainer on pairs of sentences; saved and loaded",
        needs=("sentence-transformers", "datasets"),
    ),
    Example(
        "speakers",
        "dvora's bank, a loop of one's own",
        "an adapter for each speaker of Shakespeare's plays, trained in one step, beside one adapter for all",
        needs=("transformers", "gguf"),
    ),
    Example(
        "sixteen_classifiers",
        "`dvora train`, `dvora serve`",
        "sixteen classifiers of one message in one pass; one is taught anew while others go on asking",
        limit_seconds=600,
        needs=("fastapi", "typer"),
    ),
    Example(
        "torchrun_ddp",
        "torchrun, DistributedDataParallel",
        "two processes train what one does; only the vectors' gradients are exchanged",
        processes=2,
        needs=("torch",),
        launcher=TORCHRUN,
    ),
    Example(
        "accelerate_launch",
        "accelerate launch",
        "two processes train what one does; checkpoints of the adapter; a run goes on bit for bit",
        processes=2,
        needs=("accelerate",),
        launcher=ACCELERATE,
    ),
    Example(
        "ray_train",
        "Ray Train's TorchTrainer",
        "two workers; the checkpoints that Ray keeps hold the adapter only",
        processes=2,
        needs=("ray",),
    ),
    Example(
        "federated_flower",
        "Flower's simulation",
        "three clients; federated averages of vectors; vectors in 8 bits",
        limit_seconds=600,
        processes=2,
        needs=("flwr", "ray"),
    ),
    Example(
        "rl_sync",
        "TRL's GRPOTrainer",
        "a copy of the model generates, and gets a version of the adapter after every step; other methods' bytes",
        limit_seconds=300,
        needs=("trl", "datasets"),
    ),
)
