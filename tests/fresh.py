"""Processes that start as new ones do, but for imports, which one server of each test process makes once."""

import multiprocessing

FRESH = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Have the server import what most processes need; in time, before the first of them."""
    FRESH.set_forkserver_preload(
        [
            "accelerate",
            "dvora.tools.doctor",
            "dvora.training",
            "torch.distributed.fsdp",
            "transformers.models.bert.modeling_bert",
            "transformers.models.llama.modeling_llama",
            "transformers.trainer",
        ]
    )
