"""What a bank holds, and what it has done so far."""

from typing import NamedTuple


class BankStats(NamedTuple):
    """Counts and bytes of a bank, as they are at one moment."""

    adapters: int
    slots: int
    slots_filled: int
    slots_in_use: int
    """By batches that run now."""
    pinned: int
    device_bytes: int
    host_adapters: int
    host_bytes: int
    hits: int
    """Adapters of batches that were in their slots already."""
    loads: int
    """Those that had to be put into one."""
    reads: int
    """Adapters whose rows came from their source: a folder, a pack or a vector."""
    evictions: int
    """Adapters that left their slot for another one."""
