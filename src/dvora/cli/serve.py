"""`dvora serve`: one base model over HTTP, every request with its adapter."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ..recipes.adapters import Dtype
from .errors import UsageError, check_there, one_line, wrong_input
from .output import Debug, Download, Quiet, print_line

TOKEN = "DVORA_SERVE_TOKEN"
_LIMITS, _MEMORY = "Limits", "Memory"


def serve(
    base: Annotated[str, typer.Argument(help="Folder of the base model, or its name on the hub.")],
    adapters: Annotated[Path, typer.Option(help="A folder of adapters or of runs, which may be empty, or a pack.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar=TOKEN, help="Of whoever may change adapters over HTTP.", show_default="nobody may", show_envvar=True
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Names that requests may call this server by, beside localhost and addresses; * is any.",
            show_default="none",
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="TOML file of tenants' keys: what each may ask, change and use.", show_default="all may ask"),
    ] = None,
    slots: Annotated[int, typer.Option(help="Adapters on the device at a time.", min=1, rich_help_panel=_MEMORY)] = 256,
    host_memory: Annotated[
        float, typer.Option(help="GiB of adapters in memory.", min=0.001, rich_help_panel=_MEMORY)
    ] = 1.0,
    head_memory: Annotated[
        float,
        typer.Option(
            help="GiB of heads beside them; a head may have this divided by --slots.",
            min=0.001,
            rich_help_panel=_MEMORY,
        ),
    ] = 1.0,
    body_memory: Annotated[
        int,
        typer.Option(
            help="MiB of bodies and answers under way; over it slow clients are given up, and new ones are 503.",
            min=1,
            rich_help_panel=_MEMORY,
        ),
    ] = 256,
    cache_tokens: Annotated[
        int,
        typer.Option(help="Tokens of all texts that are generated at a time.", min=2, rich_help_panel=_MEMORY),
    ] = 32768,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the base's weights; auto: as they are stored.", rich_help_panel=_MEMORY)
    ] = "auto",
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a text and its continuation; more are refused.",
            min=2,
            show_default="what the model takes",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    batch_rows: Annotated[
        int, typer.Option(help="Rows of a batch, texts generated at a time.", min=1, rich_help_panel=_LIMITS)
    ] = 32,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens of a batch.", min=1, rich_help_panel=_LIMITS)] = 8192,
    queue: Annotated[
        int, typer.Option(help="Rows that wait; more are refused with 429.", min=1, rich_help_panel=_LIMITS)
    ] = 1024,
    timeout: Annotated[
        float, typer.Option(help="Seconds that an answer may take.", min=0.1, rich_help_panel=_LIMITS)
    ] = 120.0,
    upload: Annotated[int, typer.Option(help="Bytes of an adapter in a request.", min=1, rich_help_panel=_LIMITS)] = 2
    ** 26,
    connections: Annotated[
        int,
        typer.Option(
            help="Open connections; a new one takes the oldest silent one's place.",
            min=1,
            rich_help_panel=_LIMITS,
        ),
    ] = 2048,
    download: Download = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve a base model with thousands of adapters over HTTP, each request with its own.

    Classes, embeddings and texts through OpenAI's interface and that of
    text-embeddings-inference; a page to try adapters at /; routes at /docs.
    Adapters can be put, replaced and deleted while it runs, and are there
    again after a restart. SIGTERM answers what has been taken first.

    Examples:

    \b
    dvora serve minilm --adapters customers
    dvora serve smollm2 --adapters adapters.pack --slots 64 --port 8080
    DVORA_SERVE_TOKEN=secret-of-trainers dvora serve smollm2 --adapters adapters
    """
    with one_line(debug), wrong_input():
        check_there(adapters)
        if body_memory * 2**20 < upload:
            raise UsageError(f"--body-memory is {body_memory} MiB, less than --upload, {upload:,} bytes; raise it")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from ..recipes.settings import Trust
        from ..serve.run import serve as run_server
        from ..serve.scheduler import Limits
        from ..serve.server import Settings

        settings = Settings(
            base,
            adapters,
            Limits(batch_tokens, batch_rows, queue, slots, cache_tokens),
            host_bytes=int(host_memory * 2**30),
            head_bytes=int(head_memory * 2**30),
            dtype=dtype,
            max_length=max_length,
            token=token,
            keys=keys,
            allow_hosts=tuple(allow_host or ()),
            body_memory=body_memory * 2**20,
            timeout=timeout,
            largest_upload=upload,
            trust=Trust(download=download),
        )
        run_server(settings, host, port, connections, None if quiet else print_line)
