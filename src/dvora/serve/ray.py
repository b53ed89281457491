"""Replicas of the server under Ray Serve: each has the base and its own batches, and all of them share the adapters."""

import logging
import os
from pathlib import Path

from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from .app import make_app
from .registry import Registry
from .server import Server
from .settings import TOKEN, Settings

NOTED_NAMES = 1024
"""Adapters of a replica that Ray knows of at a time. Forgetting one unloads nothing."""


class Replica:
    """One server; without a token in its settings it has that of the replica's environment.

    It batches for itself: `serve.batch` would put every adapter into a batch of its own.
    """

    def __init__(self, settings: Settings) -> None:
        log = logging.getLogger("dvora.serve")
        log.setLevel(logging.INFO)
        for handler in logging.getLogger("ray.serve").handlers:
            # The replica's log.
            log.addHandler(handler)
        token = settings.token or os.environ.get(TOKEN)
        self.server = Server(settings.model_copy(update={"token": token}), is_shared=True)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray serves; it closes the server when the replica stops."""
        app = make_app(self.server)
        app.add_middleware(Noting, registry=self.server.registry)
        return app

    def check_health(self) -> None:
        """Have Ray replace a replica whose engine has died, by an error."""
        if not self.server.engine.is_alive:
            raise RuntimeError("the engine has died; its log says why")


async def _note(name: str) -> str:
    """All that Ray takes for loading: the bank loads, as many at a time as it likes."""
    return name


class Noting:
    """Has Ray send requests with the header `serve_multiplexed_model_id` to where the adapter of that name was used."""

    def __init__(self, app: ASGIApp, registry: Registry) -> None:
        self.app, self.registry = app, registry
        self.note = serve.multiplexed(_note, max_num_models_per_replica=NOTED_NAMES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Only names that are served: clients write what they like.
        if scope["type"] == "http" and (name := serve.get_multiplexed_model_id()) in self.registry.bank:
            await self.note(name)
        await self.app(scope, receive, send)


replica = serve.deployment(
    serve.ingress()(Replica),
    name="dvora",
    # The engine has the queue; Ray's default of 5 would leave its batches small.
    max_ongoing_requests=256,
    max_queued_requests=1024,
    # Long texts take more than Ray's default of 20.
    graceful_shutdown_timeout_s=45,
    graceful_shutdown_wait_loop_s=1,
)
"""The deployment; `replica.options(num_replicas=2).bind(Settings(...))` is an application."""


def app(args: Settings) -> serve.Application:
    """An application for `serve run dvora.serve.ray:app base=minilm adapters=customers`, and for configurations."""
    base = Path(args.base)
    paths = {
        "base": str(base.resolve()) if base.is_dir() else args.base,
        "adapters": args.adapters.resolve(),
        "like": args.like and args.like.resolve(),
        "keys": args.keys and args.keys.resolve(),
    }
    return replica.bind(args.model_copy(update=paths))
