"""The parts of a measurement on a GPU. Each runs in its own process, in the order of `PARTS`."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.plan import Plan
from benchmarks.profiles import measure_one, summarize, table
from benchmarks.stages import StageOptions
from chatterbox_prewarm.bench import load
from chatterbox_prewarm.bench.executions import bake_one, voice_of
from chatterbox_prewarm.bench.recorded_steps import RecordedSteps
from chatterbox_prewarm.bench.speak_process import UPSTREAM
from chatterbox_prewarm.bench.starts import machine, settle, time_server, time_torch_import, time_upstream, versions
from chatterbox_prewarm.errors import EngineError, ModelError
from chatterbox_prewarm.model.reference_clip import reference_clip
from chatterbox_prewarm.proof.prove import ProofOptions, prove, prove_here
from chatterbox_prewarm.system.json_subprocess import report, run_module
from chatterbox_prewarm.system.process import run as run_process
from chatterbox_prewarm.weights.record import RECORD_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chatterbox_prewarm.proof.checks import Evidence


def env(plan: Plan, record: RecordedSteps) -> None:
    """Describe the machine and its software, measure the memory bandwidth, and create a random checkpoint."""
    record.step("machine", lambda: {**machine(), "versions": versions()})
    record.step("checkpoint", _checkpoint, plan)
    record.step("memory bandwidth", _in_process, "bandwidth", {"device": plan.device})


def bake(plan: Plan, record: RecordedSteps) -> None:
    """Bake a warm state for each execution; record the seconds and the sizes."""
    for name, execution in plan.executions().items():
        record.step(name, bake_one, plan.weights, plan.state(name), plan.cache, plan.device, execution)


def proof(plan: Plan, record: RecordedSteps) -> None:
    """Prove each state in a fresh process: no miss, no compiler, and the same audio as in the bake."""
    for name in plan.executions():
        record.step(name, _proof, plan, plan.state(name))


def start(plan: Plan, record: RecordedSteps) -> None:
    """Time exec to attached, ready and first audio in turn; once also `compiled` without its cache."""
    states = {name: plan.state(name) for name in plan.executions()}
    first = next(iter(states.values()))
    with reference_clip() as clip:
        cold = partial(time_server, plan.weights, first, plan.device, clip=clip)
        systems: dict[str, Callable[[], dict[str, Any]]] = {
            "import torch": time_torch_import,
            UPSTREAM: partial(time_upstream, plan.weights, clip, plan.device),
            "ours, cold": cold,
        }
        for name, state in states.items():
            cache = ("--cache", str(plan.cache))
            systems[name] = partial(time_server, plan.weights, state, plan.device, serve_options=cache)
        for number in range(1, plan.rounds + 1):
            for name, measure in systems.items():
                record.step(f"{name}, {number}", _settled, plan, states.get(name), measure)
        compiled = partial(cold, serve_options=("--profile", "compiled"))
        record.step("compiled, without its cache", _settled, plan, first, compiled)


def decode(plan: Plan, record: RecordedSteps) -> None:
    """Measure seconds per token, to compare with the memory bandwidth, and flow and vocoder by length."""
    for name in plan.executions():
        record.step(name, _in_process, "decode", _locations(plan, name))


def profiles(plan: Plan, record: RecordedSteps) -> None:
    """Compare the stages of a synthesis and their results with upstream, as in `benchmarks profiles`."""
    executions = plan.executions()
    runs = []
    for number in range(1, plan.rounds + 1):
        for name in (UPSTREAM, *executions):
            result = record.step(f"{name}, {number}", _stages, plan, name, number)
            if result is not None:
                runs.append({"system": name, "round": number, **result})
    if not record.failed:
        summary = summarize(runs, {}, executions, weights=plan.weights, device=plan.device)
        print(table(summary), file=sys.stderr)
        record.steps["summary"] = {key: summary[key] for key in ("medians", "ratios", "executions")}


def memory(plan: Plan, record: RecordedSteps) -> None:
    """Measure time and memory of each step of a start from each state."""
    for name in plan.executions():
        record.step(name, _in_process, "memory", _locations(plan, name))


def serve(plan: Plan, record: RecordedSteps) -> None:
    """Load a server with 1 and 16 streaming clients: time to the first chunk, streams without a pause."""
    on_gpu = plan.device.startswith("cuda")
    state = next(plan.state(name) for name in plan.executions() if name.startswith("aot"))
    for clients in (1, 16):
        record.step(f"{clients} clients", _load, plan, state, clients, _TOKENS if on_gpu else _TOKENS_ON_A_CPU)


#: Limits of speech tokens for a short, a medium and a long text, because random weights never stop.
_TOKENS, _TOKENS_ON_A_CPU = (25, 75, 200), (6, 12, 25)
#: Requests of each client.
_REQUESTS = 6
#: Look-ahead of a stream in tokens, so that its first chunk does not wait for its last token.
_LOOK_AHEAD = 25

#: The parts in their order, by their names on the command line.
PARTS: Mapping[str, Callable[[Plan, RecordedSteps], None]] = {
    "env": env,
    "bake": bake,
    "prove": proof,
    "start": start,
    "decode": decode,
    "profiles": profiles,
    "memory": memory,
    "serve": serve,
}


def _checkpoint(plan: Plan) -> dict[str, Any]:
    started = time.monotonic()
    if not (plan.weights / RECORD_NAME).exists():
        command = [sys.executable, "-m", "chatterbox_prewarm", "weights", "synthesize", str(plan.weights)]
        if run_process([*command, "--size", plan.size]).returncode != 0:
            raise ModelError("the checkpoint could not be created", next_step="see its output above")
    return {"size": plan.size, "seconds": round(time.monotonic() - started, 1)}


def _locations(plan: Plan, name: str) -> dict[str, Any]:
    state = plan.state(name)
    return {"warm": str(state), "weights": str(plan.weights), "cache": str(plan.cache), "device": plan.device}


def _settled(plan: Plan, state: Path | None, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Fill the page cache, then measure. A recorded step skips both."""
    settle(plan.weights, state)
    return measure()


def _in_process(module: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a module of this package in a fresh process with a hot page cache."""
    if "weights" in arguments:
        settle(Path(arguments["weights"]), Path(arguments["warm"]))
    return run_module(f"benchmarks.gpu.{module}", arguments)


def _load(plan: Plan, state: Path, clients: int, tokens: tuple[int, int, int]) -> dict[str, Any]:
    """Run `bench load` with one number of clients."""
    settle(plan.weights, state)
    options = load.LoadOptions(
        weights=plan.weights,
        warm=state,
        device=plan.device,
        clients=(clients,),
        requests=_REQUESTS,
        tokens=tokens,
        seeds=1,
        look_ahead=_LOOK_AHEAD,
    )
    report = load.run(options, say=lambda line: print(f"    {line}", file=sys.stderr))
    if messages := load.faults(report):
        raise ModelError("; ".join(messages), next_step="see the log of the server")
    return {"start": report["start"], "alone": report["alone"], **report["levels"][0]}


def _stages(plan: Plan, name: str, number: int) -> dict[str, Any]:
    options = StageOptions(
        weights=str(plan.weights),
        warm=None if name == UPSTREAM else str(plan.state(name)),
        voice=str(voice_of(plan.state(next(iter(plan.executions()))))),
        cache=str(plan.cache),
        device=plan.device,
        reference=f"{plan.out}/reference.pt" if number == 1 else None,
    )
    return measure_one(options)


def _proof(plan: Plan, state: Path) -> dict[str, Any]:
    """Prove a state in an isolated process, or without isolation if the system does not allow it."""
    isolated = True
    options = ProofOptions(warm=state, weights=plan.weights)
    try:
        evidence = prove(options)
    except EngineError:
        isolated = False
        evidence = prove_here(options, plan.cache)
    return {"isolated": isolated, **_summary(evidence)}


def _summary(evidence: Evidence) -> dict[str, Any]:
    metrics = evidence.observed["metrics"]
    return {
        "passed": evidence.passed,
        "failed checks": [asdict(check) for check in evidence.checks if not check.passed],
        "hits": metrics["hits"],
        "misses": metrics["misses"],
        "set digest": evidence.set_digest,
    }


def run(*, part: str, **plan_fields: Any) -> dict[str, Any]:
    """Run one part."""
    plan = Plan(**plan_fields)
    path = Path(plan.out) / f"{part}.json"
    record = RecordedSteps(path, asdict(plan), lambda line: print(f"  {part}: {line}", file=sys.stderr))
    PARTS[part](plan, record)
    record.write(complete=True)
    return {"failed": record.failed}


if __name__ == "__main__":
    report(run)
