"""The command line: ``tarsia VERB ...``, one file a verb.

Exit codes: 0 done, 1 a check failed, 2 a refusal (its text on stderr), 130 interrupted, 141 nobody
reads the output any more, 143 a run that SIGTERM ended. Anything else is a defect of Tarsia and keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tarsia.cli.parser import parser

__all__ = ["main"]


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken as an interruption."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. ``argv`` leaves out the program's name."""
    try:
        words = sys.argv[1:] if argv is None else argv
        args = parser(next(iter(words), None)).parse_args(words)
        with _log_on_stderr():
            code: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(error.args[0] if error.args else "interrupted", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    except BrokenPipeError:
        # The interpreter flushes once more at exit, which would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from tarsia.core.errors import TarsiaError

        refusal = error if isinstance(error, TarsiaError) else _no_memory(error)
        if refusal is None:
            raise
        from tarsia.core.visible import visible

        print("\n".join(map(visible, f"tarsia: {refusal}".split("\n"))), file=sys.stderr)
        return 2
    return code


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Show what is logged as every other notice is, so that one sees whose it is."""
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(logging.Formatter("tarsia: warning: %(message)s"))
    shown.setLevel(logging.WARNING)
    log = logging.getLogger("tarsia")
    log.addHandler(shown)
    try:
        yield
    finally:
        log.removeHandler(shown)


def _no_memory(error: Exception) -> Exception | None:
    """The refusal for a GPU that is too small for what was asked of it; None for any other error."""
    from tarsia.core.errors import ConfigError

    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return None
    return ConfigError(
        "The GPU has not enough memory for this.",
        given=str(error).partition(". ")[0],
        do="take a smaller batch (and accumulate), checkpointing: true, precision bfloat16, or smaller pictures",
    )
