"""The command line: `steerguard demo | fit | sweep | ... | check | evaluate | serve | export`.

What it knows: arguments, progress, and how to say what went wrong. Everything it does is one call into the library,
under the same name. Heavy modules are imported by the command that needs them, so `--help` answers at once. `shared` has
the options that several commands take; a module beside it has the commands of one kind.

Exit status: 0 done, 1 a guard does not steer, 2 the input cannot be used, 130 interrupted.
"""

from __future__ import annotations

import os
import sys

import typer

from steerguard.cli import evaluating, making, using  # noqa: F401  (commands register themselves)
from steerguard.cli.shared import app
from steerguard.errors import InputError, SteerguardError

__all__ = ["app", "main"]


def main() -> None:
    """The entry point: what went wrong becomes one sentence, never a traceback."""
    interrupted = "interrupted; what was finished is kept, the same command goes on from there"
    try:
        status = app(standalone_mode=False)
        if status == 130:  # how typer reports Ctrl-C
            _told(interrupted, 130)
    except SteerguardError as error:
        status = _told(str(error), 2 if isinstance(error, InputError) else 1)
    except typer.TyperException as error:  # a wrong option or argument
        status = _told(f"{error}; try --help", 2)
    except (KeyboardInterrupt, typer.Abort):
        status = _told(interrupted, 130)
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    raise SystemExit(status or 0)


def _told(sentence: str, status: int) -> int:
    print(f"steerguard: {sentence}", file=sys.stderr)  # noqa: T201
    return status
