"""Image references, as Docker and skopeo write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.references import ImageReference, is_loopback, parse

DIGEST = "sha256:" + "0a" * 32


def repository_reference(host: str, repository: str, tag: str = "", digest: str = "") -> ImageReference:
    return ImageReference(kind="registry", host=host, repository=repository, tag=tag, digest=digest)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ubuntu", repository_reference("docker.io", "library/ubuntu")),
        ("ubuntu:22.04", repository_reference("docker.io", "library/ubuntu", "22.04")),
        ("docker.io/ubuntu", repository_reference("docker.io", "library/ubuntu")),
        ("index.docker.io/alice/voice", repository_reference("docker.io", "alice/voice")),
        ("alice/voice:1", repository_reference("docker.io", "alice/voice", "1")),
        ("localhost/voice", repository_reference("localhost", "voice")),
        ("localhost:5000/a/b/c:latest", repository_reference("localhost:5000", "a/b/c", "latest")),
        ("registry.example/voice", repository_reference("registry.example", "voice")),
        (f"registry.example/voice@{DIGEST}", repository_reference("registry.example", "voice", "", DIGEST)),
        (f"registry.example:443/voice:1@{DIGEST}", repository_reference("registry.example:443", "voice", "1", DIGEST)),
        ("[::1]:5000/voice:1", repository_reference("[::1]:5000", "voice", "1")),
        ("docker://registry.example/voice", repository_reference("registry.example", "voice")),
        ("registry.example/a__b/c---d", repository_reference("registry.example", "a__b/c---d")),
        ("oci:layout", ImageReference(kind="oci", path=Path("layout"))),
        ("oci:/some/layout:1.0", ImageReference(kind="oci", path=Path("/some/layout"), tag="1.0")),
        (f"oci:layout@{DIGEST}", ImageReference(kind="oci", path=Path("layout"), digest=DIGEST)),
        ("docker-archive:a.tar", ImageReference(kind="docker-archive", path=Path("a.tar"))),
        (
            "docker-archive:a.tar:voice",
            ImageReference(
                kind="docker-archive", path=Path("a.tar"), host="docker.io", repository="library/voice", tag="latest"
            ),
        ),
        (
            "docker-archive:a.tar:localhost:5000/voice:1",
            ImageReference(
                kind="docker-archive", path=Path("a.tar"), host="localhost:5000", repository="voice", tag="1"
            ),
        ),
    ],
)
def test_a_reference_is_parsed_and_survives_a_round_trip(text: str, expected: ImageReference) -> None:
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no repository"),
        ("/voice", "is not a repository"),
        ("registry.example/", "is not a repository"),
        ("Voice", "is not a repository"),
        ("a b", "is not a repository"),
        ("voice\n", "is not a repository"),
        ("a//b", "is not a repository"),
        ("../b", "is not"),
        ("registry.example/../b", "is not a repository"),
        ("a/" + "b" * 255, "is not a repository"),
        ("voice:", "is not a tag"),
        ("voice:.1", "is not a tag"),
        ("voice:" + "1" * 129, "is not a tag"),
        ("voice:1:2", "is not a repository"),
        ("voice@sha256:12", "is not a digest"),
        ("voice@sha512:" + "0" * 128, "is not a digest"),
        ("voice@", "is not a digest"),
        ("http://registry.example/voice", "it has a scheme"),
        ("registry.example:0/voice", "is not a host"),
        ("registry.example:65536/voice", "is not a host"),
        ("-registry.example/voice", "its host is invalid"),
        ("[::zz]:1/voice", "is not a host"),
        ("oci:", "names no folder"),
        ("oci::1", "names no folder"),
        ("oci:layout:", "is not a tag of a layout"),
        ("oci:layout:a b", "is not a tag of a layout"),
        ("docker-archive:", "names no file"),
        ("docker-archive:a.tar:", "names no repository"),
        ("docker-archive:a.tar:Voice", "is not a repository"),
        (f"docker-archive:a.tar:voice@{DIGEST}", "names its images by tags"),
        ("oci-archive:a.tar", "the transport oci-archive is not supported"),
        ("docker-daemon:voice:1", "the transport docker-daemon is not supported"),
    ],
)
def test_a_malformed_reference_is_refused_with_the_reason_and_the_syntax(text: str, reason: str) -> None:
    with pytest.raises(BadInputError, match=reason) as refused:
        parse(text)
    assert "HOST[:PORT]/REPOSITORY[:TAG]" in refused.value.next_step


def test_a_password_in_a_reference_is_not_in_the_message() -> None:
    with pytest.raises(BadInputError) as refused:
        parse("alice:secret@registry.example/voice")
    assert "secret" not in str(refused.value)


def test_a_digest_takes_precedence_over_a_tag_and_a_tag_over_latest() -> None:
    assert parse("voice").target == "latest"
    assert parse("voice:1").target == "1"
    assert parse(f"voice:1@{DIGEST}").target == DIGEST
    assert parse("voice:1").at(DIGEST) == parse(f"voice@{DIGEST}")


def test_docker_hub_has_short_names_and_another_api_host() -> None:
    assert parse("ubuntu").familiar == "ubuntu"
    assert parse("alice/voice").familiar == "alice/voice"
    assert parse("localhost:5000/voice").familiar == "localhost:5000/voice"
    assert parse("ubuntu").api_host == "registry-1.docker.io"
    assert parse("localhost:5000/voice").api_host == "localhost:5000"


def test_loopback_names_and_addresses_are_recognized() -> None:
    loopback = ["localhost", "LOCALHOST:5000", "127.0.0.1", "127.9.9.9:80", "[::1]:5000"]
    others = ["localhost.example", "128.0.0.1", "0.0.0.0", "[::2]", "registry.example:5000", "127.0.0.1.example", ""]
    assert [host for host in (*loopback, *others) if is_loopback(host)] == loopback
