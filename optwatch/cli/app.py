"""The commands and their options. What a command does is in a module of its own, loaded when it runs.

ruff's PLC0415 (imports at the top) is off here for that reason: `optwatch top` must not wait for torch.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import optwatch


class _Seconds(click.FloatRange):
    """A number of seconds that can be waited for."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; NaN, which is within every range, is refused."""
        found = float(super().convert(value, param, ctx))
        if math.isnan(found):
            self.fail(f"{value} is not a number of seconds.", param, ctx)
        return found


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(optwatch.__version__, prog_name="optwatch")
def cli() -> None:
    """Low-bit optimizers that measure their own quantisation error."""


@cli.command()
@click.option("--steps", type=click.IntRange(min=2), help="Stop after this many steps.  [default: no limit]")
@click.option(
    "--seconds",
    type=_Seconds(min=1, max=1e8),
    help="Stop training after this long.  [default: 120, or no limit when --steps is given]",
)
@click.option(
    "--inject",
    type=click.Choice(["fp32-resume", "nan-loss", "leak"]),
    help="Break the run half-way. fp32-resume: resume a checkpoint as stock PyTorch does, so that the 8-bit state "
    "silently becomes fp32; watch the state bytes leave what was asked for. nan-loss: a batch whose loss is not a "
    "number. leak: gradients are kept and never freed, up to 1 GB. docs/tour.md finds the cause of each.",
)
@click.option(
    "--device", metavar="DEVICE", help="Torch device, e.g. cpu or cuda:1.  [default: the GPU, else the CPU]"
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Texts of 128 bytes a step; fewer are faster.",
)
def demo(
    steps: int | None, seconds: float | None, inject: str | None, device: str | None, batch: int
) -> None:
    """Train a small GPT-2 on the text that every Python carries, and watch it live."""
    try:
        from optwatch.cli.demo import DemoOptions, run_demo
    except ModuleNotFoundError as error:
        raise click.ClickException(f"the demo needs {error.name}, which is not installed") from error
    if steps is None and seconds is None:
        seconds = 120.0
    run_demo(DemoOptions(steps=steps, seconds=seconds, inject=inject, device=device, batch=batch))


@cli.command()
@click.argument("url", required=False)
@click.option(
    "--interval",
    type=_Seconds(min=0.1, max=1e8),
    help="Seconds between scrapes.  [default: 1 on a terminal, 5 when plain lines are written]",
)
@click.option("--once", is_flag=True, help="Print the view once and stop.")
def top(url: str | None, interval: float | None, once: bool) -> None:
    """Show a running agent live, from its metrics endpoint alone.

    URL is the agent's address, e.g. http://127.0.0.1:9464/metrics; by default this user's agent on this machine.
    """
    from optwatch.cli.top import run_top

    run_top(url, interval=interval, once=once)


@cli.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def agent(arguments: tuple[str, ...]) -> None:
    """Run the node's agent in the foreground (`optwatch agent --help`)."""
    from optwatch.agent.__main__ import main as run_agent

    sys.exit(run_agent(list(arguments)))


@cli.command("run", context_settings={"allow_interspersed_args": False})
@click.option(
    "--every",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Full statistics in one of so many steps.",
)
@click.option("--run-id", metavar="ID", help="Name of the run on every series.  [default: made up]")
@click.option("--dir", "directory", metavar="DIR", help="Where the boards lie.  [default: in shared memory]")
@click.option("--no-agent", is_flag=True, help="Start no agent; the boards stay until one takes them.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def run_(
    every: int, run_id: str | None, directory: str | None, no_agent: bool, command: tuple[str, ...]
) -> None:
    """Run COMMAND and watch every optimizer that it makes, without a change to it.

    For example `optwatch run -- python train.py`, or `optwatch run -- torchrun train.py`. Output, exit code and
    signals are the command's own. What could not be watched is noted in run.log beside the boards.
    """
    from optwatch.cli.launch import run_command

    run_command(command, every=every, run_id=run_id, directory=directory, agent=not no_agent)


@cli.group()
def baseline() -> None:
    """Write down what a run cost, for `optwatch check`."""


_RUN = click.argument("where", metavar="[RUN]", required=False)
_RUN_ID = click.option("--run-id", metavar="ID", help="Which run, where RUN holds several.")


@baseline.command()
@_RUN
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write."
)
@_RUN_ID
def record(where: str | None, output: Path, run_id: str | None) -> None:
    """Record a run: state bytes, quantisation error, peak memory, overhead.

    RUN is a directory of boards, a board, a saved metrics page, an agent's address, or the id of a run among this
    user's own boards. Tolerances of a baseline that is replaced are kept.
    """
    from optwatch.cli.gate import Baseline, find_run

    page, found = find_run(where, run_id)
    made = Baseline.of(page, found)
    made.save(output)
    click.echo(f"{output}: {len(made.values)} values of run {found}")


@cli.command()
@_RUN
@click.option(
    "--baseline",
    "path",
    type=click.Path(path_type=Path),
    required=True,
    help="What `optwatch baseline record` wrote.",
)
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="NAME=VALUE",
    help="Replace a tolerance of the file, e.g. peak_memory=0.1 for 10 %.",
)
@click.option(
    "--junit", "xml", type=click.Path(dir_okay=False, path_type=Path), help="Also write JUnit's XML here."
)
@_RUN_ID
def check(
    where: str | None, path: Path, tolerances: tuple[str, ...], xml: Path | None, run_id: str | None
) -> int:
    """Compare a run with a baseline; exit code 1 if a value is out of its tolerance, 2 if nothing can be compared.

    RUN as for `optwatch baseline record`.
    """
    from optwatch.cli.gate import Baseline, check_run

    return check_run(Baseline.load(path), path, where, run_id, tolerances, xml)


@cli.command()
@click.argument("run", metavar="[STORED_RUN]", required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page.  [default: ID.html]",
)
def report(run: str | None, output: Path | None) -> None:
    """Write a stored run as one self-contained HTML page with plots.

    STORED_RUN is a run id, the beginning of one, or a file of the local store; by default the newest run.
    """
    from optwatch.cli.history import write_report

    click.echo(write_report(run, output))


@cli.command()
@click.argument("run", metavar="[STORED_RUN]", required=False)
@click.option("--csv", "kind", flag_value="csv", help="Comma-separated values, by default to stdout.")
@click.option("--parquet", "kind", flag_value="parquet", help="Parquet; needs pyarrow and -o.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The file.")
def export(run: str | None, kind: str | None, output: Path | None) -> None:
    """Hand the history of a stored run on as a table, a row for each series and stretch of time.

    STORED_RUN is as for `optwatch report`.
    """
    from optwatch.cli.history import write_csv, write_parquet

    if kind is None:
        raise click.UsageError("in which format? give --csv or --parquet")
    if kind == "csv":
        write_csv(run, output)
    elif output is None:
        raise click.UsageError("--parquet needs a file to write to: give it with -o")
    else:
        write_parquet(run, output)


@cli.group()
def dashboards() -> None:
    """Grafana's dashboards: install them into a server, or write them to files."""


@dashboards.command()
@click.option("--grafana", "url", required=True, metavar="URL", help="Address of the Grafana server.")
@click.option(
    "--folder", default="", metavar="UID", help="Folder to put them into.  [default: the general one]"
)
@click.option("--force", is_flag=True, help="Overwrite dashboards that were changed by hand there.")
def install(url: str, folder: str, force: bool) -> None:
    """Save the dashboards through Grafana's API; those that are up to date are left as they are.

    The token of a service account is taken from the environment: OPTWATCH_GRAFANA_TOKEN.
    """
    from optwatch.cli.dashboards import install as install_dashboards

    changed = []
    for title, done in install_dashboards(url, folder=folder, force=force):
        if done == "changed":
            changed.append(title)
        else:
            click.echo(f"{title}: {done}")
    if changed:
        raise click.ClickException(
            f"left alone, changed by hand: {', '.join(changed)}; --force overwrites them"
        )


@dashboards.command("export")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def export_dashboards(directory: Path) -> None:
    """Write the dashboards as files into DIRECTORY, for Grafana's provisioning."""
    from optwatch.cli.dashboards import export as write

    for path in write(directory):
        click.echo(str(path))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; every expected failure becomes one line on stderr and an exit code."""
    try:
        code = cli.main(
            args=None if arguments is None else list(arguments), prog_name="optwatch", standalone_mode=False
        )
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        click.echo(f"optwatch: {error.format_message()}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:  # `optwatch top | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        _drop_output()
        click.echo(f"optwatch: {error.filename or 'output'}: {error.strerror or error}", err=True)
        return 1
    return code if isinstance(code, int) else 0


def _drop_output() -> None:
    """What could not be written to stdout is not tried again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
