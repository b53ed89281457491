"""Flower: three clients with reviews of their own; vectors and a head are all that travels, and are averaged.

An update is a product of vectors, so the average of the clients' vectors is not the average of their updates. With
lambda_d left as it starts that can be had exactly: `add_weighted_adapter` finds its vectors. Both ways are run, and
their distance from the average update is measured.
"""

import os
from collections.abc import Iterable, Sequence

# Before Flower and Ray are imported: both report to their makers how they are used.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import flwr
import ray
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

import dvora
from dvora.training import parameter_groups
from examples.averaging import State, average_update, distance_from_average
from examples.checks import frozen_digest, report, require
from examples.reviews import SentenceClassifier, batches, classifier, loss_of, score

CLIENTS, ROUNDS, STEPS, BATCH = 3, 3, 4, 8
THREE = dvora.DVoRAConfig(r=256, target_modules="all-linear")
TWO = dvora.DVoRAConfig(r=256, target_modules="all-linear", train=["magnitude", "lambda_b"])


def adapted(config: PeftConfig) -> SentenceClassifier:
    """The encoder is adapted; the head beside it is trained as it is."""
    torch.set_num_threads(1)
    model = classifier()
    model.encoder = get_peft_model(model.encoder, config)
    return model


def arrays_of(model: SentenceClassifier) -> ArrayRecord:
    """What travels: the vectors, and the head's weight and bias."""
    return ArrayRecord({**get_peft_model_state_dict(model.encoder), **model.classifier.state_dict()})


def parts(arrays: ArrayRecord) -> tuple[State, State]:
    """Vectors and head."""
    state = arrays.to_torch_state_dict()
    head = {name: state.pop(name) for name in ("weight", "bias")}
    return state, head


def put(model: SentenceClassifier, arrays: ArrayRecord) -> None:
    vectors, head = parts(arrays)
    set_peft_model_state_dict(model.encoder, vectors)
    model.classifier.load_state_dict(head)


def clients(config: PeftConfig) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = adapted(config)
        untouched = frozen_digest(model.encoder)
        put(model, message.content["arrays"])
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.01, learning_rates={"magnitude": 0.001}))
        # Every client has a third of the sentences, and takes the next of them in every round.
        client, turn = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"]) - 1
        for batch in batches(STEPS, BATCH, start=(client * ROUNDS + turn) * STEPS * BATCH):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        require(frozen_digest(model.encoder) == untouched, "the base keeps every bit")
        metrics = MetricRecord({"num-examples": STEPS * BATCH})
        return Message(content=RecordDict({"arrays": arrays_of(model), "metrics": metrics}), reply_to=message)

    return app


class Averaged(FedAvg):
    """Flower's average of all arrays; keeps what it was made from."""

    answers: Sequence[ArrayRecord] = ()

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        replies = list(replies)
        require(not any(reply.has_error() for reply in replies), "no client failed")
        self.answers = [reply.content["arrays"] for reply in replies]
        return super().aggregate_train(server_round, replies)


class ExactlyAveraged(Averaged):
    """The average of the clients' updates, as vectors; every client trains on as many sentences."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        average, metrics = super().aggregate_train(server_round, replies)
        exact = average_update(adapted(TWO).encoder, [parts(answer)[0] for answer in self.answers])
        return ArrayRecord({**exact, **parts(average)[1]}), metrics


def federated(config: PeftConfig, strategy: Averaged) -> tuple[list[tuple[float, float]], float]:
    """A simulation: loss and accuracy before and after it, and the distance of the last average."""
    model, held_out, scores = adapted(config), batches(4, 32, "validation"), []
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        scores.append(score(model, held_out))
        put(model, strategy.start(grid, arrays_of(model), num_rounds=ROUNDS).arrays)
        scores.append(score(model, held_out))

    # A small object store: nothing passes through it but vectors.
    options = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100_000_000}
    backend = {"init_args": options, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    try:
        run_simulation(server, clients(config), num_supernodes=CLIENTS, backend_config=backend)
    finally:
        ray.shutdown()
    require(scores[-1][0] < scores[0][0], f"the loss falls: {scores}")
    answers = [parts(answer)[0] for answer in strategy.answers]
    return scores, distance_from_average(lambda: adapted(config).encoder, parts(arrays_of(model))[0], answers)


def main() -> None:
    plain = Averaged(fraction_evaluate=0.0)
    (before, after), distance = federated(THREE, plain)
    (_, after_exact), distance_exact = federated(TWO, ExactlyAveraged(fraction_evaluate=0.0))
    require(distance_exact < 1e-3, f"the average of updates is had exactly: {distance_exact}")
    metrics = {
        "clients": CLIENTS,
        "rounds": ROUNDS,
        "validation_loss": [before[0], after[0]],
        "validation_accuracy": [before[1], after[1]],
        "each_message_bytes": plain.answers[0].count_bytes(),
        "LoRA_r8_bytes": arrays_of(adapted(LoraConfig(r=8, target_modules="all-linear"))).count_bytes(),
        "LoRA_r16_bytes": arrays_of(adapted(LoraConfig(r=16, target_modules="all-linear"))).count_bytes(),
        "distance_from_the_average_update": distance,
        "with_lambda_d_frozen": distance_exact,
        "loss_then": after_exact[0],
    }
    report({"works": True, "figures": metrics, "versions": {"flwr": flwr.__version__, "ray": ray.__version__}})


if __name__ == "__main__":
    main()
