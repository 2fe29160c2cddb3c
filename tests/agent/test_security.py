"""Who may ask, and how: web-config.yml against a real client and the real Prometheus."""

from __future__ import annotations

import base64
import os
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import bcrypt
import pytest
import trustme
import yaml

from agent_process import agent, eventually
from board_samples import Feed, schema
from optwatch.agent.webconfig import WebConfig, WebConfigError
from optwatch.board import BoardWriter
from prometheus_server import PrometheusServer

HASH = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority, the agent's certificate, and those of two clients and of a stranger."""
    folder = tmp_path_factory.mktemp("pki")
    ours, other = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(folder / "ca.pem")
    for name, authority, identity in [
        ("server", ours, "127.0.0.1"),
        ("client", ours, "prometheus.example"),
        ("visitor", ours, "visitor.example"),
        ("stranger", other, "prometheus.example"),
    ]:
        issued = authority.issue_cert(identity)
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        (folder / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    return folder


TLS = {"cert_file": "server.pem", "key_file": "server.key"}
MUTUAL = {**TLS, "client_ca_file": "ca.pem", "client_auth_type": "RequireAndVerifyClientCert"}


def web_config(pki: Path, **document: object) -> str:
    """A file beside the certificates, which it names relatively."""
    path = pki / f"web-{os.urandom(4).hex()}.yml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def ask(
    url: str, pki: Path, client: str = "", user: str = "", version: ssl.TLSVersion | None = None
) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer; an OSError when there is none."""
    context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    if client:
        context.load_cert_chain(pki / f"{client}.pem", pki / f"{client}.key")
    if version is not None:
        context.maximum_version = version
    headers = {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if user else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20, context=context) as answer:
            answer.read()
            return answer.status, dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers)


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a board."""
    directory = tmp_path_factory.mktemp("boards")
    Feed(BoardWriter.create(directory, schema())).publish(6)
    return directory


def test_tls_and_passwords(pki: Path, boards: Path) -> None:
    """Only https, only with the password, on every page; the headers that were asked for are there."""
    config = web_config(
        pki,
        tls_server_config=TLS,
        basic_auth_users={"prometheus": HASH, "other": HASH.replace("$2b$", "$2y$")},
        http_server_config={"headers": {"X-Frame-Options": "deny"}},
    )
    with agent(boards, "--web-config", config) as (url, _):
        assert url.startswith("https://")
        for user, expected in {
            "prometheus:secret": 200, "other:secret": 200, "prometheus:wrong": 401, "nobody:secret": 401,
            "prometheus:": 401, ":": 401, "": 401, "prometheus:" + "x" * 200: 401,
        }.items():  # fmt: skip
            status, headers = ask(url, pki, user=user)
            assert status == expected, user
            assert headers["X-Frame-Options"] == "deny"
            assert (headers.get("WWW-Authenticate") == "Basic") == (expected == 401)
        for path in ("/healthz", "/readyz", "/sd", "/nowhere"):
            assert ask(url.replace("/metrics", path), pki)[0] == 401
        with pytest.raises(OSError):  # noqa: PT011 - reset or empty, as the system likes
            ask(url.replace("https", "http"), pki)


def test_old_versions_of_tls_are_refused(pki: Path, boards: Path) -> None:
    """A client that knows none that is new enough gets no answer."""
    config = web_config(pki, tls_server_config={**TLS, "min_version": "TLS13"})
    with agent(boards, "--web-config", config) as (url, _):
        assert ask(url, pki, version=ssl.TLSVersion.TLSv1_3)[0] == 200
        with pytest.raises(OSError, match=r"(?i)alert|version|protocol"):
            ask(url, pki, version=ssl.TLSVersion.TLSv1_2)


@pytest.mark.parametrize(
    ("settings", "admitted"),
    [
        ({}, {"client": True, "visitor": True, "stranger": False, "": False}),
        (
            {"client_allowed_sans": ["prometheus.example"]},
            {"client": True, "visitor": False, "stranger": False, "": False},
        ),
        ({"client_auth_type": "VerifyClientCertIfGiven"}, {"client": True, "stranger": False, "": True}),
    ],
    ids=["required", "by name", "if given"],
)
def test_mutual_tls(pki: Path, boards: Path, settings: dict, admitted: dict[str, bool]) -> None:
    """A client's certificate is of the authority, and has one of the names if names are given."""
    with agent(boards, "--web-config", web_config(pki, tls_server_config={**MUTUAL, **settings})) as (url, _):
        for client, expected in admitted.items():
            try:
                answered = ask(url, pki, client)[0] == 200
            except OSError:
                answered = False
            assert answered == expected, client


def test_a_client_that_does_not_shake_hands(pki: Path, boards: Path) -> None:
    """Says nothing, or noise, or half a greeting: it loses its connection, others are served meanwhile."""
    with agent(boards, "--web-config", web_config(pki, tls_server_config=TLS)) as (url, _):
        parts = urlsplit(url)
        slow = []
        for words in (b"", b"\x16\x03\x01", b"noise" * 1000, b"GET /metrics HTTP/1.1\r\n\r\n"):
            connection = socket.create_connection((parts.hostname, parts.port), timeout=20)
            connection.sendall(words)
            slow.append(connection)
        assert ask(url, pki)[0] == 200
        for connection in slow:
            try:
                while connection.recv(1000):
                    pass
            except ConnectionResetError:
                pass
            connection.close()


def test_the_file_is_read_again(pki: Path, boards: Path) -> None:
    """A new password holds without a restart; a file that became invalid changes nothing."""
    config = web_config(pki, basic_auth_users={"prometheus": HASH})
    with agent(boards, "--web-config", config) as (url, _):
        assert ask(url, pki, user="prometheus:secret")[0] == 200
        Path(config).write_text("basic_auth_users: {prometheus: plain}")
        assert ask(url, pki, user="prometheus:secret")[0] == 200
        fresh = bcrypt.hashpw(b"fresh", bcrypt.gensalt(4)).decode()
        Path(config).write_text(yaml.safe_dump({"basic_auth_users": {"prometheus": fresh}}))

        def changed() -> None:
            assert ask(url, pki, user="prometheus:secret")[0] == 401
            assert ask(url, pki, user="prometheus:fresh")[0] == 200

        eventually(changed)
    log = (boards / "agent-test.log").read_text()
    assert "what it said before holds on" in log
    assert HASH not in log
    assert "secret" not in log


@pytest.mark.integration
def test_prometheus_scrapes_over_mutual_tls_with_a_password(pki: Path, boards: Path, tmp_path: Path) -> None:
    """The real Prometheus, with the settings its documentation gives, finds the target up."""
    config = web_config(pki, tls_server_config=MUTUAL, basic_auth_users={"prometheus": HASH})
    scrape = {
        "tls_config": {
            "ca_file": str(pki / "ca.pem"),
            "cert_file": str(pki / "client.pem"),
            "key_file": str(pki / "client.key"),
        },
        "basic_auth": {"username": "prometheus", "password": "secret"},
    }
    with (
        agent(boards, "--web-config", config) as (url, _),
        PrometheusServer(tmp_path / "prometheus", url, scrape=scrape) as server,
    ):
        server.wait_for("optwatch_step")
        assert server.value("optwatch_step") == 6
        assert [target["health"] for target in server.targets()] == ["up"]


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ("{", "is not YAML"),
        ("[1, 2]", "expected keys and values"),
        ("tls_config: {}", "'tls_config' is not supported; known: basic_auth_users"),
        ("tls_server_config: {cert_file: server.pem}", "expected cert_file and key_file"),
        (
            "tls_server_config: {cert_file: no.pem, key_file: server.key}",
            "no.pem cannot be used: No such file",
        ),
        ("tls_server_config: {cert_file: client.pem, key_file: server.key}", "cannot be used"),
        (
            "tls_server_config: {cert_file: server.pem, key_file: server.key, min_version: SSL3}",
            "min_version 'SSL3'",
        ),
        (
            "tls_server_config: {cert_file: server.pem, key_file: server.key, client_auth_type: RequestClientCert}",
            "client_auth_type 'RequestClientCert': expected one of NoClientCert",
        ),
        (
            "tls_server_config: {cert_file: server.pem, key_file: server.key, client_ca_file: ca.pem}",
            "client_ca_file and a client_auth_type that verifies go together",
        ),
        (
            "tls_server_config: {cert_file: server.pem, key_file: server.key, cipher_suites: [RC4]}",
            "cipher_suites 'RC4': expected one of",
        ),
        (
            "tls_server_config: {cert_file: server.pem, key_file: server.key, client_allowed_sans: [a]}",
            "client_allowed_sans needs client_auth_type",
        ),
        ("basic_auth_users: {me: plaintext}", "the password of 'me' is not a bcrypt hash"),
        ("http_server_config: {headers: {X-Own: a}}", "headers: 'X-Own' is not supported"),
    ],
)
def test_senseless_files(pki: Path, document: str, complaint: str) -> None:
    """One line with the file and what is wrong in it, and never a password."""
    path = pki / "senseless.yml"
    path.write_text(document)
    with pytest.raises(WebConfigError) as raised:
        WebConfig(str(path))
    message = str(raised.value)
    assert message.startswith(str(path))
    assert complaint in message
    assert "\n" not in message
    assert "plaintext" not in message


def test_suites_can_be_chosen(pki: Path) -> None:
    """Go's names are translated; TLS 1.3 has its own."""
    suites = ["TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"]
    context = WebConfig(web_config(pki, tls_server_config={**TLS, "cipher_suites": suites})).access().context
    assert context is not None
    chosen = {suite["name"] for suite in context.get_ciphers() if suite["protocol"] != "TLSv1.3"}
    assert chosen == {"ECDHE-RSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"}
