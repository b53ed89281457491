"""AdapterBank: thousands of adapters over one frozen base model, one for each row of a batch."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapter_file.packs import OnProgress, Pack, PackedSource
from ..adapter_file.values import AdapterValues, FolderSource, Source, VectorSource, adapters_in
from ..adapter_file.values_file import VALUES
from ..flat import Layout
from ..rows.batch import Batch, Batches
from ..rows.gathered import RowIndex, check_names
from ..text import did_you_mean
from .factor_rows import FactorRows, check_dtype
from .hooks import BlockForward, check_unchanged, check_without_bank
from .served import ServedModel
from .slots import AdapterRow, HostRows, Slots
from .training import TrainableAdapters

AdapterSource = str | os.PathLike[str] | Tensor | FolderSource | PackedSource
"""The folder of an adapter, its file of values, a flat vector in the order of `dvora.flat.Layout`, or an opened one."""
_log = logging.getLogger("dvora.bank")


class BankStats(NamedTuple):
    """Counts and bytes of a bank, as they are at one moment."""

    adapters: int
    slots: int
    slots_filled: int
    slots_in_use: int
    """By batches that run now."""
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


PARTIAL = ", or pass allow_partial=True (AdapterBank.add), which serves the base's there"
MORE_ROOM = "make a bank with more head_bytes or fewer slots"
"""What callers in Python can do about what is refused; a server says its own."""


@dataclass(eq=False)
class Version:
    """One version of an adapter. A bank holds it while its name has it, or a batch or `AdapterBank.using` uses it."""

    name: str
    source: Source
    allow_unchanged: bool = False
    digest: str | None = None
    """Of its content; None until it is read."""
    users: int = 1
    """Its name, and everybody who uses it."""

    def ended(self) -> None:
        """Called when nobody uses it any more."""


class UnknownAdapterError(ValueError, LookupError):
    """No adapter has such a name, or its version has left the bank."""


class _Hooked(NamedTuple):
    """The model's layers, from when the bank is made until it is closed."""

    served: ServedModel
    rows: FactorRows
    slots: Slots
    handles: list[RemovableHandle | BlockForward]


class AdapterBank:
    """Serves many adapters of one content (layers, ranks, seed, kind of matrices) over one frozen base.

    Within `with bank.rows(names):` every row of a batch gets the outputs of its own adapter, as if that was merged;
    outside of it the model refuses to run. Its layers are hooked when the bank is made, and freed by `close`.
    Adapters are in three places: slots on the device, factor rows on the host, and their source (a folder, a pack, a
    vector). Safe under threads: adapters may be added, replaced and removed while batches run.

    Args:
        model: the frozen base, without adapters, whole and in memory; it may be quantised.
        like: an adapter whose layers and heads are served, or a pack, for its first one; nothing is added. Adapters of
            the bank may have fewer layers, not others.
        slots: how many adapters are on the device at a time, at least as many as one batch has.
        host_bytes: of factor rows in memory, at least those of one adapter.
        head_bytes: of heads and of factors of LoRA on the device, of which every slot has an equal part, or as
            much as the model's own head.
        dtype: of factor rows: float32, or half precision, which rounds each factor by 2**-11 (float16) or 2**-8.
        own_heads: whether rows of the base are meant to have the model's own head, of which nobody is warned then.

    Raises:
        TypeError, ValueError: `like` is missing or damaged, a setting is out of range, or a layer cannot be served; the
            message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        like: str | os.PathLike[str] | FolderSource | PackedSource | None = None,
        slots: int = 256,
        host_bytes: int = 2**30,
        head_bytes: int = 2**30,
        dtype: torch.dtype = torch.float32,
        own_heads: bool = False,
    ) -> None:
        for setting, value in (("slots", slots), ("host_bytes", host_bytes), ("head_bytes", head_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{setting} must be a positive integer, got {value!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch module, got {model!r:.200}")
        check_dtype(dtype)
        check_without_bank(model)
        if like is None:
            raise ValueError(
                "like: nothing says which layers the bank serves; pass the folder of an adapter that has them, such as "
                "one that is added next"
            )
        self._head_bytes, self._host, self._reads = head_bytes, HostRows(host_bytes), 0
        self._batches = Batches()
        self._hooked: _Hooked | None = self._hook(model, _like(like), slots, dtype)
        self._versions: dict[str, Version] = {}
        """That the names have now."""
        self._digests = Counter[str]()
        """Of how many versions that somebody uses."""
        self._counting = threading.Lock()
        """Held while these change, within any other lock."""
        self._lock = threading.RLock()
        """Held while names or users change."""
        self._reading = threading.RLock()
        """Held while adapters are read, so that none is read twice."""
        self._has_warned = own_heads

    def add(
        self,
        name: str,
        source: AdapterSource,
        *,
        allow_partial: bool = False,
        allow_unchanged: bool = False,
        read: bool = True,
    ) -> None:
        """Add an adapter, read and checked now.

        Args:
            name: under which rows ask for it.
            source: a folder, its file of values, or a flat vector, whose strength is one.
            allow_partial: layers and heads that the adapter lacks are the base's.
            allow_unchanged: the adapter may change nothing.
            read: False: only settings, names and shapes are checked now, values when it is first used.

        Raises:
            TypeError, ValueError: the name is taken, or the adapter is not one of the bank's kind, is damaged, lacks
                layers, or changes nothing; nothing is added then.
        """
        self._check_new([name])
        self._add([Version(name, self._source(source), allow_unchanged)], allow_partial, read=read)

    def add_folder(
        self,
        folder: str | os.PathLike[str],
        *,
        allow_partial: bool = False,
        allow_unchanged: bool = False,
        on_progress: OnProgress | None = None,
    ) -> list[str]:
        """Add every adapter in a folder of adapters or of runs, by the names of the folders in it: all, or none.

        Settings, names and shapes are read and checked now, values when an adapter is first used.

        Raises:
            TypeError, ValueError: as for `add`, with the name of the folder.
        """
        folders = adapters_in(_as_path(folder, "folder"))
        self._check_new(folders)
        adapters = []
        for count, (name, path) in enumerate(folders.items(), start=1):
            adapters.append(Version(name, FolderSource(path), allow_unchanged))
            if on_progress is not None:
                on_progress(count, len(folders))
        return self._add(adapters, allow_partial)

    def add_pack(
        self, file: str | os.PathLike[str], *, allow_partial: bool = False, allow_unchanged: bool = False
    ) -> list[str]:
        """Add every adapter of a packed file (`dvora bank pack`): all of them, or none.

        Raises:
            TypeError, ValueError: as for `add`, or the file is no pack, or truncated.
        """
        pack = Pack.open(_as_path(file, "file"))
        self._check_new(pack.entries)
        return self._add([Version(name, pack.source(name), allow_unchanged) for name in pack.entries], allow_partial)

    def replace(
        self, name: str, source: AdapterSource, *, allow_partial: bool = False, allow_unchanged: bool = False
    ) -> None:
        """Give a name another adapter, read and checked now; batches that run go on with the one they began with.

        Args:
            name: of the adapter.
            source: as for `add`; a vector has the strength and the heads of the adapter that it replaces.
            allow_partial, allow_unchanged: as for `add`.

        Raises:
            TypeError, ValueError: there is no such name, or as for `add`; the old one stays then.
        """
        (before,) = self._named([name])
        version = Version(name, self._source(source, before), allow_unchanged)
        with self._loading([version], allow_partial, is_new=False):
            pass

    @contextmanager
    def loading(self, version: Version, *, read: bool = True) -> Iterator[None]:
        """Read and check a version, which its name has when the block ends; after an error nobody has it.

        Args:
            version: new, of a new name or of one whose version it replaces.
            read: as for `add`.

        Raises:
            TypeError, ValueError: as for `add`.
        """
        with self._loading([version], read=read):
            yield

    def remove(self, name: str) -> None:
        """Forget an adapter; who uses it goes on with it.

        Raises:
            ValueError: there is no such name.
        """
        with self._lock:
            (version,) = self._named([name])
            del self._versions[name]
        self._release([version])

    def version(self, name: str) -> Version | None:
        """The version that a name has now, if there is one; `using` holds it."""
        return self._versions.get(name)

    def versions(self) -> list[Version]:
        """Those that names have now, by name."""
        with self._lock:
            return [self._versions[name] for name in sorted(self._versions)]

    @contextmanager
    def using(self, name: str) -> Iterator[Version]:
        """Hold the version that a name has now, for `rows`, whatever becomes of the name; it is read if it never was.

        Raises:
            UnknownAdapterError: there is no such name.
            ValueError: its source is damaged.
        """
        self._batches.check_open()
        held = self._hold([name])
        try:
            if held[name].digest is None:
                self._rows_of([held[name]])
            yield held[name]
        finally:
            self._release(held.values())

    @contextmanager
    def rows(self, names: Sequence[str | Version | None], repeats: int = 1) -> Iterator[Batch]:
        """Within it, called from here, the rows of a batch have these adapters.

        The batch is of the thread, asyncio task and generator that enters it: calls from elsewhere are refused.
        Adapters that are not in a slot are put into one first, waiting while other threads' batches hold too many.

        Args:
            names: one a row, or a version that is held, in the order of the batch; None is the base.
            repeats: how often generation repeats each row (num_beams, num_return_sequences).

        Yields:
            The batch, whose `split` gives the outputs of heads with different numbers of them, row by row.

        Raises:
            TypeError, ValueError: a name is unknown, there are more different ones than slots, this call is in a batch
                already, an adapter is damaged, or the base has changed. In the pass: there is not one name a row.

        Warns:
            UserWarning: once, if rows are the base's and adapters bring heads: the model's own may be random.
        """
        check_names(names, repeats, (str, Version))
        self._batches.check_free()
        served, _, slots, _ = self._required()
        check_unchanged(served.layers, served.modules)
        if served.heads and None in names:
            self._warn_of_own_heads(served)
        batch, versions = object(), self._hold(names)
        try:
            # Those that were never read get their digests.
            self._rows_of([version for version in versions.values() if version.digest is None])
            by_digest = {str(version.digest): version for version in versions.values()}
            taken = slots.take(batch, list(by_digest), lambda digests: self._rows_of([by_digest[d] for d in digests]))
            places = {name: taken[str(version.digest)] for name, version in versions.items()}
            index = RowIndex([slots.count if n is None else places[n] for n in names], repeats, served.device)
            with self._batches.entered(slots.rows(index)) as entered:
                yield entered
        finally:
            slots.release(batch)
            self._release(versions.values())

    def trainable(self, names: Collection[str] = (), *, new: Collection[str] = ()) -> TrainableAdapters:
        """Adapters to train together, in one step a batch; the bank serves the old ones until `publish`.

        Args:
            names: adapters of the bank, which start with the values that they have; their settings of training
                (`train`, dropout, `detach_norm`) are the same.
            new: names that the bank does not have, which start as the base with those settings.

        Raises:
            TypeError, ValueError: a name is unknown, or taken, the base is not frozen, or an adapter has a strength
                other than one, other settings than the others, or lacks layers.
        """
        rows, adapters = self._required().rows, self._named(names)
        self._check_new(new)
        values = {adapter.name: adapter.source.read() for adapter in adapters}
        return TrainableAdapters(rows, self._batches, {**values, **dict.fromkeys(new)})

    def publish(self, trained: TrainableAdapters, names: Collection[str] | None = None) -> None:
        """Serve trained adapters as they are now, under their names: new ones are added, others replaced.

        Args:
            trained: of this bank.
            names: some of them; None publishes all.

        Raises:
            ValueError: a name is not trained there, or an adapter is not finite; those before it are published then.
        """
        content = self._required().served.content
        for name in trained.names if names is None else names:
            shapes = trained.head_shapes[trained.place(name)]
            parts = tuple(part._replace(shape=shapes.get(part.name, part.shape)) for part in content.whole)
            source = VectorSource(
                content._replace(whole=parts), trained.config, (1.0,) * len(content.layers), trained.flat_vector(name)
            )
            with self.loading(Version(name, source, allow_unchanged=True)):
                pass

    @property
    def layout(self) -> Layout:
        """What a vector of an adapter with all layers is like, on the base as it is here."""
        return Layout(self._required().served.content)

    def stats(self) -> BankStats:
        """Counts and bytes as they are now."""
        slots = self._required().slots
        return BankStats(
            adapters=len(self),
            slots=slots.count,
            slots_filled=slots.used(),
            slots_in_use=slots.in_use(),
            device_bytes=slots.nbytes,
            host_adapters=len(self._host),
            host_bytes=self._host.nbytes,
            hits=slots.hits,
            loads=slots.loads,
            reads=self._reads,
            evictions=slots.evictions,
        )

    def digest(self, name: str) -> str:
        """What names an adapter's content wherever it is: base, projections and values, not the name.

        Raises:
            ValueError: there is no such name, or its source is damaged.
        """
        with self.using(name) as version:
            return str(version.digest)

    def digest_of(self, source: AdapterSource) -> str:
        """The `digest` that an adapter has once it is added: nothing is added.

        Args:
            source: as for `add`.

        Raises:
            TypeError, ValueError: it is damaged.
        """
        return self._required().rows.identity(self._source(source).read())

    def close(self) -> None:
        """Free the model: its layers are the base's again, and the bank cannot be used any longer.

        Raises:
            ValueError: batches run, which would have the base's outputs; nothing is closed then.
        """
        with self._lock:
            self._batches.close()
            if self._hooked is not None:
                self._hooked.served.unhook(self._hooked.handles)
            self._hooked = None
            self._versions.clear()

    def __enter__(self) -> AdapterBank:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._versions)

    def __contains__(self, name: object) -> bool:
        return name in self._versions

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._versions))

    def _required(self) -> _Hooked:
        """The layers; a ValueError, if the bank was closed."""
        hooked = self._hooked
        self._batches.check_open()
        assert hooked is not None, "only closing lets go of them, which is seen above"
        return hooked

    def _hook(self, model: nn.Module, like: Source, slots: int, dtype: torch.dtype) -> _Hooked:
        """Find and hook the layers that an adapter names."""
        try:
            served = ServedModel(model, like.read().config, like.content, PARTIAL)
        except ValueError as error:
            raise ValueError(f"like: {error}") from error
        rows = FactorRows(served, dtype)
        base = rows.base()
        if base.nbytes > self._host.limit:
            raise ValueError(f"host_bytes={self._host.limit} cannot hold one adapter, which takes {base.nbytes} bytes")
        on_device = Slots(slots, base, rows.places, served.device)
        return _Hooked(served, rows, on_device, served.hook(self._batches))

    def _add(self, versions: Sequence[Version], allow_partial: bool = False, *, read: bool = False) -> list[str]:
        """Add adapters of new names: all or none."""
        with self._loading(versions, allow_partial, read=read, is_new=True):
            pass
        return [version.name for version in versions]

    @contextmanager
    def _loading(
        self, versions: Sequence[Version], allow_partial: bool = False, *, read: bool = True, is_new: bool | None = None
    ) -> Iterator[None]:
        """Check versions, which their names have afterwards: all or none.

        Args:
            versions: of different names.
            allow_partial, read: see `add`.
            is_new: whether their names have to be, or must not be; None: as they are.
        """
        self._batches.check_open()
        try:
            for version in versions:
                self._check_fits(version, allow_partial)
            if read:
                self._rows_of(versions)
            yield
            with self._lock:
                # Others may have changed names meanwhile.
                names = [version.name for version in versions]
                if is_new is False:
                    self._named(names)
                else:
                    self._check_new(names if is_new else ())
                replaced = [old for v in versions if (old := self._versions.get(v.name)) is not None]
                self._versions |= {version.name: version for version in versions}
        except BaseException:
            self._release(versions)
            raise
        self._release(replaced)

    def _hold(self, names: Iterable[str | Version | None]) -> dict[str | Version, Version]:
        """Count one more user of the versions that names have now, and of versions, until `_release`."""
        held: dict[str | Version, Version] = {}
        with self._lock:
            for name in names:
                version = name if isinstance(name, Version | None) else self._versions.get(name)
                if name is not None:
                    if version is None or not version.users:
                        raise self._unknown(name)
                    held[name] = version
            for version in held.values():
                version.users += 1
        return held

    def _release(self, versions: Collection[Version]) -> None:
        """Count one user less; a version that nobody uses any more leaves, and its rows unless another one has them."""
        ended = []
        with self._lock:
            for version in versions:
                version.users -= 1
                if not version.users:
                    ended.append(version)
        for version in ended:
            if version.digest is not None:
                with self._counting:
                    self._digests[version.digest] -= 1
                    if not self._digests[version.digest]:
                        del self._digests[version.digest]
                        self._host.remove(version.digest)
            version.ended()

    def _source(self, given: AdapterSource, like: Version | None = None) -> Source:
        """Where an adapter can be read.

        Args:
            given: by the caller.
            like: of whose kind a vector is; None is that of the bank, with a strength of one.
        """
        if isinstance(given, FolderSource | PackedSource):
            return given
        if not isinstance(given, Tensor):
            path = _as_path(given, "source")
            return FolderSource(path.parent if path.name == VALUES else path)
        served = self._required().served
        if like is not None:
            values = like.source.read()
            return VectorSource(values.content, values.config, values.strengths, given)
        return VectorSource(served.content, served.config, (1.0,) * len(served.layers), given)

    def _check_fits(self, adapter: Version, allow_partial: bool) -> None:
        with _of_adapter(adapter):
            served, _, slots, _ = self._required()
            content = adapter.source.content
            self._batches.have_factors |= bool(content.factors)
            served.check_fits(content, adapter.source.beside, adapter.source.config, allow_partial)
            size, of_base = served.head_bytes(content), served.head_bytes(served.content._replace(factors=()))
            if size > (most := max(of_base, self._head_bytes // slots.count)):
                raise ValueError(
                    f"its head and factors take {size:,} bytes on the device, and the bank has room for "
                    f"{most:,} in each of {slots.count} slots; {MORE_ROOM}"
                )

    def _check_new(self, names: Collection[str]) -> None:
        self._batches.check_open()
        for name in names:
            if not isinstance(name, str) or not name:
                raise TypeError(f"name must be a string that is not empty, got {name!r}")
            if name in self._versions:
                raise ValueError(f"name: there is an adapter {name!r} already; use bank.replace, or remove it first")

    def _named(self, names: Collection[str]) -> list[Version]:
        """The adapters of some names as they are now."""
        if isinstance(names, str):
            raise TypeError(f"names must be a list of names, got {names!r}")
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise TypeError(f"names must be strings, got {wrong[0]!r}")
        self._batches.check_open()
        with self._lock:
            if missing := [name for name in names if name not in self._versions]:
                raise self._unknown(missing[0])
            return [self._versions[name] for name in names]

    def _unknown(self, name: str | Version) -> UnknownAdapterError:
        if isinstance(name, Version):
            return UnknownAdapterError(f"names: a version of {name.name!r} has left the bank; hold it with bank.using")
        hint = did_you_mean(name, self._versions)
        return UnknownAdapterError(f"names: there is no adapter {name!r} among the {len(self)} of the bank, {hint}")

    def _rows_of(self, adapters: Sequence[Version]) -> dict[str, AdapterRow]:
        """The rows of adapters by digest: from memory, or made together from their sources.

        Raises:
            ValueError: one is damaged, has changed since it was first read, or changes nothing.
        """
        rows = self._required().rows
        with self._reading:
            by_digest = {a.digest: row for a in adapters if (row := self._host.get(a.digest)) is not None}
            missing = [adapter for adapter in adapters if adapter.digest not in by_digest]
            if not missing:
                return {str(digest): row for digest, row in by_digest.items()}
            read = [self._read(adapter, rows) for adapter in missing]
            factors = rows.of([values for _, values in read])
            for adapter, (digest, values), of_adapter in zip(missing, read, factors, strict=True):
                with _of_adapter(adapter):
                    row = rows.row(values, of_adapter)
                    if not adapter.allow_unchanged and rows.is_of_base(row):
                        raise ValueError("it changes nothing; pass allow_unchanged=True if that is meant")
                if adapter.digest is None:
                    with self._counting:
                        self._digests[digest] += 1
                    adapter.digest = digest
                by_digest[digest] = row
                self._host.put(digest, row)
                self._reads += 1
                _log.debug("read %s as %s", adapter.name, digest)
        return {str(digest): row for digest, row in by_digest.items()}

    def _read(self, adapter: Version, rows: FactorRows) -> tuple[str, AdapterValues]:
        """The values of an adapter, and what names them."""
        with _of_adapter(adapter):
            values = adapter.source.read()
            digest = rows.identity(values)
            if adapter.digest not in (None, digest):
                raise ValueError("it has other values than when it was first used; call bank.replace")
        return digest, values

    def _warn_of_own_heads(self, served: ServedModel) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"rows of None get the model's own {' and '.join(head.name for head in served.heads)}, whose "
                "values are random unless the base was trained with that head",
                stacklevel=4,
            )


@contextmanager
def _of_adapter(adapter: Version) -> Iterator[None]:
    """Around what concerns one adapter: errors begin with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"adapter {adapter.name!r}: {error}") from error


def _like(given: str | os.PathLike[str] | FolderSource | PackedSource) -> Source:
    """The adapter whose layers a bank serves."""
    if isinstance(given, FolderSource | PackedSource):
        return given
    if (path := _as_path(given, "like")).is_dir():
        return FolderSource(path)
    pack = Pack.open(path)
    return pack.source(next(iter(pack.entries)))


def _as_path(given: str | os.PathLike[str], argument: str) -> Path:
    if not isinstance(given, str | os.PathLike):
        expected = "a path or a flat vector" if argument == "source" else "a path"
        raise TypeError(f"{argument} must be {expected}, got {given!r:.200}")
    return Path(given)
