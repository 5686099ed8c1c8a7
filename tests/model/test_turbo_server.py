"""Test a bake, a proof and a server of Turbo: no misses, voices, settings and invalid requests."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import soundfile

from chatterbox_prewarm.model.reference_clip import reference_audio
from chatterbox_prewarm.model.regions.region import FLOW_MEAN
from chatterbox_prewarm.weights.variants import TURBO, Variant
from tests.conftest import build_once, run_cli
from tests.helpers.serving import Server
from tests.helpers.stages import measure_both

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

#: The regions of Turbo.
PACKAGES = {
    *("t3_gpt_prefill_1024", "t3_gpt_decode_1024", "t3_gpt_sample_1024", "flow_encoder_layer"),
    *(region.name for region in FLOW_MEAN.all),
    *("vocoder_pitch", "vocoder_trunk"),
}


def _clip(path: Path, seconds: float) -> Path:
    soundfile.write(path, reference_audio(seconds), 24_000, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def weights(checkpoint: Callable[[Variant], Path]) -> Path:
    return checkpoint(TURBO)


@pytest.fixture(scope="module", params=["eager", pytest.param("aot", marks=pytest.mark.slow)])
def warm(request: pytest.FixtureRequest, weights: Path, shared_dir: Path) -> Path:
    """Bake a state with the built-in voice and the voice `fox`."""
    profile: str = request.param
    if profile == "aot" and shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler (Debian: apt-get install g++)")
    directory = shared_dir / f"turbo-{profile}"

    def bake(warm: Path) -> None:
        clip = _clip(directory / "fox.wav", 5.5)
        arguments = ("--weights", weights, "--warm", warm, "--cache", directory / "cache", "--profile", profile)
        baked = run_cli("bake", *arguments, "--levels", "1", "--voice", f"fox={clip}")
        assert baked.returncode == 0, baked.stderr

    return build_once(directory / "warm", bake)


def test_a_proof_finds_no_miss(warm: Path, weights: Path) -> None:
    proven = run_cli("prove", "--warm", warm, "--weights", weights, "--cache", warm.parent / "cache")
    assert proven.returncode == 0, proven.stdout + proven.stderr
    assert "FAIL" not in proven.stdout
    assert "the audio is identical to the bake" in proven.stdout
    assert not list(warm.rglob("*prefix*")), "keys and values are never baked"
    packages = {path.parent.name for path in warm.rglob("region.so")}
    assert packages in (set(), PACKAGES)


@pytest.mark.parametrize("warm", ["eager"], indirect=True)
def test_the_benchmark_of_profiles_times_upstreams_stages(warm: Path, weights: Path, tmp_path: Path) -> None:
    upstream, ours = measure_both(weights, warm, tmp_path, tokens=8)
    assert upstream["steady_request"] > 0
    assert ours["greedy_tokens_equal"] == 200
    assert len(ours["t3_speeds"]) == len(ours["s3gen_speeds"]) == 5


@pytest.fixture(scope="module")
def server(warm: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "voices").mkdir()
    server = Server(
        folder / "log",
        *("--warm", warm, "--weights", weights, "--cache", warm.parent / "cache", "--policy", "require"),
        *("--voices-dir", folder / "voices"),
    )
    try:
        server.wait_ready()
        yield server
    finally:
        server.end()


def test_the_server_speaks_without_misses_and_with_the_prefixes_of_its_voices(server: Server) -> None:
    assert server.status()[1]["misses"] == {}
    (worker,) = server.status()[1]["workers"]
    assert (worker["prefixes"], worker["prefix_misses"]) == (2, 2)
    assert worker["prefix_bytes"] > 1 << 20
    for voice in ("default", "fox", "default"):
        assert server.speak(voice=voice, input="Ha. [laugh]")[0] == 200
    assert server.metric("worker_prefix_misses") == 2
    assert server.metric("worker_prefix_hits") >= 3


def test_the_server_lists_the_settings_and_the_tags(server: Server) -> None:
    (entry,) = json.loads(server.ask("GET", "/v1/models")[1])["data"]
    assert entry["id"] == "turbo"
    assert entry["controls"].keys() == {"temperature", "top_k", "top_p", "repetition_penalty"}
    assert entry["controls"]["top_k"] == {"default": 1000, "minimum": 0, "maximum": 10_000}
    assert "[laugh]" in entry["tags"]
    assert len(entry["tags"]) == 19


def test_the_settings_of_the_english_model_are_ignored_and_logged(server: Server) -> None:
    plain = server.speak()
    other = server.speak(cfg_weight=3.0, exaggeration=1.5, min_p=0.9)
    assert plain[0] == other[0] == 200
    assert plain[1] == other[1]
    server.wait_log("ignored cfg_weight, exaggeration, min_p: the model turbo does not have them")
    assert server.speak(top_k=1)[1] != plain[1]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"top_k": 1.5}, "'top_k' is 1.5"),
        ({"top_k": -1}, "'top_k' is -1"),
        ({"top_p": 0}, "'top_p' is 0"),
        ({"repetition_penalty": 0.5}, "'repetition_penalty' is 0.5"),
        ({"cfg_weight": "high"}, "'cfg_weight' is 'high'"),
        ({"input": ""}, "the text is empty"),
        ({"input": "สวัสดีชาวโลก"}, "mostly THAI"),
        ({"language": "fr"}, "does not speak it"),
    ],
)
def test_invalid_requests_are_refused(fields: dict[str, Any], problem: str, server: Server) -> None:
    status, body = server.speak(**fields)
    assert status == 400
    assert problem in json.loads(body)["error"]["message"]


def test_a_long_text_is_spoken_in_parts(server: Server) -> None:
    text = "One of these sentences follows the other without any end. " * 40
    assert server.speak(input=text[:2000], max_new_tokens=4)[0] == 200
    assert server.speak(input="x" * 1100, max_new_tokens=4)[0] == 200
    assert server.speak(input="[does not exist] Hello [laugh]", max_new_tokens=4)[0] == 200


@pytest.mark.parametrize(("seconds", "status"), [(5.0, 400), (5.01, 201)])
def test_a_voice_can_be_added_from_a_clip_that_is_long_enough(
    seconds: float, status: int, server: Server, tmp_path: Path
) -> None:
    clip = _clip(tmp_path / "clip.wav", seconds).read_bytes()
    parts = (
        b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nadded\r\n',
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="clip.wav"\r\n\r\n' + clip + b"\r\n--b--\r\n",
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    found, body = server.ask("POST", "/v1/audio/voices", b"".join(parts), headers)
    assert found == status, body
    if status == 400:
        assert "needs more than 5 s" in json.loads(body)["error"]["message"]
    else:
        assert server.speak(voice="added")[0] == 200
