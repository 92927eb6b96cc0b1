"""The `stratoscope` command: one file of this folder per subcommand, imported only when it is
used."""

from __future__ import annotations

import shutil
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from stratoscope import catalogue
from stratoscope.errors import StratoscopeError

FOLDER = Path(__file__).parent


class Failure(click.ClickException):
    """A refusal, printed as one paragraph on stderr."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code

    def show(self, file: Any = None) -> None:
        width = min(shutil.get_terminal_size().columns, 100)
        text = textwrap.fill(
            f"Error: {self.message}", width, break_long_words=False, break_on_hyphens=False
        )
        click.echo(text, file=file, err=file is None)


class Commands(click.Group):
    """Subcommands by file name: `cli/name.py` defines `command`, and its docstring opens with the
    summary."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(path.stem.replace("_", "-") for path in FOLDER.glob("[!_]*.py"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        return import_module(f"{__name__}.{cmd_name.replace('-', '_')}").command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        names = self.list_commands(ctx)
        if args[0] not in names and not args[0].startswith("-"):
            from stratoscope.cli import _options

            hint = _options.meant(args[0], names, f"The commands are {', '.join(names)}.")
            raise click.UsageError(f"There is no command {args[0]!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        files = {name: FOLDER / f"{name.replace('-', '_')}.py" for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, catalogue.summary(path.read_text("utf-8"))) for name, path in files.items()]
            )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; without --debug, whatever goes wrong ends in one paragraph and an
        exit code."""
        if ctx.params["debug"]:
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise  # click's own business
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(130)
        except StratoscopeError as error:
            raise Failure(str(error), 2) from error
        except Exception as error:
            text = (
                f"Unexpected {type(error).__name__}: {error}. Stratoscope or the model's code "
                "is at fault."
            )
            raise Failure(f"{text} Run `stratoscope --debug ...` to see where.", 1) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the whole traceback when something fails.")
@click.version_option(package_name="stratoscope")
def main(debug: bool) -> None:
    """See, measure and change what a transformer represents, on the Hugging Face model you already
    have."""
