"""The command line: `attn-dispatch doctor`, `explain`, `bench`, `tune`, `verify`,
`generate` and `demo`.

Heavy modules are imported when a command runs, so that `--help` is fast.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
import typer.core

from attn_dispatch.cli import bench, demo, doctor, explain, generate, tune, verify
from attn_dispatch.cli.streams import OutputError, checked_streams, print_error
from attn_dispatch.errors import AttnDispatchError, summary_of
from attn_dispatch.version import __version__

__all__ = ["app", "main"]

#: Exceptions of the environment, which are no bugs: files, memory, values.
_EXTERNAL_ERRORS = (OSError, MemoryError, RecursionError, OverflowError, UnicodeError)

#: The exit code for invalid input, and if stdout cannot be written.
_INVALID = 2

_UsageError: Any = typer.BadParameter.__base__


class _Commands(typer.core.TyperGroup):
    """The commands. Invalid input ends in one line on stderr and exit code 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run a command, see `click.Command.main`."""
        try:
            with checked_streams():
                code = self._run(*args, **extra)
        except OutputError:
            code = _INVALID
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, *args: Any, **extra: Any) -> int:
        """Run a command, print its error, and return its exit code."""
        try:
            code = super().main(*args, **(extra | {"standalone_mode": False}))
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except AttnDispatchError as error:
            print_error(str(error))
        except typer.Abort:
            return 130
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error.format_message(), end="")  # the help, if it is not printed already
            else:
                print_error(error.format_message())
        except _EXTERNAL_ERRORS as error:
            print_error(f"{summary_of(error)}.")
        return _INVALID


app = typer.Typer(
    name="attn-dispatch",
    cls=_Commands,
    help="Show, measure and check which attention backend computes a layer exactly, and why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"attn-dispatch {__version__}")
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


_COMMANDS = (
    doctor.doctor,
    explain.explain,
    bench.bench,
    tune.tune,
    verify.verify,
    generate.generate,
    demo.demo,
)
for _command in _COMMANDS:
    app.command()(_command)


def main() -> None:
    """Run the command line: the entry point `attn-dispatch`."""
    app()
