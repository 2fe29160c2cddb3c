"""Fetching a metrics page and reading its samples."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import click
from prometheus_client.parser import text_string_to_metric_families

from optwatch.board import BoardDirectoryError, board_directory, find_agent
from optwatch.metrics.catalogue import CATALOGUE

TIMEOUT = 3.0  # seconds that one scrape may take
_ACCEPT = "text/plain; version=0.0.4"
_LARGEST_PAGE = 64 << 20  # bytes; hundreds of ranks with 300 series each stay far below


class ScrapeError(click.ClickException):
    """The page could not be had, or is not an optwatch agent's."""


@dataclass(frozen=True)
class Page:
    """The samples of one scrape.

    Attributes:
        samples: series name (as Prometheus stores it) -> list of (labels, value).
    """

    samples: Mapping[str, list[tuple[dict[str, str], float]]]

    def select(self, metric: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        """The samples of a metric, named as in the catalogue, whose labels agree with ``labels``.

        A histogram's parts are named ``<name>#sum`` and ``<name>#count``.
        """
        name, _, part = metric.partition("#")
        series = CATALOGUE[name].prometheus + (f"_{part}" if part else "")
        for found, value in self.samples.get(series, ()):
            if all(found.get(key) == wanted for key, wanted in labels.items()):
                yield found, value

    def total(self, metric: str, **labels: str) -> float | None:
        """The sum of the matching samples; None when there are none, for absent is not zero."""
        values = [value for _, value in self.select(metric, **labels)]
        return sum(values) if values else None


def normalise_url(text: str) -> str:
    """Complete ``localhost:9464`` to ``http://localhost:9464/metrics``; refuse anything but HTTP."""
    try:
        url = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        url.netloc.encode("ascii")
        (url.hostname or "").encode("idna")
    except ValueError:
        good = False
    if not good:
        raise ScrapeError(
            f"{text!r} is no address of an agent: expected something like http://127.0.0.1:9464/metrics"
        )
    return urllib.parse.urlunsplit(url._replace(path=url.path if url.path.strip("/") else "/metrics"))


def fetch(url: str) -> Page:
    """Scrape ``url``. Raises `ScrapeError`, in one line, when it does not answer or serves something else."""
    request = urllib.request.Request(url, headers={"Accept": _ACCEPT})  # noqa: S310 - normalise_url() lets HTTP pass only
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310 - as above
            body = response.read(_LARGEST_PAGE)
    except urllib.error.HTTPError as error:
        error.close()
        raise ScrapeError(f"{url} answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ScrapeError(f"{url} does not answer: {_words(reason)}; is the agent running?") from error
    return parse(body, url)


def parse(body: bytes, url: str) -> Page:
    """Read a page in Prometheus' text format that came from ``url`` (for the message of a `ScrapeError`)."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    try:
        for family in text_string_to_metric_families(body.decode()):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    except (ValueError, KeyError, IndexError) as error:
        raise ScrapeError(f"{url} is not a metrics page: expected Prometheus' text format") from error
    if not any(name.startswith("optwatch_") for name in samples):
        raise ScrapeError(
            f"{url} is a metrics page, but not of an optwatch agent: it has no metric named optwatch_*"
        )
    return Page(samples)


def default_url() -> str:
    """The address of this user's living agent on this machine, which it leaves beside the boards."""
    try:
        url = find_agent(board_directory())
    except BoardDirectoryError as error:
        raise ScrapeError(f"no agent can be found: {error}") from error
    if url is None:
        raise ScrapeError(
            "no agent is running here: start a run that calls optwatch.watch(), or name the agent's URL"
        )
    return normalise_url(url)


def _words(reason: object) -> str:
    return (getattr(reason, "strerror", None) or str(reason) or type(reason).__name__).lower()
