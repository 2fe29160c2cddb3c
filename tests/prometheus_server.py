"""A real Prometheus on loopback that scrapes one address, for tests to query."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from typing_extensions import Self

from debian import program

SHIPPED = Path(__file__).parents[1] / "deploy" / "prometheus" / "prometheus.yml"


def free_port() -> int:
    """A port of the loopback interface that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PrometheusServer:
    """Runs Prometheus in ``directory``, as a context manager.

    ``scrape_url`` is scraped every second under the job name ``optwatch``; ``rules`` are rule files, evaluated every
    second; ``scrape`` is more of its scrape configuration, or other; ``alertmanager`` is where alerts are sent. With
    ``shipped`` the intervals are those of the configuration that deploy/ has as an example.
    """

    def __init__(
        self,
        directory: Path,
        scrape_url: str,
        rules: Iterable[Path] = (),
        scrape: Mapping[str, Any] | None = None,
        alertmanager: str = "",
        *,
        shipped: bool = False,
    ) -> None:
        self.directory = directory
        self.url = f"http://127.0.0.1:{free_port()}"
        target = urllib.parse.urlsplit(scrape_url)
        job = {
            "job_name": "optwatch",
            "scheme": target.scheme,
            "metrics_path": target.path or "/metrics",
            "static_configs": [{"targets": [target.netloc]}],
            **(scrape or {}),
        }
        self._config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(path.resolve()) for path in rules],
            "scrape_configs": [job],
        }
        if shipped:
            self._config["global"] = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))["global"]
        if alertmanager:
            targets = [{"targets": [urllib.parse.urlsplit(alertmanager).netloc]}]
            self._config["alerting"] = {"alertmanagers": [{"static_configs": targets}]}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "prometheus.yml"
        config.write_text(yaml.safe_dump(self._config), encoding="utf-8")
        command = [
            program("prometheus"),
            f"--config.file={config}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
            # Without it Prometheus asks the system for the machine's name, and waits where there is no resolver.
            f"--web.external-url={self.url}",
        ]
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait(self._ready, 30, "Prometheus did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def query(self, expr: str, **at: str) -> list[dict[str, Any]]:
        """The instant vector that ``expr`` gives now: dicts with ``metric`` and ``value`` (time and text)."""
        result = self._get("query", query=expr, **at)["result"]
        assert isinstance(result, list)
        return result

    def value(self, expr: str) -> float:
        """The value of the only series of ``expr``."""
        (series,) = self.query(expr)
        return float(series["value"][1])

    def wait_for(self, expr: str, seconds: float = 30.0) -> list[dict[str, Any]]:
        """The result of ``expr`` as soon as it has one; fails, with Prometheus' log, after so long without."""
        return self._wait(lambda: self.query(expr), seconds, f"no result for {expr}")

    def alerts(self) -> dict[str, str]:
        """State (pending, firing) of each alert that is active, by name."""
        found = self._get("alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert["state"] for alert in found}

    def targets(self) -> list[dict[str, Any]]:
        """The targets that are scraped, as found and as relabelled."""
        found = self._get("targets", state="active")["activeTargets"]
        assert isinstance(found, list)
        return found

    def rules_health(self) -> dict[str, str]:
        """Health of each rule, ``ok`` or what went wrong, by name."""
        rules = [rule for group in self._get("rules")["groups"] for rule in group["rules"]]
        return {rule["name"]: rule.get("lastError") or rule["health"] for rule in rules}

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _get(self, path: str, **parameters: str) -> dict[str, Any]:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                body = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters or path}: {error.read().decode()}") from error
        assert body["status"] == "success", body
        data = body["data"]
        assert isinstance(data, dict)
        return data

    def _wait(self, check: Any, seconds: float, complaint: str) -> Any:
        end = time.monotonic() + seconds
        while not (found := check()):
            assert self._process is not None
            assert self._process.poll() is None, f"{complaint}: {self._log()}"
            assert time.monotonic() < end, f"{complaint} in {seconds} s: {self._log()}"
            time.sleep(0.2)
        return found

    def _log(self) -> str:
        return (self.directory / "log").read_text(encoding="utf-8", errors="replace")[-3000:]
