"""Finding the run that is meant: an agent's, one whose boards lie somewhere, or one on a saved metrics page."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path

from optwatch.agent.boards import Boards
from optwatch.agent.rank import Rank
from optwatch.board import SUFFIX, BoardDirectoryError, BoardError, board_directory
from optwatch.cli.gate.baseline import GateError
from optwatch.cli.scrape import Page, ScrapeError, fetch, normalise_url, parse
from optwatch.exporters.base import HistogramValue
from optwatch.metrics.catalogue import CATALOGUE


def find_run(where: str | None, run_id: str | None) -> tuple[Page, str]:
    """The samples of a run, and its id.

    Args:
        where: a directory of boards, a board, a saved metrics page, the address of an agent, or the id of a run among
            this user's own boards; None means those boards.
        run_id: which one, where there are several.

    Raises:
        GateError: there is no such run, or several and none was named.
    """
    page, wanted, place = _open(where, run_id)
    runs = sorted({labels["run_id"] for labels, _ in page.select("optwatch.rank_up")})
    if wanted is not None:
        if wanted not in runs:
            raise GateError(f"no run {wanted!r} in {place}: {_list(runs)}")
        return page, wanted
    if len(runs) != 1:
        choice = (
            "; name one with --run-id" if runs else ": nothing was watched there, or it is over for too long"
        )
        raise GateError(f"expected one run in {place}, found {_list(runs)}{choice}")
    return page, runs[0]


def _open(where: str | None, run_id: str | None) -> tuple[Page, str | None, str]:
    """The page, which run of it was named, and how messages call the place."""
    if where is None:
        directory = _own_directory()
        return _from_boards(directory), run_id, str(directory)
    path = Path(where)
    if path.is_dir():
        return _from_boards(path), run_id, where
    try:
        if path.is_file():
            page = _from_board(path) if path.name.endswith(SUFFIX) else parse(path.read_bytes(), where)
            return page, run_id, where
        if "://" in where or re.search(r":\d+(/|$)", where):
            return fetch(normalise_url(where)), run_id, where
    except (ScrapeError, BoardError, OSError) as error:
        raise GateError(getattr(error, "message", None) or str(error)) from error
    if run_id is not None:
        raise GateError(f"{where!r} is no directory, file or address; with --run-id it has to be one")
    if "/" in where:
        raise GateError(f"{where!r}: no such directory or file")
    directory = _own_directory()
    return _from_boards(directory), where, str(directory)


def _own_directory() -> Path:
    try:
        return board_directory()
    except BoardDirectoryError as error:
        raise GateError(str(error)) from error


def _from_boards(directory: Path) -> Page:
    logging.getLogger("optwatch.agent").setLevel(
        logging.ERROR
    )  # boards that cannot be read are no run of ours
    boards = Boards(directory, grace=math.inf)
    try:
        boards.poll()
        return _page(boards.ranks.values())
    finally:
        boards.close()


def _from_board(path: Path) -> Page:
    rank = Rank(path)
    try:
        rank.poll()
        return _page([rank])
    finally:
        rank.close()


def _page(ranks: Iterable[Rank]) -> Page:
    """What an agent would serve of these boards."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for rank in ranks:
        for name, point in rank.points():
            series, labels = CATALOGUE[name].prometheus, dict(point.labels)
            if isinstance(point.value, HistogramValue):
                samples.setdefault(f"{series}_sum", []).append((labels, point.value.sum))
                samples.setdefault(f"{series}_count", []).append((labels, float(sum(point.value.counts))))
            else:
                samples.setdefault(series, []).append((labels, point.value))
    return Page(samples)


def _list(runs: list[str]) -> str:
    shown = ", ".join(runs[:5]) or "none"
    return f"{shown} and {len(runs) - 5} more" if len(runs) > 5 else shown
