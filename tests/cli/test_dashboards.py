"""`optwatch dashboards` against a server that keeps to the contract that Grafana documents for its API."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from optwatch.cli import main
from optwatch.cli.dashboards import TOKEN, shipped
from prometheus_server import free_port

UIDS = {"optwatch-fleet", "optwatch-memory", "optwatch-monitor", "optwatch-optimizer"}


class Grafana:
    """Dashboards by uid with all their versions; saving follows the documented rules."""

    def __init__(self, token: str) -> None:
        self.token, self.role = token, "Editor"
        self.versions: dict[str, list[dict]] = {}
        self.folders: dict[str, str] = {}
        self.saves = 0
        self.bare_list = False  # how versions were listed before Grafana 11.3
        self.moved = ""

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, object]:
        if self.moved:
            return 301, {}
        if headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"message": "Invalid API key"}
        if method == "POST" and path == "/api/dashboards/db":
            assert headers["Content-Type"] == "application/json"
            return self._save(json.loads(body))
        assert method == "GET"
        uid = path.removeprefix("/api/dashboards/uid/").split("/")[0]
        if uid not in self.versions:
            return 404, {"message": "Dashboard not found"}
        if path.endswith("/versions?limit=1"):
            newest = [{"version": len(self.versions[uid]), "message": self.versions[uid][-1]["message"]}]
            return 200, newest if self.bare_list else {"continueToken": "", "versions": newest}
        assert path == f"/api/dashboards/uid/{uid}"
        return 200, {"meta": {"slug": uid}, "dashboard": self.versions[uid][-1]["dashboard"]}

    def _save(self, body: dict) -> tuple[int, object]:
        if self.role != "Editor":
            return 403, {"message": "Access denied."}
        model = body["dashboard"]
        versions = self.versions.setdefault(model["uid"], [])
        if versions and not body["overwrite"] and model.get("version") != len(versions):
            return 412, {
                "status": "version-mismatch",
                "message": "The dashboard has been changed by someone else",
            }
        assert versions or model["id"] is None
        saved = {**model, "id": len(self.versions), "version": len(versions) + 1}
        versions.append({"dashboard": saved, "message": body["message"]})
        self.folders[model["uid"]] = body.get("folderUid", "")
        self.saves += 1
        return 200, {"id": saved["id"], "uid": model["uid"], "status": "success", "version": saved["version"]}


@pytest.fixture
def grafana(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Grafana]]:
    """Its address and what it holds."""
    state = Grafana("secret")
    monkeypatch.setenv(TOKEN, "secret")

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.removeprefix("/grafana")
            code, answer = state.answer(self.command, path, dict(self.headers), body)
            text = json.dumps(answer).encode()
            self.send_response(code)
            if state.moved:
                self.send_header("Location", state.moved)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _serve  # noqa: N815 - named by the base class

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/grafana", state
        server.shutdown()


def _edit(state: Grafana, uid: str) -> None:
    """Somebody saves in the browser."""
    newest = state.versions[uid][-1]["dashboard"]
    body = {"dashboard": {**newest, "title": "mine"}, "message": "", "overwrite": False}
    assert state._save(body)[0] == 200


def test_installs_once(grafana: tuple[str, Grafana], capsys: pytest.CaptureFixture[str]) -> None:
    """All of them the first time, nothing the second."""
    url, state = grafana
    assert main(["dashboards", "install", "--grafana", url, "--folder", "ops"]) == 0
    assert set(state.versions) == UIDS
    assert set(state.folders.values()) == {"ops"}
    assert capsys.readouterr().out.count(": installed\n") == 4
    assert main(["dashboards", "install", "--grafana", url + "/"]) == 0
    assert capsys.readouterr().out.count(": unchanged\n") == 4
    assert state.saves == 4


def test_updates_its_own(grafana: tuple[str, Grafana], capsys: pytest.CaptureFixture[str]) -> None:
    """A dashboard that an older package saved is brought up to date."""
    url, state = grafana
    assert main(["dashboards", "install", "--grafana", url]) == 0
    state.versions["optwatch-fleet"][-1]["dashboard"]["description"] = "of an older version"
    assert main(["dashboards", "install", "--grafana", url]) == 0
    assert "optwatch fleet: updated" in capsys.readouterr().out
    assert len(state.versions["optwatch-fleet"]) == 2


@pytest.mark.parametrize("bare_list", [False, True])
def test_leaves_changes_by_hand_alone(
    grafana: tuple[str, Grafana], capsys: pytest.CaptureFixture[str], bare_list: bool
) -> None:
    """Without --force it says which, and the exit code tells; with it they are overwritten."""
    url, state = grafana
    state.bare_list = bare_list
    assert main(["dashboards", "install", "--grafana", url]) == 0
    _edit(state, "optwatch-memory")
    capsys.readouterr()
    assert main(["dashboards", "install", "--grafana", url]) == 1
    said = capsys.readouterr()
    assert said.err == "optwatch: left alone, changed by hand: optwatch memory; --force overwrites them\n"
    assert said.out.count(": unchanged\n") == 3
    assert state.versions["optwatch-memory"][-1]["dashboard"]["title"] == "mine"
    assert main(["dashboards", "install", "--grafana", url, "--force"]) == 0
    assert state.versions["optwatch-memory"][-1]["dashboard"]["title"] == "optwatch memory"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda s: setattr(s, "token", "other"),
            "answered 401, Invalid API key: is OPTWATCH_GRAFANA_TOKEN right?",
        ),
        (lambda s: setattr(s, "role", "Viewer"), "answered 403, Access denied: the service account needs"),
        (
            lambda s: setattr(s, "moved", "https://there/"),
            "it is at https://there/: use the address that answers",
        ),
    ],
    ids=["wrong token", "no right", "a redirect, which must not get the token"],
)
def test_refusals_are_one_line(
    grafana: tuple[str, Grafana], capsys: pytest.CaptureFixture[str], break_it: object, message: str
) -> None:
    """What Grafana said, and what to do."""
    url, state = grafana
    break_it(state)
    assert main(["dashboards", "install", "--grafana", url]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert "secret" not in said


def test_without_a_token(
    grafana: tuple[str, Grafana], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is named."""
    monkeypatch.delenv(TOKEN)
    assert main(["dashboards", "install", "--grafana", grafana[0]]) == 1
    assert f"set {TOKEN} to the token" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["grafana", "ftp://grafana", "http://admin:secret@grafana", "http://"])
def test_bad_addresses(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is sent."""
    assert main(["dashboards", "install", "--grafana", url]) == 1
    assert "is no address of a Grafana" in capsys.readouterr().err


def test_unreachable(capsys: pytest.CaptureFixture[str]) -> None:
    """One line."""
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["dashboards", "install", "--grafana", url]) == 1
    assert capsys.readouterr().err == f"optwatch: {url} does not answer: connection refused\n"


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file each, with what the package holds; a path that is a file is refused in one line."""
    assert main(["dashboards", "export", str(tmp_path / "new")]) == 0
    written = {path.name: json.loads(path.read_bytes()) for path in (tmp_path / "new").iterdir()}
    assert written == shipped()
    assert {dashboard["uid"] for dashboard in written.values()} == UIDS
    (tmp_path / "file").touch()
    capsys.readouterr()
    assert main(["dashboards", "export", str(tmp_path / "file" / "below")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
