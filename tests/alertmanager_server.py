"""A real Alertmanager on loopback with the shipped configuration, and the webhook that it notifies."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from debian import program
from prometheus_server import free_port

SHIPPED = Path(__file__).parents[1] / "deploy" / "alertmanager" / "alertmanager.yml"


class Webhook:
    """What arrived: receiver, alert as Alertmanager sends it, and Unix time, in order."""

    def __init__(self) -> None:
        self.received: list[tuple[str, dict[str, Any], float]] = []

    def find(self, name: str, run: str, status: str) -> tuple[str, dict[str, Any], float] | None:
        """The first notification about an alert of a run, ``firing`` or ``resolved``."""
        for receiver, alert, at in list(self.received):
            labels = alert["labels"]
            if (labels["alertname"], labels.get("run_id"), alert["status"]) == (name, run, status):
                return receiver, alert, at
        return None

    def names(self, run: str) -> set[str]:
        """Alerts that arrived about a run."""
        return {
            alert["labels"]["alertname"]
            for _, alert, _ in self.received
            if alert["labels"].get("run_id") == run
        }


@contextmanager
def alertmanager(directory: Path) -> Iterator[tuple[str, Webhook]]:
    """Address of Alertmanager, and the webhook behind both its receivers; waits of the routes are a second."""
    webhook = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            webhook.received += [(self.path.strip("/"), alert, time.time()) for alert in body["alerts"]]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        directory.mkdir()
        config = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
        config["route"] |= {"group_wait": "0s", "group_interval": "1s"}
        for receiver in config["receivers"]:
            for hook in receiver["webhook_configs"]:
                hook["url"] = f"http://127.0.0.1:{server.server_port}/{receiver['name']}"
        (directory / "alertmanager.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        url = f"http://127.0.0.1:{free_port()}"
        command = [
            program("prometheus-alertmanager"),
            f"--config.file={directory / 'alertmanager.yml'}",
            f"--storage.path={directory / 'data'}",
            f"--web.listen-address={url.removeprefix('http://')}",
            f"--web.external-url={url}",
            "--cluster.listen-address=",  # alone
        ]
        with (directory / "log").open("wb") as log:
            # Unpacked and not installed, it finds its templates from there.
            home = Path(command[0]).parents[2]
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=home)
        try:
            _wait_for(url, process, directory / "log")
            yield url, webhook
        finally:
            process.kill()
            process.wait()
            server.shutdown()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 30
    while True:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
