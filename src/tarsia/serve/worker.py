"""The process that holds the base: ``python -m tarsia.serve.worker FD PARENT``, FD being its end of a socket pair.

    receiver (a thread)   commands off the socket; requests go to the readers, all else to the engine's thread
    readers               messages and pictures into prompts (`desk`)
    the main thread       takes what has been read, steps the engine, says what came of it (`turns`)
    sender (a thread)     events onto the socket (`post`)

The worker ends when its socket closes, and dies with PARENT, the process that started it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
from typing import Any, Final

import torch

from tarsia.core.errors import ServeError, TarsiaError
from tarsia.serve import wire
from tarsia.serve.frames import BrokenFrame, Connection
from tarsia.serve.post import Closed, Inbox, Outbox, Told
from tarsia.serve.turns import DONE, Worker

UNABLE: Final = 2
"""The exit code where what it was told to open can not be."""


def bound(parent: int) -> None:
    """Die with ``parent``, and leave interruptions to it. Raises OSError where the system refuses."""
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever stops the server stops all of it, in its own order
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL) != 0:  # PR_SET_PDEATHSIG
            raise OSError(ctypes.get_errno(), "prctl")
        if os.getppid() != parent:
            os._exit(DONE)  # it was gone before that


def _no_room(error: torch.OutOfMemoryError) -> ServeError:
    return ServeError(
        "refused",
        "The GPU has not enough memory for this base and its cache.",
        given=str(error).partition(". ")[0],
        do="serve it in 4 bits (--four-bits nf4), or give --cache-bytes and --picture-bytes less",
    )


def main() -> int:
    """Serve what the first frame says; the exit code."""
    connection = Connection(socket.socket(fileno=int(sys.argv[1])))
    bound(int(sys.argv[2]))
    frame = connection.receive()
    if frame is None:
        return DONE
    configure = wire.command_in(frame)
    if not isinstance(configure, wire.Configure):
        raise BrokenFrame("A worker is configured first.", given=type(configure).__name__)
    inbox: Inbox[Any] = Inbox()
    outbox = Outbox(connection, lambda why: inbox.put(Closed(why)))
    told = logging.getLogger("tarsia")
    told.addHandler(Told(outbox))
    told.setLevel(logging.INFO)
    try:
        from tarsia.serve.opening import opened

        house = opened(configure, lambda what: outbox.put(wire.Opening(what=what)))
        code = Worker(house, configure, connection, outbox, inbox).run()
    except (TarsiaError, torch.OutOfMemoryError) as error:
        if not isinstance(error, TarsiaError):
            error = _no_room(error)
        outbox.put(wire.Unable.model_validate(wire.Failure.facts(error)))
        code = UNABLE
    outbox.close()
    return code


if __name__ == "__main__":
    ended = main()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(ended)  # readers may be in the middle of a picture: nobody waits for it
