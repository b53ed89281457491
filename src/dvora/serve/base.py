"""The base model in memory, its tokenizer, and the bank of adapters over it."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mode
from typing import Any, TypeVar

import torch

from ..adapter_file.content import head_of
from ..adapter_file.packs import PackedSource
from ..adapter_file.patterns import is_named
from ..adapter_file.settings import DVoRAConfig
from ..adapter_file.values import Description, FolderSource, folder_of
from ..bank import AdapterBank, Version
from ..bank import Batch as BankBatch
from ..recipes.models.adapters import base_class
from ..recipes.models.bases import config_of, heads_of, load_model, load_tokenizer, model_class, without_memory
from ..recipes.settings import Trust
from .requests import RefusedError, Work, model_failed
from .settings import Settings
from .store import Served

_log = logging.getLogger("dvora.serve")
_Number = TypeVar("_Number", int, float)


@dataclass(eq=False)
class Base:
    """What the engine computes with; `enter` is for whoever is `passing`."""

    source: str
    """The folder of the model, or its name on the hub."""
    model: Any
    tokenizer: Any
    bank: AdapterBank
    like: Description
    """Of the adapter whose layers the bank serves."""
    has_own_head: bool
    """Whether a classifier came with the base, so that rows without an adapter mean something."""
    passing: threading.RLock = field(default_factory=threading.RLock)
    """Held during every pass of the model."""

    @cached_property
    def works(self) -> tuple[Work, ...]:
        """What it does: embed, and with a head, its own or adapters', classify."""
        return ("classify", "embed") if heads_of(self.model) else ("embed",)

    @cached_property
    def has_tags(self) -> bool:
        """Whether it classifies tokens, and not texts."""
        return "TokenClassification" in type(self.model).__name__

    def require(self, work: Work) -> None:
        """Refuse what it does not do, with 400."""
        if work not in self.works:
            raise RefusedError(400, f"{self.name} cannot {work}; it is served to {' and '.join(self.works)}")

    @cached_property
    def name(self) -> str:
        """What clients call it."""
        path = Path(self.source)
        return path.resolve().name if path.is_dir() else self.source

    def enter(
        self, versions: Sequence[Version | None], entered: ExitStack
    ) -> tuple[BankBatch | None, dict[Version | None, RefusedError]]:
        """Give the rows of a pass these versions, until it ends, but for those that cannot be read any more, and why.

        The batch of the bank is None where none of them can be read.
        """
        errors: dict[Version | None, RefusedError] = {}
        try:
            return entered.enter_context(self.bank.rows(versions)), errors
        except Exception as error:
            _log.warning("the adapters of a batch cannot be read: %s", error)
        # Each alone says which.
        for version in dict.fromkeys(versions):
            try:
                with self.bank.rows([version]):
                    pass
            except Exception as error:
                _log.warning("an adapter of a batch cannot be read: %s", error)
                message = "the adapter's files were changed or removed since it was loaded; load it again"
                is_of_files = isinstance(error, ValueError | OSError)
                errors[version] = RefusedError(422, message, "adapter_error") if is_of_files else model_failed()
        readable = [version for version in versions if version not in errors]
        return entered.enter_context(self.bank.rows(readable)) if readable else None, errors

    def check_task(self, description: Description) -> None:
        """Refuse, with a ValueError, an adapter for which a server that starts again could load another class."""
        settings, here = json.loads(description.settings), type(self.model).__name__
        task, named = settings.get("task_type"), (settings.get("auto_mapping") or {}).get("base_model_class")
        classes = "TOKEN_CLS" if self.has_tags else "SEQ_CLS"
        here_is = {"classify": classes, "embed": "FEATURE_EXTRACTION"}[self.works[0]]
        if task is None and named in (None, here) and here in (named, *(self.model.config.architectures or ())):
            return
        if task != here_is:
            raise ValueError(f"its task_type is {task!r:.40}, and this server's adapters have {here_is!r}")

    def common_settings(self, like: Description) -> bytes:
        """The settings of an adapter under a new name: what all have to agree on, and nothing of a trainer's own.

        Args:
            like: of an adapter of DVoRA that is served, which whoever puts another one may not see.
        """
        config, content, model = like.config, like.content, type(self.model)
        ranks = {layer.name: layer.rank for layer in content.layers if layer.rank}
        # Patterns cannot say that there is no alpha, which is that of the rank.
        alphas = {name: config.alpha_of(name) or float(rank) for name, rank in ranks.items()}
        r, alpha = mode([*ranks.values()] or [1]), mode([*alphas.values()] or [1.0])
        probes = dict(content.base)
        heads = {head_of(part.name, config.modules_to_save) for part in content.whole}
        common = DVoRAConfig(
            r=r,
            alpha=alpha,
            rank_pattern=_pattern(ranks, r),
            lambda_d_groups=max((layer.groups for layer in content.layers), default=1),
            alpha_pattern=_pattern(alphas, alpha),
            target_modules=sorted(ranks),
            magnitude_modules=sorted(layer.name for layer in content.layers if not layer.rank) or None,
            direction=content.settings.direction,
            projection_seed=content.settings.projection_seed,
            projection_init=content.settings.projection_init,
            projection_fingerprint=content.settings.projection_fingerprint,
            modules_to_save=sorted(filter(None, heads)) or None,
            base_probes={layer.name: [*probes[layer.name]] for layer in content.layers if layer.name in probes},
            base_model_name_or_path=self.name,
            task_type=config.task_type,
            inference_mode=True,
        )
        if config.task_type is None:
            common.auto_mapping = {"base_model_class": model.__name__, "parent_library": model.__module__}
        return json.dumps(common.to_dict()).encode()


def open_base(settings: Settings, opened: Sequence[Served], damaged: Mapping[str, str]) -> Base:
    """Load a base model, with a bank for the kind of adapters that it will have.

    Args:
        settings: of the server; without `like` its adapters say what that is.
        opened: its adapters; the task of the first one decides on the class and the head.
        damaged: why others are left out, by name.

    Raises:
        ValueError: no adapter says which layers are served, or the base generates texts.
    """
    source, dtype, trust = settings.base, settings.dtype, Trust(download=settings.download)
    likes = [*opened] if settings.like is None else [Served("--like", FolderSource(folder_of(settings.like)))]
    if likes:
        kind, config = base_class(likes[0].adapter, source, trust)
    else:
        config = config_of(source, trust)
        kind = model_class(config)
    outline: Any = without_memory(kind, config, trust)
    if outline.get_output_embeddings() is not None and outline.can_generate():
        raise ValueError(
            f"{source} is a language model, and `dvora serve` classifies and embeds; language models are served by "
            "vLLM with dvora-vllm (docs/how-to/vllm.md), or continued by `dvora generate`"
        )
    if not likes:
        raise ValueError(nothing_served(damaged))
    model, new = load_model(source, kind, config, dtype if dtype == "auto" else getattr(torch, dtype), trust=trust)
    model.requires_grad_(False)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    tokenizer = load_tokenizer(source, trust)
    heads = heads_of(model)
    has_own_head = bool(heads) and not any(key.partition(".")[0] in heads for key in new)
    like, bank = _bank(model, settings, likes, damaged)
    return Base(source, model, tokenizer, bank, like.description, has_own_head)


def nothing_served(damaged: Mapping[str, str]) -> str:
    """What is said where a server has no adapter: why, if some are left out."""
    if not damaged:
        return "--adapters: there is none, so nobody knows which layers they have; put one there, or name it in --like"
    name, reason = next(iter(damaged.items()))
    return f"none of the {len(damaged)} adapters can be served; {name}: {reason}"


def _bank(
    model: Any, settings: Settings, likes: Sequence[Served], damaged: Mapping[str, str]
) -> tuple[Served, AdapterBank]:
    """An adapter and a bank of its layers: of those that can be served the one with the most."""
    failed = dict[str, str]()
    for like in sorted(likes, key=lambda version: -len(version.source.content.layers)):
        assert isinstance(like.source, FolderSource | PackedSource)
        try:
            bank = AdapterBank(
                model,
                like=like.source,
                slots=settings.slots,
                host_bytes=int(settings.host_memory * 2**30),
                head_bytes=int(settings.head_memory * 2**30),
                # Rows that would get an untrained one are refused in `Call.rows`.
                own_heads=True,
            )
        except (ValueError, TypeError, OSError) as error:
            failed[like.name] = str(error).removeprefix("like: ")
        else:
            return like, bank
    raise ValueError(nothing_served({**failed, **damaged}))


def _pattern(values: dict[str, _Number], usual: _Number) -> dict[str, _Number]:
    """Of layers with another value than usual; the first entry that a layer's name ends in counts."""
    others = [name for name in values if values[name] != usual]
    return {name: values[name] for name in sorted(values, key=len, reverse=True) if is_named(others, name)}
