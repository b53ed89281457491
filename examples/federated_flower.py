"""Flower: three clients with reviews of their own; one vector of adapter and head is all that travels, and is averaged.

An update is a product of vectors, so the average of the clients' vectors is not the average of their updates: how far
it is from that is measured. Then the vectors' changes travel in 8 bits, with three seeds, beside float32.
"""

import os
from collections.abc import Sequence
from math import log
from statistics import mean

# Before Flower and Ray are imported: both report to their makers how they are used.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import flwr
import ray
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import dvora
from dvora.training import parameter_groups
from examples.checks import frozen_digest, report, require, trained_parameters
from examples.eight_bits import rounded
from examples.flower_strategies import Averaged, InEightBits, sent_in
from examples.reviews import SentenceClassifier, batches, classifier, loss_of, score

CLIENTS, ROUNDS, STEPS, BATCH, SEEDS = 3, 3, 4, 8, 3
AT_CHANCE = (log(2), 0.5)  # loss and accuracy of a head of zeros


def adapter(seed: int) -> PeftConfig:
    return dvora.DVoRAConfig(r=256, target_modules="all-linear", projection_seed=seed)


def adapted(config: PeftConfig) -> SentenceClassifier:
    """The encoder is adapted; the head beside it is trained as it is."""
    torch.set_num_threads(1)
    model = classifier()
    model.encoder = get_peft_model(model.encoder, config)
    return model


def vector_of(model: SentenceClassifier) -> Tensor:
    """The adapter, and behind it the head."""
    head = parameters_to_vector(model.classifier.parameters()).detach()
    return torch.cat([dvora.flat.Layout.of(model.encoder).to_vector(model.encoder), head])


def put(model: SentenceClassifier, vector: Tensor) -> None:
    layout = dvora.flat.Layout.of(model.encoder)
    layout.from_vector(vector[: layout.size], model.encoder)
    vector_to_parameters(vector[layout.size :].clone(), model.classifier.parameters())


def clients(config: PeftConfig, seed: int, in_eight_bits: bool) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = adapted(config)
        untouched, received = frozen_digest(model.encoder), sent_in(message.content["arrays"])
        if in_eight_bits:
            # The difference from where every client starts.
            received = vector_of(model) + received
        put(model, received)
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.01, learning_rates={"magnitude": 0.001}))
        # Every client has a third of the sentences, and takes the next of them in every round.
        client, turn = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"]) - 1
        place = (seed * CLIENTS + client) * ROUNDS + turn
        for batch in batches(STEPS, BATCH, start=place * STEPS * BATCH):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        require(frozen_digest(model.encoder) == untouched, "the base keeps every bit")
        arrays = ArrayRecord({"vector": vector_of(model)})
        if in_eight_bits:
            left = sent_in(context.state["left"]) if turn else torch.zeros_like(received)
            change, left = rounded(vector_of(model) - received, left)
            arrays, context.state["left"] = ArrayRecord(change._asdict()), ArrayRecord({"vector": left})
        metrics = MetricRecord({"num-examples": STEPS * BATCH})
        return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def federated(config: PeftConfig, strategy: Averaged, seed: int = 0) -> tuple[tuple[float, float], Tensor]:
    """A simulation: loss and accuracy after it, and the vector at its end."""
    model = adapted(config)
    server, app = ServerApp(), clients(config, seed, isinstance(strategy, InEightBits))

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        start = ArrayRecord({"vector": vector_of(model)})
        put(model, sent_in(strategy.start(grid, start, num_rounds=ROUNDS).arrays))

    # A small object store: nothing passes through it but vectors.
    options = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100_000_000}
    backend = {"init_args": options, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    try:
        run_simulation(server, app, num_supernodes=CLIENTS, backend_config=backend)
    finally:
        ray.shutdown()
    after = score(model, batches(8, 64, "validation"))
    require(after[0] < AT_CHANCE[0], f"the loss falls: {after}")
    return after, vector_of(model)


@torch.no_grad()
def distance_from_average_update(config: PeftConfig, vector: Tensor, answers: Sequence[Tensor]) -> float:
    """How far a vector's weights are from the average of the answers', as a share of how far that is from the base."""

    def weights(vector: Tensor) -> Tensor:
        put(model := adapted(config), vector)
        return torch.cat([p.flatten() for p in model.encoder.merge_and_unload().parameters()]).double()

    average = torch.stack([weights(answer) for answer in answers]).mean(0)
    base, end = weights(vector_of(adapted(config))), weights(vector)  # a new adapter changes nothing
    return float((end - average).norm() / (average - base).norm())


def main() -> None:
    in_full = [Averaged(fraction_evaluate=0.0) for _ in range(SEEDS)]
    in_bits = [InEightBits(vector_of(adapted(adapter(seed)))) for seed in range(SEEDS)]
    ends, vectors = zip(*(federated(adapter(s), strategy, s) for s, strategy in enumerate(in_full)), strict=True)
    bit_ends = [federated(adapter(s), strategy, s)[0] for s, strategy in enumerate(in_bits)]
    loras = (adapted(LoraConfig(r=rank, target_modules="all-linear")) for rank in (8, 16))
    metrics = {
        "clients": CLIENTS,
        "rounds": ROUNDS,
        "validation_loss": [AT_CHANCE[0], mean(loss for loss, _ in ends)],
        "validation_accuracy": [AT_CHANCE[1], mean(accuracy for _, accuracy in ends)],
        "each_message_bytes": in_full[0].message_bytes,
        "in_8_bits_bytes": in_bits[0].message_bytes,
        "loss_in_8_bits": mean(loss for loss, _ in bit_ends),
        "differences_of_accuracy": [bits - full for (_, bits), (_, full) in zip(bit_ends, ends, strict=True)],
        "accuracy_in_8_bits": mean(accuracy for _, accuracy in bit_ends),
        **{f"LoRA_r{r}_bytes": 4 * trained_parameters(lora) for r, lora in zip((8, 16), loras, strict=True)},
        "distance_from_the_average_update": distance_from_average_update(adapter(0), vectors[0], in_full[0].answers),
    }
    report({"works": True, "figures": metrics, "versions": {"flwr": flwr.__version__, "ray": ray.__version__}})


if __name__ == "__main__":
    main()
