"""Judging a trial: each planted failure fails exactly its own check."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm import errors
from chatterbox_prewarm.proof.checks import Evidence, counter_checks, default_evidence, judge, require_passed
from chatterbox_prewarm.system.json_subprocess import parse_report
from chatterbox_prewarm.system.metrics import WarmupMetrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAMILIES = ("bytecode", "numba", "signal", "conditionals")
DIGEST = "d" * 64


def warm_trial() -> dict[str, Any]:
    """What a trial of a warm state reports."""
    metrics = WarmupMetrics(origin=0.0)
    for name in FAMILIES:
        metrics.hit(name, 3)
    metrics.hits.pop("signal")
    metrics.loaded["signal"] = 4
    return {
        "isolation": {
            "uid": 12345,
            "hostname": "prewarm-proof",
            "home": "/nonexistent",
            "cwd": "/",
            "interfaces": ["lo"],
            "state_writable": False,
        },
        "metrics": metrics.to_dict(),
        "families": {name: ["arch"] for name in FAMILIES},
        "network": [],
        "packets": {"Tcp ActiveOpens": 0, "Udp OutDatagrams": 0, "Ip OutNoRoutes": 0},
        "programs": ["subprocess.Popen lscpu"],
        "state_writes": [],
        "cache_writes": [],
        "audio": {
            "tokens_sha256": "a" * 64,
            "pcm_sha256": "b" * 64,
            "samples": 960,
            "expected_tokens_sha256": "a" * 64,
            "expected_pcm_sha256": "b" * 64,
        },
    }


def miss(family: str, reason: str) -> Callable[[dict[str, Any]], object]:
    def plant(trial: dict[str, Any]) -> None:
        trial["metrics"]["misses"][family] = 1
        trial["metrics"]["reasons"].append(f"{family}: {reason}")

    return plant


def test_a_warm_trial_passes_every_check() -> None:
    trial = warm_trial()
    evidence = judge(trial, DIGEST)
    assert evidence.passed
    assert [check.name for check in evidence.checks if not check.passed] == []
    require_passed(evidence)
    written = json.loads(evidence.to_json())
    assert written["set_digest"] == DIGEST
    assert written["observed"] == trial
    expected = {"bytecode was used", "numba was used", "signal is in place", "conditionals was used"}
    assert expected <= {check["name"] for check in written["checks"]}


NUMBA, BYTECODE, AUDIO = "numba was used", "bytecode was used", "the audio is the bake's own"


@pytest.mark.parametrize(
    ("plant", "failed", "seen"),
    [
        (miss("numba", "compiled librosa.filters.f"), NUMBA, "3 hits, 1 misses"),
        (miss("bytecode", "x.py has changed"), BYTECODE, "3 hits, 1 misses"),
        (lambda t: t["metrics"]["hits"].update(numba=0), NUMBA, "0 hits, 0 misses"),
        (lambda t: t["metrics"]["loaded"].update(signal=0), "signal is in place", "0 loaded, 0 misses"),
        (lambda t: t["metrics"]["loaded"].pop("signal"), "signal was used", "0 hits, 0 misses"),
        (miss("signal", "computed '8000_cpu'"), "signal is in place", "4 loaded, 1 misses"),
        (lambda t: t["metrics"]["timers"].update({"numba compile": 0.002}), "no pass of Numba's compiler", "0.002 s"),
        (miss("late", "torch was imported before prepare"), "no other miss", "late"),
        (miss("all", "there is no manifest"), "no other miss", "there is no manifest"),
        (lambda t: t["network"].append("look-up of hub"), "no network attempt", "1; look-up of hub"),
        (lambda t: t["packets"].update({"Ip OutNoRoutes": 2}), "no network attempt", "2 Ip OutNoRoutes"),
        (lambda t: t["state_writes"].append("open /warm/x"), "no write into the state", "open /warm/x"),
        (lambda t: t["cache_writes"].append("/cache/f.nbc"), "no write into a cache", "/cache/f.nbc"),
        (lambda t: t["programs"].append("subprocess.Popen /usr/bin/gcc"), "no compiler started", "/usr/bin/gcc"),
        (lambda t: t["programs"].append("os.posix_spawn ptxas"), "no compiler started", "ptxas"),
        (lambda t: t["programs"].append("subprocess.Popen /bin/sh -c cd x && gcc y.c"), "no compiler started", "gcc"),
        (lambda t: t["programs"].append("os.system cd x; /usr/bin/g++-12 y.cc"), "no compiler started", "g++"),
        (lambda t: t["isolation"].update(state_writable=True), "the state is read-only", "writable"),
        (lambda t: t["isolation"].update(uid=0), "not the super-user", "uid 0"),
        (lambda t: t["isolation"]["interfaces"].append("eth0"), "no network interface but loopback", "lo, eth0"),
        (lambda t: t["audio"].update(pcm_sha256="c" * 64), AUDIO, "S3Gen or the watermark"),
        (lambda t: t["audio"].update(pcm_sha256="c" * 64, tokens_sha256="c" * 64), AUDIO, "T3, its weights"),
    ],
)
def test_a_planted_failure_fails_exactly_its_own_check(
    plant: Callable[[dict[str, Any]], object], failed: str, seen: str
) -> None:
    trial = warm_trial()
    plant(trial)
    evidence = judge(trial, DIGEST)
    assert not evidence.passed
    (check,) = [check for check in evidence.checks if not check.passed]
    assert check.name == failed
    assert seen in check.seen
    with pytest.raises(errors.NotWarmError) as caught:
        require_passed(evidence)
    assert caught.value.exit_code == 13
    assert failed in caught.value.message
    assert seen in caught.value.message


def test_a_failure_says_where_every_detail_is(tmp_path: Path) -> None:
    trial = warm_trial()
    trial["metrics"]["hits"].update(numba=0)
    evidence = judge(trial, DIGEST)
    written = default_evidence(tmp_path / "warm")
    assert written == tmp_path / "warm.evidence.json"
    for place, says in ((written, f"{written} has every detail"), ("", "named with `prove --evidence` has every")):
        with pytest.raises(errors.NotWarmError) as caught:
            require_passed(evidence, place, again="bake once more")
        assert caught.value.next_step.startswith("bake once more; ")
        assert says in caught.value.next_step


def test_evidence_without_a_check_is_no_proof() -> None:
    for evidence in (
        Evidence(set_digest=DIGEST, passed=True, checks=(), observed={}),
        replace(judge(warm_trial(), DIGEST), passed=False),
    ):
        with pytest.raises(errors.NotWarmError, match="nothing was checked"):
            require_passed(evidence)


def test_several_failures_are_all_named() -> None:
    trial = warm_trial()
    trial["isolation"]["uid"] = 0
    trial["network"].append("look-up of hub")
    with pytest.raises(errors.NotWarmError, match=r"not the super-user .* no network attempt"):
        require_passed(judge(trial, DIGEST))


def test_no_interface_at_all_and_other_programs_are_no_failure() -> None:
    trial = warm_trial()
    trial["isolation"]["interfaces"] = []
    trial["programs"] += ["subprocess.Popen /usr/bin/lscpu gcc", "subprocess.Popen /opt/gcc/bin/true"]
    assert judge(trial, DIGEST).passed


def test_counters_are_judged_without_regard_to_isolation_as_a_bake_does() -> None:
    trial = warm_trial()
    trial["isolation"].update(uid=0, interfaces=["eth0", "lo"], state_writable=True)
    names = {check.name for check in counter_checks(trial)}
    assert {"no network attempt", "no write into the state", "numba was used"} <= names
    assert all(check.passed for check in counter_checks(trial))


def test_packets_count_only_where_no_other_process_can_have_sent_them() -> None:
    trial = warm_trial()
    trial["packets"]["Tcp ActiveOpens"] = 1
    assert [check.name for check in counter_checks(trial) if not check.passed] == ["no network attempt"]
    trial["isolation"]["interfaces"] = ["eth0", "lo"]
    assert all(check.passed for check in counter_checks(trial))
    trial["network"].append("look-up of hub")
    assert [check.name for check in counter_checks(trial) if not check.passed] == ["no network attempt"]


def test_judging_changes_nothing_of_what_was_observed() -> None:
    trial = warm_trial()
    before = copy.deepcopy(trial)
    judge(trial, DIGEST)
    assert trial == before


def test_a_report_is_returned_as_it_is() -> None:
    trial = warm_trial()
    assert parse_report(json.dumps(trial), 0) == trial


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (10, errors.WeightsError),
        (11, errors.FingerprintMismatchError),
        (12, errors.IntegrityError),
        (13, errors.NotWarmError),
        (14, errors.EngineError),
        (15, errors.ModelError),
        (16, errors.BadInputError),
        (70, errors.PrewarmError),
        (99, errors.PrewarmError),
    ],
)
def test_an_error_of_the_process_is_raised_again_as_its_own_kind(code: int, kind: type[errors.PrewarmError]) -> None:
    report = json.dumps({"error": "it broke", "next_step": "mend it", "exit_code": code})
    with pytest.raises(kind) as caught:
        parse_report(report, 0)
    assert type(caught.value) is kind
    assert caught.value.message == "it broke"
    assert caught.value.next_step == "mend it"


@pytest.mark.parametrize(("output", "status"), [("", 0), ("", 1), ('{"half":', -9), ("{}", 1)])
def test_a_process_that_ended_without_a_report_is_a_model_error(output: str, status: int) -> None:
    with pytest.raises(errors.ModelError, match=f"ended with status {status} "):
        parse_report(output, status)


def test_a_process_that_is_not_set_apart_is_judged_by_its_counters() -> None:
    trial = warm_trial()
    trial["isolation"].update(uid=0, interfaces=["eth0", "lo"], state_writable=True)
    assert not judge(trial, DIGEST).passed
    found = judge(trial, DIGEST, apart=False)
    assert found.passed
    assert not any("super-user" in check.name for check in found.checks)
    miss("numba", "compiled librosa")(trial)
    assert not judge(trial, DIGEST, apart=False).passed
