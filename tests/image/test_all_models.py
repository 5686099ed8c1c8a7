"""Build one image with all models, prove each of them, and let a container without network speak with all."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from benchmarks.image import build
from chatterbox_prewarm.model.variants import code_of
from chatterbox_prewarm.weights.variants import MULTILINGUAL
from tests.conftest import run_cli
from tests.image.conftest import SYNTHETIC
from tests.image.test_image import FLAGS, ask, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(900)

TAG = "chatterbox-prewarm-test:all-models"
MODELS = ("english", "multilingual", "turbo", "nano")
WEIGHTS = "/opt/chatterbox-prewarm/weights"
#: Languages with rules or data of their own, and two without.
LANGUAGES = ("zh", "ja", "ko", "ar", "hi", "fr")


@pytest.fixture(scope="module")
def all_models(docker: str, context: Path) -> Iterator[str]:
    """Build the image. The profile `eager` compiles nothing."""
    build(context, TAG, [*SYNTHETIC, "--build-arg", f"VARIANT={','.join(MODELS)}", "--build-arg", "PROFILE=eager"])
    yield TAG
    run(docker, "rmi", "--force", TAG)


def test_each_model_is_proven_under_the_documented_flags(all_models: str, tmp_path: Path) -> None:
    proven = run_cli("prove", "--image", all_models, "--json")
    assert proven.returncode == 0, proven.stderr
    evidence = json.loads(proven.stdout)
    assert sorted(evidence) == sorted(MODELS)
    assert all(proof["passed"] and proof["observed"]["metrics"]["misses"] == {} for proof in evidence.values())
    assert len({proof["set_digest"] for proof in evidence.values()}) == len(MODELS)
    refused = run_cli("prove", "--image", all_models, "--evidence", tmp_path / "evidence.json")
    assert refused.returncode == 16
    assert "add --variant NAME" in refused.stderr
    one = run_cli("prove", "--image", all_models, "--variant", "multilingual", "--evidence", tmp_path / "evidence.json")
    assert one.returncode == 0, one.stderr
    written = json.loads((tmp_path / "evidence.json").read_text())
    assert written["set_digest"] == evidence["multilingual"]["set_digest"]


def test_the_models_share_their_equal_files(docker: str, all_models: str) -> None:
    listed = run(docker, "run", "--rm", "--entrypoint", "sh", all_models, "-c", f"ls -i {WEIGHTS}/*/*.safetensors")
    inodes = {path.removeprefix(f"{WEIGHTS}/"): inode for inode, path in map(str.split, listed.stdout.splitlines())}
    assert inodes["english/s3gen.safetensors"] == inodes["multilingual/s3gen.safetensors"]
    assert inodes["turbo/s3gen_meanflow.safetensors"] == inodes["nano/s3gen_meanflow.safetensors"]
    assert inodes["english/ve.safetensors"] == inodes["multilingual/ve.safetensors"]
    assert inodes["turbo/ve.safetensors"] == inodes["nano/ve.safetensors"]
    assert len(set(inodes.values())) == 8  # each pair has two files of its own, and each model its T3


def test_a_container_without_network_speaks_with_all_models(docker: str, all_models: str) -> None:
    started = run(docker, "run", "--detach", *FLAGS, all_models)
    assert started.returncode == 0, started.stderr
    container = started.stdout.strip()
    try:
        deadline = time.monotonic() + 240
        while (ready := ask(docker, container, "GET", "/readyz"))[0] != 200:
            assert time.monotonic() < deadline, run(docker, "logs", container).stderr
        assert json.loads(ready[1])["models"] == dict.fromkeys(MODELS, True)
        for model, language, text in (
            ("english", "en", "Hello."),
            ("turbo", "en", "Hello. [laugh]"),
            ("nano", "en", "Hello. [laugh]"),
            *(("multilingual", code, MULTILINGUAL.samples[code]) for code in LANGUAGES),
        ):
            fields = {"input": text, "model": model, "language": language, "seed": 1, "max_new_tokens": 8}
            status, sound = ask(docker, container, "POST", "/v1/audio/speech", json.dumps(fields))
            assert (status, len(sound) > 500) == (200, True), (language, sound[:500])
        for model in MODELS:
            status, body = ask(docker, container, "GET", f"/readyz/{model}")
            assert (status, json.loads(body)["misses"]) == (200, {})
    finally:
        run(docker, "rm", "--force", container)


def test_a_container_without_network_and_upstreams_packages_computes_the_same_text_tokens(
    docker: str, all_models: str, tmp_path: Path
) -> None:
    program = (
        "import json; from pathlib import Path; from chatterbox_prewarm.model.variants import code_of; "
        "from chatterbox_prewarm.weights.variants import MULTILINGUAL as variant; "
        f"text = code_of(variant).read_text(Path('{WEIGHTS}/multilingual'), variant); "
        "print(json.dumps({code: text.ids(one, code) for code, one in variant.samples.items()}))"
    )
    printed = run(docker, "run", "--rm", *FLAGS, "--entrypoint", "python", all_models, "-c", program)
    assert printed.returncode == 0, printed.stderr
    created = run(docker, "create", all_models).stdout.strip()
    try:
        assert run(docker, "cp", f"{created}:{WEIGHTS}/multilingual", str(tmp_path / "weights")).returncode == 0
    finally:
        run(docker, "rm", created)
    # tests/model/test_multilingual.py shows that these are upstream's.
    here = code_of(MULTILINGUAL).read_text(tmp_path / "weights", MULTILINGUAL)
    expected = {code: here.ids(text, code) for code, text in MULTILINGUAL.samples.items()}
    assert json.loads(printed.stdout) == expected
    assert len(expected) == 23
