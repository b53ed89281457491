"""Step times of several methods on a given model: a training step, and a decoded token or a forward pass.

Every round times every method once, and times are compared within a round: a machine that slows down slows both. The
kernels of each are counted too: for small models and few tokens a device waits for their launches.
"""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from time import perf_counter
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from ...ops.kernel_count import beyond_base, kernels
from ...tuner.config import DVoRAConfig
from ..models.architectures import config_of, heads_of, load_base, model_class, quietly, without_memory
from ..models.inputs import example_inputs, first_output
from ..training.methods import trained_parameters
from .counting import targeted_layers

Step = Callable[[], object]
Make = Callable[[int, list[str]], PeftConfig]


def _dvora(rank: int, targets: list[str], kind: str) -> PeftConfig:
    return DVoRAConfig(r=rank, target_modules=targets, projection_init=kind)


CONFIGS: Mapping[str, Make] = {
    "lora": lambda rank, targets: LoraConfig(r=rank, target_modules=targets),
    "dora": lambda rank, targets: LoraConfig(r=rank, target_modules=targets, use_dora=True),
    "vera": lambda rank, targets: VeraConfig(r=rank, target_modules=targets),
    "dvora": partial(_dvora, kind="structured"),
    "dvora dense": partial(_dvora, kind="kaiming_uniform"),
}
LOW_RANK = ("lora", "dora")
"""Methods whose ranks are small because each costs values."""


@dataclass(frozen=True)
class Timing:
    """One method's times.

    Args:
        method, rank: "base" has no rank.
        trained: values.
        training_seconds, inference_seconds: medians.
        training_ratio, inference_ratio: medians of the ratios to the base in the same round.
        training_spread, inference_spread: quartiles of those ratios.
        training_kernels, inference_kernels: launched for each adapted layer, beyond the base's own.
        note: why it was not timed.
    """

    method: str
    rank: int | None
    trained: int | None = None
    training_seconds: float | None = None
    training_ratio: float | None = None
    training_spread: tuple[float, float] | None = None
    training_kernels: float | None = None
    inference_seconds: float | None = None
    inference_ratio: float | None = None
    inference_spread: tuple[float, float] | None = None
    inference_kernels: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Speed:
    """What was timed and how; `inference`: what was timed as such."""

    model: str
    architecture: str
    dtype: str
    device: str
    threads: int
    batch: int
    tokens: int
    rounds: int
    inference: str
    timings: list[Timing]


def bench(
    source: str,
    *,
    targets: Sequence[str] = (),
    rank: int = 256,
    low_rank: int = 16,
    methods: Sequence[str] = tuple(CONFIGS),
    tokens: int = 128,
    batch: int = 1,
    rounds: int = 9,
    dtype: str = "auto",
    device: str = "cpu",
    on_round: Step = lambda: None,
) -> Speed:
    """Time methods beside the base model, in turns.

    Args:
        source: a folder, or the name of a model on the hub.
        targets: names of the layers to adapt; none means all linear layers.
        rank: of VeRA and DVoRA.
        low_rank: of LoRA and DoRA.
        methods: of `CONFIGS`.
        tokens, batch: of a training step; images have their own size.
        rounds: how often everything is timed.
        dtype: of the model; "auto" means as it is stored.
        device: where it runs.
        on_round: called after every round.

    Raises:
        ValueError: there is no such model, a method is unknown, or a number is not positive.
    """
    for name, value in {"rank": rank, "low_rank": low_rank, "tokens": tokens, "batch": batch, "rounds": rounds}.items():
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if unknown := [method for method in methods if method not in CONFIGS]:
        raise ValueError(f"unknown method {unknown[0]!r}, expected one of {', '.join(CONFIGS)}")
    config = config_of(source)
    make_base = model_class(config)
    empty = without_memory(make_base, config)
    layers = list(targeted_layers(empty, list(targets), heads_of(empty)))
    base = load_base(source, make_base, config, dtype if dtype == "auto" else getattr(torch, dtype))
    base = base.to(device)
    inputs = {name: value.to(device) for name, value in example_inputs(base, batch, tokens).items()}
    models: dict[str, nn.Module] = {"base": base}
    refused: dict[str, str] = {}
    for method in methods:
        try:
            models[method] = adapted(base, method, low_rank if method in LOW_RANK else rank, layers)
        except (TypeError, ValueError) as error:
            refused[method] = str(error)
    decodes = base.get_output_embeddings() is not None and not base.config.is_encoder_decoder
    make: Callable[[nn.Module, dict[str, Tensor]], Step] = decoding_step if decodes else forward_step
    with quietly():
        training = _measured({n: training_step(m, inputs) for n, m in models.items()}, len(layers), rounds, on_round)
        inference = _measured({n: make(m, inputs) for n, m in models.items()}, len(layers), rounds, on_round)
    timings = [_timing(method, model, training, inference, rank, low_rank) for method, model in models.items()]
    timings += [Timing(method, None, note=reason) for method, reason in refused.items()]
    timed = "one token after a prompt" if decodes else "a forward pass"
    length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return Speed(
        source, type(base).__name__, str(base.dtype).removeprefix("torch."), device, torch.get_num_threads(), batch,
        length, rounds, timed, timings,
    )  # fmt: skip


def adapted(base: nn.Module, method: str, rank: int, targets: list[str]) -> nn.Module:
    """The base with an adapter, on the base's own weights, with values slightly off their starts."""
    shared = {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())}
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(), quietly():
        model: nn.Module = get_peft_model(copy.deepcopy(base, shared), CONFIGS[method](rank, targets))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Untrained, most methods do nothing, which could be a shortcut.
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def training_step(model: Any, inputs: Mapping[str, Tensor]) -> Step:
    """A forward and a backward pass with the gradients of all trained parameters and of the embedded input."""
    model.train()
    given = _embedded(model, inputs)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        for tensor in (*given.values(), *trained):
            tensor.grad = None
        # As an optimizer's step does: a method may keep what it made until something is written.
        torch.autograd.graph.increment_version(trained)
        first_output(model(**given)).float().square().mean().backward()

    return step


def forward_step(model: Any, inputs: Mapping[str, Tensor]) -> Step:
    """A forward pass without gradients."""

    @torch.no_grad()
    def step() -> None:
        model.eval()(**inputs)

    return step


def decoding_step(model: Any, inputs: Mapping[str, Tensor]) -> Step:
    """One token after a prompt whose keys and values are cached, always at the same place."""
    ids = inputs["input_ids"]
    cache = DynamicCache()

    @torch.no_grad()
    def step() -> None:
        model.eval()
        if not cache.get_seq_length():
            model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def _embedded(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with a gradient to go to, so that a frozen base has a backward pass too."""
    if "input_ids" not in inputs:
        return {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    return {"inputs_embeds": embedded} | {name: value for name, value in inputs.items() if name != "input_ids"}


class _Measured(NamedTuple):
    """Seconds of every round, and kernels a layer, by method."""

    seconds: Mapping[str, list[float]]
    kernels: Mapping[str, float]


def _measured(steps: Mapping[str, Step], layers: int, rounds: int, on_round: Step) -> _Measured:
    seconds = _timed_in_turns(steps, rounds, on_round)
    # Counted last, when what is made in the first step is there.
    return _Measured(
        seconds, beyond_base({name: kernels(step).total() for name, step in steps.items()}, "base", layers)
    )


def _timed_in_turns(steps: Mapping[str, Step], rounds: int, on_round: Step) -> dict[str, list[float]]:
    order, seconds = list(steps), {name: list[float]() for name in steps}
    for name in order:
        steps[name]()
    for _ in range(rounds):
        for name in order:
            seconds[name].append(_seconds(steps[name]))
        # Back and forth, so that no step always follows the same one.
        order.reverse()
        on_round()
    return seconds


def _seconds(step: Step) -> float:
    _wait()
    start = perf_counter()
    step()
    _wait()
    return perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timing(
    method: str,
    model: nn.Module,
    training: _Measured,
    inference: _Measured,
    rank: int,
    low_rank: int,
) -> Timing:
    own = None if method == "base" else low_rank if method in LOW_RANK else rank
    return Timing(
        method, own, trained_parameters(model), *_statistics(method, training), *_statistics(method, inference)
    )


def _statistics(method: str, measured: _Measured) -> tuple[float, float, tuple[float, float], float]:
    """The median, the median ratio to the base, the quartiles of the ratios, and the kernels."""
    seconds = measured.seconds
    ratios = [own / base for own, base in zip(seconds[method], seconds["base"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return statistics.median(seconds[method]), middle, (low, high), round(measured.kernels[method], 2)
