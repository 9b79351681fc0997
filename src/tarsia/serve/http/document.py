"""The OpenAPI document, with what FastAPI can not know, and a page of it that asks no other host for scripts."""

from __future__ import annotations

from html import escape
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

import tarsia
from tarsia.serve.http.answers import ChatChunk
from tarsia.serve.http.gate import OPEN
from tarsia.serve.http.schema import ChatRequest, LoadRequest, UnloadRequest

_BODIES: Final[tuple[type[BaseModel], ...]] = (ChatRequest, LoadRequest, UnloadRequest, ChatChunk)
_REF: Final = "#/components/schemas/{model}"
_AGAIN: Final = {"description": "Seconds until it is worth to come again.", "schema": {"type": "integer", "minimum": 1}}


def document(app: FastAPI) -> dict[str, Any]:
    """The document: bodies that are read strictly, no 422 (it is never given), keys, Retry-After."""
    found = get_openapi(title=app.title, version=tarsia.__version__, description=app.description, routes=app.routes)
    schemas = found["components"]["schemas"]
    for model in _BODIES:
        described = model.model_json_schema(ref_template=_REF)
        schemas.update(described.pop("$defs", {}))
        schemas[model.__name__] = described
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN else [{"key": []}]
            operation["responses"].pop("422", None)
            for status, answer in operation["responses"].items():
                if status != "200":  # FastAPI takes them to be of the type of the answer that is none of these
                    answer["content"] = {"application/json": {"schema": {"$ref": _REF.format(model="ErrorAnswer")}}}
            for status in {"429", "503"} & operation["responses"].keys():
                operation["responses"][status]["headers"] = {"Retry-After": _AGAIN}
    return found


_STYLE: Final = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}code{font-size:.9em}"
    "td,th{text-align:left;padding:.15rem .8rem .15rem 0;vertical-align:top}@media(prefers-color-scheme:dark)"
    "{body{background:#111;color:#ddd}a{color:#8bf}}"
)


def page(told: dict[str, Any]) -> str:
    """The document for people, without scripts."""
    parts = [f"<h1>{escape(told['info']['title'])}</h1><p>{escape(told['info']['description'])}</p>"]
    parts.append('<p>The whole of it: <a href="/openapi.json">/openapi.json</a></p>')
    for path, operations in told["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('summary', ''))}. {escape(operation.get('description', ''))}</p>")
            parts.append(_fields(told, operation))
            rows = (
                f"<tr><td>{status}</td><td>{escape(answer.get('description', ''))}</td></tr>"
                for status, answer in sorted(operation["responses"].items())
            )
            parts.append(f"<table><tr><th>Status</th><th></th></tr>{''.join(rows)}</table>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>Tarsia</title></head><body>{"".join(parts)}</body></html>'
    )


def _fields(told: dict[str, Any], operation: dict[str, Any]) -> str:
    """A body's fields."""
    try:
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    except KeyError:
        return ""
    body = told["components"]["schemas"][name]
    rows = (
        f"<tr><td><code>{escape(field)}</code>{' (has to be said)' if field in body.get('required', ()) else ''}</td>"
        f"<td>{escape(facts.get('description', ''))}</td></tr>"
        for field, facts in body["properties"].items()
    )
    return f"<table><tr><th>Field</th><th></th></tr>{''.join(rows)}</table>"
