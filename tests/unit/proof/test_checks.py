"""Test that each problem in the report of a proof process fails exactly one check."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm import errors
from chatterbox_prewarm.proof.checks import (
    Evidence,
    audio_check,
    counter_checks,
    default_evidence,
    judge,
    require_passed,
)
from chatterbox_prewarm.system.metrics import StartMetrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAMILIES = ("bytecode", "numba", "signal", "conditionals")
DIGEST = "d" * 64


def warm_report() -> dict[str, Any]:
    """Return the report of a proof process that had no miss."""
    metrics = StartMetrics(origin=0.0)
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


def with_miss(family: str, reason: str) -> Callable[[dict[str, Any]], object]:
    """Return a function that adds a miss to a report."""

    def add(report: dict[str, Any]) -> None:
        report["metrics"]["misses"][family] = 1
        report["metrics"]["reasons"].append(f"{family}: {reason}")

    return add


def test_a_report_without_misses_passes_every_check() -> None:
    report = warm_report()
    evidence = judge(report, DIGEST)
    assert evidence.passed
    assert [check.name for check in evidence.checks if not check.passed] == []
    require_passed(evidence)
    written = json.loads(evidence.to_json())
    assert written["set_digest"] == DIGEST
    assert written["observed"] == report
    expected = {"bytecode was used", "numba was used", "signal is in place", "conditionals was used"}
    assert expected <= {check["name"] for check in written["checks"]}


NUMBA, BYTECODE, AUDIO = "numba was used", "bytecode was used", "the audio is identical to the bake"


@pytest.mark.parametrize(
    ("add_problem", "failed", "seen"),
    [
        (with_miss("numba", "compiled librosa.filters.f"), NUMBA, "3 hits, 1 misses"),
        (with_miss("bytecode", "x.py has changed"), BYTECODE, "3 hits, 1 misses"),
        (lambda report: report["metrics"]["hits"].update(numba=0), NUMBA, "0 hits, 0 misses"),
        (lambda report: report["metrics"]["loaded"].update(signal=0), "signal is in place", "0 loaded, 0 misses"),
        (lambda report: report["metrics"]["loaded"].pop("signal"), "signal was used", "0 hits, 0 misses"),
        (with_miss("signal", "computed '8000_cpu'"), "signal is in place", "4 loaded, 1 misses"),
        (
            lambda report: report["metrics"]["timers"].update({"numba compile": 0.002}),
            "no pass of Numba's compiler",
            "0.002 s",
        ),
        (with_miss("late", "torch was imported before prepare"), "no other miss", "late"),
        (with_miss("all", "there is no manifest"), "no other miss", "there is no manifest"),
        (lambda report: report["network"].append("lookup of hub"), "no network attempt", "1; lookup of hub"),
        (lambda report: report["packets"].update({"Ip OutNoRoutes": 2}), "no network attempt", "2 Ip OutNoRoutes"),
        (lambda report: report["state_writes"].append("open /warm/x"), "no write into the state", "open /warm/x"),
        (lambda report: report["cache_writes"].append("/cache/f.nbc"), "no write into a cache", "/cache/f.nbc"),
        (
            lambda report: report["programs"].append("subprocess.Popen /usr/bin/gcc"),
            "no compiler started",
            "/usr/bin/gcc",
        ),
        (lambda report: report["programs"].append("os.posix_spawn ptxas"), "no compiler started", "ptxas"),
        (
            lambda report: report["programs"].append("subprocess.Popen /bin/sh -c cd x && gcc y.c"),
            "no compiler started",
            "gcc",
        ),
        (
            lambda report: report["programs"].append("os.system cd x; /usr/bin/g++-12 y.cc"),
            "no compiler started",
            "g++",
        ),
        (lambda report: report["isolation"].update(state_writable=True), "the state is read-only", "writable"),
        (lambda report: report["isolation"].update(uid=0), "not the super-user", "uid 0"),
        (
            lambda report: report["isolation"]["interfaces"].append("eth0"),
            "no network interface but loopback",
            "lo, eth0",
        ),
        (lambda report: report["audio"].update(pcm_sha256="c" * 64), AUDIO, "S3Gen or the watermark"),
        (lambda report: report["audio"].update(pcm_sha256="c" * 64, tokens_sha256="c" * 64), AUDIO, "T3, its weights"),
    ],
)
def test_each_problem_fails_exactly_one_check(
    add_problem: Callable[[dict[str, Any]], object], failed: str, seen: str
) -> None:
    report = warm_report()
    add_problem(report)
    evidence = judge(report, DIGEST)
    assert not evidence.passed
    (check,) = [check for check in evidence.checks if not check.passed]
    assert check.name == failed
    assert seen in check.seen
    with pytest.raises(errors.NotWarmError) as caught:
        require_passed(evidence)
    assert caught.value.exit_code == 13
    assert failed in caught.value.message
    assert seen in caught.value.message


def test_a_failure_says_where_the_details_are(tmp_path: Path) -> None:
    report = warm_report()
    report["metrics"]["hits"].update(numba=0)
    evidence = judge(report, DIGEST)
    written = default_evidence(tmp_path / "warm")
    assert written == tmp_path / "warm.evidence.json"
    for details, file in ((written, str(written)), ("", "the file of `prove --evidence FILE`")):
        with pytest.raises(errors.NotWarmError) as caught:
            require_passed(evidence, details, rebake_hint="bake a second time")
        assert caught.value.next_step == f"bake a second time; see every detail in {file}"


def test_evidence_without_checks_is_not_a_proof() -> None:
    for evidence in (
        Evidence(set_digest=DIGEST, passed=True, checks=(), observed={}),
        replace(judge(warm_report(), DIGEST), passed=False),
    ):
        with pytest.raises(errors.NotWarmError, match="nothing was checked"):
            require_passed(evidence)


def test_several_failures_are_all_named() -> None:
    report = warm_report()
    report["isolation"]["uid"] = 0
    report["network"].append("lookup of hub")
    with pytest.raises(errors.NotWarmError, match=r"not the super-user .* no network attempt"):
        require_passed(judge(report, DIGEST))


def test_no_network_interface_and_other_programs_are_not_failures() -> None:
    report = warm_report()
    report["isolation"]["interfaces"] = []
    report["programs"] += ["subprocess.Popen /usr/bin/lscpu gcc", "subprocess.Popen /opt/gcc/bin/true"]
    assert judge(report, DIGEST).passed


def test_counter_checks_ignore_the_isolation() -> None:
    report = warm_report()
    report["isolation"].update(uid=0, interfaces=["eth0", "lo"], state_writable=True)
    names = {check.name for check in counter_checks(report)}
    assert {"no network attempt", "no write into the state", "numba was used"} <= names
    assert all(check.passed for check in counter_checks(report))


def test_packets_count_only_if_no_other_process_can_have_sent_them() -> None:
    report = warm_report()
    report["packets"]["Tcp ActiveOpens"] = 1
    assert [check.name for check in counter_checks(report) if not check.passed] == ["no network attempt"]
    report["isolation"]["interfaces"] = ["eth0", "lo"]
    assert all(check.passed for check in counter_checks(report))
    report["network"].append("lookup of hub")
    assert [check.name for check in counter_checks(report) if not check.passed] == ["no network attempt"]


def test_judge_does_not_change_the_report() -> None:
    report = warm_report()
    before = copy.deepcopy(report)
    judge(report, DIGEST)
    assert report == before


@pytest.mark.parametrize(("tokens", "decibels", "passed"), [("a", 61.0, True), ("a", 39.0, False), ("b", 300.0, False)])
def test_audio_that_the_bake_could_not_make_is_compared_with_eager_mode(
    tokens: str, decibels: float, passed: bool
) -> None:
    audio = {"samples": 7, "pcm_sha256": "c", "expected_pcm_sha256": "", "decibels": decibels}
    check = audio_check({"audio": {**audio, "tokens_sha256": tokens, "expected_tokens_sha256": "a"}})
    assert (check.name, check.passed) == ("the audio is like that of eager mode", passed)


def test_without_isolation_only_counters_and_audio_are_judged() -> None:
    report = warm_report()
    report["isolation"].update(uid=0, interfaces=["eth0", "lo"], state_writable=True)
    assert not judge(report, DIGEST).passed
    evidence = judge(report, DIGEST, isolated=False)
    assert evidence.passed
    assert not any("super-user" in check.name for check in evidence.checks)
    with_miss("numba", "compiled librosa")(report)
    assert not judge(report, DIGEST, isolated=False).passed
