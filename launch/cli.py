"""What all commands share: how they are found, how they end, and the options that mean the same everywhere.

A command is a module of `launch` with a click command called `main`. What parsing needs is imported at its top, what
working needs (torch above all) inside its function: so `--help` answers at once, and a test says so.

    status 0    all went well
           1    something failed: a run, a rank, a claim
           2    the user's mistake, told in a line `error: ...` before anything was run
         130    interrupted by Ctrl-C or SIGTERM
"""

import functools
import math
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import click

EXIT_FAILED, EXIT_MISTAKE, EXIT_INTERRUPTED = 1, 2, 130
GOES_ON = "the same command goes on from here"
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120, "show_default": True}

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Mistake(click.ClickException):
    """Report a mistake of the user: one line on stderr, status 2."""

    exit_code = EXIT_MISTAKE


class Failure(click.ClickException):
    """Report that something that was started failed, in one line on stderr that says enough: status 1."""

    exit_code = EXIT_FAILED


@contextmanager
def mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """Turn these exceptions, ValueError by default, into a `Mistake`."""
    try:
        yield
    except kinds or (ValueError,) as error:  # noqa: B030 a tuple either way
        raise Mistake(describe_error(error)) from error


@contextmanager
def failures(*kinds: type[Exception]) -> Iterator[None]:
    """Turn these exceptions into a `Failure`."""
    try:
        yield
    except kinds as error:
        raise Failure(describe_error(error)) from error


def describe_error(error: Exception) -> str:
    """Return the exception's message; that of a failed system call is the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def print_error(message: str) -> None:
    """Print `error: message` on stderr; of several ranks only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)


class EndsAlike(click.Command):
    """End a click command with the status of all our commands, and report mistakes in one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command and exit; without standalone_mode return its status and let a ClickException through."""
        run = functools.partial(super().main, *args, standalone_mode=False, **extra)
        if not standalone_mode:
            return run()
        try:
            status = run()
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            status = EXIT_MISTAKE
        except click.ClickException as error:
            print_error(error.format_message())
            status = error.exit_code
        except click.Abort:
            status = EXIT_INTERRUPTED
        sys.exit(status or 0)


class Command(EndsAlike):
    """Run a function as a command: the function returns its status, None where all went well.

    when_interrupted: what becomes of the work, appended to the word "interrupted". examples: lines of its help.
    """

    def __init__(self, *args: Any, when_interrupted: str = "", examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.when_interrupted, self.examples = when_interrupted, tuple(examples)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn an interruption or a closed pipe into its status."""
        # A cluster's or a container's way to ask for an end leaves the same state as Ctrl-C.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            status = super().invoke(ctx)
            sys.stdout.flush()  # here, where a closed pipe can still be told from a failure
            return status
        except KeyboardInterrupt:
            print(": ".join(filter(None, ("interrupted", self.when_interrupted))), file=sys.stderr)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            # click takes every broken pipe for the reader of stdout going away; one to a process of ours is an error.
            if not _stdout_is_closed():
                traceback.print_exc()
            return EXIT_FAILED
        finally:
            signal.signal(signal.SIGTERM, before)


def _stdout_is_closed() -> bool:
    """Return whether nobody reads stdout any more (`... | head`); what is still to be written there is dropped then."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # no file: captured
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are always told
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


class LazyGroup(EndsAlike, click.Group):
    """List commands under headings, and import each when it is called.

    sections: heading -> name -> module that holds the command as `main`. hidden: name -> module, of names not listed.
    """

    def __init__(
        self,
        *args: Any,
        sections: Mapping[str, Mapping[str, str]],
        hidden: Mapping[str, str] | None = None,
        **attributes: Any,
    ) -> None:
        super().__init__(*args, **attributes)
        self.sections = sections
        self.modules = {name: module for commands in sections.values() for name, module in commands.items()}
        self.all_modules = self.modules | dict(hidden or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands that the help lists."""
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a name, imported now; None where there is none."""
        module = self.all_modules.get(cmd_name)
        return import_module(module).main if module else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments name; the error for an unknown one suggests similar names."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            # click looks for similar names among commands that are there already.
            raise click.exceptions.NoSuchCommand(args[0], possibilities=self.modules, ctx=ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands into the help, under their headings."""
        for heading, names in self.sections.items():
            commands = {name: self.get_command(ctx, name) for name in names}
            with formatter.section(heading):
                formatter.write_dl([(name, found.get_short_help_str(90)) for name, found in commands.items() if found])


def command(
    name: str,
    description: str | None,
    *,
    summary: str,
    examples: Sequence[str] = (),
    notes: str = "",
    **attributes: Any,
) -> Callable[[Callable[..., Any]], Command]:
    """Make a function a command. description: its help, a module's docstring; summary: its line in the group's help.

    examples: what follows the command's name, with a # before a remark. notes: a paragraph below them.
    """
    shown = [f"pss-bench {name} {example}".rstrip() for example in examples]
    paragraphs = ["\n  ".join(["\b\nExamples:", *shown])] if shown else []
    return click.command(
        name.rpartition(" ")[2],
        cls=Command,
        help=keep_lines(description or ""),
        short_help=summary,
        epilog="\n\n".join([*paragraphs, *filter(None, [notes])]),
        context_settings=SETTINGS,
        examples=shown,
        **attributes,
    )


def keep_lines(text: str) -> str:
    """Mark the indented paragraphs, whose lines click would otherwise fill."""
    return "\n\n".join(f"\b\n{part}" if part.startswith(" ") else part for part in text.split("\n\n"))


def group(name: str, description: str | None, *, summary: str = "", **attributes: Any) -> Callable[..., LazyGroup]:
    """Make a function a `LazyGroup`; attributes: its sections."""
    return click.group(
        name, cls=LazyGroup, help=description, short_help=summary, context_settings=SETTINGS, **attributes
    )


class CommaList(click.ParamType):
    """Parse values of one type, separated by commas: 0,1,2. An option gets a tuple of them, each once."""

    def __init__(self, kind: click.ParamType | type, metavar: str = "N") -> None:
        self.kind = click.types.convert_type(kind)
        self.name = f"{metavar},..."

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return how the help shows a value: N,..."""
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Return the values as a tuple; fail where one is missing, mistaken or given twice."""
        if not isinstance(value, str):
            return tuple(value)  # a default that is a tuple already
        parts = [part.strip() for part in value.split(",")]
        if not all(parts):
            self.fail(f"{value!r}: a value is missing between the commas", param, ctx)
        values = tuple(self.kind.convert(part, param, ctx) for part in parts)
        if len(set(values)) < len(values):
            self.fail(f"{value}: a value is given twice", param, ctx)
        return values


class FiniteFloat(click.FloatRange):
    """Parse a number within bounds that is neither nan nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number; fail where it is out of bounds or not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value}: a finite number is expected", param, ctx)
        return number


AUC = FiniteFloat(0.5, 1.0, min_open=True, max_open=True)


class Override(click.ParamType):
    """Parse a positional `section.key=value`, laid over what a config file says."""

    name = "section.key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the override as it was given; fail where it has no key with a section, or no value."""
        key, equals, _ = value.partition("=")
        if not equals or "." not in key:
            raise click.UsageError(f"override {value!r}: must look like section.key=value", ctx)
        return value


class OutputDirectory(click.Path):
    """Parse a directory for what a command writes, made when something is written."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path of the directory; fail where it names a file."""
        if Path(value).suffix in (".html", ".json", ".md") and not Path(value).is_dir():
            self.fail(f"{value}: names a file; a directory is expected", param, ctx)
        return super().convert(value, param, ctx)


def overrides_argument(**attributes: Any) -> Decorator:
    """Add the positional overrides, passed as `overrides`: a tuple of `section.key=value`."""
    return click.argument("overrides", nargs=-1, type=Override(), metavar="[section.key=value]...", **attributes)


def items_argument(what: str, **attributes: Any) -> Decorator:
    """Add positionals of which some are overrides, passed as `items`; `split_items` parts them."""
    return click.argument("items", nargs=-1, metavar=f"[{what} | section.key=value]...", **attributes)


def split_items(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what is no override, and the overrides."""
    return [item for item in items if "=" not in item], [item for item in items if "=" in item]


def json_option(what: str = "Print the figures as JSON instead of the table.") -> Decorator:
    """Add `--json`, passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=what)


def output_option(default: str | None = None, text: str = "Directory of what is written.") -> Decorator:
    """Add `--output`, passed as a Path, or None without a default."""
    return click.option("--output", type=OutputDirectory(), default=default, metavar="DIR", help=text)


def seeds_option(default: str | None = "0", text: str = "Values of run.seed.") -> Decorator:
    """Add `--seeds`, passed as a tuple of ints, or None without a default."""
    return click.option("--seeds", type=CommaList(click.IntRange(min=0)), default=default, help=text)


def jobs_option(text: str = "Runs at a time (default: cores / threads of a run).") -> Decorator:
    """Add `--jobs`, passed as an int or None."""
    return click.option("--jobs", type=int, metavar="N", help=text)


def runner_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where runs are made, passed as `runner`: the fields of RunnerOptions by their names."""

    @jobs_option("Runs at a time (default: what the cores hold; on a cluster, what it takes).")
    @click.option(
        "--scheduler",
        metavar="NAME",
        help="Make every run a torchx job there: slurm, kubernetes, ... or local_cwd; its options: .torchxconfig.",
    )
    @click.option(
        "--ranks-per-node", type=int, metavar="N", help="Of jobs with --scheduler (default: all on one node)."
    )
    @click.option(
        "--job",
        multiple=True,
        metavar="OPTION=VALUE",
        help="Option of the component with --scheduler, such as memMB=64000 or gpu=8; may be given repeatedly.",
    )
    @functools.wraps(function)
    def with_runner(**given: Any) -> Any:
        """Pass the options of a runner on as one dictionary."""
        runner = {name: given.pop(name) for name in ("jobs", "scheduler", "ranks_per_node", "job")}
        return function(runner=runner, **given)

    return with_runner
