"""Test loading: it equals upstream's loading, and invalid checkpoints are refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from chatterbox_prewarm.errors import BadInputError, WeightsError
from chatterbox_prewarm.model.model import load, read_tensors
from chatterbox_prewarm.model.synthetic import shortened_upstream
from chatterbox_prewarm.model.upstream import load_upstream
from chatterbox_prewarm.model.voices import read_builtin_voice
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.weights.mapped import MappedWeights
from chatterbox_prewarm.weights.record import read_record, record
from chatterbox_prewarm.weights.variants import ENGLISH
from tests.conftest import run_cli, writable_copy
from tests.helpers.states import rewrite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a module: parameters, all buffers, and plain attributes."""
    for name, child in module.named_modules():
        for key, value in {**child._parameters, **child._buffers, **vars(child)}.items():
            if isinstance(value, torch.Tensor):
                yield f"{name}.{key}", value


@pytest.fixture(scope="module")
def as_published(mini: Path, upstream: Any) -> Any:  # noqa: ARG001 - it registers the short stacks
    """Load the same checkpoint with upstream's own code, whose constructors are shortened for `mini`."""
    from chatterbox import tts

    full = tts.T3, tts.S3Gen
    with shortened_upstream(ENGLISH, read_record(mini).synthetic):
        model = tts.ChatterboxTTS.from_local(mini, "cpu")
    assert (tts.T3, tts.S3Gen) == full
    assert len(model.t3.tfmr.layers) == 2
    return model


@pytest.mark.parametrize("part", ["t3", "s3gen", "ve"])
def test_every_tensor_equals_the_tensor_of_upstream(part: str, as_published: Any, mini: Path) -> None:
    ours = dict(_tensors(getattr(load_upstream(mini), part)))
    theirs = dict(_tensors(getattr(as_published, part)))
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_every_module_has_the_training_mode_of_upstream(as_published: Any, mini: Path) -> None:
    ours = load_upstream(mini)
    for part in ("t3", "s3gen", "ve"):
        modes = {name: module.training for name, module in getattr(ours, part).named_modules()}
        assert modes == {name: module.training for name, module in getattr(as_published, part).named_modules()}


def test_parameters_are_mapped_pages_of_the_files(mini: Path) -> None:
    model = load(mini)
    pages = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("t3_cfg.safetensors"):
            start, _, end = line.split()[0].partition("-")
            pages.append((int(start, 16), int(end, 16)))
    weight = model.tensors["t3.speech_head.weight"]
    assert any(start <= weight.data_ptr() < end for start, end in pages)


class _Copies(TorchDispatchMode):
    """Counts the copies of tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in {"_to_copy", "clone", "copy_"}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "copies"), [("cpu", 0), ("meta", 1)])
def test_a_tensor_is_not_copied_on_the_cpu_and_copied_once_to_another_device(
    device: str, copies: int, mini: Path
) -> None:
    mapped = MappedWeights(mini, ENGLISH)
    with _Copies() as counted:
        tensors = dict(read_tensors(mapped, device, None))
    assert len(tensors) == sum(len(file.used) for file in mapped.files) > 500
    assert counted.count == copies * len(tensors)


def test_upstreams_model_shares_the_tensors_of_the_lean_one(mini: Path) -> None:
    lean = load(mini, t3_dtype=torch.bfloat16)
    upstream = load_upstream(mini, lean=lean)
    names = {"t3": upstream.t3, "s3gen": upstream.s3gen}
    for name, tensor in lean.tensors.items():
        file, _, own = name.partition(".")
        assert names[file].state_dict()[own].data_ptr() == tensor.data_ptr(), name


def _copy(mini: Path, directory: Path) -> Path:
    shutil.copytree(mini, directory)
    return directory


def _record(copy: Path, mini: Path) -> None:
    old = read_record(mini)
    record(copy, variant=ENGLISH, repository=old.repository, revision=old.revision, synthetic=old.synthetic)


def _reshape(path: Path) -> None:
    tensors = load_file(path)
    tensors["speech_head.weight"] = tensors["speech_head.weight"][:-1].contiguous()
    save_file(tensors, path)


def _drop(path: Path) -> None:
    tensors = load_file(path)
    del tensors["speech_head.weight"]
    save_file(tensors, path)


def _cast(path: Path) -> None:
    tensors = load_file(path)
    tensors["speech_head.weight"] = tensors["speech_head.weight"].double()
    save_file(tensors, path)


def _add(path: Path) -> None:
    save_file({**load_file(path), "one_too_many": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_reshape, "speech_head.weight has shape [8193, 1024], the model english needs [8194, 1024]"),
        (_drop, "lacks 1 tensor(s), the first: speech_head.weight"),
        (_add, "unknown tensor(s), the first: one_too_many"),
        (_cast, "speech_head.weight has dtype F64, the model needs F32"),
    ],
)
def test_error_names_the_tensor_that_does_not_match(
    damage: Callable[[Path], None], word: str, mini: Path, tmp_path: Path
) -> None:
    copy = _copy(mini, tmp_path / "weights")
    damage(copy / "t3_cfg.safetensors")
    _record(copy, mini)
    with pytest.raises(WeightsError, match=r"t3_cfg") as caught:
        load(copy)
    assert word in caught.value.message
    verified = run_cli("weights", "verify", copy)
    assert verified.returncode == WeightsError.exit_code
    assert word in verified.stderr
    recorded = run_cli("weights", "record", copy)
    assert recorded.returncode == WeightsError.exit_code, "a checkpoint of a user has all layers"
    assert "t3_cfg" in recorded.stderr


def test_truncated_weights_are_refused(mini: Path, tmp_path: Path) -> None:
    copy = _copy(mini, tmp_path / "weights")
    with (copy / "s3gen.safetensors").open("r+b") as stream:
        stream.truncate(1_000_000)
    with pytest.raises(WeightsError, match="truncated"):
        load(copy)


class _CodeInPickle:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self._target}",)


def test_invalid_voice_file_is_refused_and_runs_no_code(mini: Path, tmp_path: Path) -> None:
    copy = _copy(mini, tmp_path / "weights")
    for content in (
        pickle.dumps(_CodeInPickle(tmp_path / "ran"), protocol=2),
        b"PK\x03\x04 and no more",
        b"",
        b"voice",
    ):
        (copy / ENGLISH.builtin_voice).write_bytes(content)
        _record(copy, mini)
        with pytest.raises(WeightsError, match=r"does not contain a Chatterbox voice"):
            read_builtin_voice(copy)
    for saved in ({}, {"t3": {"no": "such field"}, "gen": {}}, [1]):
        torch.save(saved, copy / ENGLISH.builtin_voice)
        _record(copy, mini)
        with pytest.raises(WeightsError, match=r"does not contain a Chatterbox voice"):
            read_builtin_voice(copy)
    assert not (tmp_path / "ran").exists()


def test_missing_gpu_is_reported(mini: Path) -> None:
    from chatterbox_prewarm.errors import ModelError

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ModelError, match="torch sees no GPU"):
        load(mini, device="cuda")


def test_same_seed_gives_the_same_checkpoint(mini: Path, tmp_path: Path) -> None:
    from chatterbox_prewarm.model.synthetic import synthesize

    repeated = synthesize(tmp_path / "repeated", size="mini", seed=0)
    other = synthesize(tmp_path / "other", size="mini", seed=1)
    tensors = {"ve.safetensors", "t3_cfg.safetensors", "s3gen.safetensors", "tokenizer.json"}
    digests = {file.path: file.sha256 for file in repeated.files if file.path in tensors}
    assert digests == {file.path: file.sha256 for file in read_record(mini).files if file.path in tensors}
    assert digests["t3_cfg.safetensors"] != {file.path: file.sha256 for file in other.files}["t3_cfg.safetensors"]


def test_a_synthesis_replaces_only_files_of_an_older_synthesis(mini: Path, tmp_path: Path) -> None:
    from chatterbox_prewarm.model.synthetic import synthesize

    weights = writable_copy(mini, tmp_path / "weights")
    for name, content in (("fine-tune/t3.safetensors", b"weeks of work"), ("tokenizer.json", b"{}")):
        path = weights / name
        path.parent.mkdir(exist_ok=True)
        original = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(BadInputError, match=path.relative_to(weights).parts[0]):
            synthesize(weights, size="mini", seed=1)
        assert path.read_bytes() == content
        assert sorted(tmp_path.rglob("*")) == before
        if original is None:
            shutil.rmtree(path.parent)
        else:
            path.write_bytes(original)
    assert synthesize(weights, size="mini", seed=1).revision == "mini-seed-1"


_DEFERRED = """
import sys
import {first}
before = {{name: sys.modules[name] for name in "{first}".split(", ")}}
from chatterbox_prewarm.model.chatterbox_imports import import_chatterbox
import_chatterbox()
assert all(sys.modules[name] is module for name, module in before.items()), "imported modules stay"
import torch
assert ("scipy.stats" in sys.modules, "torch._dynamo" in sys.modules) == ("{first}" != "json", False)
assert isinstance(torch.distributed.tensor.DTensor, type)
assert torch.utils.checkpoint.checkpoint(torch.sin, torch.zeros(1), use_reentrant=False) == 0
import scipy.signal, scipy.stats
assert scipy.stats.scoreatpercentile([1, 2, 3], 50) == 2
assert list(scipy.signal.find_peaks_cwt([0, 0, 1, 0, 0, 0, 2, 0, 0], [1])) == [2, 6]
"""


@pytest.mark.parametrize("first", ["json", "scipy.stats, torch.utils.checkpoint"])
def test_deferred_modules_work_when_they_are_used(first: str) -> None:
    """Use the modules in the same process, imported before or first used afterwards."""
    program = _DEFERRED.format(first=first)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


#: Packages that no start may import: a synthesis runs without them, and importing them takes 1.5 s.
FOR_UPSTREAM_ONLY = frozenset(
    {
        *("chatterbox", "transformers", "diffusers", "librosa", "perth", "scipy", "numba", "torchaudio", "sklearn"),
        *("pandas", "einops", "omegaconf", "s3tokenizer", "soundfile", "huggingface_hub"),
    }
)
#: Starts from a folder of states, synthesizes, and prints the metrics and the imported packages as JSON.
_START = """
import json, sys
from pathlib import Path
from chatterbox_prewarm import load_warmup_cache
warm, weights, cache = map(Path, sys.argv[1:])
attached = load_warmup_cache(warm, weights, cache=cache, policy="require")
attached.synthesizer.check()
attached.synthesizer.synthesize("Hello, world.", seed=7, max_new_tokens=12)
packages = sorted({name.partition(".")[0] for name in sys.modules})
print("JSON" + json.dumps({**attached.metrics.to_dict(), "packages": packages, "modules": len(sys.modules)}))
"""


@pytest.fixture
def two_states(baked: Path, tmp_path: Path) -> Path:
    """Return a folder with the baked state and a copy of it for another processor."""
    (tmp_path / "states").mkdir(mode=0o755)
    for name in ("another", "here"):
        writable_copy(baked, tmp_path / "states" / name)
    rewrite(
        tmp_path / "states" / "another",
        lambda raw: [family["requires"].update(arch="riscv64") for family in raw["families"]],
    )
    return tmp_path / "states"


def test_start_selects_the_compatible_one_of_two_states_and_misses_nothing(
    two_states: Path, mini: Path, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    ran = subprocess.run(
        [sys.executable, "-c", _START, str(two_states), str(mini), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE"},
    )
    assert ran.returncode == 0, ran.stderr
    assert "GOMP_SPINCOUNT = '1000'" in ran.stderr, "OpenMP was loaded before the setting, or ignores it"
    log = json.loads(ran.stdout.rpartition("JSON")[2])
    assert log["misses"] == {}
    assert log["state"] == State.read(two_states / "here").key
    assert {"bytecode", "conditionals"} <= log["hits"].keys()
    assert "torch" in log["packages"]
    assert not FOR_UPSTREAM_ONLY.intersection(log["packages"])
    assert log["modules"] < 1500, "a start imported 2,841 modules when it constructed upstream's model"


#: Imports Chatterbox first, as a program that has used it for a while, and then loads the warm state.
_TOO_LATE = """
import json, sys
import chatterbox.tts
from chatterbox_prewarm import load_warmup_cache
attached = load_warmup_cache(*sys.argv[1:3], cache=sys.argv[3])
speech = attached.synthesizer.synthesize("Hello, world.", seed=7, max_new_tokens=12)
print("JSON" + json.dumps({**attached.metrics.to_dict(), "samples": len(speech.samples)}))
"""


@pytest.mark.slow
def test_a_process_that_imported_chatterbox_first_is_told_so_and_works(baked: Path, mini: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _TOO_LATE, str(baked), str(mini), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    log = json.loads(ran.stdout.rpartition("JSON")[2])
    assert log["misses"] == {"late": 2}
    assert sorted(log["next_steps"].values()) == [
        f"call `load_warmup_cache` or `from_pretrained_with_warmup` before you import {name}"
        for name in ("numba", "torch")
    ]
    assert log["samples"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_prove_selects_the_compatible_one_of_two_states(two_states: Path, mini: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence.json"
    proven = run_cli("prove", "--warm", two_states, "--weights", mini, "--evidence", evidence)
    assert proven.returncode == 0, proven.stdout + proven.stderr
    found = json.loads(evidence.read_text())
    assert found["set_digest"] == State.read(two_states / "here").manifest.set_digest
    assert found["observed"]["metrics"]["state"] == State.read(two_states / "here").key
    assert run_cli("prove", "--warm", two_states, "--weights", mini, "--state", "another").returncode == 11
