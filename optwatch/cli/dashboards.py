"""``optwatch dashboards``: put the dashboards into Grafana through its HTTP API, or into a folder."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import click

from optwatch import __version__

TOKEN = "OPTWATCH_GRAFANA_TOKEN"  # noqa: S105 - the variable's name, not its value
TIMEOUT = 10.0  # seconds for one request
#: What begins the message of every version that this command saved: a newest version without it was saved by hand.
MESSAGE = "optwatch dashboards install"
#: What Grafana gives a dashboard when it is saved.
_GIVEN = ("id", "version")


class GrafanaError(click.ClickException):
    """Grafana could not be reached, or refused."""


def shipped() -> dict[str, dict[str, Any]]:
    """The dashboards of this package, as Grafana's model, by file name."""
    files = (file for file in resources.files("optwatch").joinpath("dashboards").iterdir())
    found = {file.name: json.loads(file.read_bytes()) for file in files if file.name.endswith(".json")}
    return dict(sorted(found.items()))


def export(directory: Path) -> Iterator[Path]:
    """Write the dashboards into a folder, for Grafana's provisioning; yields their paths."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, dashboard in shipped().items():
            path = directory / name
            path.write_text(json.dumps(dashboard, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            yield path
    except OSError as error:
        raise click.ClickException(
            f"{error.filename or directory}: {(error.strerror or 'failed').lower()}"
        ) from error


def install(url: str, *, folder: str = "", force: bool = False) -> Iterator[tuple[str, str]]:
    """Save every dashboard that is missing or of another version; yields title and what was done.

    A dashboard that was saved by hand since is left alone, and ``changed`` is yielded, unless ``force``.

    Raises:
        GrafanaError: one line that says what to do.
    """
    grafana = Grafana(url, os.environ.get(TOKEN, ""))
    for dashboard in shipped().values():
        found = grafana.find(dashboard["uid"])
        if found is not None and _content(found) == _content(dashboard):
            yield dashboard["title"], "unchanged"
        elif found is not None and not force and not grafana.saved_by_us(dashboard["uid"]):
            yield dashboard["title"], "changed"
        else:
            version = None if found is None else found.get("version")
            grafana.save(dashboard, version, folder=folder, force=force)
            yield dashboard["title"], "installed" if found is None else "updated"


def _content(dashboard: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in dashboard.items() if key not in _GIVEN}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the token along, to wherever it leads."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Grafana:
    """Grafana's HTTP API, as far as dashboards need it.

    Args:
        url: address of the server, with the path below which it is served.
        token: of a service account that may write dashboards; empty for a server that lets everybody.
    """

    def __init__(self, url: str, token: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise GrafanaError(
                f"{url!r} is no address of a Grafana: expected something like https://grafana.example"
            )
        self._url, self._token = url.rstrip("/"), token
        self._open = urllib.request.build_opener(_NoRedirect).open

    def find(self, uid: str) -> dict[str, Any] | None:
        """The dashboard as it is saved, or None."""
        answer = self._call("GET", f"/api/dashboards/uid/{uid}", missing=True)
        return None if answer is None else dict(answer["dashboard"])

    def saved_by_us(self, uid: str) -> bool:
        """Whether the newest version was saved by this command."""
        answer = self._call("GET", f"/api/dashboards/uid/{uid}/versions?limit=1")
        versions = (
            answer["versions"] if isinstance(answer, dict) else answer
        )  # a bare list before Grafana 11.3
        return bool(versions) and str(versions[0].get("message", "")).startswith(MESSAGE)

    def save(self, dashboard: Mapping[str, Any], version: int | None, *, folder: str, force: bool) -> None:
        """Save a dashboard on top of a version; without ``force`` Grafana refuses if there is a newer one."""
        model = {**dashboard, "id": None} if version is None else {**dashboard, "version": version}
        body: dict[str, Any] = {
            "dashboard": model,
            "message": f"{MESSAGE}, {__version__}",
            "overwrite": force,
        }
        if folder:
            body["folderUid"] = folder
        self._call("POST", "/api/dashboards/db", body)

    def _call(self, method: str, path: str, body: object = None, *, missing: bool = False) -> Any:
        request = urllib.request.Request(self._url + path, method=method)  # noqa: S310 - checked by __init__
        request.add_header("Accept", "application/json")
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with self._open(request, data, TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404 and missing:
                    return None
                raise GrafanaError(self._refused(error)) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            words = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            what = "is no Grafana" if isinstance(error, ValueError) else "does not answer"
            raise GrafanaError(f"{self._url} {what}: {words.lower()}") from error

    def _refused(self, error: urllib.error.HTTPError) -> str:
        try:
            said = str(json.load(error)["message"]).rstrip(".")
        except (ValueError, KeyError, TypeError, OSError):
            said = str(error.reason)
        advice = {
            401: f"set {TOKEN} to the token of a service account"
            if not self._token
            else f"is {TOKEN} right?",
            403: "the service account needs the role Editor, or the right to write dashboards",
            412: "somebody saved it just now; try again, or overwrite it with --force",
        }.get(error.code)
        if 300 <= error.code < 400:
            advice = (
                f"it is at {error.headers.get('Location', 'another address')}: use the address that answers"
            )
        return f"{self._url} answered {error.code}, {said}" + (f": {advice}" if advice else "")
