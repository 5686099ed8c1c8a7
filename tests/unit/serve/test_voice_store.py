"""Added voices on the disk: whole or not there, one winner for each name, and no file breaks a server."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve.voices.voice_errors import (
    BakedVoiceError,
    StoreFullError,
    StoreUnavailableError,
    UnknownVoiceError,
    UnusableVoiceError,
    VoiceExistsError,
)
from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
from tests.helpers.added_voices import VARIANT, WEIGHTS, tensors, voice

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def open_store(directory: Path, **settings: Any) -> VoiceStore:
    return VoiceStore(directory, baked={"default": 10, "fox": 20}, variant=VARIANT, weights=WEIGHTS, **settings)


@pytest.fixture
def store(tmp_path: Path) -> VoiceStore:
    return open_store(tmp_path)


def listed(store: VoiceStore) -> dict[str, str | None]:
    """Added voices, and why they cannot be used."""
    return {entry.name: entry.problem for entry in store.entries() if not entry.baked}


def holds(path: Path, seed: int) -> bool:
    """Whether a file has the tensors of `voice(seed)`; the order of its metadata differs from process to process."""
    found, made = load(path.read_bytes()), tensors(seed)
    return found.keys() == made.keys() and all(np.array_equal(found[name], made[name]) for name in made)


def test_an_added_voice_is_there_for_every_server_of_the_directory_until_it_is_deleted(
    store: VoiceStore, tmp_path: Path
) -> None:
    other = open_store(tmp_path)
    added = store.add("Ann-1", voice())
    assert other.get("Ann-1") == added == store.get("Ann-1")
    assert (added.baked, added.created, added.problem) == (False, 1_700_000_000, None)
    assert added.size == (tmp_path / "Ann-1.safetensors").stat().st_size == len(voice())
    assert [entry.name for entry in other.entries()] == ["Ann-1", "default", "fox"]
    store.delete("Ann-1")
    assert listed(other) == {}
    with pytest.raises(UnknownVoiceError, match=r"no voice 'Ann-1'(.|\n)*choose one of: default, fox"):
        other.get("Ann-1")
    assert list(tmp_path.iterdir()) == []


def test_a_voice_is_shown_as_the_api_has_it(store: VoiceStore) -> None:
    added = store.add("ann", voice())
    shown = {"id": "fox", "object": "voice", "baked": True, "bytes": 20, "created": None}
    assert store.get("fox").to_dict() == {**shown, "digest": None, "usable": True, "reason": None}
    assert json.loads(json.dumps(added.to_dict()))["created"] == 1_700_000_000


def test_another_voice_under_the_same_name_has_another_digest(store: VoiceStore, tmp_path: Path) -> None:
    other = open_store(tmp_path)
    first = store.add("ann", voice(1)).digest
    assert other.digest("ann") == first
    store.delete("ann")
    second = store.add("ann", voice(2)).digest
    assert other.digest("ann") == second != first
    assert store.digest("default") is store.digest("fox") is None


def test_an_alias_is_the_voice_it_names_unless_there_is_one_of_its_name(store: VoiceStore, tmp_path: Path) -> None:
    named = open_store(tmp_path, aliases={"alloy": "fox", "echo": "ann", "lost": "nobody"})
    assert named.resolve("alloy") == ("fox", None)
    assert named.resolve("default") == ("default", None)
    with pytest.raises(UnknownVoiceError, match="no voice 'ann'"):
        named.resolve("echo")
    with pytest.raises(UnknownVoiceError, match="no voice 'other'"):
        named.resolve("other")
    digest = store.add("ann", voice(1)).digest
    assert named.resolve("echo") == named.resolve("ann") == ("ann", digest)
    own = store.add("alloy", voice(2)).digest
    assert named.resolve("alloy") == ("alloy", own)
    assert store.resolve("alloy") == ("alloy", own)
    anything = open_store(tmp_path, aliases={"*": "fox", "echo": "ann"})
    assert [anything.resolve(name)[0] for name in ("other", "echo", "default")] == ["fox", "ann", "default"]
    with pytest.raises(BadInputError, match="cannot name a voice"):
        anything.resolve("../x")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a.b", "a" * 65, "-a", "é", "a\0", "a\n", None, 5])
def test_what_cannot_name_a_voice_reaches_no_file(store: VoiceStore, tmp_path: Path, name: Any) -> None:
    for call in (store.get, store.digest, store.delete, store.check_free, lambda name: store.add(name, voice())):
        with pytest.raises(BadInputError, match="cannot name a voice"):
            call(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["default", "fox"])
def test_a_baked_voice_is_read_only_and_hides_a_file_of_its_name(store: VoiceStore, tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.safetensors").write_bytes(voice())
    with pytest.raises(VoiceExistsError, match="baked") as exists:
        store.add(name, voice())
    with pytest.raises(BakedVoiceError, match="cannot be deleted") as baked:
        store.delete(name)
    assert (exists.value.status, baked.value.status) == (409, 403)
    assert store.get(name).baked
    assert listed(store) == {}
    assert (tmp_path / f"{name}.safetensors").exists()


def test_the_built_in_voice_counts_as_baked_before_any_worker_has_told(tmp_path: Path) -> None:
    store = VoiceStore(tmp_path, baked={}, variant=VARIANT, weights=WEIGHTS)
    with pytest.raises(VoiceExistsError):
        store.add("default", voice())
    store.baked = {"default": 1, "ann": 2}
    with pytest.raises(VoiceExistsError):
        store.add("ann", voice())


def test_a_name_that_is_taken_is_refused_and_its_voice_stays(store: VoiceStore) -> None:
    first = store.add("ann", voice(1))
    with pytest.raises(VoiceExistsError, match="already") as caught:
        store.add("ann", voice(2))
    assert caught.value.status == 409
    assert store.get("ann") == first


_ADD_ALL = """
import sys
from pathlib import Path
from chatterbox_prewarm.serve.voices.voice_errors import VoiceExistsError
from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
from tests.helpers.added_voices import VARIANT, WEIGHTS, voice
store = VoiceStore(Path(sys.argv[1]), baked={}, variant=VARIANT, weights=WEIGHTS)
data = voice(int(sys.argv[2]))
store.check_free = lambda name: None  # what they see before they write is no protection
print("there", flush=True)
sys.stdin.readline()
for number in range(60):
    try:
        store.add(f"v{number}", data)
        print(number)
    except VoiceExistsError:
        pass
"""


def test_of_replicas_that_add_the_same_name_at_once_one_wins(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ADD_ALL, str(tmp_path)]
    replicas = [
        subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    for replica in replicas:
        assert replica.stdout is not None
        assert replica.stdout.readline() == "there\n"
    for replica in replicas:
        assert replica.stdin is not None
        replica.stdin.write("\n")
        replica.stdin.flush()
    won = [sorted(map(int, replica.communicate(timeout=60)[0].split())) for replica in replicas]
    assert sorted(number for numbers in won for number in numbers) == list(range(60))
    for seed, numbers in enumerate(won):
        for number in numbers:
            assert holds(tmp_path / f"v{number}.safetensors", seed)
    assert len(list(tmp_path.iterdir())) == 60


_ADD_AND_DELETE = """
import sys
from pathlib import Path
from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
from tests.helpers.added_voices import VARIANT, WEIGHTS, voice
store = VoiceStore(Path(sys.argv[1]), baked={}, variant=VARIANT, weights=WEIGHTS)
data = voice()
while True:
    for number in range(20):
        store.add(f"{sys.argv[2]}-{number}", data)
        print(flush=True)
    for number in range(20):
        store.delete(f"{sys.argv[2]}-{number}")
"""


def test_a_server_killed_at_any_moment_leaves_whole_voices_alone(store: VoiceStore, tmp_path: Path) -> None:
    wrong: list[dict[str, str | None]] = []
    done = threading.Event()

    def watch() -> None:
        other = open_store(tmp_path)
        while not done.is_set():
            if any((found := listed(other)).values()):
                wrong.append(found)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for turn in range(8):
            command = [sys.executable, "-c", _ADD_AND_DELETE, str(tmp_path), f"t{turn}"]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
                assert server.stdout is not None
                server.stdout.readline()
                time.sleep(0.003 * turn)
                server.send_signal(signal.SIGKILL)
    finally:
        done.set()
        watcher.join()
    assert wrong == []
    assert set(listed(store).values()) <= {None}
    assert all(holds(tmp_path / f"{name}.safetensors", 0) for name in listed(store))


def test_what_a_killed_server_left_half_written_is_no_voice_and_goes_when_it_is_old(
    store: VoiceStore, tmp_path: Path
) -> None:
    fresh, old = tmp_path / ".ann.1-aa.part", tmp_path / ".ann.2-bb.part"
    for path in (fresh, old):
        path.write_bytes(voice()[:100])
    os.utime(old, (time.time() - 7200,) * 2)
    assert listed(store) == {}
    store.add("ann", voice())
    assert fresh.exists(), "another replica may be writing it"
    assert not old.exists()


def test_without_a_directory_there_are_the_baked_voices_alone_and_adding_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "nowhere", tmp_path / "file", tmp_path / "file" / "below"):
        store = open_store(place)
        assert [entry.name for entry in store.entries()] == ["default", "fox"]
        with pytest.raises(UnknownVoiceError):
            store.delete("ann")
        with pytest.raises(StoreUnavailableError, match="no directory") as caught:
            store.add("ann", voice())
        assert caught.value.status == 503
        assert "--voices-dir" in caught.value.next_step
    (tmp_path / "nowhere").mkdir()
    assert open_store(tmp_path / "nowhere").add("ann", voice()).problem is None


def test_a_full_disk_is_said_and_nothing_is_left_behind(small_disk: Path) -> None:
    store = open_store(small_disk)
    kept = store.add("ann", voice())
    with pytest.raises(StoreFullError, match="No space left") as caught:
        store.add("bob", voice(1))
    assert caught.value.status == 507
    assert [path.name for path in small_disk.iterdir()] == ["ann.safetensors"]
    assert store.get("ann") == kept
    store.delete("ann")
    assert store.add("bob", voice(1)).problem is None


def test_a_read_only_directory_is_said_and_its_voices_can_be_used(small_disk: Path) -> None:
    open_store(small_disk).add("ann", voice())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    store = open_store(small_disk)
    assert listed(store) == {"ann": None}
    for call in (lambda: store.add("bob", voice()), lambda: store.delete("ann")):
        with pytest.raises(StoreUnavailableError, match="Read-only file system") as caught:
            call()
        assert caught.value.status == 503


def test_their_number_is_bounded(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_voices=2)
    for name in ("ann", "bob"):
        store.add(name, voice())
    with pytest.raises(StoreFullError, match="2 is the limit") as caught:
        store.add("cem", voice())
    assert caught.value.status == 507
    (tmp_path / "cem.safetensors").write_bytes(voice())
    assert sorted(listed(store)) == ["ann", "bob"]


def _write(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (_write(b""), "no safetensors file"),
        (_write(b"hello, world, this is text"), "no safetensors file"),
        (_write(pickle.dumps(list(range(100)))), "no safetensors file"),
        (_write(voice()[:-1]), "promises"),
        (_write(voice()[:50]), "no safetensors file"),
        (_write(voice() + b"x"), "promises"),
        (_write(bytes(2 << 20)), "larger than"),
        (_write(voice(weights="sha256:" + "3" * 64)), "made for the checkpoint 'sha256:333"),
        (_write(voice(variant="turbo")), "made for the variant 'turbo'"),
        (_write(voice(schema="2")), "schema is '2', this version reads 1"),
        (_write(voice(created="-1")), "incomplete"),
        (_write(voice(created="x" * 999)), "incomplete"),
        (_write(voice(clip_sha256="")), "incomplete"),
        (_write(voice(without="gen.embedding")), "it holds the tensors"),
        (_write(voice(instead={"more": np.zeros(1)})), "it holds the tensors"),
        (_write(voice(instead={"gen.embedding": np.zeros((1, 192))})), "gen.embedding is F64"),
        (_write(voice(instead={"gen.embedding": np.zeros((1, 191), np.float32)})), "gen.embedding"),
        (_write(voice(instead={"gen.prompt_token": np.zeros((1, 0), np.int64)})), "gen.prompt_token"),
        (_write(voice(instead={"gen.prompt_token": np.zeros((1, 74), np.int64)})), "150 frames for 74"),
        (lambda path: path.mkdir(), "no regular file"),
        (lambda path: path.symlink_to("/etc/passwd"), "no regular file"),
        (os.mkfifo, "no regular file"),
    ],
)
def test_a_file_that_is_no_voice_of_this_model_is_listed_with_the_reason(
    store: VoiceStore, tmp_path: Path, make: Callable[[Path], Any], word: str
) -> None:
    good = store.add("good", voice())
    make(tmp_path / "bad.safetensors")
    assert word in (listed(store)["bad"] or "")
    entry = store.get("bad").to_dict()
    assert (entry["usable"], entry["digest"]) == (False, None)
    with pytest.raises(UnusableVoiceError, match="the voice 'bad' cannot be used"):
        store.digest("bad")
    with pytest.raises(VoiceExistsError):
        store.add("bad", voice())
    assert store.get("good") == good
    if not (tmp_path / "bad.safetensors").is_dir():
        store.delete("bad")
        assert listed(store) == {"good": None}


def test_files_that_are_none_of_ours_are_left_alone(store: VoiceStore, tmp_path: Path) -> None:
    for name in ("lost+found", "notes.txt", "a b.safetensors", ".safetensors", "..safetensors", "x.safetensors.bak"):
        (tmp_path / name).write_bytes(voice())
    before = sorted(tmp_path.iterdir())
    assert listed(store) == {}
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_no_voice_of_this_model_is_not_added(store: VoiceStore, tmp_path: Path) -> None:
    for data in (b"", b"text", voice()[:-1], voice(weights="other")):
        with pytest.raises(UnusableVoiceError):
            store.add("ann", data)
    assert list(tmp_path.iterdir()) == []


def test_the_front_imports_nothing_heavy_for_its_voices() -> None:
    code = (
        "import sys; import chatterbox_prewarm.serve.voices.voice_store, chatterbox_prewarm.serve.http.voice_routes;"
        "print(sorted({'torch', 'numpy', 'soundfile', 'starlette', 'pydantic', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
