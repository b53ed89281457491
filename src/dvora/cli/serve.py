"""`dvora serve`: one base model over HTTP, every request with its adapter."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..recipes.files import checked
from ..recipes.models.hub import check_model
from ..recipes.settings import Trust
from ..serve.settings import TOKEN, Settings
from .errors import check_there
from .options import Download, command, with_options_of
from .output import Output, print_line


def _new_key(tenant: str | None) -> None:
    if tenant is not None:
        from ..serve.access import new_key

        secret, table = new_key(tenant)
        typer.echo(f"the key, which only the tenant needs: {secret}\nfor the file of --keys:\n\n{table}", nl=False)
        raise typer.Exit


@partial(command, as_json=False)
@with_options_of(Settings)
def serve(
    base: Annotated[str, typer.Argument(help="Folder of the base model, or its name on the hub.")],
    adapters: Annotated[Path, typer.Option(help="A folder of adapters or of runs, empty with --like only, or a pack.")],
    shown: Output,
    token: Annotated[
        str | None,
        typer.Option(
            envvar=TOKEN, help="Of whoever may change adapters over HTTP.", show_default="nobody may", show_envvar=True
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    connections: Annotated[
        int, typer.Option(help="Open connections; a new one takes the oldest silent one's place.", min=1)
    ] = 2048,
    new_key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            callback=_new_key,
            is_eager=True,
            help="Print a new key of a tenant, and its table, and exit.",
        ),
    ] = None,
    download: Download = False,
    **settings: Any,
) -> None:
    """Serve a base model with thousands of adapters over HTTP, each request with its own.

    Classes and embeddings through OpenAI's interface and that of
    text-embeddings-inference; a page to try adapters at /; routes at /docs.
    Adapters can be put, replaced and deleted while it runs, and are there
    again after a restart. SIGTERM answers what has been taken first.

    Examples:

    \b
    dvora serve minilm --adapters customers
    dvora serve minilm --adapters adapters.pack --slots 64 --port 8080
    DVORA_SERVE_TOKEN=secret-of-trainers dvora serve minilm --adapters adapters
    """
    check_there(adapters)
    options = {"base": base, "adapters": adapters, "token": token, "download": download, **settings}
    chosen = checked(Settings, {name: value for name, value in options.items() if value is not None})
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    check_model(base, Trust(download=download))
    from ..serve.run import serve as run_server

    run_server(chosen, host, port, connections, None if shown.quiet else print_line)
