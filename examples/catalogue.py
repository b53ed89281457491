"""What examples there are, in the order of the README's table."""

from dataclasses import dataclass

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True)
class Example:
    """One file of this folder.

    Args:
        name: of the file, without `.py`.
        trainer: whose training it is, for the table.
        shows: what it shows, in a few words, for the table.
        limit_seconds: after which it is killed.
        processes: how many of them train.
        needs: packages, by the names they are installed by, without which it is not started.
        launcher: arguments of Python that go before `-m examples.<name>`, where a launcher starts the processes.
    """

    name: str
    trainer: str
    shows: str
    limit_seconds: float = 180
    processes: int = 1
    needs: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()


CATALOGUE: tuple[Example, ...] = ()
