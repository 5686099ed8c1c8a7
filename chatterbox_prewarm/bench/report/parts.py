"""The parts of a report. Each part measures its systems in fresh processes, in steps that are recorded one by one."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench import load as bench_load
from chatterbox_prewarm.bench.executions import HALVES, bake_one, file_name, select_executions, token_limit
from chatterbox_prewarm.bench.report.options import WARM_AGAIN, ReportOptions
from chatterbox_prewarm.bench.report.quality import compare_audio
from chatterbox_prewarm.bench.report.quality_process import QualityOptions
from chatterbox_prewarm.bench.report.states import with_voices, without_family
from chatterbox_prewarm.bench.speak_process import (
    COLD,
    UPSTREAM,
    WARM,
    SpeakOptions,
    run_with_cache,
    speak_in_fresh_process,
)
from chatterbox_prewarm.bench.starts import settle
from chatterbox_prewarm.bench.startup import label_run, start_functions
from chatterbox_prewarm.errors import ModelError, PrewarmError
from chatterbox_prewarm.model.reference_clip import reference_clip
from chatterbox_prewarm.model.warmup.settings import LONG_TEXT, MEDIUM_TEXT, SHORT_TEXT
from chatterbox_prewarm.state.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from chatterbox_prewarm.bench.recorded_steps import RecordedSteps
    from chatterbox_prewarm.model.profiles import Execution

#: The systems that need no bake of the report.
_SYSTEMS = (UPSTREAM, COLD, WARM)
#: Module of the processes whose audio is compared.
QUALITY = "chatterbox_prewarm.bench.report.quality_process"
#: Module of the process that calls T3, and the number of calls.
_CALLS_PROCESS, _CALLS = "chatterbox_prewarm.bench.t3_calls", 20
#: Speech tokens of a short, a medium and a long text with random weights, which never stop.
_TOKENS = {SHORT_TEXT: 12, MEDIUM_TEXT: 50, LONG_TEXT: 100}
#: Requests of a process in sequence.
_BATCH = 6
#: Memory limits in percent of the memory that an unlimited process had allocated after its first request. They are
#: tried one after the other, until one is too little. The process needs more for a moment.
_LIMITS = range(140, 40, -10)
_VOICES = (1, 16, 64)


def state(options: ReportOptions, record: RecordedSteps) -> None:
    """Record the bytes of each family of the warm state."""
    families = State.read(options.warm).manifest.families
    record.step("state", lambda: {family.name: family.size for family in families})


def starts(options: ReportOptions, record: RecordedSteps) -> None:
    """Time exec to attached, ready and first audio of the server and of upstream; the warm server twice."""
    with reference_clip() as clip:
        systems = start_functions(options.weights, options.warm, clip, options.device)
        systems[WARM_AGAIN] = systems[WARM]
        for number in _rounds(options):
            for name, measure in systems.items():
                record.step(f"starts: {name}, {number}", _start, options, name, measure)


def _start(options: ReportOptions, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    settle(options.weights, options.warm)
    return label_run(measure(), name, "hot")


def requests(options: ReportOptions, record: RecordedSteps) -> None:
    """Send requests in sequence through the Python API: the first chunk, the gaps between chunks, the memory."""
    for number in _rounds(options):
        for system in _SYSTEMS:
            speak = _options(options, system, requests=3, second_model=number == 1)
            record.step(f"requests: {system}, {number}", _speak, options, speak)
    record.step("requests: batch in sequence", _speak, options, _options(options, WARM, requests=_BATCH))


def calls(options: ReportOptions, record: RecordedSteps) -> None:
    """Call T3, upstream's and ours in turn, in one process. Upstream's T3 runs only in float32."""
    if State.read(options.warm).manifest.execution.t3_dtype == "float32":
        record.step("calls", _call, options)


def _call(options: ReportOptions) -> dict[str, Any]:
    settle(options.weights, options.warm)
    arguments = {"weights": str(options.weights), "warm": str(options.warm), "device": options.device}
    return run_with_cache(_CALLS_PROCESS, {**arguments, "calls": _CALLS})


def memory(options: ReportOptions, record: RecordedSteps) -> None:
    """Lower the memory limit of a warm process, until it is just too little.

    On a GPU, only the memory of the host is limited.
    """
    unlimited = record.step("memory: unlimited", _speak, options, _options(options, WARM, requests=2))
    if unlimited is None:
        return
    for percent in _LIMITS:
        limited = _options(options, WARM, requests=2, memory_limit=percent * unlimited["allocated_bytes"] // 100)
        found = record.step(f"memory: {percent} %", _speak_or_fail, options, limited)
        if found is None or "error" in found:
            return


def levels(options: ReportOptions, record: RecordedSteps) -> None:
    """Start without a warm state, and warm up to each level: 0 is no warm-up."""
    for level in range(4):
        speak = _options(options, COLD, requests=3, levels=tuple(range(1, level + 1)))
        record.step(f"levels: {level}", _speak, options, speak)


def ablation(options: ReportOptions, record: RecordedSteps) -> None:
    """Start without one family of the state after the other, and with all of them, without a warm-up.

    A start must not use the bytecode next to the sources, because a fresh image does not contain it.
    """
    for number in _rounds(options):
        record.step(f"ablation: none, {number}", _without, options, None)
        for family in State.read(options.warm).manifest.families:
            record.step(f"ablation: {family.name}, {number}", _without, options, family.name)


def _without(options: ReportOptions, family: str | None) -> dict[str, Any]:
    warm = options.warm
    if family is not None:
        warm = without_family(options.warm, family, options.states / f"without-{family}")
    settle(options.weights, warm)
    speak = replace(_options(options, WARM), warm=str(warm), policy="fallback", speak_once=False)
    return speak_in_fresh_process(speak, bytecode=False)


def profiles(options: ReportOptions, record: RecordedSteps) -> None:
    """Bake each profile, and the last one with half the bytes of T3, and start from each state."""
    names = _bake(options, record)
    for number in _rounds(options):
        for name in names:
            record.step(f"profiles: {name}, {number}", _speak_profile, options, name)


def _speak_profile(options: ReportOptions, name: str) -> dict[str, Any]:
    speak = replace(_options(options, WARM, requests=3), warm=str(_state(options, name)))
    return _speak(options, speak, _cache(options, name))


def growth(options: ReportOptions, record: RecordedSteps) -> None:
    """Vary the length of the text and the number of baked voices."""
    for text, tokens in _TOKENS.items():
        speak = replace(
            _options(options, WARM, requests=3), text=text, max_new_tokens=token_limit(options.weights, tokens)
        )
        record.step(f"growth: text of {len(text)} characters", _speak, options, speak)
    for count in _VOICES:
        record.step(f"growth: {count} voices", _with_voices, options, count)


def _with_voices(options: ReportOptions, count: int) -> dict[str, Any]:
    state = with_voices(options.warm, count, options.states / f"voices-{count}")
    size = sum(family.size for family in State.read(state).manifest.families)
    return {"voices": count, "bytes": size, **_speak(options, replace(_options(options, WARM), warm=str(state)))}


def load(options: ReportOptions, record: RecordedSteps) -> None:
    """Send requests from concurrent clients to a server with one worker, and to one with two."""
    for workers in (1, 2):
        record.step(f"load: {workers} worker(s)", _load, options, workers)


def _load(options: ReportOptions, workers: int) -> dict[str, Any]:
    settle(options.weights, options.warm)
    report = bench_load.run(
        bench_load.LoadOptions(
            weights=options.weights,
            warm=options.warm,
            device=",".join([options.device] * workers),
            clients=options.clients,
            requests=options.requests,
            tokens=[token_limit(options.weights, tokens) for tokens in _TOKENS.values()],
            seeds=1,
        ),
        say=lambda _: None,
    )
    if messages := bench_load.faults(report):
        raise ModelError("; ".join(messages), next_step="see the log of the server")
    return {name: report[name] for name in ("alone", "levels", "resident_bytes")}


def quality(options: ReportOptions, record: RecordedSteps) -> None:
    """Speak the same text with the same random numbers by each system, and compare the audio in pairs."""
    options.audio.mkdir(exist_ok=True)
    systems = [UPSTREAM, COLD, WARM, *_bake(options, record)]
    for name in systems:
        record.step(f"quality: {name}", _synthesize, options, name)
    for first, second in _pairs(systems):
        files = [audio_of(options, name).with_suffix(".npz") for name in (first, second)]
        record.step(f"quality: {first} / {second}", compare_audio, *files)


def _synthesize(options: ReportOptions, name: str) -> dict[str, Any]:
    state = {UPSTREAM: None, COLD: None, WARM: options.warm}.get(name) if name in _SYSTEMS else _state(options, name)
    speak = QualityOptions(
        system=name if name in _SYSTEMS else WARM,
        weights=str(options.weights),
        warm=None if state is None else str(state),
        device=options.device,
        max_new_tokens=token_limit(options.weights, _TOKENS[MEDIUM_TEXT]),
        audio=str(audio_of(options, name)),
        reference=str(options.audio / "upstream.pt"),
    )
    return run_with_cache(QUALITY, asdict(speak), _cache(options, name))


def audio_of(options: ReportOptions, name: str) -> Path:
    """Return the WAV file of a system of the part `quality`."""
    return options.audio / f"{file_name(name)}.wav"


def _pairs(systems: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs to compare: warm with upstream and cold, profiles with the first one, halves with float32."""
    names = [name for name in systems if name not in _SYSTEMS]
    halves = [(name.rpartition(", ")[0], name) for name in names if name.rpartition(", ")[2] in HALVES.values()]
    return [(UPSTREAM, WARM), (COLD, WARM), *((names[0], name) for name in names[1:]), *halves]


def _bake(options: ReportOptions, record: RecordedSteps) -> list[str]:
    """Bake a state for each execution, and return the names of the successful ones."""
    return [
        name
        for name, execution in select_executions(options.device, options.profiles).items()
        if record.step(f"profiles: bake {name}", _bake_one, options, name, execution) is not None
    ]


def _bake_one(options: ReportOptions, name: str, execution: Execution) -> dict[str, float]:
    return bake_one(options.weights, options.states / file_name(name), options.cache, options.device, execution)


def _state(options: ReportOptions, name: str) -> Path:
    """Return the state of an execution; bake it again if an earlier run removed it."""
    state = options.states / file_name(name)
    if not state.exists():
        _bake_one(options, name, select_executions(options.device, options.profiles)[name])
    return state


def _options(options: ReportOptions, system: str, **more: Any) -> SpeakOptions:
    return SpeakOptions(
        system=system,
        weights=str(options.weights),
        warm=str(options.warm),
        device=options.device,
        text=MEDIUM_TEXT,
        max_new_tokens=token_limit(options.weights, _TOKENS[MEDIUM_TEXT]),
        **more,
    )


def _cache(options: ReportOptions, name: str) -> Path | None:
    """Return the cache directory of the bakes for the profile `compiled`, whose state works only with that path."""
    return options.cache if name.startswith("compiled") else None


def _speak(options: ReportOptions, speak: SpeakOptions, cache: Path | None = None) -> dict[str, Any]:
    settle(options.weights, options.warm)
    return speak_in_fresh_process(speak, cache)


def _speak_or_fail(options: ReportOptions, speak: SpeakOptions) -> dict[str, Any]:
    """Return the result, or the error with which the process ended."""
    try:
        return _speak(options, speak)
    except PrewarmError as error:
        return {"error": error.message, "exit_code": error.exit_code}


def _rounds(options: ReportOptions) -> range:
    return range(1, options.rounds + 1)


PART_FUNCTIONS: Mapping[str, Callable[[ReportOptions, RecordedSteps], None]] = {
    "state": state,
    "starts": starts,
    "requests": requests,
    "calls": calls,
    "memory": memory,
    "levels": levels,
    "ablation": ablation,
    "profiles": profiles,
    "growth": growth,
    "load": load,
    "quality": quality,
}
