"""TLS, mutual TLS and basic authentication from a ``web-config.yml``, in the format of Prometheus' exporter-toolkit.

What cannot be honoured is refused, never ignored. The file and the certificates that it names are read again when they
change; a file that has become invalid is said once, and the settings before it stay.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import re
import secrets
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

log = logging.getLogger("optwatch.agent")

_KEYS: dict[str, set[str]] = {
    "": {"tls_server_config", "http_server_config", "basic_auth_users"},
    "tls_server_config": {
        "cert_file", "key_file", "client_auth_type", "client_ca_file", "client_allowed_sans", "cipher_suites",
        "prefer_server_cipher_suites", "min_version", "max_version",
    },
    "http_server_config": {"http2", "headers"},
    "headers": {
        "Strict-Transport-Security", "X-Content-Type-Options", "X-Frame-Options", "X-XSS-Protection",
        "Content-Security-Policy",
    },
}  # fmt: skip
_CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_VERSIONS = {
    "TLS12": ssl.TLSVersion.TLSv1_2,
    "TLS13": ssl.TLSVersion.TLSv1_3,
}
#: Go's names of the suites that are still thought safe -> OpenSSL's; those of TLS 1.3 cannot be chosen in either.
_SUITES = {
    f"TLS_ECDHE_{key}_WITH_{go}": f"ECDHE-{key}-{openssl}"
    for key in ("ECDSA", "RSA")
    for go, openssl in (
        ("AES_128_GCM_SHA256", "AES128-GCM-SHA256"),
        ("AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
        ("CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"),
    )
}
_BCRYPT = re.compile(r"\$2[aby]\$\d\d\$[./A-Za-z0-9]{53}")
_BCRYPT_BYTES = 72  # it reads no more of a password
_KNOWN_ANSWERS = (
    100  # a comparison takes a tenth of a second by design, and a scraper comes every few seconds
)


class WebConfigError(Exception):
    """The file cannot be read or makes no sense; the message is one line for the user, without secrets."""


@dataclass(frozen=True)
class Access:
    """What one reading of the file says."""

    context: ssl.SSLContext | None = None
    allowed_sans: frozenset[str] = frozenset()
    users: Mapping[str, bytes] = field(default_factory=dict)  # name -> bcrypt hash
    headers: Mapping[str, str] = field(default_factory=dict)  # of every answer
    files: tuple[Path, ...] = ()

    def admits(self, connection: ssl.SSLSocket) -> bool:
        """Whether a client whose certificate was verified has one of the names that are allowed, if any are."""
        if not self.allowed_sans:
            return True
        names = (connection.getpeercert() or {}).get("subjectAltName", ())
        return any(name[1] in self.allowed_sans for name in names)


class WebConfig:
    """The newest valid reading of the file; without a path everything is open, in plain text.

    Raises WebConfigError if the file cannot be used.
    """

    def __init__(self, path: str | None = None) -> None:
        self._path = None if path is None else Path.cwd() / path
        self._guard = threading.Lock()
        self._answers: dict[bytes, bool] = {}
        self._key = secrets.token_bytes(32)
        self._access = Access() if self._path is None else _read(self._path)
        self._look = _look(self._access.files)

    def access(self) -> Access:
        """What holds now."""
        with self._guard:
            if self._path is not None and (look := _look(self._access.files)) != self._look:
                self._look = look
                try:
                    self._access = _read(self._path)
                    self._look = _look(self._access.files)
                    self._answers.clear()
                    log.info("%s was read again", self._path)
                except WebConfigError as error:
                    log.warning("%s; what it said before holds on", error)
            return self._access

    def authorised(self, header: str | None) -> bool:
        """Whether an Authorization header names a user and the password; everyone is where there are no users."""
        access = self.access()
        if not access.users:
            return True
        name, password = _credentials(header)
        key = hmac.digest(self._key, b"\0".join((name.encode(), password)), "sha256")
        with (
            self._guard
        ):  # one comparison at a time: they are meant to be slow, and others need the processor
            if key not in self._answers:
                if len(self._answers) >= _KNOWN_ANSWERS:
                    self._answers.clear()
                self._answers[key] = _matches(password, name, access.users)
            return self._answers[key]


def _credentials(header: str | None) -> tuple[str, bytes]:
    scheme, _, value = (header or "").partition(" ")
    try:
        decoded = base64.b64decode(value, validate=True) if scheme.lower() == "basic" else b""
        name, _, password = decoded.partition(b":")
        return name.decode(), password
    except (binascii.Error, UnicodeDecodeError):
        return "", b""


def _matches(password: bytes, name: str, users: Mapping[str, bytes]) -> bool:
    import bcrypt  # noqa: PLC0415 - needed only by agents that ask for passwords

    # An unknown name takes as long as a wrong password.
    known = users.get(name) or next(iter(users.values()))
    return bcrypt.checkpw(password[:_BCRYPT_BYTES], known) and name in users


def _look(files: tuple[Path, ...]) -> tuple[object, ...]:
    """What tells whether one of the files is another now."""
    found: list[object] = []
    for path in files:
        try:
            status = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


def _read(path: Path) -> Access:
    try:
        import yaml  # noqa: PLC0415 - needed only by agents with such a file

        document = yaml.safe_load(path.read_bytes()) or {}
    except ImportError as error:
        raise WebConfigError("--web-config needs the package pyyaml: pip install 'optwatch[web]'") from error
    except OSError as error:
        raise WebConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WebConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    try:
        return _access(path, _section(document, ""))
    except ImportError as error:
        raise WebConfigError(
            "basic_auth_users needs the package bcrypt: pip install 'optwatch[web]'"
        ) from error
    except (ValueError, OSError) as error:
        raise WebConfigError(f"{path}: {error}") from error


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)


def _access(path: Path, document: Mapping[str, Any]) -> Access:
    tls = _section(document.get("tls_server_config"), "tls_server_config")
    http = _section(document.get("http_server_config"), "http_server_config")
    named = {name: path.parent / str(tls[name]) for name in _FILES if tls.get(name)}
    sans = tls.get("client_allowed_sans") or []
    if not isinstance(sans, list):
        _refuse("client_allowed_sans: expected a list of names")
    if sans and tls.get("client_auth_type") != "RequireAndVerifyClientCert":
        _refuse("client_allowed_sans needs client_auth_type: RequireAndVerifyClientCert")
    return Access(
        context=_context(tls, named) if tls else None,
        allowed_sans=frozenset(str(name) for name in sans),
        users=_users(document.get("basic_auth_users") or {}),
        headers={k: str(v) for k, v in _section(http.get("headers"), "headers").items()},
        files=(path, *named.values()),
    )


_FILES = ("cert_file", "key_file", "client_ca_file")


def _section(value: object, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        _refuse(f"{name or 'the file'}: expected keys and values")
    unknown = {str(key) for key in value} - _KEYS[name]
    if unknown:
        known = ", ".join(sorted(_KEYS[name]))
        _refuse(f"{name + ': ' if name else ''}{min(unknown)!r} is not supported; known: {known}")
    return value


def _context(tls: Mapping[str, Any], files: Mapping[str, Path]) -> ssl.SSLContext:
    if "cert_file" not in files or "key_file" not in files:
        _refuse("tls_server_config: expected cert_file and key_file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _choice(tls, "min_version", _VERSIONS, "TLS12")
    context.maximum_version = _choice(tls, "max_version", _VERSIONS, "TLS13")
    mode = _choice(tls, "client_auth_type", _CLIENT_AUTH, "NoClientCert")
    if (mode != ssl.CERT_NONE) != ("client_ca_file" in files):
        _refuse("client_ca_file and a client_auth_type that verifies go together")
    try:
        key = "cert_file"
        context.load_cert_chain(files["cert_file"], files["key_file"])
        if "client_ca_file" in files:
            key = "client_ca_file"
            context.load_verify_locations(files["client_ca_file"])
    except OSError as error:  # an ssl.SSLError is one, too
        raise ValueError(f"{files[key]} cannot be used: {error.strerror or error}") from error
    context.verify_mode = mode
    suites = tls.get("cipher_suites")
    if suites:
        chosen = [_choice({"cipher_suites": suite}, "cipher_suites", _SUITES, "") for suite in suites]
        context.set_ciphers(":".join(chosen))
    if tls.get("prefer_server_cipher_suites", True):
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    return context


def _choice(section: Mapping[str, Any], key: str, choices: Mapping[str, Any], default: str) -> Any:
    word = section.get(key, default)
    if word not in choices:
        _refuse(f"{key} {word!r}: expected one of {', '.join(choices)}")
    return choices[word]


def _users(users: object) -> dict[str, bytes]:
    if not isinstance(users, dict):
        _refuse("basic_auth_users: expected names and bcrypt hashes")
    if users:
        import bcrypt  # noqa: F401, PLC0415 - said now, not at the first scrape
    for name, value in users.items():
        if not isinstance(value, str) or not _BCRYPT.fullmatch(value):
            _refuse(f"basic_auth_users: the password of {name!r} is not a bcrypt hash ($2y$...)")
    return {str(name): value.encode() for name, value in users.items()}
