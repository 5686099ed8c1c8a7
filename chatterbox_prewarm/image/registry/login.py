"""The login at a registry: Docker's own, as `docker login` left it, and the tokens that a registry asks for.

A registry answers 401 with what it wants ("WWW-Authenticate"): a name and a password, or a token that another server
gives for them, for one scope ("repository:NAME:pull"). Tokens are kept by scope: that of one repository is no use in
another.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import requests.utils

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.image.references import is_loopback
from chatterbox_prewarm.image.registry.credentials import Credentials, find_credentials
from chatterbox_prewarm.image.registry.registry_errors import origin

if TYPE_CHECKING:
    from collections.abc import Mapping

_CLIENT = "chatterbox-prewarm"
#: Seconds: what a token lasts whose server does not say (the token specification), and what is left for its way.
_LIFETIME, _MARGIN = 60.0, 5.0
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9-]*) +(?P<rest>[A-Za-z_]+=.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """What a registry asks for, of its WWW-Authenticate header; the scheme in small letters."""

    scheme: str
    realm: str = ""
    service: str = ""
    scope: str = ""


class Fetch(Protocol):
    """One request to a token's server, without a redirect: the status and the body."""

    def __call__(
        self, method: str, url: str, *, headers: Mapping[str, str], data: list[tuple[str, str]] | None
    ) -> tuple[int, bytes]:
        """Send it; raises EngineError when there is no answer, or one that says to come back later."""


class Login:
    """What is sent as Authorization to one registry.

    Args:
        host: of the registry, as `docker login` was given it.
        base: the registry's API, "https://HOST" or, on this machine, "http://HOST".
        fetch: how a token's server is asked.
    """

    def __init__(self, host: str, base: str, fetch: Fetch) -> None:
        self._host = host
        self._base = base
        self._fetch = fetch
        self._credentials: Credentials | None = None
        self._looked = False
        self._basic = ""
        #: Scope → the challenge that it answers, the token, and when it ends by the monotonic clock.
        self._tokens: dict[str, tuple[Challenge, str, float]] = {}

    @property
    def user(self) -> str:
        """Who was tried, for messages."""
        if self._credentials is None:
            return "without a login"
        return f"as {self._credentials.username!r}"

    def header(self, scope: str) -> str:
        """What to send for a scope; empty as long as the registry asked for nothing.

        Raises:
            EngineError: a token ended, and there is no other to be had.
        """
        if self._basic:
            return self._basic
        if scope not in self._tokens:
            return ""
        challenge, token, ends = self._tokens[scope]
        if time.monotonic() > ends:
            return self._renew(challenge, scope)
        return f"Bearer {token}"

    def answer(self, header: str, scope: str) -> None:
        """Take what a 401 asks for in its WWW-Authenticate header; `header` has the answer from now on.

        Raises:
            EngineError: there is no login, it is refused, or the registry asks for what this program does not know.
        """
        challenges = parse_challenges(header)
        for challenge in challenges:
            if challenge.scheme == "bearer" and challenge.realm:
                self._renew(challenge, scope)
                return
        if not any(challenge.scheme == "basic" for challenge in challenges):
            schemes = ", ".join(challenge.scheme for challenge in challenges) or "nothing"
            raise EngineError(
                f"the registry {self._host} asks for a login by {schemes}; Bearer and Basic are known here",
                next_step="see its documentation for another address",
            )
        found = self._look()
        if found is None or not found.password:
            raise self.refused("it asks for a name and a password")
        self._check_private(self._base)
        self._basic = found.basic

    def refused(self, said: str) -> EngineError:
        """The error of a login that is missing, wrong, or not enough."""
        return EngineError(
            f"the registry {self._host} refuses ({self.user}): {said}",
            next_step=f"log in with docker login {self._host}, as somebody who may do this, and check the reference",
        )

    def _look(self) -> Credentials | None:
        if not self._looked:
            self._credentials = find_credentials(self._host)
            self._looked = True
        return self._credentials

    def _renew(self, challenge: Challenge, scope: str) -> str:
        token, lifetime = self._fetch_token(challenge, scope)
        self._tokens[scope] = (challenge, token, time.monotonic() + lifetime - _MARGIN)
        return f"Bearer {token}"

    def _fetch_token(self, challenge: Challenge, scope: str) -> tuple[str, float]:
        """A token for what the registry asked for and what is wanted, and the seconds that it lasts."""
        scopes = _union(f"{challenge.scope} {scope}")
        found = self._look()
        if found:
            self._check_private(challenge.realm)
        headers: dict[str, str] = {}
        if found and found.identity_token:
            data = [
                ("grant_type", "refresh_token"),
                ("refresh_token", found.identity_token),
                ("service", challenge.service),
                ("scope", " ".join(scopes)),
                ("client_id", _CLIENT),
            ]
            status, body = self._fetch("POST", challenge.realm, headers=headers, data=data)
        else:
            query = [("service", challenge.service), *(("scope", one) for one in scopes), ("client_id", _CLIENT)]
            if found:
                headers["Authorization"] = found.basic
                query.append(("account", found.username))
            joint = "&" if "?" in challenge.realm else "?"
            url = challenge.realm + joint + urllib.parse.urlencode([(key, value) for key, value in query if value])
            status, body = self._fetch("GET", url, headers=headers, data=None)
        if status in {401, 403}:
            raise self.refused(f"the server of its tokens, {origin(challenge.realm)}, answered {status}")
        return self._read_token(challenge, status, body)

    def _read_token(self, challenge: Challenge, status: int, body: bytes) -> tuple[str, float]:
        what = f"the server of the tokens of {self._host}, {origin(challenge.realm)},"
        step = "try again later, or log in to the registry anew"
        if status != 200:
            raise EngineError(f"{what} answered {status} where a token belongs", next_step=step)
        try:
            raw = json.loads(body)
            token = raw.get("token") or raw["access_token"]
            lifetime = float(raw.get("expires_in") or _LIFETIME)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise EngineError(f"{what} sent something else than a token", next_step=step) from error
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise EngineError(f"{what} sent a token that no header can hold", next_step=step)
        return token, max(lifetime - _age(raw.get("issued_at")), 0.0)

    def _check_private(self, url: str) -> None:
        """A password goes nowhere in the clear, but to this machine, and there only for a registry of this machine."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme == "https":
            return
        if parts.scheme == "http" and is_loopback(parts.netloc) and is_loopback(self._host):
            return
        raise EngineError(
            f"the registry {self._host} wants the login sent to {origin(url)}, where others can read it",
            next_step="use a registry that speaks HTTPS; a password is sent over plain HTTP to this machine alone",
        )


def parse_challenges(header: str) -> tuple[Challenge, ...]:
    """The challenges of a WWW-Authenticate header (RFC 9110, section 11.6.1); a scope may have commas in its quotes."""
    found: list[tuple[str, list[str]]] = []
    for item in urllib.request.parse_http_list(header):
        started = _SCHEME.fullmatch(item)
        if started:
            found.append((started["scheme"].lower(), [started["rest"]]))
        elif "=" not in item:
            found.append((item.strip().lower(), []))
        elif found:
            found[-1][1].append(item)
    parsed = ((scheme, dict(_pair(item) for item in items)) for scheme, items in found)
    return tuple(
        Challenge(
            scheme=scheme,
            realm=values.get("realm", ""),
            service=values.get("service", ""),
            scope=values.get("scope", ""),
        )
        for scheme, values in parsed
    )


def _pair(item: str) -> tuple[str, str]:
    key, _, value = item.partition("=")
    return key.strip().lower(), requests.utils.unquote_header_value(value.strip())


def _age(issued: object) -> float:
    """Seconds since a token was issued, by its server's clock; a clock that is ahead of ours counts as now."""
    try:
        stamp = dt.datetime.fromisoformat(str(issued).replace("Z", "+00:00"))
        return max((dt.datetime.now(dt.timezone.utc) - stamp).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return 0.0  # absent, or of a form that this Python does not read: it counts from now


def _union(scopes: str) -> list[str]:
    """Each resource once, with every action that is asked for it: a registry names them in any order ("push,pull")."""
    actions: dict[str, set[str]] = {}
    for scope in scopes.split():
        resource, _, named = scope.rpartition(":")
        actions.setdefault(resource, set()).update(named.split(","))
    return [f"{resource}:{','.join(sorted(named))}" for resource, named in actions.items()]
