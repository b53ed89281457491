"""AdapterBank: thousands of adapters over one frozen base model, one for each row of a batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from ..peft.restoring import on_failure, surely
from .catalogue import Adapter, AdapterSource, Catalogue, as_path, source_of
from .factors import FactorRows, check_dtype
from .fitted import FittedModel, ModelSide
from .hooks import check_without_bank
from .pack import Pack
from .rows import CurrentRows, RowIndex, SlotRows, check_names
from .sources import FolderSource, Source, adapters_in
from .stats import BankStats
from .trainable import TrainableAdapters

OnProgress = Callable[[int, int], None]
"""Called with what is done and how much there is."""


class AdapterBank:
    """Serves many adapters of one content (layers, ranks, seed, kind of matrices) over one frozen base.

    Within `with bank.rows(names):` every row of a batch gets the outputs of its own adapter, as if that was merged;
    outside of it the model refuses to run. Layers are hooked when the first adapter comes, and freed by `close`.
    Adapters are in three places: slots on the device, factor rows on the host, and their source (a folder, a pack, a
    vector). Safe under threads: adapters may be added, replaced and removed while batches run.

    Args:
        model: the frozen base, without adapters, whole and in memory; it may be quantised.
        slots: how many adapters are on the device at a time, at least as many as one batch has.
        host_bytes: of factor rows in memory, at least those of one adapter.
        dtype: of factor rows: float32, or half precision, which rounds each factor by 2**-11 (float16) or 2**-8.
        like: the folder of an adapter, or a pack, whose layers are served; None waits for the first adapter.

    Raises:
        TypeError, ValueError: a setting is out of range, or a layer cannot be served; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        slots: int = 256,
        host_bytes: int = 2**30,
        dtype: torch.dtype = torch.float32,
        like: str | os.PathLike[str] | None = None,
    ) -> None:
        for setting, value in (("slots", slots), ("host_bytes", host_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{setting} must be a positive integer, got {value!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch module, got {model!r:.200}")
        check_dtype(dtype)
        check_without_bank(model)
        self._slot_count = slots
        self._catalogue = Catalogue(host_bytes)
        self._packs: list[Pack] = []
        self._current = CurrentRows()
        self._side = ModelSide(
            lambda first: FittedModel.of(model, first, dtype, slots, host_bytes, self._current), self._current
        )
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="dvora-bank")
        if like is not None:
            with _first_adapter(as_path(like, "like")) as first:
                self._side.fit(first)

    def add(
        self,
        name: str,
        source: AdapterSource,
        *,
        allow_partial: bool = False,
        allow_unchanged: bool = False,
        pinned: bool = False,
    ) -> None:
        """Add an adapter, read and checked now.

        Args:
            name: under which rows ask for it.
            source: a folder, its file of values, or a flat vector.
            allow_partial: layers and heads that the adapter lacks are the base's.
            allow_unchanged: the adapter may change nothing.
            pinned: never leaves its slot.

        Raises:
            TypeError, ValueError: the name is taken, or the adapter is not one of the bank's kind, is damaged, lacks
                layers, or changes nothing; nothing is added then.
        """
        with self._side.adding(lambda: len(self) > 0):
            self._catalogue.check_new([name])
            adapter = self._fitting(name, source_of(source, self._rows), allow_partial, allow_unchanged)
            self._catalogue.read(adapter, self._side.known().rows)
            with self._changing(adapter):
                if pinned:
                    self._pin([adapter])
                self._catalogue.add([adapter])
        if pinned:
            self._load([adapter])

    def add_folder(
        self,
        folder: str | os.PathLike[str],
        *,
        allow_partial: bool = False,
        allow_unchanged: bool = False,
        on_progress: OnProgress | None = None,
    ) -> list[str]:
        """Add every adapter in a folder of adapters, by the names of their folders: all of them, or none.

        Settings, names and shapes are read and checked now, values when an adapter is first used.

        Raises:
            TypeError, ValueError: as for `add`, with the name of the folder.
        """
        found = adapters_in(as_path(folder, "folder"))
        with self._side.adding(lambda: len(self) > 0):
            self._catalogue.check_new(found)
            adapters = []
            for count, (name, path) in enumerate(found.items(), start=1):
                adapters.append(self._fitting(name, FolderSource(path), allow_partial, allow_unchanged))
                if on_progress is not None:
                    on_progress(count, len(found))
            return self._catalogue.add(adapters)

    def add_pack(
        self, file: str | os.PathLike[str], *, allow_partial: bool = False, allow_unchanged: bool = False
    ) -> list[str]:
        """Add every adapter of a packed file (`dvora bank pack`): all of them, or none.

        Raises:
            TypeError, ValueError: as for `add`, or the file is no pack, or truncated.
        """
        pack = Pack.open(as_path(file, "file"))
        with on_failure(pack.close), self._side.adding(lambda: len(self) > 0):
            self._catalogue.check_new(pack.names)
            adapters = []
            for name in pack.names:
                source = pack.source(name)
                adapters.append(self._fitting(name, source, allow_partial, allow_unchanged))
            self._packs.append(pack)
            return self._catalogue.add(adapters)

    def replace(
        self, name: str, source: AdapterSource, *, allow_partial: bool = False, allow_unchanged: bool = False
    ) -> None:
        """Give a name another adapter, read and checked now; batches that run go on with the one they began with.

        Raises:
            TypeError, ValueError: there is no such name, or as for `add`; the old one stays then.
        """
        self._catalogue.named([name])
        adapter = self._fitting(name, source_of(source, self._rows), allow_partial, allow_unchanged)
        self._catalogue.read(adapter, self._side.known().rows)
        with self._catalogue.lock:
            (before,) = self._catalogue.named([name])
            with self._changing(before, adapter):
                if before.pinned:
                    self._pin([adapter], instead_of=before)
                self._catalogue.put(adapter)
        if before.pinned:
            self._load([adapter])

    def remove(self, name: str) -> None:
        """Forget an adapter; batches that run go on with it.

        Raises:
            ValueError: there is no such name.
        """
        with self._catalogue.lock, self._changing(*self._catalogue.named([name])):
            self._catalogue.remove(name)

    def pin(self, names: Collection[str]) -> None:
        """Put adapters into slots, now or, where batches hold all of them, when they are first used; they stay there.

        Raises:
            TypeError, ValueError: a name is unknown, or no slot would be left.
        """
        # Read before names are kept from changing, since other batches go on meanwhile.
        for adapter in self._catalogue.named(names):
            self._catalogue.digest(adapter, self._side.known().rows)
        with self._catalogue.lock:
            adapters = self._catalogue.named(names)
            with self._changing(*adapters):
                self._pin(adapters)
        self._load(adapters)

    def unpin(self, names: Collection[str]) -> None:
        """Let adapters leave their slots again.

        Raises:
            ValueError: a name is unknown.
        """
        with self._catalogue.lock, self._changing(*self._catalogue.named(names)):
            for adapter in self._catalogue.named(names):
                adapter.pinned = False

    def prefetch(self, names: Collection[str]) -> Future[None]:
        """Read adapters beside the batches that run, and put them into slots that none of these holds.

        Returns:
            What tells when they are read, and raises what reading them raised.

        Raises:
            ValueError: a name is unknown.
        """
        adapters = self._catalogue.named(names)
        self._side.known()
        return self._loader.submit(self._load, adapters)

    @contextmanager
    def rows(self, names: Sequence[str | None], repeats: int = 1) -> Iterator[None]:
        """Within it, in this thread, the rows of a batch have these adapters.

        Adapters that are not in a slot are put into one first, waiting while other threads' batches hold too many.

        Args:
            names: one a row, in the order of the batch; None is the base.
            repeats: how often generation repeats each row (num_beams, num_return_sequences).

        Raises:
            TypeError, ValueError: a name is unknown, there are more different ones than slots, the thread is in a batch
                already, an adapter is damaged, or the base has changed. In the pass: there is not one name a row.
        """
        check_names(names, repeats)
        self._current.check_free()
        fitted = self._side.known()
        fitted.served.check_unchanged()
        distinct = list(dict.fromkeys(name for name in names if name is not None))
        adapters = self._catalogue.named(distinct)
        with self._slots_of(adapters) as slots:
            place = dict(zip(distinct, slots, strict=True))
            base = fitted.slots.count
            taken = [base if name is None else place[name] for name in names]
            index = torch.tensor(taken, device=fitted.served.device)
            rows = SlotRows(RowIndex(index, repeats), fitted.slots.values, fitted.slots.heads, fitted.rows.places)
            with self._current.entered(rows):
                yield

    def trainable(self, names: Collection[str] = (), *, new: Collection[str] = ()) -> TrainableAdapters:
        """Adapters to train together, in one step a batch; the bank serves the old ones until `publish`.

        Args:
            names: adapters of the bank, which start with the values that they have.
            new: names that the bank does not have, which start as the base.

        Raises:
            TypeError, ValueError: a name is unknown, or taken, the base is not frozen, or an adapter has a strength
                other than one or lacks layers.
        """
        rows, adapters = self._side.known().rows, self._catalogue.named(names)
        self._catalogue.check_new(new)
        values = {adapter.name: adapter.source.read() for adapter in adapters}
        return TrainableAdapters(rows, self._current, {**values, **dict.fromkeys(new)})

    def publish(self, trained: TrainableAdapters, names: Collection[str] | None = None) -> None:
        """Serve trained adapters as they are now, under their names: new ones are added, others replaced.

        Args:
            trained: of this bank.
            names: some of them; None publishes all.

        Raises:
            ValueError: a name is not trained there, or an adapter is not finite; those before it are published then.
        """
        for name in trained.names if names is None else names:
            change = self.replace if name in self else self.add
            change(name, trained.flat_vector(name), allow_unchanged=True)

    def stats(self) -> BankStats:
        """Counts and bytes as they are now."""
        slots = None if self._side.fitted is None else self._side.fitted.slots
        return BankStats(
            adapters=len(self._catalogue),
            slots=self._slot_count,
            slots_filled=0 if slots is None else slots.used(),
            slots_in_use=0 if slots is None else slots.in_use(),
            pinned=0 if slots is None else slots.pinned(),
            device_bytes=0 if slots is None else slots.nbytes,
            host_adapters=len(self._catalogue.host),
            host_bytes=self._catalogue.host.nbytes,
            hits=0 if slots is None else slots.hits,
            loads=0 if slots is None else slots.loads,
            reads=self._catalogue.reads,
            evictions=0 if slots is None else slots.evictions,
        )

    def digest(self, name: str) -> str:
        """What names an adapter's content wherever it is: base, projections and values, not the name.

        Raises:
            ValueError: there is no such name, or its source is damaged.
        """
        (adapter,) = self._catalogue.named([name])
        return self._catalogue.digest(adapter, self._side.known().rows)

    def close(self) -> None:
        """Free the model: its layers are the base's again, and the bank cannot be used any longer.

        Raises:
            ValueError: batches run, which would have the base's outputs; nothing is closed then.
        """
        self._side.close()
        self._loader.shutdown(cancel_futures=True)
        for pack in self._packs:
            pack.close()

    def __enter__(self) -> AdapterBank:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._catalogue)

    def __contains__(self, name: object) -> bool:
        return name in self._catalogue

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalogue)

    @contextmanager
    def _slots_of(self, adapters: Sequence[Adapter]) -> Iterator[list[int]]:
        """The slots of a batch's adapters, which stay theirs within."""
        (_, rows, slots, _), catalogue = self._side.known(), self._catalogue
        by_digest = {catalogue.digest(adapter, rows): adapter for adapter in adapters}
        batch = object()
        with surely(lambda: slots.leave(batch)):
            found = slots.take(batch, by_digest, lambda digest: catalogue.factors(by_digest[digest], rows))
            yield [found[catalogue.digest(adapter, rows)] for adapter in adapters]

    def _load(self, adapters: Sequence[Adapter]) -> None:
        """Read adapters, and put them into slots that no batch holds."""
        fitted = self._side.known()
        for adapter in adapters:
            factors = self._catalogue.factors(adapter, fitted.rows)
            fitted.slots.load_if_free(self._catalogue.digest(adapter, fitted.rows), factors)

    @contextmanager
    def _changing(self, *adapters: Adapter) -> Iterator[None]:
        """Around what changes names or pins: at its end, whatever came, slots and memory are as these say."""

        def settle() -> None:
            digests = {adapter.digest for adapter in adapters if adapter.digest is not None}
            pinned = digests & self._catalogue.pinned()
            for digest in digests - self._catalogue.digests():
                self._catalogue.host.remove(digest)
            if self._side.fitted is not None:
                self._side.fitted.slots.unpin(digests - pinned)
                self._side.fitted.slots.pin(pinned)

        with self._catalogue.lock, surely(settle):
            yield

    def _pin(self, adapters: Sequence[Adapter], instead_of: Adapter | None = None) -> None:
        """Mark adapters that were read as pinned, if that leaves a slot; called within `_changing`."""
        slots = self._side.known().slots
        digests = {adapter.digest for adapter in adapters if adapter.digest is not None}
        kept = self._catalogue.pinned(besides=instead_of) | digests
        if len(kept) >= slots.count:
            raise ValueError(
                f"names: {len(kept)} pinned adapters would leave none of the {slots.count} slots for others"
            )
        for adapter in adapters:
            adapter.pinned = True

    def _fitting(self, name: str, source: Source, allow_partial: bool, allow_unchanged: bool) -> Adapter:
        """An adapter whose content is the bank's."""
        try:
            self._side.fit(source).rows.check(source.content, allow_partial)
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from error
        return Adapter(name, source, allow_unchanged)

    @property
    def _rows(self) -> FactorRows | None:
        return None if self._side.fitted is None else self._side.fitted.rows


@contextmanager
def _first_adapter(path: Path) -> Iterator[Source]:
    """An adapter that is a folder, or the first of a pack."""
    if path.is_dir():
        yield FolderSource(path)
        return
    with Pack.open(path) as pack:
        yield pack.source(pack.names[0])
