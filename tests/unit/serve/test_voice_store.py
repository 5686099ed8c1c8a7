"""The voice store: complete files only, one winner for each name, and no file that breaks a server."""

from __future__ import annotations

import contextlib
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
from chatterbox_prewarm.serve.voices.voice_errors import UnknownVoiceError, UnusableVoiceError, VoiceError
from chatterbox_prewarm.serve.voices.voice_file import MAX_BYTES, digest_of, make_metadata
from chatterbox_prewarm.serve.voices.voice_store import VoiceEntry, VoiceStore
from tests.helpers.added_voices import VARIANT, WEIGHTS, tensors, voice, voice_of_schema_1

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def open_store(directory: Path, **settings: Any) -> VoiceStore:
    store = VoiceStore(directory, {VARIANT: WEIGHTS}, **settings)
    store.baked[VARIANT] = {"default": 10, "fox": 20}
    return store


@pytest.fixture
def store(tmp_path: Path) -> VoiceStore:
    return open_store(tmp_path)


@contextlib.contextmanager
def refused(code: str, status: int, match: str | None = None) -> Iterator[None]:
    """Expect a `VoiceError` with this code, status and text."""
    with pytest.raises(VoiceError, match=match) as caught:
        yield
    assert (caught.value.code, caught.value.status) == (code, status)


def problems(store: VoiceStore) -> dict[str, str | None]:
    """Return the added voices, and why each cannot be used."""
    return {entry.name: entry.problem for entry in store.entries() if not entry.baked}


def has_tensors(path: Path, seed: int) -> bool:
    """Return whether a file has the tensors of `voice(seed)`; the order of the metadata differs between processes."""
    actual, expected = load(path.read_bytes()), {f"{VARIANT}/{name}": value for name, value in tensors(seed).items()}
    return actual.keys() == expected.keys() and all(np.array_equal(actual[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("lean_installation")
def test_a_lean_installation_advises_to_bake_an_unknown_voice(store: VoiceStore) -> None:
    with pytest.raises(UnknownVoiceError, match=r"(?s)no voice 'nobody'.*choose one of: default, fox, or bake it"):
        store.get("nobody")


def test_all_servers_of_a_directory_see_an_added_voice_until_it_is_deleted(store: VoiceStore, tmp_path: Path) -> None:
    other = open_store(tmp_path)
    added = store.add("Ann-1", voice())
    assert other.get("Ann-1") == added == store.get("Ann-1")
    assert (added.baked, added.created, added.problem) == (False, 1_700_000_000, None)
    assert added.size == (tmp_path / "Ann-1.safetensors").stat().st_size == len(voice())
    assert [entry.name for entry in other.entries()] == ["Ann-1", "default", "fox"]
    store.delete("Ann-1")
    assert problems(other) == {}
    with pytest.raises(UnknownVoiceError, match=r"no voice 'Ann-1'(.|\n)*choose one of: default, fox"):
        other.get("Ann-1")
    assert list(tmp_path.iterdir()) == []


def test_an_entry_has_the_size_of_a_baked_voice_and_the_creation_time_of_an_added_one(store: VoiceStore) -> None:
    added = store.add("ann", voice())
    assert store.get("fox") == VoiceEntry(name="fox", baked=True, size=20, models=(VARIANT,))
    assert added.created == 1_700_000_000


def test_a_new_voice_with_the_name_of_a_deleted_one_has_another_digest(store: VoiceStore, tmp_path: Path) -> None:
    other = open_store(tmp_path)
    first = store.add("ann", voice(1)).digest
    assert other.digest("ann") == first
    store.delete("ann")
    second = store.add("ann", voice(2)).digest
    assert other.digest("ann") == second != first
    assert store.digest("default") is store.digest("fox") is None


def test_an_alias_resolves_to_its_voice_unless_a_voice_has_its_name(store: VoiceStore, tmp_path: Path) -> None:
    named = open_store(tmp_path, aliases={"alloy": "fox", "echo": "ann", "lost": "missing"})
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


@pytest.mark.parametrize(
    "name", ["Emily.wav", "John Smith", "voices/chatterbox/Alice.wav", "../x", "", "é", "x" * 100_000]
)
def test_an_alias_covers_names_that_no_voice_can_have(tmp_path: Path, name: str) -> None:
    assert open_store(tmp_path, aliases={"*": "fox"}).resolve(name) == ("fox", None)
    assert open_store(tmp_path, aliases={name: "fox"}).resolve(name) == ("fox", None)
    with pytest.raises(
        UnknownVoiceError, match=r"(?s)no voice .*choose one of: default, fox, or .*--voice-alias"
    ) as caught:
        open_store(tmp_path).resolve(name)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a.b", "a" * 65, "-a", "é", "a\0", "a\n", None, 5])
def test_invalid_names_are_refused_before_any_file_is_touched(store: VoiceStore, tmp_path: Path, name: Any) -> None:
    for call in (store.get, store.digest, store.delete, store.check_free, lambda name: store.add(name, voice())):
        with pytest.raises(BadInputError, match="cannot name a voice"):
            call(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["default", "fox"])
def test_a_baked_voice_is_read_only_and_hides_a_file_of_its_name(store: VoiceStore, tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.safetensors").write_bytes(voice())
    with refused("voice_exists", 409, "baked"):
        store.add(name, voice())
    with refused("voice_is_baked", 403, "cannot be deleted"):
        store.delete(name)
    assert store.get(name).baked
    assert problems(store) == {}
    assert (tmp_path / f"{name}.safetensors").exists()


def test_the_default_voice_counts_as_baked_before_a_worker_reports_its_voices(tmp_path: Path) -> None:
    store = VoiceStore(tmp_path, {VARIANT: WEIGHTS})
    with refused("voice_exists", 409):
        store.add("default", voice())
    store.baked[VARIANT] = {"default": 1, "ann": 2}
    with refused("voice_exists", 409):
        store.add("ann", voice())


def test_adding_an_existing_name_is_refused_and_changes_nothing(store: VoiceStore) -> None:
    first = store.add("ann", voice(1))
    with refused("voice_exists", 409, "already"):
        store.add("ann", voice(2))
    assert store.get("ann") == first


_ADD_ALL = """
import sys
from pathlib import Path
from chatterbox_prewarm.serve.voices.voice_errors import VoiceError
from chatterbox_prewarm.serve.voices.voice_file import MAX_BYTES, digest_of
from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
from tests.helpers.added_voices import VARIANT, WEIGHTS, voice
store = VoiceStore(Path(sys.argv[1]), {VARIANT: WEIGHTS})
data = voice(int(sys.argv[2]))
store.check_free = lambda name: None  # so that only the write itself protects an existing file
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    try:
        store.add(f"v{number}", data)
        print(number)
    except VoiceError as error:
        assert error.code == "voice_exists"
"""


def test_one_replica_wins_when_several_add_the_same_name_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ADD_ALL, str(tmp_path)]
    replicas = [
        subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    for replica in replicas:
        assert replica.stdout is not None
        assert replica.stdout.readline() == "ready\n"
    for replica in replicas:
        assert replica.stdin is not None
        replica.stdin.write("\n")
        replica.stdin.flush()
    won = [sorted(map(int, replica.communicate(timeout=60)[0].split())) for replica in replicas]
    assert sorted(number for numbers in won for number in numbers) == list(range(60))
    for seed, numbers in enumerate(won):
        for number in numbers:
            assert has_tensors(tmp_path / f"v{number}.safetensors", seed)
    assert len(list(tmp_path.iterdir())) == 60


_ADD_AND_DELETE = """
import sys
from pathlib import Path
from chatterbox_prewarm.serve.voices.voice_file import MAX_BYTES, digest_of
from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
from tests.helpers.added_voices import VARIANT, WEIGHTS, voice
store = VoiceStore(Path(sys.argv[1]), {VARIANT: WEIGHTS})
data = voice()
while True:
    for number in range(20):
        store.add(f"{sys.argv[2]}-{number}", data)
        print(flush=True)
    for number in range(20):
        store.delete(f"{sys.argv[2]}-{number}")
"""


def test_a_killed_server_leaves_only_complete_voices(store: VoiceStore, tmp_path: Path) -> None:
    broken: list[dict[str, str | None]] = []
    done = threading.Event()

    def watch() -> None:
        other = open_store(tmp_path)
        while not done.is_set():
            if any((listing := problems(other)).values()):
                broken.append(listing)

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
    assert broken == []
    assert set(problems(store).values()) <= {None}
    assert all(has_tensors(tmp_path / f"{name}.safetensors", 0) for name in problems(store))


def test_old_temporary_files_of_killed_servers_are_removed(store: VoiceStore, tmp_path: Path) -> None:
    fresh, old = tmp_path / ".ann.safetensors.aa", tmp_path / ".ann.safetensors.bb"
    for path in (fresh, old):
        path.write_bytes(voice()[:100])
    os.utime(old, (time.time() - 7200,) * 2)
    assert problems(store) == {}
    store.add("ann", voice())
    assert fresh.exists(), "another replica may be writing it"
    assert not old.exists()


def test_without_a_directory_only_baked_voices_exist_and_adding_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "nowhere", tmp_path / "file", tmp_path / "file" / "below"):
        store = open_store(directory)
        assert [entry.name for entry in store.entries()] == ["default", "fox"]
        with pytest.raises(UnknownVoiceError):
            store.delete("ann")
        with refused("voices_unavailable", 503, r"no directory(.|\n)*--voices-dir"):
            store.add("ann", voice())
    (tmp_path / "nowhere").mkdir()
    assert open_store(tmp_path / "nowhere").add("ann", voice()).problem is None


def test_a_full_disk_is_reported_and_leaves_no_file_behind(small_disk: Path) -> None:
    store = open_store(small_disk)
    kept = store.add("ann", voice())
    with refused("voices_full", 507, "No space left"):
        store.add("bob", voice(1))
    assert [path.name for path in small_disk.iterdir()] == ["ann.safetensors"]
    assert store.get("ann") == kept
    store.delete("ann")
    assert store.add("bob", voice(1)).problem is None


def test_a_read_only_directory_is_reported_and_its_voices_stay_usable(small_disk: Path) -> None:
    open_store(small_disk).add("ann", voice())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    store = open_store(small_disk)
    assert problems(store) == {"ann": None}
    for call in (lambda: store.add("bob", voice()), lambda: store.delete("ann")):
        with refused("voices_unavailable", 503, "Read-only file system"):
            call()


def test_the_number_of_voices_is_limited(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_voices=2)
    for name in ("ann", "bob"):
        store.add(name, voice())
    with refused("voices_full", 507, "2 is the limit"):
        store.add("cem", voice())
    (tmp_path / "cem.safetensors").write_bytes(voice())
    assert sorted(problems(store)) == ["ann", "bob"]


def _write(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (_write(b""), "not a safetensors file"),
        (_write(b"hello, world, this is text"), "not a safetensors file"),
        (_write(pickle.dumps(list(range(100)))), "not a safetensors file"),
        (_write(voice()[:-1]), "its header describes"),
        (_write(voice()[:50]), "not a safetensors file"),
        (_write(voice() + b"x"), "its header describes"),
        (_write(bytes(MAX_BYTES + 1)), "larger than"),
        (_write(voice(models={VARIANT: "sha256:" + "3" * 64})), "made for the checkpoint 'sha256:333"),
        (_write(voice(models={"multilingual": WEIGHTS})), "made for the model 'multilingual', and not for 'english'"),
        (_write(voice(models={})), "made for the model '', and not for 'english'"),
        (_write(voice_of_schema_1(weights="sha256:" + "3" * 64)), "made for the checkpoint 'sha256:333"),
        (_write(voice_of_schema_1("multilingual")), "made for the model 'multilingual', and not for 'english'"),
        (_write(voice(schema="3")), "schema is '3', this version reads 2"),
        (_write(voice(created="-1")), "incomplete"),
        (_write(voice(created="x" * 999)), "incomplete"),
        (_write(voice(clip_sha256="")), "incomplete"),
        (_write(voice(without="gen.embedding")), "it contains the tensors"),
        (_write(voice(instead={"more": np.zeros(1)})), "it contains the tensors"),
        (_write(voice(instead={"gen.embedding": np.zeros((1, 192))})), "gen.embedding is F64"),
        (_write(voice(instead={"gen.embedding": np.zeros((1, 191), np.float32)})), "gen.embedding"),
        (_write(voice(instead={"gen.prompt_token": np.zeros((1, 0), np.int64)})), "gen.prompt_token"),
        (_write(voice(instead={"gen.prompt_token": np.zeros((1, 74), np.int64)})), "150 frames for 74"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.symlink_to("/etc/passwd"), "not a regular file"),
        (os.mkfifo, "not a regular file"),
    ],
)
def test_an_unusable_file_is_listed_with_the_reason(
    store: VoiceStore, tmp_path: Path, write: Callable[[Path], Any], problem: str
) -> None:
    good = store.add("good", voice())
    write(tmp_path / "bad.safetensors")
    assert problem in (problems(store)["bad"] or "")
    assert store.get("bad").digest is None
    with pytest.raises(UnusableVoiceError, match="the voice 'bad' cannot be used"):
        store.digest("bad")
    with refused("voice_exists", 409):
        store.add("bad", voice())
    assert store.get("good") == good
    if not (tmp_path / "bad.safetensors").is_dir():
        store.delete("bad")
        assert problems(store) == {"good": None}


def test_a_voice_of_an_older_version_stays_usable(store: VoiceStore, tmp_path: Path) -> None:
    (tmp_path / "old.safetensors").write_bytes(voice_of_schema_1())
    assert problems(store) == {"old": None}
    assert store.digest("old") is not None


def test_a_voice_speaks_with_the_models_that_it_was_made_for(tmp_path: Path) -> None:
    store = VoiceStore(tmp_path, {"english": "e", "multilingual": "m"})
    store.baked = {"english": {"default": 1, "fox": 2}, "multilingual": {"default": 3}}
    both = voice(models={"english": "e", "multilingual": "m"})
    (tmp_path / "english.safetensors").write_bytes(voice(models={"english": "e"}))
    (tmp_path / "changed.safetensors").write_bytes(voice(models={"english": "e", "multilingual": "other"}))
    store.add("both", both)
    assert {entry.name: entry.models for entry in store.entries()} == {
        "both": ("english", "multilingual"),
        "changed": ("english",),
        "default": ("english", "multilingual"),
        "english": ("english",),
        "fox": ("english",),
    }
    assert store.resolve("both") == store.resolve("both", "multilingual") == ("both", digest_of(both))
    assert store.resolve("default", "multilingual") == ("default", None)
    for name, reason in (
        ("english", "made for the model 'english', and not for 'multilingual'"),
        ("changed", "made for the checkpoint 'other', this server has 'm'"),
        ("fox", "baked for the model english, and not for 'multilingual'"),
    ):
        assert store.resolve(name)[0] == name
        with pytest.raises(UnusableVoiceError, match=reason):
            store.resolve(name, "multilingual")
    with pytest.raises(UnusableVoiceError, match="the model multilingual cannot use the voice"):
        store.add("half", voice(models={"english": "e"}))
    assert not (tmp_path / "half.safetensors").exists()


def test_an_added_voice_stays_usable_for_a_model_that_has_no_baked_voice_of_its_name(tmp_path: Path) -> None:
    store = VoiceStore(tmp_path, {"english": "e", "multilingual": "m"})
    (tmp_path / "fox.safetensors").write_bytes(voice(models={"english": "e"}))
    store.baked = {"english": {"default": 1}, "multilingual": {"default": 1, "fox": 2}}
    assert store.resolve("fox", "multilingual") == ("fox", None)
    assert store.resolve("fox", "english")[1] is not None
    store.delete("fox")
    assert not (tmp_path / "fox.safetensors").exists()
    with refused("voice_is_baked", 403):
        store.delete("fox")
    with pytest.raises(UnusableVoiceError, match="baked for the model multilingual"):
        store.resolve("fox", "english")


def test_the_file_of_a_voice_for_one_model_can_be_read_by_older_versions() -> None:
    one = make_metadata({"english": "e"}, clip_sha256="a" * 64)
    assert (one["schema"], one["variant"], one["weights"]) == ("1", "english", "e")
    two = make_metadata({"english": "e", "multilingual": "m"}, clip_sha256="a" * 64)
    assert (two["schema"], two["weights:multilingual"]) == ("2", "m")


def test_other_files_in_the_directory_are_ignored(store: VoiceStore, tmp_path: Path) -> None:
    for name in ("lost+found", "notes.txt", "a b.safetensors", ".safetensors", "..safetensors", "x.safetensors.bak"):
        (tmp_path / name).write_bytes(voice())
    before = sorted(tmp_path.iterdir())
    assert problems(store) == {}
    assert sorted(tmp_path.iterdir()) == before


def test_unusable_data_is_not_added(store: VoiceStore, tmp_path: Path) -> None:
    for data in (b"", b"text", voice()[:-1], voice(models={VARIANT: "other"})):
        with pytest.raises(UnusableVoiceError):
            store.add("ann", data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("voices.voice_store", {"torch", "numpy", "soundfile", "starlette", "pydantic", "safetensors"}),
        ("http.voice_routes", {"torch", "numpy", "soundfile", "pydantic", "safetensors"}),
    ],
)
def test_the_front_imports_no_heavy_package_for_its_voices(module: str, heavy: set[str]) -> None:
    code = f"import sys; import chatterbox_prewarm.serve.{module}; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
