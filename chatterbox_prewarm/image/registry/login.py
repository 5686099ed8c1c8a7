"""The login to a registry: the credentials that Docker or podman stored, and the tokens that registries require.

A registry answers 401 with a challenge (WWW-Authenticate): it wants the password itself (Basic), or a token (Bearer)
from a token server for one scope, e.g. "repository:NAME:pull". Tokens are kept per scope.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
import re
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import requests.utils

from chatterbox_prewarm.errors import EngineError, first_line
from chatterbox_prewarm.image.references import is_loopback
from chatterbox_prewarm.image.registry.registry_errors import origin

#: Sends (method, url, headers, form data) to a token server, and returns status and body.
FetchToken = Callable[[str, str, Mapping[str, str], list[tuple[str, str]] | None], tuple[int, bytes]]

_CLIENT_ID = "chatterbox-prewarm"
#: Seconds: the lifetime of a token without "expires_in" (token specification), and the time to renew it before its end.
_LIFETIME, _MARGIN = 60.0, 5.0
_CHALLENGE_START = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9-]*) +(?P<parameter>[A-Za-z_]+=.*)", re.DOTALL)


class Login:
    """Computes the Authorization header for one registry.

    Args:
        host: the registry, as given to `docker login`.
        base: base URL of its API, e.g. "https://HOST".
        fetch_token: sends a request to a token server.
    """

    def __init__(self, host: str, base: str, fetch_token: FetchToken) -> None:
        self._host = host
        self._base = base
        self._fetch_token = fetch_token
        #: Username, and password or identitytoken; empty without a login, None before it is read.
        self._credentials: Mapping[str, str] | None = None
        self._basic = ""
        #: Scope -> (parameters of the challenge, token, end of its lifetime on the monotonic clock).
        self._tokens: dict[str, tuple[Mapping[str, str], str, float]] = {}

    def authorization(self, scope: str) -> str:
        """Return the Authorization header for a scope. It is empty until the registry sends a challenge.

        Raises:
            EngineError: a token has expired and cannot be renewed.
        """
        if self._basic:
            return self._basic
        if scope not in self._tokens:
            return ""
        challenge, token, end = self._tokens[scope]
        return f"Bearer {token}" if time.monotonic() <= end else self._renew(challenge, scope)

    def handle_challenge(self, header: str, scope: str) -> None:
        """Log in as the WWW-Authenticate header of a 401 requires, for the next call of `authorization`.

        Raises:
            EngineError: there is no login, the registry refuses it, or it wants an unsupported scheme.
        """
        challenges = parse_challenges(header)
        for scheme, parameters in challenges:
            if scheme == "bearer" and parameters.get("realm"):
                self._renew(parameters, scope)
                return
        schemes = [scheme for scheme, _ in challenges]
        if "basic" not in schemes:
            raise EngineError(
                f"the registry {self._host} requires the login scheme {', '.join(schemes) or '(none)'}; "
                "only Bearer and Basic are supported",
                next_step="see its documentation for another address",
            )
        credentials = self._read_credentials()
        if not credentials.get("password"):
            raise self.error("it requires a username and a password")
        self._check_private(self._base)
        self._basic = _basic(credentials)

    def error(self, reason: str) -> EngineError:
        """Return the error for a login that is missing, wrong or not sufficient."""
        user = f"as {self._credentials['username']!r}" if self._credentials else "without a login"
        return EngineError(
            f"the registry {self._host} refuses ({user}): {reason}",
            next_step=f"log in with docker login {self._host}, or podman login, as a user with this permission, "
            "and check the reference",
        )

    def _read_credentials(self) -> Mapping[str, str]:
        if self._credentials is None:
            self._credentials = read_credentials(self._host)
        return self._credentials

    def _renew(self, challenge: Mapping[str, str], scope: str) -> str:
        token, lifetime = self._request_token(challenge, scope)
        self._tokens[scope] = (challenge, token, time.monotonic() + lifetime - _MARGIN)
        return f"Bearer {token}"

    def _request_token(self, challenge: Mapping[str, str], scope: str) -> tuple[str, float]:
        """Return a token for the scopes of the challenge and of the request, and its remaining lifetime in seconds."""
        realm, service = challenge["realm"], challenge.get("service", "")
        scopes = _merge_scopes(f"{challenge.get('scope', '')} {scope}")
        credentials = self._read_credentials()
        if credentials:
            self._check_private(realm)
        if "identitytoken" in credentials:
            form = [
                ("grant_type", "refresh_token"),
                ("refresh_token", credentials["identitytoken"]),
                ("service", service),
                ("scope", " ".join(scopes)),
                ("client_id", _CLIENT_ID),
            ]
            status, body = self._fetch_token("POST", realm, {}, form)
        else:
            query = [("service", service), *(("scope", one) for one in scopes), ("client_id", _CLIENT_ID)]
            if credentials:
                query.append(("account", credentials["username"]))
            separator = "&" if "?" in realm else "?"
            url = realm + separator + urllib.parse.urlencode([(key, value) for key, value in query if value])
            headers = {"Authorization": _basic(credentials)} if credentials else {}
            status, body = self._fetch_token("GET", url, headers, None)
        if status in {401, 403}:
            raise self.error(f"its token server {origin(realm)} answered {status}")
        return self._parse_token(realm, status, body)

    def _parse_token(self, realm: str, status: int, body: bytes) -> tuple[str, float]:
        server = f"the token server {origin(realm)} of {self._host}"
        step = "try again later, or log in to the registry again"
        if status != 200:
            raise EngineError(f"{server} answered {status} instead of sending a token", next_step=step)
        try:
            raw = json.loads(body)
            token = raw.get("token") or raw["access_token"]
            lifetime = float(raw.get("expires_in") or _LIFETIME)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise EngineError(f"{server} sent a response without a token", next_step=step) from error
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise EngineError(f"{server} sent a token with characters that are invalid in a header", next_step=step)
        return token, max(lifetime - _age(raw.get("issued_at")), 0.0)

    def _check_private(self, url: str) -> None:
        """Refuse to send a password over plain HTTP, except within this machine for a registry on this machine."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme == "https":
            return
        if parts.scheme == "http" and is_loopback(parts.netloc) and is_loopback(self._host):
            return
        raise EngineError(
            f"the registry {self._host} wants the login sent to {origin(url)} without encryption",
            next_step="use a registry with HTTPS; a password is only sent over plain HTTP within this machine",
        )


def parse_challenges(header: str) -> list[tuple[str, dict[str, str]]]:
    """Parse a WWW-Authenticate header (RFC 9110, section 11.6.1) into schemes, in lower case, and their parameters.

    `requests.utils.parse_dict_header` reads only one challenge; a header can hold several.
    """
    challenges: list[tuple[str, dict[str, str]]] = []
    for item in urllib.request.parse_http_list(header):  # keeps commas within quotes
        parameter = item
        if start := _CHALLENGE_START.fullmatch(item):
            challenges.append((start["scheme"].lower(), {}))
            parameter = start["parameter"]
        elif "=" not in item:
            challenges.append((item.strip().lower(), {}))
        if challenges and "=" in parameter:
            key, _, value = parameter.partition("=")
            challenges[-1][1][key.strip().lower()] = requests.utils.unquote_header_value(value.strip())
    return challenges


def read_credentials(host: str) -> Mapping[str, str]:
    """Read what `docker login` or `podman login` stored for a registry, in a file or in a credential helper.

    Returns:
        "username", and "password" or "identitytoken"; empty without a login.

    Raises:
        EngineError: a file cannot be read, or its credential helper is missing or fails.
    """
    return next((found for path in _login_files() if (found := _read_login(path, host))), {})


def _login_files() -> Iterator[Path]:
    """Yield the files with logins, first the file that the user names, then Docker's, then podman's.

    Podman's are documented in containers-auth.json(5). They have the format of Docker's.
    """
    import docker.utils.config

    if named := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(named)
    if config := docker.utils.config.find_config_file():
        yield Path(str(config))
    configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    for folder in (os.environ.get("XDG_RUNTIME_DIR"), configuration):
        if folder and (path := Path(folder, "containers", "auth.json")).exists():
            yield path


def _read_login(file: Path, host: str) -> Mapping[str, str]:
    """Read the login for a registry from a file.

    docker-py reads it, but ignores a broken file and raises errors of many types; both are handled here.
    """
    import docker.auth
    import docker.errors

    _check_login_file(file)
    path = str(file)
    try:
        with warnings.catch_warnings():
            # docker-py warns about a missing credential helper, and then raises the same message.
            warnings.simplefilter("ignore", UserWarning)
            stored: dict[str, Any] = docker.auth.resolve_authconfig(docker.auth.load_config(path), host) or {}
        entry = {key.lower(): value for key, value in stored.items()}
        if entry.get("identitytoken"):
            return {"username": "<token>", "identitytoken": str(entry["identitytoken"])}
        if entry.get("username") is None:
            return {}
        return {"username": str(entry["username"]), "password": str(entry["password"])}
    except docker.errors.DockerException as error:
        raise EngineError(
            f"the login for {host} cannot be read: {first_line(error)}",
            next_step=f"install the credential helper named in {path}, or remove it there and run docker login {host}",
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # The unparsed text may be the password: report only the type of the error, without its cause.
        raise EngineError(
            f"the login for {host} in {path} cannot be read ({type(error).__name__})",
            next_step=f"log in again with docker login {host}",
        ) from None


def _check_login_file(path: Path) -> None:
    """Refuse a broken file; docker-py treats it as empty. The older .dockercfg of Docker is not JSON."""
    try:
        readable = path.name == ".dockercfg" or isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        readable = False
    if not readable:
        raise EngineError(
            f"the file with logins {path} is not a readable JSON object",
            next_step="repair it, or name another folder in DOCKER_CONFIG or another file in REGISTRY_AUTH_FILE",
        )


def _basic(credentials: Mapping[str, str]) -> str:
    pair = f"{credentials['username']}:{credentials['password']}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _age(issued_at: object) -> float:
    """Return the seconds since a token was issued; 0 if its server's clock is ahead or the time is unreadable."""
    try:
        issued = dt.datetime.fromisoformat(str(issued_at).replace("Z", "+00:00"))
        return max((dt.datetime.now(dt.timezone.utc) - issued).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def _merge_scopes(scopes: str) -> list[str]:
    """List each resource once with all its actions; registries list actions in any order, e.g. "push,pull"."""
    actions: dict[str, set[str]] = {}
    for scope in scopes.split():
        resource, _, names = scope.rpartition(":")
        actions.setdefault(resource, set()).update(names.split(","))
    return [f"{resource}:{','.join(sorted(names))}" for resource, names in actions.items()]
