"""A small OpenAI-compatible server for the load generator to talk to: what a model says follows from its name.

``cut`` ends its stream before its end, ``mid`` tells an error in it, ``busy`` answers 429, ``broken`` 500 with no JSON,
``away`` redirects to ``elsewhere``, ``slow`` never ends, ``mixed`` says another thing when two are asked at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse

PIECES = 4


class Feigned:
    def __init__(self, models: list[str]) -> None:
        self.models, self.asked, self.most, self.running = models, [], 0, 0
        self.keys: set[str | None] = set()
        self.elsewhere = "http://127.0.0.1:9/"
        self.app = FastAPI()
        self.app.get("/v1/models")(self.listed)
        self.app.get("/metrics")(self.metrics)
        self.app.post("/v1/chat/completions")(self.chat)

    async def listed(self, request: Request) -> Any:
        self.keys.add(request.headers.get("authorization"))
        base = {"id": "base", "object": "model", "parent": None}
        return {"object": "list", "data": [base, *({"id": name, "parent": "base"} for name in self.models)]}

    async def metrics(self) -> Any:
        asked = len(self.asked)
        lines = [
            "# TYPE hits counter", f"hits_total {asked}", "# TYPE now gauge", f"now {asked}",
            "# TYPE by counter",
            f'by_total{{adapter="a",kind="x"}} {asked}',
            f'by_total{{adapter="b",kind="x"}} {asked}',
            "# TYPE old counter", "old_total 5",
        ]  # fmt: skip
        return PlainTextResponse("\n".join([*lines, ""]))

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        error = {"error": {"message": "too much <b>at once</b>", "type": "x", "code": "overloaded"}}
        match body["model"]:
            case "busy":
                return JSONResponse(error, 429, {"Retry-After": "1"})
            case "broken":
                return PlainTextResponse("what?", 500)
            case "away":
                return RedirectResponse(self.elsewhere, 307)
        return StreamingResponse(self._told(body), media_type="text/event-stream")

    async def _told(self, body: dict[str, Any]) -> Any:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.002)
            said = hashlib.sha256(json.dumps([body["model"], body["messages"]]).encode()).hexdigest()[:8]
            if body["model"] == "mixed" and self.running > 1:
                said = "somebody else's"
            for i in range(PIECES):
                text = f"{said} " if i == 0 else f"{i} "
                yield _event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})
                if body["model"] == "slow":
                    await asyncio.sleep(60)
                if body["model"] == "cut":
                    return
                if body["model"] == "mid":
                    yield _event({"error": {"message": "the worker is gone", "code": "lost"}})
                    return
            yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            yield _event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": PIECES}})
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


@contextmanager
def serving(feigned: Feigned) -> Iterator[str]:
    """Serve until the block ends; gives the address."""
    server = uvicorn.Server(uvicorn.Config(feigned.app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the feigned server did not start")
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
