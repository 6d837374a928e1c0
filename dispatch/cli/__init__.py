"""The command line: `attn-dispatch doctor`, `explain`, `bench`, `tune`, `verify` and
`demo`.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
import typer.core

from attn_dispatch.cli import bench, demo, doctor, explain, tune, verify
from attn_dispatch.cli.streams import OutputError, checked_streams, tell_error
from attn_dispatch.errors import AttnDispatchError, summary_of
from attn_dispatch.version import __version__

__all__ = ["app", "main"]


#: What makes a command impossible, and is no error of the library: files, memory, values.
_MISFORTUNES = (OSError, MemoryError, RecursionError, OverflowError, UnicodeError)

#: Where what goes wrong is the caller's, or stdout's.
_WRONG = 2

_UsageError: Any = typer.BadParameter.__base__


class _Commands(typer.core.TyperGroup):
    """The commands. Whatever is rejected becomes one line and exit code 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run a command, see `click.Command.main`."""
        try:
            with checked_streams():
                code = self._run(*args, **extra)
        except OutputError:
            code = _WRONG
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, *args: Any, **extra: Any) -> int:
        """A command's exit code; what went wrong is printed."""
        try:
            code = super().main(*args, **(extra | {"standalone_mode": False}))
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except AttnDispatchError as error:
            tell_error(str(error))
        except typer.Abort:
            return 130
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error.format_message(), end="")  # the help, if it is not printed already
            else:
                tell_error(error.format_message())
        except _MISFORTUNES as error:
            tell_error(f"{summary_of(error)}.")
        return _WRONG


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


for _module in (doctor, explain, bench, tune, verify, demo):
    _module.register(app)


def main() -> None:
    """Run the command line: the entry point `attn-dispatch`."""
    app()
