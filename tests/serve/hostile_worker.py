"""The worker as it is, in a process that writes down every step outside of it: ``hostile`` reads that.

    python hostile_worker.py SEEN FD PARENT

SEEN is a file that lines are added to; what follows is what the supervisor gives every worker.
"""

from __future__ import annotations

import os
import sys

EVENTS = frozenset(
    (
        *(
            "open",
            "os.listdir",
            "os.scandir",
            "os.mkdir",
            "os.remove",
            "os.rename",
            "os.chmod",
            "os.link",
            "os.symlink",
        ),
        *("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen", "sqlite3.connect"),
        *(
            "socket.connect",
            "socket.bind",
            "socket.getaddrinfo",
            "socket.gethostbyname",
            "socket.sendto",
            "ctypes.dlopen",
        ),
    )
)
"""Audit events of steps outside of a process."""


def main() -> int:
    """The worker's own main, watched from its first line on."""
    seen = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND)

    def hear(event: str, args: tuple[object, ...]) -> None:
        if event in EVENTS and not (event == "open" and isinstance(args[0], int)):
            os.write(seen, f"{event} {args[:2]!r}\n"[:500].encode("utf8", "backslashreplace"))

    sys.addaudithook(hear)
    from tarsia.serve.worker import main as worker

    return worker()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # as the worker ends: nothing waits for threads that are in the middle of something
