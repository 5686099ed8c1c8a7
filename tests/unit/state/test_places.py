"""Test that no command writes into a state or a checkpoint, or removes a file that this project did not write."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.state.places import (
    check_apart,
    check_cache_place,
    check_output_place,
    check_state_place,
    check_states_place,
    check_weights_place,
)
from chatterbox_prewarm.state.state import State
from tests.conftest import run_cli
from tests.helpers.states import make_checkpoint, make_state, record_weights

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a state, a checkpoint, a file of the user, and links into the state."""
    make_state(tmp_path / "warm", {"numba": {"index.nbi": b"index"}})
    make_checkpoint(tmp_path / "weights")
    record_weights(tmp_path / "weights")
    (tmp_path / "notes.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "warm")
    (tmp_path / "manifest-link.json").symlink_to(tmp_path / "warm" / "manifest.json")
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of every file and the type of every other path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


#: Commands with a path inside `{warm}` or `{weights}` that they would write to.
_REFUSED = [
    "pack --warm {warm} --output {warm}/layer.tar.gz",
    "pack --warm {warm} --output {weights}/layer.tar.gz",
    "pack --warm {warm} --output {link}/layer.tar.gz",
    "prove --warm {warm} --weights {weights} --evidence {warm}/manifest.json",
    "prove --warm {warm} --weights {weights} --evidence {warm}/new/evidence.json",
    "prove --warm {warm} --weights {weights} --evidence {link}/manifest.json",
    "prove --warm {warm} --weights {weights} --evidence {folder}/manifest-link.json",
    "prove --warm {warm} --weights {weights} --evidence {weights}/weights.json",
    "prove --warm {warm} --weights {weights} --evidence {folder}/notes.txt",
    "sign --warm {warm} --key {folder}/key.pem --output {weights}/warm.sig",
    "sbom --warm {warm} --weights {weights} --output {warm}/sbom.json",
    "facts --output {weights}/facts.json",
    "k8s render --image i --output {warm}/pod.yaml",
    "k8s render-bake --image i --output {warm}/job.yaml",
    "bench startup --warm {warm} --weights {weights} --output {warm}/report.json",
    "bench load --warm {warm} --weights {weights} --output {warm}/report.json",
    "bench report --warm {warm} --weights {weights} --output {warm}/report",
    "append --base oci:{folder}/base:1 --to oci:{warm}/layout:1 --warm {warm}",
    "append --base oci:{folder}/base:1 --to docker-archive:{warm}/image.tar:a:1 --warm {warm}",
    "bake --weights {weights} --warm {folder}/new --cache {warm}",
    "bake --weights {weights} --warm {folder}/new --cache {warm}/cache",
    "bake --weights {weights} --warm {folder}/new --cache {weights}",
    "bake --weights {weights} --warm {folder}/new --cache {folder}/new",
    "bake --weights {weights} --warm {warm} --cache {warm}",
    "bake --weights {weights} --warm {warm} --cache {link}",
    "bake --weights {weights} --warm {warm} --cache {folder}",
    "bake --weights {weights} --warm {weights} --cache {folder}/cache",
    "bake --weights {weights} --warm {weights}/warm --cache {folder}/cache",
    "bake --weights {weights} --warm {warm}/nested --cache {folder}/cache",
    "weights fetch {warm}",
    "weights fetch {warm}/weights",
    "weights synthesize {warm}/weights --size mini",
    "serve --warm {warm} --weights {weights} --cache {warm}",
    "serve --warm {warm} --weights {weights} --cache {weights}/cache",
    "prove --here --warm {warm} --weights {weights} --cache {link}/cache",
    "serve --warm {warm} --weights {weights} --cache {folder}/cache --voices-dir {warm}/voices",
]

_REASON = re.compile(
    r"is (inside )?the (warm state|checkpoint) /|(contains|is inside|is the same folder as) --|"
    r"is not the evidence of a proof"
)


@pytest.mark.parametrize("line", _REFUSED)
def test_a_command_that_would_write_into_a_state_or_a_checkpoint_changes_nothing(folder: Path, line: str) -> None:
    places = {name: folder / name for name in ("warm", "weights", "link")}
    before = contents(folder)
    refused = run_cli(*line.format(folder=folder, **places).split(), timeout=60)
    assert refused.returncode == 16, refused.stdout + refused.stderr
    assert _REASON.search(refused.stderr), refused.stderr
    assert "next: " in refused.stderr
    assert contents(folder) == before
    State.open(folder / "warm").check_files()


def test_a_path_inside_a_state_or_a_checkpoint_is_refused_with_both_paths(folder: Path) -> None:
    warm, weights = folder / "warm", folder / "weights"
    for path, root in ((warm / "a", warm), (warm / "numba" / "b" / "c", warm), (weights / "d.json", weights)):
        with pytest.raises(BadInputError, match=f"{path} is inside the .* {root}, "):
            check_output_place(path)
    with pytest.raises(BadInputError, match=f"{folder / 'link' / 'a'} is inside the warm state {warm}, "):
        check_output_place(folder / "link" / "a")
    for path in (folder / "warm.sig", folder / "new" / "layer.tar.gz", folder / "warm2"):
        check_output_place(path)


def test_a_damaged_state_and_a_checkpoint_without_a_record_are_protected(folder: Path) -> None:
    (folder / "warm" / "manifest.json").chmod(0o644)
    (folder / "warm" / "manifest.json").write_text('{"schema": ')
    (folder / "weights" / "weights.json").unlink()
    with pytest.raises(BadInputError, match="damaged warm state"):
        check_output_place(folder / "warm" / "a")
    with pytest.raises(BadInputError, match="checkpoint"):
        check_output_place(folder / "weights" / "a")


def test_a_folder_with_a_manifest_of_another_program_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    (tmp_path / "weights.json").write_text("[1, 2]")
    (tmp_path / "signal").mkdir()
    check_output_place(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("one", "other", "relation"),
    [
        ("a", "a", "is the same folder as"),
        ("a", "a/b", "contains"),
        ("a/b", "a", "is inside"),
        ("a", "c", "is the same"),
    ],
)
def test_equal_and_nested_paths_are_refused(tmp_path: Path, one: str, other: str, relation: str) -> None:
    (tmp_path / "c").symlink_to(tmp_path / "a")
    with pytest.raises(BadInputError, match=f"--warm {tmp_path / one} {relation}.* --cache {tmp_path / other}"):
        check_apart({"--warm": tmp_path / one, "--cache": tmp_path / other})
    check_apart({"--warm": tmp_path / "warm", "--cache": tmp_path / "warm.cache"})


@pytest.mark.parametrize("name", ["notes.txt", "numba/notes.txt", "numba/below/notes.txt"])
def test_a_state_with_a_file_of_the_user_is_not_replaced(folder: Path, name: str) -> None:
    path = folder / "warm" / name
    path.parent.mkdir(exist_ok=True)
    check_state_place(folder / "warm")
    path.write_text("years of work")
    with pytest.raises(BadInputError, match=f"the file {name}, and a bake would remove it"):
        check_state_place(folder / "warm")


def test_a_damaged_or_empty_state_can_be_replaced(folder: Path) -> None:
    (folder / "warm" / "numba" / "index.nbi").unlink()
    check_state_place(folder / "warm")
    (folder / "empty").mkdir()
    check_state_place(folder / "empty")
    check_state_place(folder / "new" / "warm")


def test_states_are_added_only_to_a_folder_whose_directories_are_all_states(folder: Path) -> None:
    states = folder / "states"
    check_states_place(states)
    states.mkdir()
    make_state(states / "one", {"numba": {"index.nbi": b"index"}})
    (states / "one.evidence.json").write_text("{}")
    (states / ".two.staging-a").mkdir()
    check_states_place(states)
    (states / "photos").mkdir()
    (states / "photos" / "cat.jpg").touch()
    for place, words in (
        (states, "photos holds something other than a warm state"),
        (folder / "warm", "is the warm state"),
        (folder / "weights" / "warm", "is inside the checkpoint"),
        (folder / "notes.txt", "is not a directory"),
        (folder / "link", "is the warm state"),
    ):
        with pytest.raises(BadInputError, match=words):
            check_states_place(place)


def test_a_cache_with_folders_of_another_program_is_refused(folder: Path) -> None:
    cache = folder / "cache"
    paths = {"warm": folder / "warm", "weights": folder / "weights"}
    check_cache_place(cache, **paths)
    (cache / "lost+found").mkdir(parents=True)
    check_cache_place(cache, **paths)
    (cache / "cuda").mkdir()
    with pytest.raises(BadInputError, match=f"{cache} has a folder 'cuda' that this program did not write"):
        check_cache_place(cache, **paths)
    (cache / ".bake.lock").touch()  # each start and each bake makes this file first
    check_cache_place(cache, **paths)


def test_a_checkpoint_can_replace_an_older_one_but_no_state(folder: Path) -> None:
    check_weights_place(folder / "weights")
    check_weights_place(folder / "new")
    for path in (folder / "warm", folder / "warm" / "new", folder / "weights" / "new"):
        with pytest.raises(BadInputError, match="where this command must not write"):
            check_weights_place(path)


def test_the_evidence_of_an_older_proof_is_removed_and_no_other_file(folder: Path) -> None:
    from chatterbox_prewarm.proof.checks import remove_older_evidence

    evidence = folder / "evidence.json"
    remove_older_evidence(evidence)
    evidence.write_text(json.dumps({"passed": True}))
    remove_older_evidence(evidence)
    assert not evidence.exists()
    with pytest.raises(BadInputError, match=r"notes\.txt is not the evidence of a proof"):
        remove_older_evidence(folder / "notes.txt")
    assert (folder / "notes.txt").read_text() == "years of work"
