"""Processes that carry out runs: one thread each, and none outlives its parent."""

import os
import threading
import time

import torch


def start_process(nice: int) -> None:
    """Prepare a process for runs: one thread, so that several do not wait for each other; it ends with its parent."""
    torch.set_num_threads(1)
    os.nice(nice)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent has, which may have been killed: nobody else would."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
