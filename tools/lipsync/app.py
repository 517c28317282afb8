"""The `lipsync` command: puts the subcommands together, and turns errors into one line and an exit status."""

from __future__ import annotations

import sys

import typer
from rich.text import Text

from compositor.errors import LipsyncError

from .commands import bench, demo, models, serving, speaking, talking, tenant
from .commands.console import err

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Talking avatars for many tenants from one Triton.",
)
app.add_typer(tenant.app, name="tenant")
app.add_typer(models.encoder_app, name="encoder")
app.add_typer(models.model_app, name="model")
app.add_typer(bench.app, name="bench")
app.command()(serving.up)
app.command()(serving.serve)
app.command()(serving.triton)
app.command()(speaking.speak)
app.command()(talking.talk)
app.command()(demo.demo)


def main() -> None:
    """Exit status: 0 done, 1 refused or failed (one line on stderr), 2 wrong usage, 130 interrupted."""
    try:
        app()
    except LipsyncError as error:
        _complain(error.message)
    except OSError as error:
        _complain(": ".join(filter(None, [str(error.filename or ""), error.strerror or str(error)])))
    sys.exit(1)


def _complain(message: str) -> None:
    """One line on stderr for each of the message's, as it is: a path in it may hold anything, brackets included."""
    for line in message.splitlines():
        printable = "".join(character if character.isprintable() else "?" for character in line)
        err.print(Text.assemble(("error: ", "bold red"), printable), soft_wrap=True)
