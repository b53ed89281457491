"""Pages of the server, which load nothing from elsewhere: one to try adapters, and one with what the routes take."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import sha256
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fastapi.responses import HTMLResponse

TRY, ROUTES = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.html", "routes.html"))


def page(html: str) -> HTMLResponse:
    """An answer with a page, in which no scripts run but those that stand in it now."""
    texts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    scripts = " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in texts) or "'none'"
    policy = (
        f"default-src 'none'; script-src {scripts}; connect-src 'self'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(html, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})


def routes_page(openapi: dict[str, Any]) -> HTMLResponse:
    """The page of all routes."""
    schemas = openapi["components"]["schemas"]
    routes = [
        f"<section><h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(route.get('description', ''))}</p>"
        f"<table>{_fields(route, schemas)}</table></section>"
        for path, methods in openapi["paths"].items()
        for method, route in methods.items()
    ]
    return page(Template(ROUTES).substitute(routes="\n".join(routes)))


def _fields(route: dict[str, Any], schemas: dict[str, Any]) -> str:
    """Rows of a table: parameters, and fields of the body."""
    fields = [
        (parameter["name"], parameter["in"], parameter["schema"], parameter["required"])
        for parameter in route.get("parameters", ())
    ]
    for content in route.get("requestBody", {"content": {}})["content"].values():
        body = schemas.get(_type(content["schema"]), content["schema"])
        required = body.get("required", ())
        fields += [(name, "body", field, name in required) for name, field in body["properties"].items()]
    return "\n".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{place}</td><td>{escape(_type(schema))}</td>"
        f"<td>{'required' if is_required else escape(json.dumps(schema.get('default')))}</td></tr>"
        for name, place, schema, is_required in fields
    )


def _type(schema: dict[str, Any]) -> str:
    """What a field takes, in words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return ", ".join(map(json.dumps, values)) or str(schema.get("type", "anything"))
