"""Who may ask and change what: the server's token, and the keys of tenants, who learn of no adapter but their own."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import httpx2 as httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient
from typer.testing import CliRunner

from dvora.adapter_file.packs import write_pack
from dvora.cli.app import app
from dvora.flat import Layout
from dvora.serve import access
from dvora.serve.access import Allowance, Keys
from dvora.serve.app import make_app
from dvora.serve.requests import RefusedError
from dvora.serve.server import Server
from dvora.serve.settings import Settings
from tests.serve.served import ADMIN, TEXTS, TOKEN, Alone, ask, probabilities, save_classifier, serving

VALUES = "adapter_model.safetensors"
SECRETS = {
    "shop": "secret of the shop",
    "reader": "secret of the reader",
    "few": "secret of few",
    "little": "secret of little",
}
EMPTY = hashlib.sha256(b"").hexdigest()
FILE = """
[shop]
sha256 = "{shop}"
adapters = ["shop-*"]
change = true

[reader]
sha256 = "{reader}"
adapters = ["a0", "base"]

[few]
sha256 = "{few}"
adapters = ["*"]
requests = 3
"""


def headers(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[tenant]}"}


def asked(client: httpx.Client, model: str, tenant: str) -> httpx.Response:
    return client.post("/v1/classify", json={"model": model, "input": TEXTS[0]}, headers=headers(tenant))


def key_file(folder: Path, content: str = FILE) -> Path:
    hashes = {name: hashlib.sha256(secret.encode()).hexdigest() for name, secret in SECRETS.items()}
    (folder / "keys.toml").write_text(content.format(**hashes))
    return folder / "keys.toml"


@pytest.fixture
def client(critic: Path, adapters: Path, tmp_path: Path) -> Iterator[httpx.Client]:
    with serving(critic, adapters, keys=key_file(tmp_path)) as (client, _):
        yield client


def test_without_a_key_nothing_is_answered(client: httpx.Client) -> None:
    routes = [
        route
        for route in client.get("/openapi.json").json()["paths"]
        if route not in ("/health", "/healthz", "/readyz", "/docs")
    ]
    assert len(routes) > 12
    for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": SECRETS["shop"]}):
        for route in routes:
            for method in ("GET", "POST", "PUT", "DELETE"):
                if (method, route) == ("GET", "/"):
                    # The page, which is the same for all.
                    continue
                answer = client.request(method, route.replace("{", "").replace("}", ""), headers=wrong, content=b"{}")
                assert answer.status_code in (400, 401, 405), (method, route)
                assert "a0" not in answer.text
    assert client.get("/readyz").status_code == 200


def test_a_tenant_learns_of_its_own_adapters_only(client: httpx.Client, adapters: Path) -> None:
    shop, values = headers("shop"), (adapters / "a1" / VALUES).read_bytes()
    assert client.put("/v1/adapters/shop-1", content=values, headers=shop).status_code == 201
    assert [card["id"] for card in client.get("/v1/models", headers=shop).json()["data"]] == ["shop-1"]
    listed = client.get("/v1/adapters", headers=shop).json()
    assert [card["name"] for card in listed["adapters"]] == ["shop-1"]
    assert client.get("/metrics", headers=shop).status_code == 403
    assert client.get("/info", headers=shop).json()["adapters"] == 1

    def hidden(method: str, path: str, name: str, **options: object) -> tuple[int, str, list[str]]:
        answer = client.request(method, path.format(name), headers=shop, **options)  # type: ignore[arg-type]
        return answer.status_code, answer.text.replace(name, "NAME"), sorted({*answer.headers} - {"date"})

    for name in ("a0", "shop-2", "critic"):
        # What exists is answered like what does not.
        for method, path in (("GET", "/v1/models/{}"), ("GET", "/v1/adapters/{}")):
            assert hidden(method, path, name) == hidden(method, path, "nothing"), name
        for path, body in (
            ("/v1/classify", {"input": "good"}),
            ("/v1/classify", {"input": "good " * 100}),
            ("/v1/embeddings", {"input": "good"}),
            ("/predict", {"inputs": "good"}),
        ):
            for before in ("", "critic:"):
                of_name = hidden("POST", path, name, json={**body, "model": before + name})
                assert of_name == hidden("POST", path, "nothing", json={**body, "model": before + "nothing"})
                assert of_name[0] == 404
    for method, options in (("PUT", {"content": values}), ("DELETE", {})):
        assert hidden(method, "/v1/adapters/{}", "a0", **options) == hidden(
            method, "/v1/adapters/{}", "nothing", **options
        )
    load = {"lora_name": "shop-2", "lora_path": "a0"}
    assert client.post("/v1/load_lora_adapter", json=load, headers=shop).status_code == 403
    assert asked(client, "shop-1", "shop").status_code == 200


def test_who_may_ask_may_not_change(client: httpx.Client, adapters: Path) -> None:
    reader, values = headers("reader"), (adapters / "a1" / VALUES).read_bytes()
    for model in ("a0", "critic"):
        assert asked(client, model, "reader").status_code == 200
    assert client.put("/v1/adapters/a0", content=values, headers=reader).status_code == 403
    assert client.delete("/v1/adapters/a0", headers=reader).status_code == 403
    # The server's token is for all.
    assert client.put("/v1/adapters/a0", content=values, headers=ADMIN).status_code == 200
    assert "dvora_requests" in client.get("/metrics", headers=ADMIN).text


def test_a_minute_has_so_many_requests(client: httpx.Client) -> None:
    codes = [client.get("/v1/models", headers=headers("few")).status_code for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    refused = client.get("/v1/models", headers=headers("few"))
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    # Others have minutes of their own.
    assert client.get("/v1/models", headers=headers("reader")).status_code == 200


def test_a_minute_has_so_many_tokens(critic: Path, adapters: Path, tmp_path: Path) -> None:
    keys = key_file(tmp_path, FILE + "\n[little]\nsha256 = \"{little}\"\nadapters = ['a1']\ntokens = 20\n")
    with serving(critic, adapters, keys=keys) as (client, _):
        client.headers.update(headers("little"))
        assert ask(client, "a1", "good " * 10).status_code == 200
        assert client.get("/v1/models").status_code == 200
        # A list: 12 tokens before, 12 by this.
        assert ask(client, "a1", ["good " * 4] * 2).status_code == 200
        answer = ask(client, "a1")
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_exceeded"


def test_what_was_used_comes_back_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(access.time, "monotonic", lambda: now)
    tokens = Allowance(60)
    tokens.take(75)
    assert tokens.seconds(0) == pytest.approx(15)
    now += 20
    assert tokens.seconds(0) == 0
    assert tokens.seconds(60) == pytest.approx(55)
    now += 1000
    # It is not saved up.
    tokens.take(61)
    assert tokens.seconds(0) == pytest.approx(1)
    assert Allowance().seconds(1000) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "[shop]\nsha256 = 'x'\nadapters = ['a']",
            "shop: sha256 is no hash of a key; .* 64 digits.*--new-key",
        ),
        ("[shop]\nadapters = ['a']", "shop: sha256 is missing"),
        ("[shop]\nsha = '{shop}'\nadapters = ['a']", "shop: unknown key 'sha', did you mean 'sha256'"),
        ("sha256 = '{shop}'", "sha256 stands outside of a table"),
        ("[shop]\nsha256 = '{shop}'\nadapters = []", "shop: adapters: "),
        ("[shop]\nsha256 = '{shop}'\nadapters = ['a']\nrate = 3", "shop: unknown key 'rate'"),
        ("[shop]\nsha256 = '{shop}'\nadapters = ['a']\nrequests = 0", "shop: requests: "),
        ("[a]\nsha256 = '{shop}'\nadapters = ['a']\n[b]\nsha256 = '{shop}'\nadapters = ['a']", "same key"),
        ("[shop", "keys.toml"),
        (f"[shop]\nsha256 = '{EMPTY}'\nadapters = ['a']", r"keys.toml: shop.sha256 .*empty text.*--new-key"),
    ],
)
def test_files_of_keys_that_are_wrong(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Keys(file=key_file(tmp_path, content))


@pytest.mark.parametrize("token", ["short", "a passwörd of ours", "with\na new line"])
def test_tokens_that_clients_could_not_send(token: str) -> None:
    with pytest.raises(ValueError, match="openssl"):
        Keys(token)


@pytest.mark.parametrize("secret", ["a", "1234567", "12345678"])
def test_what_is_too_short_is_no_key(secret: str, tmp_path: Path) -> None:
    hashed = hashlib.sha256(secret.encode()).hexdigest()
    keys = Keys(TOKEN, key_file(tmp_path, f"[shop]\nsha256 = '{hashed}'\nadapters = ['*']"))
    with nullcontext() if len(secret) == 8 else pytest.raises(RefusedError):
        keys.key_of(f"Bearer   {secret} ".encode())


def test_the_token_is_no_tenant_s_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keys.toml: the key of 'reader' is the server's token.*--new-key"):
        Keys(SECRETS["reader"], key_file(tmp_path))


def test_bearer_is_written_as_one_likes(tmp_path: Path) -> None:
    assert Keys(TOKEN).key_of(f"bEARER  {TOKEN}".encode()).may_change
    assert not Keys(TOKEN).key_of(f"Basic {TOKEN}".encode()).may_change
    with pytest.raises(RefusedError):
        Keys(TOKEN, key_file(tmp_path)).key_of(b"")


CHANGES = [
    ("DELETE", "/v1/adapters/a1", None),
    ("PUT", "/v1/adapters/a1", None),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "a1"}),
    ("POST", "/v1/unload_lora_adapter%0A", {"lora_name": "a1"}),
    ("POST", "/v1/unload_lora_adapter/", {"lora_name": "a1"}),
    ("POST", "//v1/unload_lora_adapter", {"lora_name": "a1"}),
    ("POST", "/v1/load_lora_adapter%0A", {"lora_name": "x", "lora_path": "a1"}),
    ("DELETE", "/v1/adapters/a1%0A", None),
    ("DELETE", "/v1/./adapters/a1", None),
]


@pytest.mark.parametrize("token", [TOKEN, None])
@pytest.mark.parametrize("prefix", ["", "/mounted", "/root"])
def test_no_path_leads_around_the_token(
    prefix: str, token: str | None, critic: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also mounted in another application, or with a `root_path`, as proxies set it."""
    server = Server(Settings(base=str(critic), adapters=adapters, token=token))
    app = make_app(server)
    asgi = {"": app, "/mounted": Starlette(routes=[Mount("/mounted", app)]), "/root": app}[prefix]
    try:
        client = TestClient(asgi, base_url="http://localhost", root_path="/root" if prefix == "/root" else "")
        for method, path, body in CHANGES:
            answer = client.request(method, f"{prefix}{path}", json=body)
            assert answer.status_code in (401, 403, 404, 405), (method, path)
            assert len(server.base.bank) == 6
        if token:
            assert client.delete(f"{prefix}/v1/adapters/a1", headers=ADMIN).status_code == 200
    finally:
        server.close()


def test_a_tenant_gets_nothing_of_hidden_adapters(
    client: httpx.Client, critic: Path, adapters: Path, tmp_path: Path
) -> None:
    """Neither their settings, nor in what another adapter differs from them."""
    settings = adapters / "a0" / "adapter_config.json"
    (path,) = {json.loads(settings.read_text())["base_model_name_or_path"]}
    assert "/" in path
    content = (adapters / "a1" / VALUES).read_bytes()
    assert client.put("/v1/adapters/shop-1", content=content, headers=headers("shop")).status_code == 201
    (uploaded,) = (adapters / ".served").glob("*/adapter_config.json")
    assert json.loads(uploaded.read_text())["base_model_name_or_path"] == critic.name
    other = save_classifier(critic, tmp_path / "other", 1, 3, r=3, target_modules=["query"])
    write_pack(tmp_path / "pack", {"x": other})
    answer = client.put("/v1/adapters/shop-2", content=(tmp_path / "pack").read_bytes(), headers=headers("shop"))
    assert answer.status_code == 422
    assert "query" not in answer.text


def test_nothing_that_a_tenant_wrote_is_in_another_s_adapters(critic: Path, adapters: Path, tmp_path: Path) -> None:
    """A vector and a file of values come without settings, to adapters of which the shop sees none."""
    for file in adapters.glob("*/adapter_config.json"):
        settings = json.loads(file.read_text())
        of_tenant = {
            **dict.fromkeys(("base_model_name_or_path", "revision"), "private"),
            "exclude_modules": ["private"],
            "magnitude_modules": ["private"],
            "rank_pattern": {"private": 17},
            "alpha_pattern": {"private": 17},
            "target_modules": [*settings["target_modules"], "private"],
            "strength": {"private": 0.5},
            "dvora_dropout": 0.375,
            "auto_mapping": {"base_model_class": "private", "parent_library": "private"},
            "base_probes": {**settings["base_probes"], "private": [1.0]},
        }
        file.write_text(json.dumps(settings | of_tenant))
    source, shop = adapters / "a1", headers("shop")
    vector = Layout.of(source).to_vector(source).numpy().tobytes()
    secrets = re.compile(r"private|0\.375|17")
    other = save_classifier(critic, tmp_path / "other", 1, 3, r=3, target_modules=["query"])

    def put(client: httpx.Client, name: str, content: bytes, **query: str) -> httpx.Response:
        return client.put(f"/v1/adapters/shop-{name}", content=content, params=query, headers=shop)

    with serving(critic, adapters, keys=key_file(tmp_path)) as (client, _):
        answers = [
            put(client, "vector", vector, format="vector"),
            put(client, "file", (source / VALUES).read_bytes()),
            put(client, "wrong", vector[4:], format="vector"),
            put(client, "wrong", (other / VALUES).read_bytes()),
            client.get("/v1/adapters", headers=shop),
            client.get("/v1/adapters/shop-file", headers=shop),
        ]
        assert [answer.status_code for answer in answers] == [201, 201, 422, 422, 200, 200]
        assert answers[0].json()["digest"] == answers[1].json()["digest"] != ""
        stored = [file.read_text() for file in (adapters / ".served").glob("*/adapter_config.json")]
        assert len(stored) == 2
        for text in (*stored, *(answer.text for answer in answers)):
            assert not secrets.search(re.sub(r"[0-9a-f]{16,}|\d+\.\d{3,}(e-\d+)?", "", text)), text
        settings = answers[4].json()["layout"]["settings"]
        assert json.loads(stored[0]) == {**settings, "base_probes": json.loads(stored[1])["base_probes"]}
        assert "base_probes" not in settings
        answers = [asked(client, "shop-vector", "shop")]
    with serving(critic, adapters, keys=key_file(tmp_path)) as (client, _):
        answers.append(asked(client, "shop-vector", "shop"))
    for answer in answers:
        assert probabilities(answer) == Alone(critic).answer(source)


def test_a_new_key_opens_what_its_table_says(critic: Path, adapters: Path, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["serve", "--new-key", "shop"])
    assert ended.exit_code == 0
    said = ended.output
    secret = re.search(r"only the tenant needs: ([0-9a-f]{48})$", said, re.MULTILINE)
    assert secret is not None
    file = tmp_path / "keys.toml"
    file.write_text(said[said.index("[") :])
    with serving(critic, adapters, keys=file) as (client, _):
        for key, status in ((secret[1], 200), (secret[1][:-1] + "x", 401)):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == status
