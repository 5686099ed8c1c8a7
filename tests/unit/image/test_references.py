"""Image references as Docker and skopeo write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.references import ImageReference, is_loopback, parse

DIGEST = "sha256:" + "0a" * 32


def of(host: str, repository: str, tag: str = "", digest: str = "") -> ImageReference:
    return ImageReference(kind="registry", host=host, repository=repository, tag=tag, digest=digest)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ubuntu", of("docker.io", "library/ubuntu")),
        ("ubuntu:22.04", of("docker.io", "library/ubuntu", "22.04")),
        ("docker.io/ubuntu", of("docker.io", "library/ubuntu")),
        ("index.docker.io/somebody/voice", of("docker.io", "somebody/voice")),
        ("somebody/voice:1", of("docker.io", "somebody/voice", "1")),
        ("localhost/voice", of("localhost", "voice")),
        ("localhost:5000/a/b/c:latest", of("localhost:5000", "a/b/c", "latest")),
        ("registry.example/voice", of("registry.example", "voice")),
        (f"registry.example/voice@{DIGEST}", of("registry.example", "voice", "", DIGEST)),
        (f"registry.example:443/voice:1@{DIGEST}", of("registry.example:443", "voice", "1", DIGEST)),
        ("[::1]:5000/voice:1", of("[::1]:5000", "voice", "1")),
        ("docker://registry.example/voice", of("registry.example", "voice")),
        ("registry.example/a__b/c-.d".replace("-.", "---"), of("registry.example", "a__b/c---d")),
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
def test_a_reference_is_parsed_and_what_it_prints_is_parsed_to_the_same(text: str, expected: ImageReference) -> None:
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "names no repository"),
        ("/voice", "is no repository"),
        ("registry.example/", "is no repository"),
        ("Voice", "is no repository"),
        ("a b", "is no repository"),
        ("voice\n", "is no repository"),
        ("a//b", "is no repository"),
        ("../b", "is no"),
        ("registry.example/../b", "is no repository"),
        ("a/" + "b" * 255, "is no repository"),
        ("voice:", "is no tag"),
        ("voice:.1", "is no tag"),
        ("voice:" + "1" * 129, "is no tag"),
        ("voice:1:2", "is no repository"),
        ("voice@sha256:12", "is no digest"),
        ("voice@sha512:" + "0" * 128, "is no digest"),
        ("voice@", "is no digest"),
        ("http://registry.example/voice", "it has a scheme"),
        ("registry.example:0/voice", "is no host"),
        ("registry.example:65536/voice", "is no host"),
        ("-registry.example/voice", "its host is none"),
        ("[::zz]:1/voice", "is no host"),
        ("oci:", "names no folder"),
        ("oci::1", "names no folder"),
        ("oci:layout:", "is no tag of a layout"),
        ("oci:layout:a b", "is no tag of a layout"),
        ("docker-archive:", "names no file"),
        ("docker-archive:a.tar:", "names no repository"),
        ("docker-archive:a.tar:Voice", "is no repository"),
        (f"docker-archive:a.tar:voice@{DIGEST}", "names its images by tags"),
    ],
)
def test_a_bad_reference_is_refused_with_the_reason_and_what_is_expected(text: str, why: str) -> None:
    with pytest.raises(BadInputError, match=why) as refused:
        parse(text)
    assert "HOST[:PORT]/REPOSITORY[:TAG]" in refused.value.next_step


def test_a_password_in_a_reference_is_not_repeated() -> None:
    with pytest.raises(BadInputError) as refused:
        parse("somebody:secret@registry.example/voice")
    assert "secret" not in str(refused.value)


def test_a_digest_goes_before_a_tag_and_a_tag_before_latest() -> None:
    assert parse("voice").target == "latest"
    assert parse("voice:1").target == "1"
    assert parse(f"voice:1@{DIGEST}").target == DIGEST
    assert parse("voice:1").at(DIGEST) == parse(f"voice@{DIGEST}")


def test_docker_hub_is_left_out_where_docker_leaves_it_out_and_has_its_api_elsewhere() -> None:
    assert parse("ubuntu").familiar == "ubuntu"
    assert parse("somebody/voice").familiar == "somebody/voice"
    assert parse("localhost:5000/voice").familiar == "localhost:5000/voice"
    assert parse("ubuntu").api_host == "registry-1.docker.io"
    assert parse("localhost:5000/voice").api_host == "localhost:5000"


def test_this_machine_is_told_from_others_by_its_name_or_address() -> None:
    here = ["localhost", "LOCALHOST:5000", "127.0.0.1", "127.9.9.9:80", "[::1]:5000"]
    elsewhere = ["localhost.example", "128.0.0.1", "0.0.0.0", "[::2]", "registry.example:5000", "127.0.0.1.example", ""]
    assert [host for host in (*here, *elsewhere) if is_loopback(host)] == here
