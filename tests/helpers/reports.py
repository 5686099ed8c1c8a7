"""Results of a report, as if they had been measured."""

from __future__ import annotations

from typing import Any


def speech(first: float, *later: float, gaps: tuple[float, ...] = (0.1, 0.1), **more: Any) -> dict[str, Any]:
    """Return a result of `speak_process` whose requests took these seconds."""
    requests = [{"seconds": one, "first_chunk": one / 2, "gaps": list(gaps), "audio": 2.0} for one in (first, *later)]
    marks = {"attached": 4.0, "ready": 5.0, "first_audio": 5.0 + first}
    memory = {"peak_bytes": 2_000_000_000, "allocated_bytes": 2_500_000_000, "peak_gpu_bytes": 0}
    return {**marks, **memory, "requests": requests, "hits": {}, "misses": {}, **more}


def start(attached: float, first_audio: float, misses: int = 0) -> dict[str, Any]:
    """Return a result of the part `starts`."""
    marks = {"imported": attached / 2, "loaded": attached * 0.9, "attached": attached, "ready": attached + 1}
    missed = {"numba": misses} if misses else {}
    return {**marks, "first_audio": first_audio, "steady_request": 1.0, "hits": {}, "misses": missed, "apart": False}


def pair(tokens: float | None = 1.0, decibels: float | None = None) -> dict[str, Any]:
    """Return the result of `compare_audio`."""
    return {"tokens_equal": tokens, "mel_distance": 0.0, "decibels": decibels}


def t3_calls(upstream: float = 0.8) -> dict[str, Any]:
    """Return the result of the part `calls`, in which a call of upstream's T3 took these seconds, and of ours 0.4."""
    seconds = {"ours": [0.9, *[0.4] * 19], "upstream": [2.0, *[upstream] * 19]}
    medians = {"ours": 0.4, "upstream": upstream}
    return {"seconds": seconds, "first": medians, "last": medians, "hooks": [0, 60], "profile": "aot"}


def results(**more: Any) -> dict[str, Any]:
    """Return the results of a report of two rounds.

    Args:
        **more: other fields of the file, or of its plan, by their names.
    """
    steps = {
        "state": {"numba": 2_300_000, "signal": 340_000},
        "starts: torch, 1": {"imported": 1.0, "read_bytes": 0},
        "starts: torch, 2": {"imported": 1.1, "read_bytes": 0},
        "starts: upstream, 1": start(20.0, 30.0),
        "starts: upstream, 2": start(22.0, 32.0),
        "starts: cold, 1": start(10.0, 24.0, misses=3),
        "starts: cold, 2": start(11.0, 25.0, misses=3),
        "starts: warm, 1": start(3.0, 10.0),
        "starts: warm, 2": start(3.1, 10.0),
        "starts: warm again, 1": start(3.1, 10.2),
        "starts: warm again, 2": start(3.2, 10.1),
        "requests: upstream, 1": speech(9.0, 4.0, gaps=(), peak_bytes=2_500_000_000, second_model=20.0),
        "requests: cold, 1": speech(8.0, 4.0, gaps=(0.5, 1.5), second_model=6.0),
        "requests: warm, 1": speech(4.2, 4.0, second_model=5.0),
        "requests: batch in sequence": speech(4.1, 4.0, 4.0),
        "calls": t3_calls(),
        "memory: unlimited": speech(4.0, 4.0),
        "memory: 100 %": speech(4.0, 4.0),
        "memory: 90 %": {"error": "the process ran out of memory", "exit_code": 15},
        **{f"levels: {level}": speech(9.0 - level, 4.0) for level in range(4)},
        "ablation: none, 1": speech(4.0),
        "ablation: numba, 1": speech(12.0),
        "ablation: signal, 1": speech(4.0),
        "profiles: bake eager": {"bake_seconds": 31.0, "state_megabytes": 59.0},
        "profiles: eager, 1": speech(4.0, 3.9),
        "growth: text of 13 characters": speech(2.0, 2.0),
        "growth: text of 89 characters": speech(4.0, 4.0),
        "growth: 1 voices": {**speech(4.0), "voices": 1, "bytes": 59_000_000},
        "growth: 16 voices": {**speech(4.0), "voices": 16, "bytes": 60_000_000},
        "load: 1 worker(s)": {"alone": {}, "levels": [_level(1), _level(4)], "resident_bytes": 2_000_000_000},
        "load: 2 worker(s)": {"alone": {}, "levels": [_level(1), _level(4)], "resident_bytes": 3_500_000_000},
        "quality: upstream": {"watermark": 1.0, "seconds": 2.0},
        "quality: cold": {"watermark": 1.0, "seconds": 2.0},
        "quality: warm": {"watermark": 1.0, "seconds": 2.0, "greedy_tokens_equal": 200.0},
        "quality: upstream / warm": pair(None, 60.0),
        "quality: cold / warm": pair(),
    }
    plan = {
        "tool": "0.1.0",
        "machine": {"cpu": "a processor", "cores": 2, "memory_bytes": 1, "gpu": "", "driver": "", "kernel": "6"},
        "versions": {"torch": "2.6.0"},
        "device": "cpu",
        "weights": {"repository": "synthetic", "revision": "mini", "synthetic": "mini"},
        "rounds": 2,
    }
    content = {"plan": plan, "complete": True, "failed": {}, "steps": steps}
    for name, value in more.items():
        (content if name in content else plan)[name] = value
    return content


def _level(clients: int) -> dict[str, Any]:
    latency = {"p50": 4.0 * clients, "p90": 4.5 * clients, "p99": 5.0 * clients, "most": 5.0 * clients}
    counts = {"clients": clients, "requests": 3, "spoken": 3 * clients, "throughput": 0.5}
    return {**counts, "latency": latency, "first_chunk": latency}
