"""A worker without a base, for the tests of whoever talks to one: ``python pretended_worker.py FD``.

It says back what it was told, word by word; some words make it misbehave:

    wait        say one word and nothing more until cancelled
    die         end by SIGKILL after one word
    garbage     send bytes that are no frame after one word
    hang        never read or say anything again
    fail        a failed event

The model's name makes it misbehave at the start: "unable", "crash", "crash-after-FILE" (crashes once FILE is there).
"""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from tarsia.core.errors import ServeError
from tarsia.serve import wire
from tarsia.serve.frames import Connection


class Pretended:
    def __init__(self, connection):
        self.connection = connection
        self.open = set()
        self.names = {}
        self.draining = threading.Event()

    def say(self, *events):
        self.connection.send(*map(wire.framed, events))

    def run(self):
        configure = wire.command_in(self.connection.receive())
        self.begin(configure)
        while (frame := self.connection.receive()) is not None:
            command = wire.command_in(frame)
            match command:
                case wire.Generate():
                    self.open.add(command.id)
                    self.generate(command, frame.blobs)
                case wire.Cancel():
                    self.open.discard(command.id)
                    self.say(wire.Log(level="info", what=f"cancelled {command.id}"))
                case wire.Load():
                    self.load(command)
                case wire.Unload():
                    self.names.pop(command.name, None)
                    self.say(wire.Answer(id=command.id))
                case wire.Models():
                    self.say(wire.Answer(id=command.id, models=[model(*each) for each in self.names.items()]))
                case wire.Drain():
                    self.draining.set()
                case wire.Stop():
                    return
            if self.draining.is_set() and not self.open:
                self.say(wire.Drained())
                return

    def begin(self, configure):
        name, _, marker = configure.model.partition("-after-")
        if name == "unable":
            error = ServeError("invalid", "There is no such base.", given=configure.model, do="check the name")
            self.say(wire.Unable.model_validate(wire.Failure.facts(error)))
            sys.exit(2)
        if name == "crash" and (not marker or Path(marker).exists()):
            os._exit(3)
        self.say(wire.Opening(what="the base"), READY)

    def load(self, command):
        if command.source == "bad" or Path(command.source + ".gone").exists():
            error = ServeError("refused", "There is no such adapter.", given=command.source)
            return self.say(wire.Answer(id=command.id, failure=wire.Failure.of(error)))
        if command.source == "nothing":
            return self.say(wire.Answer(id=command.id))
        self.names[command.name] = command.source
        return self.say(wire.Answer(id=command.id, models=[model(command.name, command.source)]))

    def generate(self, command, pictures):
        if command.adapter is not None and command.adapter not in self.names:
            error = ServeError("unknown_adapter", "There is no such adapter.", given=command.adapter)
            self.open.discard(command.id)
            return self.say(wire.Failed.about(command.id, error))
        text = " ".join(p.text for m in command.messages for p in m.content if isinstance(p, wire.TextPart))
        first = text.split()[0]
        self.say(wire.Started(id=command.id, prompt_tokens=len(text.split()), picture_hits=len(pictures)))
        self.say(wire.Text(id=command.id, text=first, tokens=1))
        if first == "finish":  # when it is asked to drain
            threading.Thread(target=self.later, args=(command.id,), daemon=True).start()
        elif first == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif first == "garbage":
            self.connection._socket.sendall(b"no frame of ours at all")
        elif first == "hang":
            time.sleep(3600)
        elif first == "fail":
            self.open.discard(command.id)
            self.say(wire.Failed.about(command.id, ServeError("internal", "Something broke.")))
        elif first != "wait":
            self.rest(command, text.split()[1:])
        return None

    def later(self, id_):
        self.draining.wait()
        self.say(wire.Done(id=id_, reason="stop", completion_tokens=1), wire.Drained())
        os._exit(0)

    def rest(self, command, words):
        for choice in range(command.sampling.choices):
            self.say(*(wire.Text(id=command.id, choice=choice, text=f" {word}", tokens=1) for word in words))
            self.say(wire.Done(id=command.id, choice=choice, reason="stop", completion_tokens=1 + len(words)))
        self.open.discard(command.id)


READY = wire.Ready(
    model="pretended",
    family="none",
    form="float32",
    digest="0" * 64,
    dtype="float32",
    device="cpu",
    context=128,
    most_tokens=256,
    vocabulary=100,
    pictures=True,
    router=False,
    seconds=0.0,
)


def model(name, source):
    return wire.Model(name=name, version=None, hash="1" * 64, source=source)


if __name__ == "__main__":
    Pretended(Connection(socket.socket(fileno=int(sys.argv[1])))).run()
