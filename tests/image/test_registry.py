"""Upload and download blobs and manifests with a real registry: broken connections, errors, damage and logins."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any, BinaryIO

import pytest

from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.image.oci import (
    DOCKER_MANIFEST,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    Document,
    Image,
    digest_of,
    dump,
    to_documents,
)
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.registry.client import Repository
from chatterbox_prewarm.image.registry.login import parse_challenges
from tests.conftest import ROOT
from tests.helpers import registry_server
from tests.helpers.registry_server import PASSWORD, USER, Fault, Registry, Tokens, faulty_proxy, serve, serve_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

pytestmark = pytest.mark.programs

MB = 1 << 20
#: Seconds; short, so that retries do not make the tests slow.
RETRY_DELAYS = (0.05, 0.1, 0.1)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with serve(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(autouse=True)
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty Docker configuration, so that no test uses a login of this machine."""
    folder = tmp_path / "docker-config"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return folder


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A different repository for each test."""
    return "tests/" + hashlib.sha256(request.node.name.encode()).hexdigest()[:16]


def connect(address: str, name: str, **options: Any) -> Repository:
    return Repository(parse(f"{address}/{name}"), **{"retry_delays": RETRY_DELAYS, **options})


def describe(content: bytes) -> Descriptor:
    return Descriptor(media_type=OCI_LAYER, digest=digest_of(content), size=len(content))


def put(repository: Repository, content: bytes) -> Descriptor:
    descriptor = describe(content)
    repository.put_blob(descriptor, lambda: io.BytesIO(content))
    return descriptor


def read(repository: Repository, descriptor: Descriptor) -> bytes:
    with repository.open_blob(descriptor) as stream:
        return stream.read()


def limit(size: int = 0) -> Fault:
    """Refuse an upload of more bytes with one request, so that it continues with pieces."""
    return Fault(method="PUT", path="/uploads/", larger_than=size, status=413, times=99)


def push_image(repository: Repository, tag: str) -> Document:
    """Push an image without layers."""
    image_config = {"rootfs": {"diff_ids": []}, "author": repository.reference.repository}
    document, config, content = to_documents(Image(config=image_config, layers=()))
    repository.put_blob(config, lambda: io.BytesIO(content))
    repository.put_manifest(document, tag)
    return document


# --- upload and download


@pytest.mark.parametrize("size", [0, 1, MB, 5 * MB + 17])
def test_a_blob_is_downloaded_as_it_was_uploaded(registry: Registry, name: str, size: int) -> None:
    content = os.urandom(size)
    with connect(registry.address, name, piece=2 * MB) as repository:
        descriptor = describe(content)
        assert not repository.has_blob(descriptor)
        put(repository, content)
        assert repository.has_blob(descriptor)
        assert read(repository, descriptor) == content
        counters = repository.counters
    assert (counters["blobs_sent"], counters["bytes_sent"], counters["bytes_received"]) == (1, size, size)
    assert registry.blob(descriptor.digest).read_bytes() == content
    assert registry.sessions(name) == []


def test_a_stored_blob_is_not_uploaded_again(registry: Registry, name: str) -> None:
    with connect(registry.address, name) as repository:
        put(repository, b"a blob")
    with connect(registry.address, name) as repository:
        put(repository, b"a blob")
        counters = repository.counters
    assert (counters["requests"], counters["blobs_sent"], counters["bytes_sent"]) == (1, 0, 0)


def test_a_manifest_is_read_by_tag_and_by_digest(registry: Registry, name: str) -> None:
    with connect(registry.address, name) as repository:
        assert not repository.has_manifest("1.0")
        document = push_image(repository, "1.0")
        assert repository.has_manifest("1.0")
        assert repository.has_manifest(document.digest)
        assert repository.read_manifest("1.0") == document
        assert repository.read_manifest(document.digest) == document
        repository.put_manifest(document, document.digest)
        with pytest.raises(BadInputError, match="cannot be stored as"):
            repository.put_manifest(document, digest_of(b"other"))
        with pytest.raises(BadInputError, match="is neither a tag nor a digest"):
            repository.read_manifest("../tags/list")


def test_a_manifest_with_a_missing_blob_is_refused(registry: Registry, name: str) -> None:
    document, _, _ = to_documents(Image(config={"rootfs": {"diff_ids": []}, "unknown": name}, layers=()))
    with connect(registry.address, name) as repository, pytest.raises(EngineError, match="MANIFEST_BLOB_UNKNOWN"):
        repository.put_manifest(document, "1.0")


def test_a_blob_is_mounted_from_another_repository_without_an_upload(registry: Registry, name: str) -> None:
    with connect(registry.address, f"{name}/source") as source, connect(registry.address, name) as repository:
        descriptor = put(source, name.encode())
        assert repository.mount_blob(descriptor, f"{name}/source")
        assert repository.has_blob(descriptor)
        assert repository.counters["bytes_sent"] == 0
        absent = describe(b"nowhere " + name.encode())
        assert not repository.mount_blob(absent, f"{name}/source")
        assert not repository.has_blob(absent)
    assert registry.sessions(name) == []


def test_a_blob_is_streamed_between_repositories_over_broken_connections(registry: Registry, name: str) -> None:
    content = os.urandom(5 * MB)
    descriptor = describe(content)
    faults = [
        Fault(method="GET", cut=3 * MB, path="blobs/sha256"),
        Fault(method="PUT", cut=4 * MB, deliver="part"),
        Fault(method="PATCH", cut=MB, deliver="part"),
    ]
    with connect(registry.address, f"{name}/source") as source, faulty_proxy(registry, *faults) as proxy:
        put(source, content)
        with connect(proxy.address, f"{name}/source") as cut, connect(proxy.address, name, piece=2 * MB) as repository:
            repository.put_blob(descriptor, lambda: cut.open_blob(descriptor))
            assert read(repository, descriptor) == content
    assert [fault.times for fault in faults] == [0, 0, 0]


def test_a_blob_is_sent_with_one_request_if_the_registry_allows_it(registry: Registry, name: str) -> None:
    content = os.urandom(5 * MB)
    with faulty_proxy(registry) as proxy, connect(proxy.address, name, piece=MB) as repository:
        put(repository, content)
        assert read(repository, describe(content)) == content
    assert [method for method, _, _ in proxy.requests] == ["HEAD", "POST", "PUT", "GET"]


@pytest.mark.parametrize("status", [400, 404, 405])
def test_a_registry_that_refuses_pieces_gets_the_whole_blob_again(registry: Registry, name: str, status: int) -> None:
    """As Google's Artifact Registry does. The first connection breaks."""
    content = os.urandom(3 * MB)
    faults = [Fault(method="PUT", cut=MB, times=2), Fault(method="PATCH", status=status, times=99)]
    with faulty_proxy(registry, *faults) as proxy, connect(proxy.address, name) as repository:
        put(repository, content)
        assert read(repository, describe(content)) == content
    assert (len(proxy.headers_of("PUT")), len(proxy.headers_of("PATCH"))) == (3, 1)


def test_a_registry_that_refuses_pieces_and_large_requests_is_an_error(registry: Registry, name: str) -> None:
    with (
        faulty_proxy(registry, limit(), Fault(method="PATCH", status=405, times=99)) as proxy,
        connect(proxy.address, name) as repository,
        pytest.raises(EngineError, match=r"answered 413 to PUT .* limits the size"),
    ):
        put(repository, name.encode())
    assert registry.sessions(name) == []


def test_a_blob_that_another_repository_has_is_taken_from_there(registry: Registry, name: str) -> None:
    """The registry finds the repository itself. Docker's registry cannot, so the proxy answers instead."""
    fault = Fault(method="POST", path="?mount=sha256", status=201)
    with faulty_proxy(registry, fault) as proxy, connect(proxy.address, name) as repository:
        put(repository, name.encode())
    assert (repository.counters["bytes_sent"], fault.times) == (0, 0)
    assert [method for method, _, _ in proxy.requests] == ["HEAD", "POST"]


@pytest.mark.parametrize("status", [400, 500])
def test_a_registry_that_requires_the_name_of_the_other_repository_gets_the_blob(
    registry: Registry, name: str, status: int
) -> None:
    fault = Fault(method="POST", path="?mount=sha256", status=status, times=99)
    with faulty_proxy(registry, fault) as proxy, connect(proxy.address, name) as repository:
        put(repository, name.encode())
        assert repository.has_blob(describe(name.encode()))
    assert len(proxy.headers_of("POST")) == 2


# --- damaged and malformed content


def test_a_manifest_that_changed_in_the_registry_is_refused(registry: Registry, name: str) -> None:
    with connect(registry.address, name) as repository:
        document = push_image(repository, "1.0")
        path = registry.blob(document.digest)
        path.write_bytes(document.raw.replace(b'"size":', b'"size": '))
        for reference in ("1.0", document.digest):
            with pytest.raises(EngineError, match=rf"is damaged.*expected is {document.digest}"):
                repository.read_manifest(reference)


def test_a_blob_that_changed_in_the_registry_is_refused(registry: Registry, name: str) -> None:
    content = name.encode() + bytes(3 * MB)
    with connect(registry.address, name) as repository:
        descriptor = put(repository, content)
        registry.blob(descriptor.digest).write_bytes(content[:-1] + b"x")
        with repository.open_blob(descriptor) as stream:
            assert stream.read(MB) == content[:MB]  # no damage so far
            with pytest.raises(EngineError, match=r"is damaged at the registry .*: its bytes have the digest"):
                stream.read(2 * MB + 100)  # exactly the remaining bytes, without a read at the end
        registry.blob(descriptor.digest).write_bytes(content[:-1])
        with pytest.raises(EngineError, match=f"the registry sends {len(content) - 1} bytes instead of {len(content)}"):
            read(repository, descriptor)
        with pytest.raises(EngineError, match=f"has {len(content) - 1} bytes in the registry"):
            repository.has_blob(descriptor)


def test_bytes_that_differ_from_the_descriptor_are_not_stored(registry: Registry, name: str) -> None:
    content = name.encode()
    with connect(registry.address, name) as repository:
        with pytest.raises(EngineError, match=r"DIGEST_INVALID.*the uploaded bytes do not have the digest sha256:"):
            repository.put_blob(describe(content), lambda: io.BytesIO(content[::-1]))
        with pytest.raises(EngineError, match="is 1 bytes shorter than described"):
            repository.put_blob(describe(content), lambda: io.BytesIO(content[:-1]))
        assert not repository.has_blob(describe(content))


def test_a_manifest_with_an_unknown_media_type_is_refused(registry: Registry, name: str) -> None:
    odd = {"Content-Type": "application/vnd.docker.distribution.manifest.v1+prettyjws"}
    two = {"Content-Type": DOCKER_MANIFEST}
    faults = [
        Fault(method="GET", status=200, headers=odd, body=b'{"schemaVersion":1}'),
        Fault(method="GET", status=200, headers=two, body=dump({"mediaType": OCI_MANIFEST})),
        Fault(method="GET", status=200, headers=two, body=b"<html>"),
        Fault(method="GET", status=200, headers=two, body=b" " * (4 * MB + 1)),
    ]
    with faulty_proxy(registry, *faults) as proxy, connect(proxy.address, name) as repository:
        for words in ("schema 1", "has the mediaType", "is not a manifest", "is longer than 4194304 bytes"):
            with pytest.raises(EngineError, match=words) as refused:
                repository.read_manifest("1.0")
            assert refused.value.exit_code == 14


# --- broken connections and busy registries


def test_a_broken_upload_resumes_at_the_position_of_the_registry(registry: Registry, name: str) -> None:
    """The registry has nothing of the broken piece. The pieces before are not sent again."""
    content = os.urandom(8 * MB)
    # The first piece passes. The second one breaks after 1 MB, and nothing of it reaches the registry.
    fault = Fault(method="PATCH", cut=MB, skip=1)
    with faulty_proxy(registry, limit(), fault) as proxy, connect(proxy.address, name, piece=3 * MB) as repository:
        put(repository, content)
        assert read(repository, describe(content)) == content
    ranges = [headers["Content-Range"] for headers in proxy.headers_of("PATCH")]
    assert ranges == [
        f"0-{3 * MB - 1}",
        f"{3 * MB}-{6 * MB - 1}",
        f"{3 * MB}-{6 * MB - 1}",
        f"{6 * MB}-{8 * MB - 1}",
    ]
    assert len(proxy.headers_of("POST")) == 2, "one for the whole blob, and one for the pieces"
    assert registry.sessions(name) == []


def test_a_broken_upload_resumes_in_the_middle_of_a_piece(registry: Registry, name: str) -> None:
    """The registry keeps the bytes of the broken piece, so every byte is sent once."""
    content = os.urandom(5 * MB)
    fault = Fault(method="PATCH", cut=MB + 5, deliver="piece")
    with faulty_proxy(registry, limit(), fault) as proxy, connect(proxy.address, name, piece=3 * MB) as repository:
        repository.put_blob(describe(content), pipe(content))  # not seekable: the bytes that were sent are skipped
        assert read(repository, describe(content)) == content
    assert proxy.received["PATCH"] == len(content)
    assert [headers["Content-Range"] for headers in proxy.headers_of("PATCH")][1] == f"{MB + 5}-{4 * MB + 4}"
    assert len(proxy.headers_of("POST")) == 2


def test_a_broken_upload_restarts_if_the_registry_does_not_know_its_position(
    registry: Registry, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Docker's registry answers 404 after it received a part of a piece."""
    content = os.urandom(5 * MB)
    fault = Fault(method="PATCH", cut=MB, deliver="part")
    with faulty_proxy(registry, limit(), fault) as proxy, connect(proxy.address, name, piece=3 * MB) as repository:
        put(repository, content)
        assert read(repository, describe(content)) == content
        assert repository.counters["blobs_sent"] == 1
    assert len(proxy.headers_of("POST")) == 3
    assert f"uploading blob {describe(content).digest}" in caplog.text


def test_an_upload_is_not_repeated_when_only_its_last_response_is_lost(registry: Registry, name: str) -> None:
    fault = Fault(method="PUT", lose_response=True)
    with faulty_proxy(registry, fault) as proxy, connect(proxy.address, name) as repository:
        put(repository, name.encode())
        assert repository.has_blob(describe(name.encode()))
    assert len(proxy.headers_of("PUT")) == 1


def test_an_upload_fails_after_a_limited_number_of_retries(registry: Registry, name: str) -> None:
    faults = [Fault(method="PUT", cut=100, times=99), Fault(method="PATCH", cut=100, times=99)]
    with (
        faulty_proxy(registry, *faults) as proxy,
        connect(proxy.address, name) as repository,
        pytest.raises(EngineError, match=r"\(1048576 bytes\) failed 4 times in a row: the connection .* broke"),
    ):
        put(repository, name.encode().ljust(MB))
    assert len(proxy.headers_of("PUT")) + len(proxy.headers_of("PATCH")) == len(RETRY_DELAYS) + 1
    assert registry.sessions(name) == []


def test_a_broken_download_resumes_at_its_position(registry: Registry, name: str) -> None:
    content = os.urandom(5 * MB)
    with connect(registry.address, name) as repository:
        descriptor = put(repository, content)
    faults = [Fault(method="GET", cut=2 * MB + 3, path="blobs"), Fault(method="GET", cut=MB + 5, path="blobs")]
    with faulty_proxy(registry, *faults) as proxy, connect(proxy.address, name) as repository:
        assert read(repository, descriptor) == content
    ranges = [headers.get("Range") for headers in proxy.headers_of("GET")]
    assert ranges[0] is None
    assert len(ranges) == 3
    starts = [int(str(ranged).removeprefix("bytes=").rstrip("-")) for ranged in ranges[1:]]
    assert MB <= starts[0] <= 2 * MB + 3
    assert starts[0] < starts[1] < len(content)


def test_a_broken_download_resumes_without_support_for_ranges(registry: Registry, name: str) -> None:
    content = os.urandom(3 * MB)
    with connect(registry.address, name) as repository:
        descriptor = put(repository, content)
    complete = Fault(method="GET", status=200, body=content, path="blobs")
    with (
        faulty_proxy(registry, Fault(method="GET", cut=2 * MB, path="blobs"), complete) as proxy,
        connect(proxy.address, name) as repository,
    ):
        assert read(repository, descriptor) == content
    assert proxy.headers_of("GET")[1]["Range"].startswith("bytes=")


def test_a_download_fails_after_a_limited_number_of_retries(registry: Registry, name: str) -> None:
    with connect(registry.address, name) as repository:
        descriptor = put(repository, name.encode().ljust(MB))
    with (
        faulty_proxy(registry, Fault(method="GET", cut=1000, times=99, path="blobs")) as proxy,
        connect(proxy.address, name) as repository,
        pytest.raises(EngineError, match=r"\(1048576 bytes\) failed 4 times in a row"),
    ):
        read(repository, descriptor)
    assert len(proxy.headers_of("GET")) == len(RETRY_DELAYS) + 1


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_requests_to_a_busy_registry_are_retried(registry: Registry, name: str, status: int) -> None:
    faults = [Fault(method=method, status=status) for method in ("HEAD", "POST", "PATCH", "PUT", "GET")]
    with faulty_proxy(registry, *faults) as proxy, connect(proxy.address, name) as repository:
        document = push_image(repository, "1.0")
        assert repository.read_manifest("1.0") == document
    assert [fault.times for fault in faults] == [0] * len(faults)


def test_a_retry_waits_as_long_as_the_registry_asks(registry: Registry, name: str) -> None:
    with (
        faulty_proxy(registry, Fault(method="HEAD", status=429, headers={"Retry-After": "1"})) as proxy,
        connect(proxy.address, name) as repository,
    ):
        start = time.monotonic()
        assert not repository.has_manifest("1.0")
        assert 1.0 <= time.monotonic() - start < 5.0


def test_a_registry_that_asks_to_wait_an_hour_is_an_error(registry: Registry, name: str) -> None:
    with (
        faulty_proxy(registry, Fault(method="GET", status=429, headers={"Retry-After": "3600"})) as proxy,
        connect(proxy.address, name) as repository,
        pytest.raises(EngineError, match="asks to wait 3600 s"),
    ):
        repository.read_manifest("1.0")
    assert len(proxy.headers_of("GET")) == 1


def test_the_error_text_of_a_registry_is_quoted_without_control_characters(registry: Registry, name: str) -> None:
    body = b'{"errors":[{"code":"UNAVAILABLE","message":"closed \x1b[31m on sundays"}]}'
    with (
        faulty_proxy(registry, Fault(method="GET", status=503, body=body, times=99)) as proxy,
        connect(proxy.address, name) as repository,
        pytest.raises(EngineError, match="on sundays") as refused,
    ):
        repository.read_manifest("1.0")
    assert "\x1b" not in str(refused.value)
    assert len(proxy.headers_of("GET")) == len(RETRY_DELAYS) + 1


def test_pieces_that_are_too_large_for_a_proxy_become_smaller(registry: Registry, name: str) -> None:
    content = os.urandom(9 * MB)
    fault = Fault(method="PATCH", status=413, larger_than=4 * MB, times=99)
    with faulty_proxy(registry, limit(4 * MB), fault) as proxy, connect(proxy.address, name) as repository:
        put(repository, content)
        assert read(repository, describe(content)) == content
    assert [int(headers["Content-Length"]) for headers in proxy.headers_of("PATCH")] == [9 * MB, 4 * MB, 4 * MB, MB]


def test_a_size_limit_below_the_smallest_piece_is_reported(registry: Registry, name: str) -> None:
    page = b"<html><head><title>413 Request Entity Too Large</title></head></html>"
    with (
        faulty_proxy(
            registry, limit(MB), Fault(method="PATCH", status=413, larger_than=MB, times=99, body=page)
        ) as proxy,
        connect(proxy.address, name) as repository,
        pytest.raises(EngineError, match=r"Too Large; the registry, or a proxy .*, limits the size") as refused,
    ):
        put(repository, name.encode().ljust(5 * MB))
    assert "client_max_body_size" in refused.value.next_step
    assert registry.sessions(name) == []


def test_a_registry_that_is_down_is_reported_without_a_retry(name: str) -> None:
    address = f"127.0.0.1:{registry_server.free_port()}"
    with connect(address, name, retry_delays=(60.0,)) as repository:
        start = time.monotonic()
        with pytest.raises(
            EngineError, match=rf"{address} cannot be reached: no server answers .*Connection refused"
        ) as refused:
            repository.has_manifest("1.0")
    assert time.monotonic() - start < 5.0
    assert refused.value.exit_code == 14


def test_an_unknown_host_is_reported(name: str) -> None:
    with (
        connect("registry.invalid", name) as repository,
        pytest.raises(EngineError, match=r"cannot be re(ached|solved)"),
    ):
        repository.has_manifest("1.0")


def test_plain_http_instead_of_tls_is_recognized(registry: Registry, name: str) -> None:
    with (
        connect(registry.address, name, insecure=False) as repository,
        pytest.raises(EngineError, match="no trusted TLS connection") as refused,
    ):
        repository.has_manifest("1.0")
    assert "plain HTTP" in refused.value.next_step


def test_a_certificate_is_only_trusted_through_its_authority(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    registry_server.make_certificate(key, certificate)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    with serve(tmp_path / "registry", tls={"certificate": str(certificate), "key": str(key)}) as secure:
        with (
            connect(secure.address, name, insecure=False) as repository,
            pytest.raises(EngineError, match=r"no trusted TLS connection.*self.signed") as refused,
        ):
            repository.has_manifest("1.0")
        assert "REQUESTS_CA_BUNDLE" in refused.value.next_step
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        with connect(secure.address, name, insecure=False) as repository:
            document = push_image(repository, "1.0")
            assert repository.read_manifest("1.0") == document
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nowhere"))
    with pytest.raises(BadInputError, match="REQUESTS_CA_BUNDLE names"):
        connect("registry.example", name)


def test_a_missing_image_is_reported(registry: Registry, name: str) -> None:
    with connect(registry.address, name) as repository:
        with pytest.raises(EngineError, match=r"answered 404 to GET manifest 1\.0 .*MANIFEST_UNKNOWN"):
            repository.read_manifest("1.0")
        with pytest.raises(EngineError, match="answered 404 to GET blob"):
            read(repository, describe(b"nowhere"))


def test_a_full_disk_of_the_registry_is_reported(tmp_path: Path, name: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted: {mounted.stderr.strip()}")
    try:
        with (
            serve(tmp_path / "registry", storage=disk) as full,
            connect(full.address, name) as repository,
            pytest.raises(EngineError, match="its disk is full"),
        ):
            put(repository, os.urandom(8 * MB))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# --- interrupts and memory

SLOW_UPLOAD = """
    import io, sys, time
    from chatterbox_prewarm.image.oci import Descriptor
    from chatterbox_prewarm.image.references import parse
    from chatterbox_prewarm.image.registry.client import Repository

    class Slow(io.RawIOBase):
        def readable(self): return True
        def read(self, count):
            print("reading", flush=True)
            time.sleep(0.2)
            return bytes(count)

    repository = Repository(parse(sys.argv[1]))
    descriptor = Descriptor(media_type="", digest="sha256:" + "0" * 64, size=64 << 20)
    repository.put_blob(descriptor, Slow)
"""


def test_an_interrupted_upload_stops_at_once_and_is_cancelled(registry: Registry, name: str) -> None:
    """The registry gets the cancellation. Version 2 of it keeps an incomplete upload for some days nevertheless."""
    with (
        faulty_proxy(registry) as proxy,
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SLOW_UPLOAD), f"{proxy.address}/{name}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for _ in range(6):
                assert process.stdout.readline() == "reading\n"
            assert len(registry.sessions(name)) == 1
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert len(proxy.headers_of("DELETE")) == 1


LARGE_TRANSFER = """
    import hashlib, resource, sys
    from chatterbox_prewarm.image.oci import Descriptor
    from chatterbox_prewarm.image.references import parse
    from chatterbox_prewarm.image.registry.client import Repository

    path, reference = sys.argv[1:]
    def describe(path):
        sha256, size = hashlib.sha256(), 0
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                sha256.update(block)
                size += len(block)
        return Descriptor(media_type="", digest="sha256:" + sha256.hexdigest(), size=size)
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with Repository(parse(reference)) as repository:
        small = path + ".small"
        open(small, "wb").write(bytes(1000))
        descriptor = describe(small)
        repository.put_blob(descriptor, lambda: open(small, "rb"))
        with repository.open_blob(descriptor) as stream:
            stream.read()
        before = peak()
        descriptor = describe(path)
        repository.put_blob(descriptor, lambda: open(path, "rb"))
        sent = peak()
        with repository.open_blob(descriptor) as stream:
            while stream.read(1 << 20): pass
        print(sent - before, peak() - before, repository.counters["bytes_sent"])
"""


def test_a_blob_of_300_megabytes_is_not_held_in_memory(registry: Registry, name: str, tmp_path: Path) -> None:
    path = tmp_path / "blob"
    with path.open("wb") as stream:
        for number in range(300):
            stream.write(hashlib.sha256(number.to_bytes(4, "big")).digest() * (MB // 32))
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LARGE_TRANSFER), str(path), f"{registry.address}/{name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    sent, received, count = (float(word) for word in ended.stdout.split())
    assert count == 300 * MB + 1000
    assert sent < 5, ended.stdout  # megabytes
    assert received < 5, ended.stdout


# --- logins


def log_in(folder: Path, address: str, password: str = PASSWORD, user: str = USER) -> None:
    """Store a login as `docker login` does without a credential helper."""
    pair = base64.b64encode(f"{user}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {address: {"auth": pair}}}))


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    root = tmp_path_factory.mktemp("private")
    with serve(root, auth=registry_server.basic_auth(root)) as running:
        yield running


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokens]:
    with serve_tokens(tmp_path_factory.mktemp("tokens")) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that requires tokens."""
    with serve(tmp_path_factory.mktemp("guarded"), auth=tokens.auth()) as running:
        yield running


def test_the_login_is_only_sent_after_a_challenge(private: Registry, name: str, docker_config: Path) -> None:
    log_in(docker_config, private.address)
    with faulty_proxy(private) as proxy:
        log_in(docker_config, proxy.address)
        with connect(proxy.address, name) as repository:
            document = push_image(repository, "1.0")
            assert repository.read_manifest("1.0") == document
    authorized = ["Authorization" in headers for _, _, headers in proxy.requests]
    assert authorized == [False] + [True] * (len(authorized) - 1)


def test_a_missing_login_is_reported_with_the_command_to_log_in(private: Registry, name: str) -> None:
    with connect(private.address, name) as repository, pytest.raises(EngineError, match="without a login") as refused:
        repository.read_manifest("1.0")
    assert f"docker login {private.address}" in refused.value.next_step


def test_a_wrong_password_is_reported_without_a_retry_and_without_the_password(
    private: Registry, name: str, docker_config: Path
) -> None:
    with faulty_proxy(private) as proxy:
        log_in(docker_config, proxy.address, password="wrong-secret")
        with connect(proxy.address, name) as repository, pytest.raises(EngineError, match="as 'alice'") as refused:
            repository.read_manifest("1.0")
    assert "wrong-secret" not in str(refused.value)
    assert len(proxy.requests) == 2


HELPER = """#!/bin/sh
[ "$1" = get ] || exit 2
read -r server
[ "$server" = "{address}" ] || {{ echo "credentials not found in native keychain"; exit 1; }}
echo '{{"ServerURL": "{address}", "Username": "{user}", "Secret": "{secret}"}}'
"""


@pytest.mark.parametrize("key", ["credsStore", "credHelpers"])
def test_the_login_is_read_from_a_credential_helper(
    private: Registry, name: str, docker_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text(HELPER.format(address=private.address, user=USER, secret=PASSWORD))
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    value: Any = "test" if key == "credsStore" else {private.address: "test"}
    (docker_config / "config.json").write_text(json.dumps({key: value}))
    with connect(private.address, name) as repository:
        document = push_image(repository, "1.0")
        assert repository.read_manifest("1.0") == document


PODMAN_FILES = {
    "REGISTRY_AUTH_FILE": "auth.json",
    "XDG_RUNTIME_DIR": "containers/auth.json",
    "XDG_CONFIG_HOME": "containers/auth.json",
    "HOME": ".config/containers/auth.json",
}


@pytest.mark.parametrize("variable", PODMAN_FILES)
def test_the_login_of_podman_is_read(
    private: Registry, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    path = tmp_path / "podman" / PODMAN_FILES[variable]
    path.parent.mkdir(parents=True)
    monkeypatch.setenv(variable, str(path if variable == "REGISTRY_AUTH_FILE" else tmp_path / "podman"))
    log_in(path.parent, private.address)
    (path.parent / "config.json").rename(path)
    with connect(private.address, name) as repository:
        push_image(repository, "1.0")
    path.write_text("{")
    with connect(private.address, name) as repository, pytest.raises(EngineError, match=r"logins .*auth\.json is not"):
        repository.has_manifest("1.0")


def test_the_login_of_docker_is_used_if_podman_has_a_login_for_another_registry(
    private: Registry, name: str, docker_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(tmp_path, "registry.example")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "config.json"))
    log_in(docker_config, private.address)
    with connect(private.address, name) as repository:
        push_image(repository, "1.0")


def test_a_missing_or_broken_credential_helper_is_reported(
    private: Registry, name: str, docker_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docker_config / "config.json").write_text(json.dumps({"credsStore": "test"}))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with connect(private.address, name) as repository:
        with pytest.raises(EngineError, match="docker-credential-test not installed") as refused:
            repository.has_manifest("1.0")
        assert "config.json" in refused.value.next_step
    helper = tmp_path / "docker-credential-test"
    for script, words in [("echo locked; exit 1", "locked"), ("echo '{\"a-secret\"'", "cannot be read")]:
        helper.write_text(f"#!/bin/sh\n{script}\n")
        helper.chmod(0o755)
        with connect(private.address, name) as repository, pytest.raises(EngineError, match=words) as refused:
            repository.has_manifest("1.0")
        assert "a-secret" not in str(refused.value)


def test_a_broken_docker_configuration_is_not_treated_as_empty(
    private: Registry, registry: Registry, name: str, docker_config: Path
) -> None:
    (docker_config / "config.json").write_text('{"auths": ')
    with connect(registry.address, name) as repository:
        assert not repository.has_manifest("1.0")  # the registry requires no login
    with connect(private.address, name) as repository, pytest.raises(EngineError, match="not a readable JSON object"):
        repository.has_manifest("1.0")
    (docker_config / "config.json").write_text(json.dumps({"auths": {private.address: {"auth": "not a pair"}}}))
    with connect(private.address, name) as repository, pytest.raises(EngineError, match="cannot be read") as refused:
        repository.has_manifest("1.0")
    assert "not a pair" not in str(refused.value)


def test_a_token_is_requested_once_per_scope(guarded: Registry, tokens: Tokens, name: str, docker_config: Path) -> None:
    log_in(docker_config, guarded.address)
    tokens.requests.clear()
    with connect(guarded.address, name) as repository:
        document = push_image(repository, "1.0")
        assert repository.read_manifest("1.0") == document
        put(repository, name.encode() * MB)
    scopes = [query["scope"] for _, query in tokens.requests]
    assert scopes == [[f"repository:{name}:pull"], [f"repository:{name}:pull,push"]]
    assert {tuple(query["service"]) for _, query in tokens.requests} == {(registry_server.SERVICE,)}
    with connect(guarded.address, f"{name}/other") as other:
        assert other.mount_blob(describe(name.encode() * MB), name)
    assert set(tokens.requests[-1][1]["scope"]) == {
        f"repository:{name}:pull",
        f"repository:{name}/other:pull,push",
    }


def test_a_mount_from_an_unreadable_repository_is_not_an_error(
    guarded: Registry, tokens: Tokens, name: str, docker_config: Path
) -> None:
    log_in(docker_config, guarded.address)
    content = name.encode()
    with connect(guarded.address, f"{name}/source") as source, connect(guarded.address, name) as repository:
        descriptor = put(source, content)
        tokens.denied.add(f"{name}/source")
        assert not repository.mount_blob(descriptor, f"{name}/source")
        put(repository, content)
        assert read(repository, descriptor) == content
        with (
            connect(guarded.address, f"{name}/source") as refused,
            pytest.raises(EngineError, match=r"refuses \(as 'alice'\).* answered 401"),
        ):
            refused.has_blob(descriptor)


def test_an_expired_token_is_renewed(
    guarded: Registry, tokens: Tokens, name: str, docker_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(docker_config, guarded.address)
    with connect(guarded.address, name) as repository:
        document = push_image(repository, "1.0")
        tokens.requests.clear()
        monkeypatch.setattr(tokens, "lifetime", 6)  # 1 s, after the 5 s by which tokens are renewed early
        with connect(guarded.address, name) as short:
            assert short.read_manifest("1.0") == document
            assert short.read_manifest("1.0") == document
            assert len(tokens.requests) == 1
            time.sleep(1.2)
            before_renewal = short.counters["requests"]
            assert short.read_manifest("1.0") == document
    assert len(tokens.requests) == 2
    assert short.counters["requests"] == before_renewal + 2  # the token and the manifest, without a 401


def test_a_token_that_the_registry_rejects_is_renewed(
    guarded: Registry, tokens: Tokens, name: str, docker_config: Path
) -> None:
    with faulty_proxy(guarded) as proxy:
        log_in(docker_config, proxy.address)
        with connect(proxy.address, name) as repository:
            document = push_image(repository, "1.0")
            repository.read_manifest("1.0")
            challenge = f'Bearer realm="{tokens.realm}",service="{registry_server.SERVICE}",error="invalid_token"'
            proxy.faults.append(Fault(method="GET", status=401, headers={"WWW-Authenticate": challenge}))
            assert repository.read_manifest("1.0") == document
            # The body of an upload request cannot be sent again, so the piece is retried.
            proxy.faults.append(Fault(method="PATCH", status=401, headers={"WWW-Authenticate": challenge}))
            put(repository, name.encode() * MB)
            assert repository.has_blob(describe(name.encode() * MB))


def test_an_identity_token_replaces_the_password(
    guarded: Registry, tokens: Tokens, name: str, docker_config: Path
) -> None:
    entry = {"auth": base64.b64encode(b"00000000:").decode(), "identitytoken": tokens.identity}
    (docker_config / "config.json").write_text(json.dumps({"auths": {guarded.address: entry}}))
    tokens.requests.clear()
    with connect(guarded.address, name) as repository:
        push_image(repository, "1.0")
    assert {tuple(form["refresh_token"]) for _, form in tokens.requests} == {(tokens.identity,)}
    entry["identitytoken"] = "expired-secret"
    (docker_config / "config.json").write_text(json.dumps({"auths": {guarded.address: entry}}))
    with connect(guarded.address, name) as repository, pytest.raises(EngineError, match="refuses") as refused:
        repository.read_manifest("1.0")
    assert "expired-secret" not in str(refused.value)


def test_a_login_that_the_token_server_refuses_is_not_retried(
    guarded: Registry, tokens: Tokens, name: str, docker_config: Path
) -> None:
    log_in(docker_config, guarded.address, password="wrong-secret")
    tokens.requests.clear()
    with connect(guarded.address, name) as repository, pytest.raises(EngineError, match="as 'alice'") as refused:
        repository.read_manifest("1.0")
    assert len(tokens.requests) == 1
    assert "wrong-secret" not in str(refused.value)


def test_the_login_is_not_sent_to_the_host_of_a_redirect(
    private: Registry, name: str, docker_config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = name.encode()
    (docker_config.parent / ".netrc").write_text("machine 127.0.0.1 login netrc password netrc\n")
    (docker_config.parent / ".netrc").chmod(0o600)
    caplog.set_level("DEBUG", "chatterbox_prewarm")
    with registry_server.serve_blob(content) as (url, seen), faulty_proxy(private) as proxy:
        log_in(docker_config, proxy.address)
        with connect(proxy.address, name) as repository:
            descriptor = put(repository, content)
            proxy.faults.append(Fault(method="GET", path="blobs", status=307, headers={"Location": url}))
            assert read(repository, descriptor) == content
    assert len(seen) == 1
    assert "Authorization" not in seen[0]
    assert "Authorization" in proxy.headers_of("GET")[-1]
    assert "/store" in caplog.text
    assert "signature=secret" not in caplog.text
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize("location", ["http://[", "http://a:b/", "file:///etc/passwd"])
def test_a_redirect_to_an_invalid_url_is_refused(registry: Registry, name: str, location: str) -> None:
    fault = Fault(method="GET", status=307, headers={"Location": location})
    with (
        faulty_proxy(registry, fault) as proxy,
        connect(proxy.address, name) as repository,
        pytest.raises(EngineError, match="redirects to an invalid URL"),
    ):
        read(repository, describe(b"anything"))


def test_a_redirect_loop_is_refused(registry: Registry, name: str) -> None:
    fault = Fault(method="GET", status=307, headers={"Location": "/v2/"}, times=99)
    with (
        faulty_proxy(registry, fault) as proxy,
        connect(proxy.address, name) as repository,
        pytest.raises(EngineError, match="more than 5 times"),
    ):
        read(repository, describe(b"anything"))


def test_a_password_is_not_sent_over_plain_http_to_another_machine(
    registry: Registry, name: str, docker_config: Path
) -> None:
    realm = {"WWW-Authenticate": 'Bearer realm="http://tokens.example/token",service="a",scope="b"'}
    with faulty_proxy(registry, Fault(method="HEAD", status=401, headers=realm)) as proxy:
        log_in(docker_config, proxy.address)
        with connect(proxy.address, name) as repository, pytest.raises(EngineError, match="without encryption"):
            repository.has_manifest("1.0")


def test_challenges_with_commas_in_quotes_are_parsed() -> None:
    header = (
        'Basic realm="a, b", Bearer realm="https://x/t",service="s",scope="repository:a:pull,push repository:b:pull"'
    )
    assert parse_challenges(header) == [
        ("basic", {"realm": "a, b"}),
        (
            "bearer",
            {"realm": "https://x/t", "service": "s", "scope": "repository:a:pull,push repository:b:pull"},
        ),
    ]
    assert parse_challenges("") == []
    assert parse_challenges("Negotiate") == [("negotiate", {})]
    assert parse_challenges("Bearer realm=") == [("bearer", {"realm": ""})]


# --- helpers


def pipe(content: bytes) -> Callable[[], AbstractContextManager[BinaryIO]]:
    """Return how to open a stream that is not seekable."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation("seek")

    return lambda: Pipe(content)
