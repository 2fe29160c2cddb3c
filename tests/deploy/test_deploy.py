"""What is deployed: accepted by the programs that will read it, least privilege, and true to the package."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from agent_process import eventually, scrape
from board_samples import end, environment, start_writer
from debian import program
from optwatch.board import find_agent

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.30"


def _documents(path: Path) -> list[dict]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


MANIFESTS = [
    (path.relative_to(DEPLOY), document)
    for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
    for document in _documents(path)
]


def _pods() -> Iterator[dict]:
    for _, document in MANIFESTS:
        template = document.get("spec", {}).get("template")
        if template:
            yield template["spec"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="platform: tomllib came with Python 3.11")
def test_the_agents_requirements_are_the_packages_without_torch() -> None:
    """The list by hand is the list of the package, so that an agent installed by it starts."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [name for name in project["dependencies"] if not name.startswith("torch")]
    wanted += [name for extra in ("otlp", "web") for name in project["optional-dependencies"][extra]]
    lines = (DEPLOY / "agent" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == wanted


def test_the_images_context_holds_what_it_copies() -> None:
    """Every path that the Dockerfile's build needs exists and is let through."""
    ignored = (DEPLOY / "agent" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for line in ignored:
        if line.startswith("!"):
            assert (ROOT / line[1:]).exists(), line
    assert "!deploy/agent/requirements.txt" in ignored


def _check_custom(document: dict) -> None:
    """The Prometheus operator's schema has every field of it, and accepts the values."""
    # The first import in a process takes seconds.
    from cloudcoil.models.prometheus_operator import v1

    model = getattr(v1, document["kind"]).model_validate(document)
    # It ignores what it does not know; so would the cluster, once it has pruned the field.
    assert model.model_dump(mode="json", by_alias=True, exclude_unset=True) == document


@pytest.mark.parametrize(
    ("path", "document"), MANIFESTS, ids=lambda value: value if isinstance(value, Path) else ""
)
def test_manifest(path: Path, document: dict) -> None:
    """Kubernetes' own schema accepts it, or the operator's; a kustomization names files that exist."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own dependencies
        import kubernetes_validate

    if document["kind"] in {"Kustomization", "Component"}:
        for name in document.get("resources", []) + [patch["path"] for patch in document.get("patches", [])]:
            assert (DEPLOY / path.parent / name).exists(), name
    elif document["apiVersion"].startswith("monitoring.coreos.com/"):
        _check_custom(document)
    else:
        if path.parent.name == "sidecar":  # a patch leaves out what it does not change
            document = copy.deepcopy(document)
            document["spec"]["template"]["spec"]["containers"][0]["image"] = "train"
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda spec: spec["podMetricsEndpoints"][0].update(interval="15 seconds"),
        lambda spec: spec["podMetricsEndpoints"][0]["relabelings"][0].update(targetlabel="job"),
        lambda spec: spec.pop("selector"),
        lambda spec: spec["selector"]["matchExpressions"][0].pop("operator"),
    ],
    ids=["a duration", "a field that is misspelt", "what it selects", "a part of it"],
)
def test_the_check_of_custom_resources_finds_mistakes(mistake: Callable[[dict], None]) -> None:
    """The check that the test above relies on does fail."""
    monitor = copy.deepcopy(next(document for _, document in MANIFESTS if document["kind"] == "PodMonitor"))
    mistake(monitor["spec"])
    with pytest.raises((ValueError, AssertionError)):
        _check_custom(monitor)


def test_pods_have_no_privilege() -> None:
    """Not root, no capability, a read-only root file system, limits; the port that the PodMonitor looks for."""
    pods = list(_pods())
    assert len(pods) == 2
    monitored = next(document for _, document in MANIFESTS if document["kind"] == "PodMonitor")
    (endpoint,) = monitored["spec"]["podMetricsEndpoints"]
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "optwatch"}]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        containers = pod.get("initContainers", []) or pod["containers"]
        (agent,) = [one for one in containers if one["image"] == "optwatch-agent"]
        assert agent["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert agent["resources"]["limits"]
        assert [port["name"] for port in agent["ports"]] == [endpoint["port"]]


def test_generated_manifests_hold_what_was_generated() -> None:
    """The rules and the dashboards, whole, each dashboard below the quarter of a megabyte that kubectl can apply."""
    kinds = {document["metadata"]["name"]: document for _, document in MANIFESTS if "metadata" in document}
    shipped = yaml.safe_load((DEPLOY / "prometheus" / "optwatch.rules.yml").read_text(encoding="utf-8"))
    assert next(d for _, d in MANIFESTS if d["kind"] == "PrometheusRule")["spec"] == shipped
    for path in (ROOT / "optwatch" / "dashboards").glob("*.json"):
        data = kinds[f"optwatch-dashboard-{path.stem}"]["data"][path.name]
        assert json.loads(data) == json.loads(path.read_bytes())
        assert len(data.encode()) < 256 * 1024


def test_compose_services_have_no_privilege() -> None:
    """Read-only, no capability, no new privileges, a user and limits for each; ports on loopback only."""
    services = yaml.safe_load((DEPLOY / "compose" / "docker-compose.yml").read_text(encoding="utf-8"))[
        "services"
    ]
    assert set(services) == {"agent", "prometheus", "alertmanager", "grafana", "otel-collector"}
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service["user"].startswith("0")
        assert service["mem_limit"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_compose_mounts_exist() -> None:
    """Every file that a container reads is in the checkout."""
    services = yaml.safe_load((DEPLOY / "compose" / "docker-compose.yml").read_text(encoding="utf-8"))[
        "services"
    ]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / "compose" / source).exists(), source


@pytest.mark.integration
@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "gpu.yml"]], ids=len)
def test_compose_accepts_the_files(files: list[str]) -> None:
    """docker-compose reads them without a complaint."""
    command = [program("docker-compose"), *(f"--file={DEPLOY / 'compose' / file}" for file in files)]
    modules = ROOT / ".tools" / "usr" / "lib" / "python3" / "dist-packages"
    if modules.is_dir():  # unpacked, not installed
        command = ["/usr/bin/python3", "-W", "ignore", *command]
    paths = {**os.environ, "PYTHONPATH": str(modules)}
    done = subprocess.run(
        [*command, "config", "--quiet"], capture_output=True, text=True, check=False, env=paths
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.integration
def test_promtool_accepts_the_configuration_of_compose(tmp_path: Path) -> None:
    """As the container sees it: the rules beside it."""
    for file in (DEPLOY / "compose" / "prometheus.yml", DEPLOY / "prometheus" / "optwatch.rules.yml"):
        shutil.copy(file, tmp_path)
    check = [program("promtool"), "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_collector_pipelines_are_complete() -> None:
    """Every component of a pipeline is configured, none is left over, and what they reach is there in compose."""
    config = yaml.safe_load((DEPLOY / "otel-collector" / "config.yaml").read_text(encoding="utf-8"))
    for kind in ("receivers", "processors", "exporters"):
        used = {name for pipe in config["service"]["pipelines"].values() for name in pipe[kind]}
        assert used == set(config[kind])
    (pipeline,) = config["service"]["pipelines"].values()
    assert pipeline["processors"] == ["memory_limiter", "batch"], "refuse before anything is kept, batch last"
    services = yaml.safe_load((DEPLOY / "compose" / "docker-compose.yml").read_text(encoding="utf-8"))[
        "services"
    ]
    ports = {
        protocol["endpoint"].split(":")[1] for protocol in config["receivers"]["otlp"]["protocols"].values()
    }
    assert {port.split(":")[2] for port in services["otel-collector"]["ports"]} == ports
    target = urlsplit(config["exporters"]["prometheusremotewrite"]["endpoint"])
    prometheus = services[str(target.hostname)]
    assert "--web.enable-remote-write-receiver" in prometheus["command"]
    assert any(port.endswith(f":{target.port}") for port in prometheus["ports"])


@pytest.mark.integration
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """Systemd's own checker has nothing to say, with an interpreter that exists here."""
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("platform: no systemd")
    text = (DEPLOY / "systemd" / "optwatch-agent@.service").read_text(encoding="utf-8")
    unit = tmp_path / "optwatch-agent@root.service"
    unit.write_text(text.replace("/opt/optwatch/bin/python", sys.executable), encoding="utf-8")
    done = subprocess.run([verify, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert "optwatch" not in done.stderr, done.stderr
    assert not re.search(r"^ExecStart=.*--host", text, flags=re.MULTILINE), "loopback unless told otherwise"


@pytest.mark.integration
def test_slurm(tmp_path: Path) -> None:
    """The prolog starts an agent that announces the run, the epilog ends it and takes the announcement away."""
    boards, targets = tmp_path / "boards", tmp_path / "targets"
    boards.mkdir(mode=0o700)
    targets.mkdir()
    for name in ("prolog.sh", "epilog.sh"):
        shutil.copy(DEPLOY / "slurm" / name, tmp_path)
    settings = {
        "OPTWATCH_PYTHON": sys.executable,
        "OPTWATCH_FILE_SD": targets,
        "OPTWATCH_HOST": "127.0.0.1",
        "OPTWATCH_IDLE": 60,
        "OPTWATCH_LINGER": 1,
        "OPTWATCH_STORE": "off",
    }
    (tmp_path / "optwatch.conf").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    slurm = {
        "SLURM_JOB_USER": user,
        "SLURM_JOB_ID": "7",
        "SLURMD_NODENAME": "node1",
        "OPTWATCH_DIR": str(boards),
    }
    given = {**environment(), **slurm}
    rank = start_writer(boards)
    try:
        subprocess.run([tmp_path / "prolog.sh"], env=given, check=True, timeout=10)
        eventually(lambda: _announced(boards, targets))
        address = str(find_agent(boards))
        assert scrape(address).one("optwatch_rank_up") == 1
        subprocess.run([tmp_path / "epilog.sh"], env=given, check=True, timeout=10)
        assert scrape(address).one("optwatch_rank_up") == 1, "the last values are still served"
        eventually(lambda: _gone(boards, targets))
    finally:
        end(rank)
        subprocess.run([tmp_path / "epilog.sh"], env=given, check=True, timeout=10)


def _announced(boards: Path, targets: Path) -> None:
    assert find_agent(boards)
    (file,) = targets.glob("*.json")
    assert json.loads(file.read_text())[0]["targets"][0].startswith("node1:")


def _gone(boards: Path, targets: Path) -> None:
    assert find_agent(boards) is None
    assert not list(targets.glob("*.json"))


def test_slurm_without_a_user_does_nothing() -> None:
    """A prolog that fails would drain the node."""
    bare = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    for name in ("prolog.sh", "epilog.sh"):
        subprocess.run([DEPLOY / "slurm" / name], env=bare, check=True, timeout=10)


def test_agents_write_where_they_may() -> None:
    """Nowhere by default, or in a folder of their own: root file systems and homes are read-only."""
    image = (DEPLOY / "agent" / "Dockerfile").read_text(encoding="utf-8")
    assert "\nENV OPTWATCH_STORE=off\n" in image
    unit = (DEPLOY / "systemd" / "optwatch-agent@.service").read_text(encoding="utf-8")
    (state,) = re.findall(r"^StateDirectory=(.+)$", unit, flags=re.MULTILINE)
    assert f"\nEnvironment=OPTWATCH_STORE=%S/{state}\n" in unit
    assert "\nOPTWATCH_STORE=off\n" in (DEPLOY / "slurm" / "optwatch.conf").read_text(encoding="utf-8")


def test_the_end_of_a_run_is_scraped() -> None:
    """Agents that end with their run stay for longer than a scrape: else a finished run looks like a lost one."""
    monitor = next(document for _, document in MANIFESTS if document["kind"] == "PodMonitor")
    interval = int(monitor["spec"]["podMetricsEndpoints"][0]["interval"].removesuffix("s"))
    (job,) = [document for path, document in MANIFESTS if path.name == "job.yaml"]
    pod = job["spec"]["template"]["spec"]
    (agent,) = pod["initContainers"]
    assert (
        interval
        < agent["lifecycle"]["preStop"]["sleep"]["seconds"]
        < pod.get("terminationGracePeriodSeconds", 30)
    )
    conf = (DEPLOY / "slurm" / "optwatch.conf").read_text(encoding="utf-8")
    assert int(re.findall(r"^OPTWATCH_LINGER=(\d+)$", conf, flags=re.MULTILINE)[0]) > interval
