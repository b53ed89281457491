"""Three ways in which Flower's server averages the vectors of its clients."""

from collections.abc import Callable, Iterable, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from peft import PeftModel
from torch import Tensor

from dvora.flat import Layout
from examples.averaging import average_update
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


class ExactlyAveraged(Averaged):
    """The average of the clients' updates, as a vector; every client trains on as many sentences."""

    def __init__(self, make: Callable[[], PeftModel]) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.make = make

    def average(self, server_round: int, replies: Sequence[Message]) -> Averages:
        average, metrics = super().average(server_round, replies)
        model = self.make()
        size = Layout.of(model).size
        exact = average_update(model, [answer[:size] for answer in self.answers])
        # What is behind the adapter has no product in it.
        return ArrayRecord({"vector": torch.cat([exact, sent_in(average)[size:]])}), metrics


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
