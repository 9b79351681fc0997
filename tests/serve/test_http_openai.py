"""What OpenAI's own client makes of the server."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serve.http_world import HASH, SECRETS, Running, chat, data_url, keyring, picture_chat, png, running

from tarsia.serve import wire
from tarsia.serve.http.keys import Key
from tarsia.serve.http.models import listed
from tarsia.serve.http.settings import Settings
from tarsia.serve.supervise import State


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    with running(Settings(keys=keyring(), loading=True, sources=("/allowed",))) as server:
        yield server


OPEN = contextlib.ExitStack()  # a client that garbage collection closes may lose its sockets first, with a warning


@pytest.fixture(autouse=True)
def _clients_are_closed() -> Iterator[None]:
    with OPEN:
        yield


def client(server: Running, key: str = "none") -> openai.OpenAI:
    key = SECRETS.get(key, key)
    return OPEN.enter_context(openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=20))


def ask(server: Running, text: str = "hello", key: str = "none", **more: Any) -> Any:
    return client(server, key).chat.completions.create(**chat(text, **more))


def test_an_answer(plain: Running) -> None:
    answer = ask(plain)
    assert answer.choices[0].message.content == "you said hello"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 3, 14)
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert answer.tarsia == {"adapter": None, "routed": None, "cached_tokens": 4}
    assert answer._request_id == answer.id


def test_the_answer_says_which_version_answered(plain: Running) -> None:
    raw = client(plain).chat.completions.with_raw_response.create(**chat(model="acme-ocr@3"))
    assert raw.headers["x-tarsia-adapter"] == "acme-ocr@3"
    assert raw.headers["x-tarsia-adapter-hash"] == HASH
    assert raw.parse().tarsia["adapter"] == {"name": "acme-ocr", "version": 3, "hash": HASH, "source": None}
    assert plain.fake.asked[-1][0].adapter == "acme-ocr@3"


def test_the_documented_example_runs(
    plain: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf8")
    example = page.partition("```python\n")[2].partition("```")[0].replace("http://127.0.0.1:8000", plain.url)
    (tmp_path / "sign.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    exec(example.replace('"signs"', '"acme-ocr"'), names := {"__name__": "example"})
    OPEN.enter_context(names["client"])
    assert "you said Which sign is this?" in capsys.readouterr().out


def test_an_alias_says_which_version_of_which_adapter_answered(keyed: Running) -> None:
    keyed.fake.aliases.update({"acme-live": "acme-ocr", "acme-theirs": "rival-plan@7", "acme-file": "/somewhere/x"})
    try:
        names = ("live", "theirs", "file", "ocr")
        told = {name: ask(keyed, key="acme", model=f"acme-{name}").tarsia["adapter"] for name in names}
        roots = {model.id: model.root for model in client(keyed, "acme").models.list()}
    finally:
        keyed.fake.aliases.clear()
    assert {name: one["source"] for name, one in told.items()} == {
        "live": "acme-ocr@3", "theirs": None, "file": None, "ocr": None
    }  # fmt: skip
    assert told["live"]["name"] == "acme-live" and told["live"]["version"] == 3
    assert roots["acme-live"] == roots["acme-ocr"] == "acme-ocr@3"
    assert roots["acme-theirs"] == "acme-theirs" and roots["acme-file"] == "acme-file"


def test_auto_says_what_was_chosen(plain: Running) -> None:
    answer = ask(plain, model="auto")
    assert answer.tarsia["routed"] == {"adapter": "acme-ocr", "confidence": 0.9}
    assert answer.tarsia["adapter"]["name"] == "acme-ocr"


def test_a_stream_ends_with_its_usage(plain: Running) -> None:
    chunks = list(ask(plain, stream=True, stream_options={"include_usage": True}, n=2))
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["you said hello"] * 2
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"] * 2
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[0].tarsia["cached_tokens"] == 4


def test_a_stream_without_usage_ends_with_done(plain: Running) -> None:
    answer = httpx.post(f"{plain.url}/v1/chat/completions", json=chat(stream=True))
    events = answer.text.split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""]
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


def test_pictures_keep_their_places(plain: Running) -> None:
    first, second = png(4, 5), png(6, 7, "JPEG")
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(first)}},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": data_url(second, "image/jpeg"), "detail": "auto"}},
    ]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    client(plain).chat.completions.create(model="mini-1", messages=messages)  # type: ignore[arg-type]
    command, pictures = plain.fake.asked[-1]
    assert [part.type for part in command.messages[1].content] == ["image", "text", "image"]
    assert command.messages[0] == wire.ChatMessage(role="system", content=(wire.TextPart(text="be brief"),))
    assert pictures == [first, second]


@pytest.mark.parametrize("kind, media", [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("GIF", "gif")])
def test_every_type_of_picture(plain: Running, kind: str, media: str) -> None:
    raw = png(3, 5, kind)
    client(plain).chat.completions.create(**picture_chat(data_url(raw, f"image/{media}")))  # type: ignore[arg-type]
    assert plain.fake.asked[-1][1] == [raw]


def test_log_probabilities(plain: Running) -> None:
    entries = ask(plain, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["you", " said", " hello"]
    assert bytes(entries[1].bytes) == b" said" and len(entries[0].top_logprobs) == 2
    assert ask(plain, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(plain).choices[0].logprobs is None
    chunks = ask(plain, logprobs=True, stream=True)
    assert next(e.token for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content) == "you"


def test_how_it_is_drawn_reaches_the_worker(plain: Running) -> None:
    more = {"top_k": 7, "ignore_eos": True}
    ask(
        plain, max_completion_tokens=9, temperature=0, top_p=0.5, n=3, stop=["a", "b"], seed=-5, user="me",
        presence_penalty=1, frequency_penalty=-2, logit_bias={"17": -100}, extra_body=more,
    )  # fmt: skip
    sampling = plain.fake.asked[-1][0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.0, 0.5, 7)
    assert (sampling.choices, sampling.stop, sampling.seed, sampling.bias) == (3, ("a", "b"), -5, {17: -100.0})
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.ignore_end) == (1.0, -2.0, True)


def test_stop_and_length(plain: Running) -> None:
    assert ask(plain, stop=" hello").choices[0].message.content == "you said"
    cut = ask(plain, max_tokens=2).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("you said", "length")


@pytest.mark.parametrize(
    "how",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"guided_json": {"type": "object"}}},
        {"extra_body": {"guided_json": '{"type": "object"}'}},
    ],
)
def test_an_answer_by_a_schema(plain: Running, how: dict[str, Any]) -> None:
    assert json.loads(ask(plain, **how).choices[0].message.content) == {"answer": 42}
    assert json.loads(plain.fake.asked[-1][0].sampling.schema or "") == {"type": "object"}


def test_what_was_answered_can_be_said_back(plain: Running) -> None:
    message = ask(plain).choices[0].message
    messages = [{"role": "user", "content": "a"}, message, {"role": "user", "content": "b"}]
    client(plain).chat.completions.create(model="mini-1", messages=messages)  # type: ignore[arg-type]
    assert [said.role for said in plain.fake.asked[-1][0].messages] == ["user", "assistant", "user"]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    "more, name",
    [
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": "none"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temperature": 3}, "temperature"),
        ({"n": 9}, "n: 9"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 5000}, "max_tokens"),
    ],
)
def test_nothing_is_left_out_silently(plain: Running, more: dict[str, Any], name: str) -> None:
    before = len(plain.fake.asked)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(plain, **more)
    assert name in caught.value.message
    assert caught.value.type == "invalid_request_error"
    assert len(plain.fake.asked) == before


def _content(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    "more, place, told",
    [
        ({"messages": [{"role": "developer", "content": "x"}]}, "messages.0.role", "'developer'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'tool'"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "has to be said"),
        ({"messages": [{"role": "x" * 999, "content": "x"}]}, "messages.0.role", "(1001 characters)"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "has to be said"),
        ({"messages": [{"role": "user", "content": "x", "user": 1}]}, "messages.0.user", "not supported"),
        (_content({"type": "audio"}), "messages.0.content.0.type", "'audio'"),
        (_content({"type": "text", "text": 1}), "messages.0.content.0.text", "string"),
        (_content({"type": "image_url"}), "messages.0.content.0.image_url", "has to be said"),
        (_content({"type": "image_url", "image_url": "http://x"}), "messages.0.content.0.image_url", ""),
        (_content({"type": "image_url", "image_url": {}}), "messages.0.content.0.image_url.url", "has to be said"),
        (_content({"type": "image_url", "image_url": {"url": "x", "detail": "low"}}),
         "messages.0.content.0.image_url.detail", "auto"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "has to be said"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": False}}},
         "response_format.json_schema.strict", "can not be false"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema", "has to be said"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_place(plain: Running, more: dict[str, Any], place: str, told: str) -> None:
    answer = httpx.post(f"{plain.url}/v1/chat/completions", json=chat() | more)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, place)
    given = next(line.split()[1] for line in error["message"].splitlines() if "given:" in line)
    assert given.rstrip(":") == place and told in error["message"]


def test_a_query_is_not_left_out_silently(plain: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="after"):
        ask(plain, extra_query={"api-version": "1"})
    assert httpx.get(f"{plain.url}/v1/models?limit=1").status_code == 400


@pytest.mark.parametrize("detail", ["low", "high"])
def test_a_detail_that_is_not_kept_is_refused(plain: Running, detail: str) -> None:
    body = picture_chat(data_url())
    body["messages"][0]["content"][1]["image_url"]["detail"] = detail
    with pytest.raises(openai.BadRequestError, match="detail"):
        client(plain).chat.completions.create(**body)


@pytest.mark.parametrize(
    "text, error",
    [
        ("!fail invalid", openai.BadRequestError),
        ("!fail too_long", openai.BadRequestError),
        ("!fail refused", openai.BadRequestError),
        ("!fail unknown_adapter", openai.NotFoundError),
        ("!fail overloaded", openai.RateLimitError),
        ("!fail lost", openai.InternalServerError),
        ("!fail internal", openai.InternalServerError),
        ("!fail timeout", openai.InternalServerError),
        ("!other", openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_worker_refuses(plain: Running, text: str, error: type[openai.APIStatusError], stream: bool) -> None:
    """The status comes before the stream does, so a client that streams has the same error."""
    with pytest.raises(error) as caught:
        ask(plain, text, stream=stream)
    assert "/etc/secret" not in str(caught.value) and "rival" not in str(caught.value)
    assert plain.fake.open == set()
    again = caught.value.response.headers.get("retry-after")
    assert (again is not None) == (caught.value.status_code in (429, 503))


def test_a_lost_stream_is_an_error_and_never_done(plain: Running) -> None:
    raw = httpx.post(f"{plain.url}/v1/chat/completions", json=chat("!lose", stream=True)).text
    assert "[DONE]" not in raw
    assert json.loads(raw.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "worker_lost"
    with pytest.raises(openai.APIError, match="lost"):
        list(ask(plain, "!lose", stream=True))
    with pytest.raises(openai.InternalServerError):
        ask(plain, "!lose")
    assert plain.logged()[-1]["outcome"] == "lost"


def test_what_nothing_proves_is_listed_as_that() -> None:
    key = Key(name="k", sha256="0" * 64, tenant="t", adapters=["*"])
    held = [wire.Model(name=name, version=1, hash=HASH, unproved=why) for name, why in (("a", None), ("b", "no probe"))]
    found = {model.id: model.tarsia.get("unproved") for model in listed(held, None, None, key).data}
    assert found == {"a": None, "b": "no probe"}


def test_what_is_of_another_base_is_not_listed() -> None:
    key = Key(name="k", sha256="0" * 64, tenant="t", adapters=["*"])
    held = [wire.Model(name=name, version=1, hash=HASH, foreign=name == "b") for name in "ab"]
    assert [model.id for model in listed(held, "base", None, key).data] == ["base", "a"]


def test_who_may_see_all_is_told_what_is_there_of_a_name(plain: Running, keyed: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean rival-plan"):
        ask(plain, model="rival-plam")
    with pytest.raises(openai.NotFoundError) as caught:
        ask(keyed, key="rival", model="rival-plam")
    assert "did you mean" not in str(caught.value)


def test_models(plain: Running) -> None:
    found = {model.id: model for model in client(plain).models.list().data}
    assert set(found) == {"mini-1", "acme-ocr", "acme-tone", "rival-plan"}
    told = found["acme-ocr"].model_dump()
    assert (told["parent"], told["root"], told["max_model_len"]) == ("mini-1", "acme-ocr@3", 512)
    assert told["permission"][0]["object"] == "model_permission"
    assert client(plain).models.retrieve("acme-ocr@3").id == "acme-ocr"
    assert client(plain).models.retrieve("acme-ocr#ab12").id == "acme-ocr"
    for name in ("acme-ocr@4", "nobody", "acme-ocr#ff00", "../../etc/passwd"):
        with pytest.raises(openai.NotFoundError):
            client(plain).models.retrieve(name)


@pytest.mark.parametrize("name", ["nobody", "nobody@2", "Acme-OCR", "../x", "", "a\0b", "acme-ocr@", "acme-ocr@1@2"])
def test_an_unknown_adapter_is_never_the_base(plain: Running, name: str) -> None:
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
        ask(plain, model=name)


def test_while_no_worker_is_ready(plain: Running) -> None:
    plain.fake.state = State.LOST
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(plain)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "2"
        assert httpx.get(f"{plain.url}/ready").status_code == 503
        assert httpx.get(f"{plain.url}/v1/models").status_code == 503
        assert httpx.get(f"{plain.url}/health").json() == {"status": "ok"}
    finally:
        plain.fake.state = State.READY
    assert httpx.get(f"{plain.url}/ready").json() == {"status": "ready"}


def test_a_base_without_eyes(plain: Running) -> None:
    assert plain.fake.ready is not None
    blind = plain.fake.ready.model_copy(update={"pictures": False, "router": False})
    seeing, plain.fake.ready = plain.fake.ready, blind
    try:
        with pytest.raises(openai.BadRequestError, match="does not see"):
            client(plain).chat.completions.create(**picture_chat(data_url()))
        with pytest.raises(openai.BadRequestError, match="does not choose"):
            ask(plain, model="auto")
    finally:
        plain.fake.ready = seeing


# Keys ----------------------------------------------------------------------------------------------------------------


def test_a_picture_that_is_nobodys_is_told_as_that(keyed: Running) -> None:
    """The worker says that it knows no adapter for it; the key may not have the base."""
    with pytest.raises(openai.PermissionDeniedError, match="base") as caught:
        ask(keyed, "!fail unknown_adapter", key="rival", model="auto")
    assert isinstance(caught.value.body, dict) and caught.value.body["code"] == "abstained"
    assert "/v1/models" not in caught.value.message


def test_a_source_that_is_not_there_is_named(keyed: Running) -> None:
    answer = post(keyed, "/v1/load_lora_adapter", {"lora_name": "x3", "lora_path": "absent@9"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (404, "lora_path", "model_not_found")
    assert "absent@9" in error["message"] and "/v1/models" not in error["message"]


def test_damage_is_the_servers_fault_and_no_path_of_it_is_told(plain: Running) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        ask(plain, "!fail damaged")
    error = caught.value.body
    assert isinstance(error, dict) and error["code"] == "adapter_damaged" and error["type"] == "server_error"
    assert "/etc" not in caught.value.message


def test_keys(keyed: Running) -> None:
    assert ask(keyed, key="acme", model="acme-ocr").choices[0].message.content == "you said hello"
    assert keyed.fake.asked[-1][0].tenant == "acme"
    for wrong in ("none", "tarsia-" + "a" * 43, "x" * 4000, SECRETS["acme"][:-1]):
        with pytest.raises(openai.AuthenticationError):
            ask(keyed, key=wrong)
    assert httpx.get(f"{keyed.url}/v1/models").status_code == 401
    basic = base64.b64encode(SECRETS["acme"].encode()).decode()
    assert httpx.get(f"{keyed.url}/v1/models", headers={"authorization": f"Basic {basic}"}).status_code == 401


def test_another_tenants_adapter_is_as_if_it_were_not_there(keyed: Running) -> None:
    said = []
    for name in ("rival-plan", "rival-none", "nobody", "rival-plan@7", "rival-plan#ab12", "acme-none"):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(keyed, key="acme", model=name)
        said.append((caught.value.body, {*caught.value.response.headers} - {"date"}))
        with pytest.raises(openai.NotFoundError) as listed:
            client(keyed, "acme").models.retrieve(name)
        said.append((listed.value.body, {*listed.value.response.headers} - {"date"}))
    assert all(one == said[0] for one in said)
    assert {model.id for model in client(keyed, "acme").models.list()} == {"mini-1", "acme-ocr", "acme-tone"}
    assert {model.id for model in client(keyed, "rival").models.list()} == {"rival-plan"}
    with pytest.raises(openai.NotFoundError):
        ask(keyed, key="rival", model="mini-1")


def test_the_router_may_not_choose_what_the_key_may_not_use(keyed: Running) -> None:
    with pytest.raises(openai.InternalServerError, match="nothing of it is sent"):
        ask(keyed, key="rival", model="auto")
    assert keyed.fake.asked[-1][0].may == ("rival-*",)
    assert ask(keyed, key="acme", model="auto").tarsia["adapter"]["name"] == "acme-ocr"
    assert ask(keyed, key="root", model="auto") and keyed.fake.asked[-1][0].may is None
    keyed.fake.chosen = None
    try:
        assert ask(keyed, key="acme", model="auto").tarsia["adapter"] is None
        with pytest.raises(openai.PermissionDeniedError, match="may not use the base"):
            ask(keyed, key="rival", model="auto")
    finally:
        keyed.fake.chosen = "acme-ocr"


def test_only_administrators_see_metrics(keyed: Running) -> None:
    for key, status in (("acme", 403), ("root", 200)):
        answer = httpx.get(f"{keyed.url}/metrics", headers={"authorization": f"Bearer {SECRETS[key]}"})
        assert answer.status_code == status
    assert httpx.get(f"{keyed.url}/metrics").status_code == 401


def test_rates(keyed: Running) -> None:
    assert ask(keyed, key="slow", max_tokens=60).usage.total_tokens == 14  # the other 46 come back
    with pytest.raises(openai.BadRequestError, match="in a minute"):
        ask(keyed, key="slow", max_tokens=60, n=2)
    with pytest.raises(openai.RateLimitError, match="tokens"):
        ask(keyed, key="slow", max_tokens=100)
    with pytest.raises(openai.RateLimitError, match="requests") as caught:
        ask(keyed, key="slow")
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 20


# Loading -------------------------------------------------------------------------------------------------------------


def post(server: Running, path: str, body: dict[str, Any], key: str = "root") -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, headers={"authorization": f"Bearer {SECRETS.get(key, key)}"})


def test_loading_and_unloading_as_vllm_says_it(keyed: Running) -> None:
    body = {"lora_name": "mine", "lora_path": "acme-ocr@3"}
    loaded = post(keyed, "/v1/load_lora_adapter", body)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    assert ask(keyed, key="root", model="mine").tarsia["adapter"]["name"] == "mine"
    again = post(keyed, "/v1/load_lora_adapter", body)
    assert again.status_code == 400 and "already been loaded" in again.json()["error"]["message"]
    assert post(keyed, "/v1/load_lora_adapter", {**body, "load_inplace": True}).status_code == 200
    gone = post(keyed, "/v1/unload_lora_adapter", {"lora_name": "mine"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    assert post(keyed, "/v1/unload_lora_adapter", {"lora_name": "mine"}).status_code == 404
    shelved = post(keyed, "/v1/unload_lora_adapter", {"lora_name": "acme-ocr"})
    assert shelved.status_code == 404 and "the library's" in shelved.json()["error"]["message"]


@pytest.mark.parametrize(
    "body, status",
    [
        ({"lora_name": "acme-ocr", "lora_path": "acme-tone"}, 400),
        ({"lora_name": "mini-1", "lora_path": "acme-tone"}, 400),
        ({"lora_name": "auto", "lora_path": "acme-tone"}, 400),
        ({"lora_name": "../x", "lora_path": "acme-tone"}, 400),
        ({"lora_name": "x", "lora_path": "/etc"}, 400),
        ({"lora_name": "x", "lora_path": "/allowed/../etc"}, 400),
        ({"lora_name": "x", "lora_path": "/allowedx"}, 400),
        ({"lora_name": "x", "lora_path": "/allowed/a\0b"}, 400),
        ({"lora_name": "x", "lora_path": "broken"}, 400),
        ({"lora_name": "x"}, 400),
        ({"lora_name": "x", "lora_path": "acme-tone", "lora_int_id": 3}, 400),
        ({"lora_name": "x", "lora_path": "/allowed/a"}, 200),
    ],
)
def test_what_may_be_loaded(keyed: Running, body: dict[str, Any], status: int) -> None:
    assert post(keyed, "/v1/load_lora_adapter", body).status_code == status


def test_loading_is_for_administrators_and_off_by_itself(keyed: Running, plain: Running) -> None:
    body = {"lora_name": "x2", "lora_path": "acme-ocr"}
    assert post(keyed, "/v1/load_lora_adapter", body, "acme").status_code == 403
    assert post(plain, "/v1/load_lora_adapter", body).status_code == 403
    assert post(plain, "/v1/unload_lora_adapter", {"lora_name": "x2"}).status_code == 403
