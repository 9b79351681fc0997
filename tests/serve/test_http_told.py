"""What the server says of itself: its log, its metrics, its document; and what it never says."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve.http_world import SECRETS, Running, chat, data_url, keyring, picture_chat, running

from tarsia.serve.http.logs import Journal, user_digest
from tarsia.serve.http.metrics import BASE, OTHER, Metrics
from tarsia.serve.http.schema import ChatRequest
from tarsia.serve.http.settings import Settings
from tarsia.serve.wire import Stats


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    with running(Settings(keys=keyring())) as server:
        yield server


def ask(server: Running, key: str = "acme", **body: object) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {SECRETS[key]}"}
    )


def test_a_line_for_every_request_and_nothing_of_what_was_said(keyed: Running) -> None:
    before = len(keyed.logged())
    url = data_url()
    ask(keyed, **chat("my secret words", model="acme-ocr", user="jane@example.org"))
    ask(keyed, **picture_chat(url, model="acme-ocr"))
    ask(keyed, **chat("my secret words", model="rival-plan"))
    ask(keyed, **chat("!lose my secret words", model="acme-ocr", tools=["my secret words"]))
    httpx.get(f"{keyed.url}/my-secret-path?secret=words", headers={"authorization": "Bearer wrong-secret"})
    assert keyed.soon(lambda: len(keyed.logged()) == before + 5)
    first, second, third, fourth, fifth = keyed.logged()[before:]
    assert (first["tenant"], first["key"], first["adapter"], first["status"]) == (
        "acme",
        "acme",
        f"acme-ocr@3#{'ab12':0<24}",
        200,
    )
    assert (first["prompt_tokens"], first["completion_tokens"], first["outcome"]) == (11, 5, "ok")
    assert first["user"] == user_digest("jane@example.org") and first["first_seconds"] <= first["seconds"]
    assert first["route"] == "/v1/chat/completions" and second["status"] == 200
    assert (third["status"], third["code"]) == (404, "model_not_found")
    assert (fourth["status"], fourth["code"]) == (400, "invalid_request")
    assert (fifth["status"], fifth["route"]) == (401, None)
    text = keyed.log.getvalue()
    for never in ("secret", "jane", url[22:60], *SECRETS.values()):
        assert never not in text


@pytest.mark.parametrize("letter", ["\n", "\r", "\x1b", "\0", "\x7f", "\x85", "\u2028", '"', "\\", "\ud800", "\x9b"])
def test_no_letter_forges_a_line(letter: str) -> None:
    out = io.StringIO()
    Journal(out).write("request", {"id": f'a{letter}{{"at": "now"}}', "long": "x" * 10_000})
    (line,) = out.getvalue().splitlines()
    assert re.fullmatch(r"[ -~]+", line) and len(line) < 600
    assert json.loads(line)["id"] == f'a{letter}{{"at": "now"}}'


def test_an_error_of_the_server_is_told_to_nobody(keyed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place of it is logged; its text, which may hold what a client said, is nowhere."""
    from tarsia.serve.http import chat as inside

    def fails(*args: object) -> None:
        raise RuntimeError("my secret words")

    monkeypatch.setattr(inside, "check", fails)
    answer = ask(keyed, **chat())
    assert answer.status_code == 500 and "secret" not in answer.text
    assert keyed.soon(lambda: any(line["what"] == "error" for line in keyed.logged()))
    (line,) = [line for line in keyed.logged() if line["what"] == "error"]
    assert line["error"].startswith("RuntimeError at ") and line["id"] == answer.headers["x-request-id"]


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(keyed: Running) -> None:
    def now() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        answer = httpx.get(f"{keyed.url}/metrics", headers={"authorization": f"Bearer {SECRETS['root']}"})
        return samples(answer.text)

    before = now()
    ask(keyed, **chat(model="acme-tone"))
    ask(keyed, **chat())
    ask(keyed, **chat("!lose", model="acme-tone", stream=True))
    ask(keyed, **chat(model="x-unknown-name"))
    after = now()

    def more(name: str, **labels: str) -> float:
        at = (name, tuple(sorted(labels.items())))
        return after.get(at, 0) - before.get(at, 0)

    assert more("tarsia_requests_total", adapter="acme-tone", outcome="ok") == 1
    assert more("tarsia_requests_total", adapter="acme-tone", outcome="lost") == 1
    assert more("tarsia_requests_total", adapter=BASE, outcome="ok") == 1
    assert more("tarsia_tokens_total", adapter="acme-tone", kind="completion") == 5
    assert more("tarsia_time_to_first_token_seconds_count") == 3
    assert more("tarsia_time_per_output_token_seconds_count") == 3
    assert more("tarsia_refused_total", status="404") == 1
    assert after["tarsia_worker_picture_hits_total", ()] == 5 and after["tarsia_worker_adapter_bytes", ()] == 77
    assert after["tarsia_queue_requests", ()] == after["tarsia_running_requests", ()] == 0
    assert "x-unknown-name" not in str(after)


def test_labels_are_bounded() -> None:
    metrics = Metrics(3, Stats, lambda: 2)
    labels = [metrics.label(f"a{i}") for i in range(6)]
    assert labels == ["a0", "a1", "a2", OTHER, OTHER, OTHER] and metrics.label("a1") == "a1"
    assert metrics.label(None) == BASE
    page = metrics.page().decode()
    assert "tarsia_adapters_without_label 1.0" in page and "tarsia_worker_restarts_total 2.0" in page
    assert "beyond 3 adapters" in page


def test_the_document_is_what_is_done(keyed: Running) -> None:
    told = httpx.get(f"{keyed.url}/openapi.json").json()
    assert "422" not in json.dumps(told) and "ValidationError" not in json.dumps(told)
    refs = set(re.findall(r"#/components/schemas/([\w-]+)", json.dumps(told)))
    assert refs <= told["components"]["schemas"].keys()
    assert set(told["paths"]) == {
        "/v1/chat/completions", "/v1/models", "/v1/models/{model}", "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter", "/health", "/ready", "/metrics",
    }  # fmt: skip
    assert set(told["components"]["schemas"]["ChatRequest"]["properties"]) == set(ChatRequest.model_fields)
    answers = told["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(answers) == {"200", *map(str, (400, 401, 403, 404, 408, 413, 415, 421, 429, 500, 503, 504))}
    assert answers["429"]["headers"]["Retry-After"] and "text/event-stream" in answers["200"]["content"]


def test_the_page_asks_no_other_host(keyed: Running) -> None:
    answer = httpx.get(f"{keyed.url}/docs")
    assert answer.status_code == 200 and "max_tokens" in answer.text
    assert "<script" not in answer.text and not re.search(r"(src|href)=\"(?!/openapi)", answer.text)
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_without_a_document() -> None:
    with running(Settings(docs=False)) as server:
        assert httpx.get(f"{server.url}/openapi.json").status_code == httpx.get(f"{server.url}/docs").status_code == 404


def test_this_process_has_no_torch() -> None:
    code = (
        "import sys, tarsia.serve.http.app, tarsia.serve.http.listen\nprint({'torch', 'transformers'} & {*sys.modules})"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"


def test_a_base_is_called_by_its_name_and_not_by_its_path() -> None:
    from serve.http_world import READY

    from tarsia.serve.http.models import base_name

    assert base_name("mine", READY) == "mine" and base_name(None, None) is None
    for model, name in (
        ("/a/b/small", "small"),
        ("./x/small", "small"),
        ("org/small", "org/small"),
        ("mini-1", "mini-1"),
    ):
        assert base_name(None, READY.model_copy(update={"model": model})) == name
