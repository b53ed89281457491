"""A copy of a model in another process that generates, and takes the trained vectors as bytes."""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.multiprocessing import get_context

from examples.checks import require, same_bits


def as_bytes(model: nn.Module) -> bytes:
    """What an adapter's file would hold."""
    return safetensors.torch.save(get_peft_model_state_dict(model))


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of a batch, in evaluation."""
    training = model.training
    result: Tensor = model.eval()(tokens).logits
    model.train(training)
    return result


class GeneratingCopy:
    """This process's hold of the other.

    Args:
        make: a function of a module; makes the adapted model there.
        new_tokens: how many it adds to a text at most.
    """

    def __init__(self, make: Callable[[], PeftModel], new_tokens: int) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # A daemon: it ends with this process, whatever happens.
        context.Process(target=_answer, args=(theirs, make, new_tokens), daemon=True).start()
        # Or the end of the other process would go unnoticed.
        theirs.close()
        self.sizes: list[int] = []
        self.seconds: list[float] = []

    def synchronise(self, model: nn.Module, tokens: Tensor) -> None:
        """Send the model's vectors, and check that the copy's logits of some tokens are the model's, bit for bit."""
        start = time.perf_counter()
        vectors = as_bytes(model)
        self._ask("vectors", vectors)
        self.seconds.append(time.perf_counter() - start)
        self.sizes.append(len(vectors))
        theirs = torch.from_numpy(self._ask("logits", tokens.numpy()))
        require(same_bits(theirs, logits(model, tokens)), "the copy gives the trainer's outputs, bit for bit")

    def generate(self, tokens: list[list[int]], seed: int) -> list[list[int]]:
        """What the copy adds to texts of one length."""
        return self._ask("generate", (tokens, seed))

    def _ask(self, what: str, given: object) -> object:
        self.pipe.send((what, given))
        return self.pipe.recv()


def _answer(pipe: Connection, make: Callable[[], PeftModel], new_tokens: int) -> None:
    torch.set_num_threads(1)
    model = make().eval()
    while True:
        what, given = pipe.recv()
        if what == "vectors":
            set_peft_model_state_dict(model, safetensors.torch.load(given))
            pipe.send("done")
        elif what == "logits":
            pipe.send(logits(model, torch.from_numpy(given)).numpy())
        else:
            tokens, seed = torch.tensor(given[0]), given[1]
            # Nothing else draws in this process.
            torch.manual_seed(seed)
            made = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                do_sample=True,
                top_k=0,
            )
            pipe.send(made[:, tokens.shape[1] :].tolist())
