"""The page of routes."""

from pathlib import Path

from tests.serve.served import copied, serving
from tests.tools.pages.seen import PHONE, seen


def test_routes(llama: Path, language_adapters: Path, tmp_path: Path) -> None:
    with serving(llama, copied(language_adapters, tmp_path / "adapters")) as (client, _):
        answer = client.get("/docs")
        assert "//" not in answer.text
        assert "<script" not in answer.text
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        for path, methods in client.get("/openapi.json").json()["paths"].items():
            for method in methods:
                assert f"{method.upper()} {path}</code>" in answer.text
        with seen(f"{client.base_url}/docs", PHONE) as found:
            found.page.wait_for_selector("text=PUT /v1/adapters/{name}")
            assert found.width() <= PHONE
            assert not found.complaints
