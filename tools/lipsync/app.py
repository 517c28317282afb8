"""The `lipsync` command: puts the subcommands together, and turns errors into one line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from compositor.errors import LipsyncError

if TYPE_CHECKING:
    import typer

COMMANDS: Mapping[str, str] = {
    "tenant": "tenant:app",
    "encoder": "models:encoder_app",
    "model": "models:model_app",
    "bench": "bench:app",
    "up": "serving:up",
    "serve": "serving:serve",
    "triton": "serving:triton",
    "speak": "speaking:speak",
    "talk": "talking:talk",
    "top": "watching:top",
    "demo": "demo:demo",
    "doctor": "doctor:doctor",
}
"""Where each command is, in `commands`: an app of subcommands, or a function."""
_SERVICES = ("up", "serve", "triton")
"""Those that run until they are told to stop."""


def build(names: Collection[str] = tuple(COMMANDS)) -> typer.Typer:
    """The command with these subcommands; the modules of the others, some of which take a while, are not imported."""
    import typer

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Talking avatars for many tenants from one Triton.",
    )
    app.callback()(_keep_names)
    for name in names:
        module, attribute = COMMANDS[name].split(":")
        found = getattr(import_module(f".commands.{module}", __package__), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    return app


def _keep_names() -> None:
    # Without a callback, an app of one command would do without that command's name.
    pass


def main() -> None:
    """Exit status: 0 done, 1 refused or failed (one line on stderr), 2 wrong usage, 130 interrupted."""
    wanted = [name for name in sys.argv[1:2] if name in COMMANDS]
    if wanted and wanted[0] in _SERVICES:
        # All that is imported from here on takes half a second, in which there is nothing yet to end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(0))
    try:
        build(wanted or COMMANDS)()
    except KeyboardInterrupt:
        sys.exit(130)
    except LipsyncError as error:
        _complain(error.message)
    except OSError as error:
        _complain(": ".join(filter(None, [str(error.filename or ""), error.strerror or str(error)])))
    sys.exit(1)


def _complain(message: str) -> None:
    """One line on stderr for each of the message's, as it is: a path in it may hold anything, brackets included."""
    from rich.text import Text

    from .commands.console import err

    for line in message.splitlines():
        printable = "".join(character if character.isprintable() else "?" for character in line)
        err.print(Text.assemble(("error: ", "bold red"), printable), soft_wrap=True)
