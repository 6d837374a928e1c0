"""The command line: `attn-dispatch doctor`, `explain`, `bench`, `tune`, `verify` and
`demo`.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
import typer.core

from attn_dispatch import __version__
from attn_dispatch.cli import bench, demo, doctor, explain, tune, verify
from attn_dispatch.errors import AttnDispatchError

__all__ = ["app", "main"]


class _Commands(typer.core.TyperGroup):
    """The commands; whatever the library refuses becomes one message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AttnDispatchError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="attn-dispatch",
    cls=_Commands,
    help="Which attention backend computes exactly what is asked, here or elsewhere, and why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attn-dispatch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


for _module in (doctor, explain, bench, tune, verify, demo):
    _module.register(app)


def main() -> None:
    """Run the command line: the entry point `attn-dispatch`."""
    for stream in (sys.stdout, sys.stderr):
        # Names of devices and errors of libraries may hold what a terminal's encoding does not.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app()
