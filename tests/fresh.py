"""Processes that start as new ones do, but for imports, which one server of each test process makes once."""

import multiprocessing

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(
    [
        "accelerate",
        "dvora.training",
        "torch.distributed.fsdp",
        "transformers.models.bert.modeling_bert",
        "transformers.models.llama.modeling_llama",
        "transformers.trainer",
    ]
)
