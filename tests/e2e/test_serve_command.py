"""``tarsia serve`` as a process, over the embedded base: asked, published to, killed, drained; and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from e2e.made_adapters import saved
from PIL import Image

import tarsia.cli
from tarsia.adapter import Host, open_base
from tarsia.library import Library

LORA = (("lora", "language.*.{q,v}; vision.*.{q,v}", {"rank": 4, "alpha": 8.0}),)
QUESTION = [{"role": "user", "content": "what do you see?"}]


class Server:
    """A server that runs, and a client of it."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tarsia", "serve", "mini-1", "--port", "0", "--json", "--threads", "1", *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.errors: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "".join(self.errors)
        self.ready = json.loads(line)
        self.url = self.ready["address"]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def ask(self, model: str, **more: Any) -> Any:
        options = {"messages": QUESTION, "max_tokens": 12, "temperature": 0, **more}
        return self.client.chat.completions.create(model=model, **options)

    @property
    def worker(self) -> int:
        """The worker's process id."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def end(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


def until(true: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def host() -> Host:
    return open_base("mini-1")


@pytest.fixture(scope="module")
def shelf(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shelf")
    library = Library.make(root / "library")
    for name, seed in (("cats", 1), ("dogs", 2)):
        library.publish(saved(host, root / name, LORA, seed, 0.3), name)
    saved(host, root / "new", LORA, 3, 0.3)
    saved(host, root / "unproved", LORA, 4, 0.3, probed=False)
    return root


@pytest.fixture(scope="module")
def server(shelf: Path) -> Iterator[Server]:
    paths = os.pathsep.join(path for path in sys.path if path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        patch.setenv("OMP_NUM_THREADS", "1")
        made = Server("--library", str(shelf / "library"), "--allow-load", str(shelf), "--log", str(shelf / "log"))
        yield made
        made.end()


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the worker")


def test_it_says_what_it_serves_and_answers(server: Server, shelf: Path) -> None:
    assert (server.ready["base"], server.ready["adapters"], server.ready["pictures"]) == ("mini-1", 2, True)
    answers = {name: server.ask(name).choices[0].message.content for name in ("mini-1", "cats", "dogs")}
    assert len(set(answers.values())) == 3  # each its own
    assert {model.id for model in server.client.models.list()} == {"mini-1", "cats", "dogs"}
    with pytest.raises(openai.NotFoundError):
        server.ask("birds")
    records = [json.loads(line) for line in (shelf / "log").read_text().splitlines()]
    asked = [record["status"] for record in records if record.get("route") == "/v1/chat/completions"]
    assert asked[-4:] == [200, 200, 200, 404]


def test_a_picture_is_read(server: Server) -> None:
    shown = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 30)).save(shown, "PNG")
    url = "data:image/png;base64," + base64.b64encode(shown.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
    answer = server.ask("mini-1", messages=[{"role": "user", "content": parts}])
    assert answer.usage.prompt_tokens > 64 and answer.choices[0].message.content


def test_the_worker_has_one_openmp_runtime_and_ignores_what_is_the_servers(server: Server) -> None:
    maps = Path(f"/proc/{server.worker}/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if any(name in line for name in ("libgomp", "libiomp", "libomp"))}
    assert len(runtimes) == 1
    pid = server.worker
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    assert server.ask("mini-1").choices and server.worker == pid


def test_what_is_published_while_it_serves_is_served(server: Server, shelf: Path) -> None:
    before = server.ask("cats").choices[0].message.content
    Library.open(shelf / "library").publish(shelf / "new", "cats")
    answer = server.ask("cats")
    assert answer.tarsia["adapter"]["version"] == 2
    assert answer.choices[0].message.content != before == server.ask("cats@1").choices[0].message.content


def load(server: Server, name: str, folder: Path) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
    return httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)


def test_a_folder_is_loaded_under_a_name_and_an_unproved_one_is_not(server: Server, shelf: Path) -> None:
    assert load(server, "mine", shelf / "new").status_code == 200
    Library.open(shelf / "library").publish(shelf / "new", "kittens")
    assert server.ask("mine").choices[0].message.content == server.ask("kittens").choices[0].message.content
    refused = load(server, "bad", shelf / "unproved")
    assert refused.status_code == 400 and "proves" in refused.text
    with pytest.raises(openai.NotFoundError):
        server.ask("bad")


def test_who_leaves_takes_nothing_more(server: Server) -> None:
    def figure(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"tarsia_worker_{name} ")))

    before = figure("completion_tokens_total")
    stream = server.ask("dogs", stream=True, max_tokens=900, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    until(lambda: figure("running") == 0 and figure("completion_tokens_total") > before)
    assert figure("completion_tokens_total") - before < 850


def test_a_killed_worker_is_told_replaced_and_has_what_was_loaded(server: Server, shelf: Path) -> None:
    assert load(server, "mine", shelf / "new").status_code == 200
    before, mine = server.worker, server.ask("mine").choices[0].message.content
    stream = server.ask("mini-1", stream=True, max_tokens=900, extra_body={"ignore_eos": True})
    next(iter(stream))
    os.kill(before, signal.SIGKILL)
    with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
        for _ in stream:
            pass
    refused = httpx.get(f"{server.url}/ready")
    assert refused.status_code == 503 and refused.headers["retry-after"]
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
    assert gone(before) and server.worker != before
    assert server.ask("mine").choices[0].message.content == mine
    assert "tarsia_worker_restarts_total 1.0" in httpx.get(f"{server.url}/metrics").text
    assert any("signal 9" in line for line in server.errors)


def test_terminated_it_finishes_what_runs_and_leaves_nothing(server: Server) -> None:
    worker = server.worker
    stream = server.ask("mini-1", stream=True, max_tokens=300, extra_body={"ignore_eos": True})
    chunks = iter(stream)
    next(chunks)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
    last = [*chunks][-1]
    assert last.choices[0].finish_reason == "length"
    assert server.process.wait(120) == 0
    until(lambda: gone(worker), 60)


def test_no_worker_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, subprocess, sys, time\n"
        "code = 'import sys, time; from tarsia.serve.worker import bound; bound(int(sys.argv[1]));' "
        "'print(1, flush=True); time.sleep(600)'\n"
        "child = subprocess.Popen([sys.executable, '-c', code, str(os.getpid())], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not gone(child)
    parent.kill()
    parent.wait()
    until(lambda: gone(child), 60)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert tarsia.cli.main(["serve", *map(str, words)]) == 2
    told = capsys.readouterr()
    assert not told.out and told.err.startswith("tarsia: ")
    return told.err


@pytest.mark.parametrize(
    "options, said",
    [
        ([], "Which base is to be served"),
        (["mini-1", "--library", "nowhere"], "There is no library"),
        (["mini-1", "--host", "0.0.0.0"], "needs a key"),
        (["mini-1", "--port", "65536"], "no such port"),
        (["mini-1", "--max-rows", "0"], "too small"),
        (["mini-1", "--cache-bytes", "lots"], "no size"),
        (["mini-1", "--adapter-bytes", "0"], "too small"),
        (["mini-1", "--keys", "nowhere"], "keys can not be read"),
        (["mini-1", "--allow-load", "nowhere"], "no such folder"),
        (["mini-1", "--four-bits", "[1]"], "no form of 4 bits"),
        (["mini-1", "--drain", "-1"], "no time"),
        (["mini-1", "--unproved", "perhaps"], "allow"),
        (["mini-1", "--log", "nowhere/log", "--port", "0"], "log can not be written"),
        (["mini-1", "--new-key", ""], "name"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *options)


def test_a_port_that_is_taken_is_told_before_anything_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "can not listen" in refused(capsys, "mini-1", "--port", taken.getsockname()[1])


def test_a_base_that_can_not_be_opened_is_told_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    assert tarsia.cli.main(["serve", str(tmp_path / "no-base"), "--port", "0"]) == 2
    told = capsys.readouterr().err
    assert told.count("no-base") >= 1 and "to do:" in told and "Traceback" not in told


def test_a_new_key_is_told_once_and_its_entry_is_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tarsia.serve.http.keys import Keyring

    assert tarsia.cli.main(["serve", "--new-key", "acme"]) == 0
    entry, secret = capsys.readouterr()  # a redirected entry holds no secret
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n{entry}")
    file.chmod(0o600)
    key = Keyring.read(file).find(secret.strip().rpartition(" ")[2])
    assert key is not None and key.name == "acme"


def test_its_help_needs_neither_torch_nor_a_server() -> None:
    code = (
        "import sys, contextlib, tarsia.cli\n"
        "with contextlib.suppress(SystemExit): tarsia.cli.main(['serve', '--help'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'fastapi', 'uvicorn')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "--adapter-bytes" in done.stdout
