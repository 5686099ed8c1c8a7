"""Test the addresses that a server listens on."""

from __future__ import annotations

import contextlib
import socket

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve.http.server import listen

HAS_IPV6 = socket.has_dualstack_ipv6()


def reaches(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", {"127.0.0.1"}),
        ("localhost", {"127.0.0.1"}),
        ("0.0.0.0", {"127.0.0.1"}),
        ("::1", {"::1"}),
        ("[::1]", {"::1"}),
        ("::", {"127.0.0.1", "::1"}),
        ("[::]", {"127.0.0.1", "::1"}),
    ],
)
def test_a_server_listens_on_an_address_with_and_without_brackets(host: str, reached: set[str]) -> None:
    if ":" in host and not HAS_IPV6:
        pytest.skip("this machine has no IPv6")
    with contextlib.closing(listen(host, 0)) as listener:
        port = listener.getsockname()[1]
        assert {address for address in ("127.0.0.1", "::1") if reaches(address, port)} == reached


def test_a_port_in_use_and_a_foreign_address_are_refused() -> None:
    with (
        contextlib.closing(listen("127.0.0.1", 0)) as listener,
        pytest.raises(BadInputError, match="Address already in use"),
    ):
        listen("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(BadInputError, match=r"cannot listen on 192\.0\.2\.1"):
        listen("192.0.2.1", 0)
