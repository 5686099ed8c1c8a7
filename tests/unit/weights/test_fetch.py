"""Test downloads from a hub on the loopback interface that interrupts transfers and sends wrong content."""

from __future__ import annotations

import hashlib
import io
import socket
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from chatterbox_prewarm.errors import BadInputError, WeightsError
from chatterbox_prewarm.system.digests import verify_files
from chatterbox_prewarm.weights.record import check_quickly, read_record, record
from chatterbox_prewarm.weights.variants import ENGLISH
from tests.helpers.children import call, start
from tests.helpers.hub_server import Hub, serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"
LARGE, SMALL = "t3_cfg.safetensors", "tokenizer.json"
#: The client writes to disk in chunks of 10 MiB. A transfer that breaks earlier starts again from the beginning.
CHUNK = 10 * 1024 * 1024
TENSORS: bytes = save({"a": np.arange((CHUNK + (1 << 20)) // 4, dtype=np.int32)})


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Serve a hub with a small and a large file."""
    files = {SMALL: b'{"version": "1.0"}', LARGE: TENSORS}
    with serve(Hub(repository="someone/voice", revision=REVISION, files=files)) as running:
        yield running


def arguments(directory: Path, revision: str = REVISION) -> dict[str, Any]:
    """Return the arguments of the program `fetch` in `tests.helpers.children`."""
    return {
        "directory": str(directory),
        "repository": "someone/voice",
        "files": [SMALL, LARGE],
        "tensors": [LARGE],
        "revision": revision,
    }


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """Return the settings of the client of the hub."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "hub-home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def fetch(hub: Hub, home: Path, revision: str = REVISION) -> dict[str, Any]:
    """Fetch the weights in another process, and return its report."""
    return call("fetch", env=environment(hub.endpoint, home), **arguments(home / "weights", revision))


def test_a_download_is_complete_verified_and_recorded(hub: Hub, tmp_path: Path) -> None:
    report = fetch(hub, tmp_path)
    assert report["revision"] == REVISION
    assert report["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in hub.files.items()}
    weights = tmp_path / "weights"
    record = read_record(weights)
    assert (record.repository, record.revision, record.synthetic) == ("someone/voice", REVISION, None)
    assert {entry.path: entry.sha256 for entry in record.files} == report["files"]
    check_quickly(weights, record)
    assert verify_files(record.files, weights) == []
    assert hub.ranges("GET", LARGE) == [None]


def test_a_second_download_transfers_no_content(hub: Hub, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path)
    hub.requests.clear()
    assert fetch(hub, tmp_path) == first
    assert [request for request in hub.requests if request[0] == "GET"] == []
    assert hub.ranges("HEAD", LARGE)  # the announced digest is compared again


def test_an_interrupted_transfer_is_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.cut[LARGE] = CHUNK + 1000
    report = fetch(hub, tmp_path)
    assert hub.ranges("GET", LARGE) == [None, f"bytes={CHUNK}-"]
    assert report["files"][LARGE] == hashlib.sha256(TENSORS).hexdigest()
    assert (tmp_path / "weights" / LARGE).read_bytes() == TENSORS


def test_a_killed_download_leaves_no_record_and_the_next_one_completes_it(hub: Hub, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    fetch(hub, tmp_path)  # the next download must remove the record of this one
    (weights / LARGE).unlink()
    hub.requests.clear()
    hub.hold[LARGE] = CHUNK + 1000
    with start("fetch", arguments(weights), environment(hub.endpoint, tmp_path)) as process:
        assert hub.holding.wait(30)
        process.kill()
    assert not (weights / "weights.json").exists()
    assert not (weights / LARGE).exists()
    with pytest.raises(WeightsError, match="the download did not finish"):
        read_record(weights)
    hub.hold.clear()
    assert fetch(hub, tmp_path)["files"][LARGE] == hashlib.sha256(TENSORS).hexdigest()
    assert hub.ranges("GET", SMALL) == []  # it was complete
    assert list(weights.rglob("*.incomplete")) == []  # no later download uses them


def flipped(content: bytes) -> bytes:
    """Flip a bit of the last byte."""
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_content_with_another_digest_than_announced_is_refused_and_removed(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.sent[name] = flipped(hub.files[name])
    weights = tmp_path / "weights"
    with pytest.raises(WeightsError, match=f"{name} of someone/voice: the hub announced digest") as caught:
        fetch(hub, tmp_path)
    assert caught.value.exit_code == 10
    assert not (weights / "weights.json").exists()
    assert not (weights / name).exists()
    hub.sent.clear()
    assert name in fetch(hub, tmp_path)["files"]


def test_a_file_that_was_changed_on_disk_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    changed = tmp_path / "weights" / SMALL
    changed.write_bytes(flipped(changed.read_bytes()))
    fetch(hub, tmp_path)
    assert changed.read_bytes() == hub.files[SMALL]
    assert hub.ranges("GET", LARGE) == [None]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_checkpoint_of_the_user_is_not_replaced(hub: Hub, tmp_path: Path, recorded: bool) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ENGLISH.files:
        (weights / name).write_bytes(TENSORS[:-4] + b"user" if name in ENGLISH.safetensors else b"{}")
    if recorded:
        record(weights, variant=ENGLISH, repository="own", revision="unversioned")
    before = {path: path.read_bytes() for path in weights.iterdir()}
    with pytest.raises(BadInputError, match=f"{SMALL} is not of someone/voice") as caught:
        fetch(hub, tmp_path)
    assert caught.value.exit_code == 16
    assert {path: path.read_bytes() for path in weights.iterdir()} == before


def test_a_failed_download_keeps_a_complete_checkpoint(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    hub.files.clear()
    with pytest.raises(WeightsError, match="could not be fetched"):
        fetch(hub, tmp_path)
    check_quickly(tmp_path / "weights", read_record(tmp_path / "weights"))


def test_a_file_of_another_size_than_announced_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.sent[LARGE] = hub.files[LARGE][:-8]
    with pytest.raises(WeightsError, match="could not be fetched") as caught:
        fetch(hub, tmp_path)
    assert caught.value.exit_code == 10
    assert not (tmp_path / "weights" / "weights.json").exists()


def test_a_pickle_on_the_hub_is_refused_although_its_digest_is_correct(hub: Hub, tmp_path: Path) -> None:
    hub.files[LARGE] = b"PK\x03\x04" + bytes(2000)
    with pytest.raises(WeightsError, match="is a pickle"):
        fetch(hub, tmp_path)
    assert not (tmp_path / "weights" / "weights.json").exists()


def test_a_file_that_is_missing_on_the_hub_is_named(hub: Hub, tmp_path: Path) -> None:
    del hub.files[LARGE]
    with pytest.raises(
        WeightsError, match=f"{LARGE} of someone/voice at {REVISION[:12]} could not be fetched"
    ) as caught:
        fetch(hub, tmp_path)
    assert caught.value.exit_code == 10
    assert "404" in caught.value.message
    assert not (tmp_path / "weights" / "weights.json").exists()


def test_a_hub_that_cannot_be_reached_is_a_weights_error(tmp_path: Path) -> None:
    with socket.socket() as unused:  # bound, but not listening
        unused.bind(("127.0.0.1", 0))
        unreachable = Hub(repository="someone/voice", revision=REVISION, files={})
        unreachable.endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(WeightsError, match="could not be fetched") as caught:
            fetch(unreachable, tmp_path)
    assert caught.value.exit_code == 10
    assert "network" in caught.value.next_step
    assert not (tmp_path / "weights" / "weights.json").exists()


def test_a_download_in_offline_mode_is_a_weights_error(hub: Hub, tmp_path: Path) -> None:
    offline = {**environment(hub.endpoint, tmp_path), "HF_HUB_OFFLINE": "1"}
    with pytest.raises(WeightsError, match="could not be fetched"):
        call("fetch", env=offline, **arguments(tmp_path / "weights"))
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["main", REVISION[:-1], REVISION.upper(), f"{REVISION}\n"])
def test_a_revision_that_can_move_is_refused_before_any_request(hub: Hub, tmp_path: Path, revision: str) -> None:
    with pytest.raises(BadInputError, match="is not a full commit hash") as caught:
        fetch(hub, tmp_path, revision)
    assert caught.value.exit_code == 16
    assert hub.requests == []
    assert not (tmp_path / "weights").exists()


def test_a_directory_that_cannot_be_written_is_refused(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("not a directory")
    with pytest.raises(BadInputError, match="creating the weights directory") as caught:
        fetch(hub, tmp_path)
    assert caught.value.exit_code == 16
    assert hub.requests == []


PICKLE, CONVERTED, ARCHIVE = "s3gen.pt", "s3gen.safetensors", "words.zip"


def _pickle(content: object) -> bytes:
    torch = pytest.importorskip("torch", reason="a pickle of tensors is read with torch")
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _convert(hub: Hub, home: Path) -> dict[str, Any]:
    given = {
        **arguments(home / "weights"),
        "files": [SMALL, CONVERTED],
        "tensors": [CONVERTED],
        "published": {CONVERTED: PICKLE},
    }
    return call("fetch", env=environment(hub.endpoint, home), **given)


def test_a_published_pickle_of_tensors_is_converted_once(hub: Hub, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="a pickle of tensors is read with torch")
    hub.files[PICKLE] = _pickle({"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([7])})
    first = _convert(hub, tmp_path)
    weights = tmp_path / "weights"
    tensors = load((weights / CONVERTED).read_bytes())
    assert tensors["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tensors["b"].tolist() == [7]
    assert not (weights / PICKLE).exists()
    hub.requests.clear()
    assert _convert(hub, tmp_path) == first
    assert hub.ranges("GET", PICKLE) == []
    hub.files[PICKLE] = _pickle({"a": torch.zeros(1)})
    assert _convert(hub, tmp_path) != first, "the hub has another file now"


class Code:
    """Runs code when it is unpickled without protection."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the code in the pickle was run",))


@pytest.mark.parametrize("content", [{"a": Code()}, {"a": "no tensor"}, ["no names"]])
def test_a_published_pickle_with_something_else_than_tensors_is_refused(
    content: object, hub: Hub, tmp_path: Path
) -> None:
    hub.files[PICKLE] = _pickle(content)
    with pytest.raises(WeightsError, match=r"s3gen\.pt"):
        _convert(hub, tmp_path)
    assert not (tmp_path / "weights" / CONVERTED).exists()
    assert not (tmp_path / "weights" / "weights.json").exists()


def _zip(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return stream.getvalue()


def _unpack(hub: Hub, home: Path, sha256: str) -> dict[str, Any]:
    archive = {
        "path": f"data/{ARCHIVE}",
        "url": f"{hub.endpoint}/{hub.repository}/resolve/{hub.revision}/{ARCHIVE}",
        "sha256": sha256,
        "members": ["one", "two"],
    }
    unpacked = [f"data/{ARCHIVE}", "data/words/one", "data/words/two"]
    given = {**arguments(home / "weights"), "files": [SMALL, LARGE, *unpacked], "archives": [archive]}
    return call("fetch", env=environment(hub.endpoint, home), **given)


def test_an_archive_is_unpacked_and_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    hub.files[ARCHIVE] = _zip(one=b"1", two=b"2", other=b"3")
    digest = hashlib.sha256(hub.files[ARCHIVE]).hexdigest()
    first = _unpack(hub, tmp_path, digest)
    folder = tmp_path / "weights" / "data" / "words"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"one": b"1", "two": b"2"}
    assert f"data/{ARCHIVE}" in first["files"]
    (folder / "one").write_bytes(b"changed")
    hub.requests.clear()
    assert _unpack(hub, tmp_path, digest) == first
    assert hub.ranges("GET", ARCHIVE) == []


@pytest.mark.parametrize(("content", "reason"), [(_zip(one=b"1"), "cannot be unpacked"), (b"no archive", "unpacked")])
def test_an_archive_without_its_members_is_refused(content: bytes, reason: str, hub: Hub, tmp_path: Path) -> None:
    hub.files[ARCHIVE] = content
    with pytest.raises(WeightsError, match=reason):
        _unpack(hub, tmp_path, hashlib.sha256(content).hexdigest())


def test_an_archive_with_another_digest_is_refused_and_removed(hub: Hub, tmp_path: Path) -> None:
    hub.files[ARCHIVE] = _zip(one=b"1", two=b"2")
    with pytest.raises(WeightsError, match="sent a file with the digest") as caught:
        _unpack(hub, tmp_path, "0" * 64)
    assert "put it at" in (caught.value.next_step or "")
    assert not (tmp_path / "weights" / "data" / ARCHIVE).exists()


def test_an_interrupted_conversion_continues(hub: Hub, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="a pickle of tensors is read with torch")
    hub.files[PICKLE] = _pickle({"a": torch.arange(6.0)})
    first = _convert(hub, tmp_path)
    weights = tmp_path / "weights"
    (weights / "weights.json").unlink()  # as after a call that was killed
    (weights / PICKLE).write_bytes(b"left")
    hub.requests.clear()
    assert _convert(hub, tmp_path) == first
    assert hub.ranges("GET", PICKLE) == []
    assert not (weights / PICKLE).exists()


@pytest.mark.parametrize("size", [-1, -4])
def test_a_converted_file_that_was_damaged_is_converted_again(size: int, hub: Hub, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="a pickle of tensors is read with torch")
    hub.files[PICKLE] = _pickle({"a": torch.arange(6.0)})
    first = _convert(hub, tmp_path)
    path = tmp_path / "weights" / CONVERTED
    path.write_bytes(flipped(path.read_bytes()) if size == -1 else path.read_bytes()[:size])
    assert _convert(hub, tmp_path) == first


def test_an_archive_that_was_put_there_by_hand_is_used(hub: Hub, tmp_path: Path) -> None:
    content = _zip(one=b"1", two=b"2")
    (tmp_path / "weights" / "data").mkdir(parents=True)
    (tmp_path / "weights" / "data" / ARCHIVE).write_bytes(content)
    assert f"data/{ARCHIVE}" in _unpack(hub, tmp_path, hashlib.sha256(content).hexdigest())["files"]
    assert hub.ranges("GET", ARCHIVE) == []


def test_a_checkpoint_of_another_variant_is_not_replaced(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    path = tmp_path / "weights" / "weights.json"
    path.write_text(path.read_text().replace('"variant": "english"', '"variant": "multilingual"'))
    with pytest.raises(BadInputError, match="fetching would replace it"):
        fetch(hub, tmp_path)
