"""The time before the first step: a layer's constants, a whole model; and the norm's share of every step."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import torch
from peft import get_peft_model
from torch import nn

import dvora
from benchmarks.speed.arms import Arm, adapted, sharing_copy
from benchmarks.speed.plan import linears_1024
from benchmarks.speed.runner import Report
from benchmarks.speed.steps import training_step
from benchmarks.speed.targets import NORM_TOKENS
from benchmarks.speed.timing import Step, interleaved
from benchmarks.speed.workloads import SEED, Workload, random, smollm2
from dvora.factors import FactorSource, StackConstants, layer_factors
from dvora.peft.layer import DVoRALayer, layers_in

LAYERS = ((1024, 1024), (1024, 2816), (2816, 1024))
"""in_features, out_features."""
DISTRIBUTIONS = {"dvora dense": "kaiming_uniform", "dvora structured": "structured"}
ARMS = [Arm(method, rank) for method in DISTRIBUTIONS for rank in (256, 1024)]


def measure_layers(report: Report, rounds: int) -> None:
    """Set-up of one layer, its matrices being there already, beside 2 x out tokens through the frozen layer."""
    for inputs, outputs in LAYERS:
        base = frozen_layer(inputs, outputs)
        x = random(2 * outputs, inputs)
        steps: dict[str, Step] = {"forward": partial(base, x)}

        def prepare(arm: Arm, base: nn.Linear = base, steps: dict[str, Step] = steps) -> None:
            steps[arm.name] = _new(base, arm)

        for arm in ARMS:
            report.attempt(f"set-up {inputs} x {outputs}: {arm.name}", partial(prepare, arm))
        seconds, _ = interleaved(steps, rounds)
        for arm in ARMS:
            if arm.name in seconds:
                row = {"part": "set-up", "in_features": inputs, "out_features": outputs, **arm.described()}
                report.add({**row, "seconds": seconds[arm.name], "forward_seconds": seconds["forward"]})


def measure_model(report: Report, rounds: int, workload: Workload | None = None) -> None:
    """Adapting all linear layers of a model of 135 million parameters, from the base to a model ready to train."""
    workload = workload or smollm2()
    base = workload.frozen(torch.float32)
    # A new seed each time, or the matrices of the last time would be used again.
    seeds = count(1)

    def adapt(arm: Arm) -> None:
        config = dvora.DVoRAConfig(
            r=arm.rank,
            target_modules="all-linear",
            projection_init=DISTRIBUTIONS[arm.method],
            projection_seed=next(seeds),
        )
        get_peft_model(sharing_copy(base), config)

    steps: dict[str, Step] = {}
    chosen = [arm for arm in ARMS if arm.rank == 256]
    for arm in chosen:
        step = partial(adapt, arm)
        if report.attempt(f"adapting {workload.name}: {arm.name}", step):
            steps[arm.name] = step
    if steps:
        seconds, _ = interleaved(steps, rounds, warm_ups=0, at_least=0)
        for arm in chosen:
            if arm.name in seconds:
                report.add(
                    {"part": "adapting", "workload": workload.name, **arm.described(), "seconds": seconds[arm.name]}
                )


def measure_norm(report: Report, rounds: int, workload: Workload | None = None, chosen: Sequence[Arm] = ARMS) -> None:
    """The gains of all layers, forward and backward, beside whole training steps of few and of more tokens."""
    workload = workload or linears_1024()
    base = workload.frozen(torch.float32)
    inputs = {tokens: workload.inputs(1, tokens, torch.float32) for tokens in NORM_TOKENS}
    steps: dict[str, Step] = {}

    def prepare(arm: Arm) -> None:
        model = adapted(base, arm, workload.targets)
        for tokens, x in inputs.items():
            steps[f"{arm.name}, {tokens} tokens"] = training_step(workload, model, x)
        steps[arm.name] = norm_step(model)

    for arm in chosen:
        report.attempt(f"norm of {workload.name}: {arm.name}", partial(prepare, arm))
    seconds, _ = interleaved(steps, rounds)
    for arm in chosen:
        for tokens in NORM_TOKENS if arm.name in seconds else ():
            row = {"part": "norm", "workload": workload.name, "tokens": tokens, **arm.described()}
            step_seconds = seconds[f"{arm.name}, {tokens} tokens"]
            report.add({**row, "seconds": seconds[arm.name], "step_seconds": step_seconds})


def frozen_layer(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer with weights of a seed."""
    layer = nn.Linear(in_features, out_features, bias=False).requires_grad_(False)
    layer.weight.copy_(random(out_features, in_features, seed=SEED) / in_features**0.5)
    return layer


def norm_step(model: nn.Module) -> Step:
    """The gains of all adapted layers and the gradients of their vectors: what does not depend on the tokens."""
    stacks: dict[tuple[int, int], list[DVoRALayer]] = {}
    for layer in layers_in(model):
        stacks.setdefault((layer.out_features, layer.in_features), []).append(layer)
    parts = [_gains(layers) for layers in stacks.values()]

    def step() -> None:
        for part in parts:
            part()

    return step


def _gains(layers: Sequence[DVoRALayer]) -> Callable[[], object]:
    """Those of layers of one shape, which models make together."""
    (name,) = layers[0].active_adapters
    sources = [FactorSource(layer.adapted(name), layer.vectors(name)) for layer in layers]
    constants = StackConstants.of([source.adapted for source in sources])
    leaves = [vector for source in sources for vector in source.vectors]

    def step() -> object:
        factors = layer_factors(sources, constants)
        trained = [factor for of_layer in factors for factor in (of_layer.gain_minus_one, of_layer.scale)]
        return torch.autograd.grad(trained, leaves, [torch.ones_like(factor) for factor in trained])

    return step


def _new(base: nn.Linear, arm: Arm) -> Step:
    shared = dvora.SharedProjections(SEED, DISTRIBUTIONS[arm.method])  # type: ignore[arg-type]
    step = partial(dvora.DVoRAAdapter, base, arm.rank, shared=shared)
    step()
    return step
