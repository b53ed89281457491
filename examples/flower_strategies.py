"""Two ways in which Flower's server averages the vectors of its clients."""

from collections.abc import Iterable, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from examples.checks import require
from examples.eight_bits import EightBits

Averages = tuple[ArrayRecord, MetricRecord]


def sent_in(arrays: ArrayRecord) -> Tensor:
    """A vector that travelled, in float32 or in 8 bits."""
    tensors = arrays.to_torch_state_dict()
    return tensors["vector"] if "vector" in tensors else EightBits(**tensors).vector()


class Averaged(FedAvg):
    """Flower's average of all vectors; keeps what it was made from."""

    answers: Sequence[Tensor] = ()
    message_bytes = 0

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Averages:
        replies = list(replies)
        require(not any(reply.has_error() for reply in replies), "no client failed")
        self.answers = [sent_in(reply.content["arrays"]) for reply in replies]
        self.message_bytes = replies[0].content["arrays"].count_bytes()
        return self.average(server_round, replies)

    def average(self, server_round: int, replies: Sequence[Message]) -> Averages:
        return super().aggregate_train(server_round, replies)


class InEightBits(Averaged):
    """Sends the difference from where all start in 8 bits, and adds the average of the changes to its own vector.

    Clients say how they have changed what they got, so nothing of the server's vector is lost by rounding.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.start_vector = self.vector = start

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        sent = EightBits.of(self.vector - self.start_vector)
        return super().configure_train(server_round, ArrayRecord(sent._asdict()), config, grid)

    def average(self, server_round: int, replies: Sequence[Message]) -> Averages:
        self.vector = self.vector + torch.stack([*self.answers]).mean(0)
        return ArrayRecord({"vector": self.vector}), MetricRecord()
