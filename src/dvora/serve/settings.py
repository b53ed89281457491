"""How a server is set up: each setting is an option of `dvora serve`, and an argument of Ray Serve's application."""

from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from ..recipes.adapters import Dtype
from ..recipes.settings import setting

TOKEN = "DVORA_SERVE_TOKEN"
_option, _limit, _memory = (partial(setting, section) for section in ("Options", "Limits", "Memory"))


class Limits(BaseModel):
    """What runs and waits at a time."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    batch_rows: PositiveInt = _limit("rows of a batch", 32)
    batch_tokens: PositiveInt = _limit("padded tokens of a batch", 8192)
    queue: PositiveInt = _limit("rows that wait; those of the longest queues are refused with 429", 1024)
    slots: PositiveInt = _memory("adapters on the device at a time", 256)


class Settings(Limits):
    """All of a server."""

    base: str = _option("folder of the base model, or its name on the hub")
    adapters: Path = _option("a folder of adapters or of runs, empty with like only, or a pack")
    like: Path | None = _option(
        "folder of an adapter or a run: others have its layers, or fewer, and its head", None, null="one of adapters"
    )
    token: str | None = _option(
        "of whoever may change adapters over HTTP", None, null="nobody may, unless a key says so"
    )
    keys: Path | None = _option(
        "TOML file of tenants' keys: what each may ask, change and use", None, null="all may ask"
    )
    allow_host: tuple[str, ...] = _option(
        "names or patterns that requests may call it by, beside localhost and addresses", (), null="none"
    )
    dtype: Dtype = _option("of the base's weights; auto: as they are stored", "auto")
    download: bool = _option("fetch the base from the hub if it is not there", False)
    abstain_below: float = _option(
        "/v1/classify names no class whose probability is below this, unless a request says another", 0.0, ge=0, le=1
    )
    max_length: int | None = _limit("tokens of a text; more are refused", None, null="what the model takes", ge=2)
    timeout: float = _limit("seconds that an answer may take", 120.0, ge=0.1, allow_inf_nan=False)
    upload: PositiveInt = _limit("bytes of an adapter in a request", 2**26)
    host_memory: float = _memory("GiB of adapters in memory", 1.0, gt=0, le=2**20)
    head_memory: float = _memory(
        "GiB of heads on the device; a head may have this divided by slots", 1.0, gt=0, le=2**20
    )
    body_memory: float = _memory(
        "MiB of bodies and answers under way; over it slow clients are given up, and new ones are 503",
        256,
        gt=0,
        le=2**30,
    )

    @model_validator(mode="after")
    def _uploads_fit(self) -> "Settings":
        if self.body_memory * 2**20 < self.upload:
            raise ValueError(
                f"body_memory is {self.body_memory:g} MiB, less than upload, {self.upload:,} bytes; raise it"
            )
        return self
