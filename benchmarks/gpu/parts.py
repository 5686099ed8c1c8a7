"""The parts of a run on a GPU, each a process of its own: `PARTS` names them in their order."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.record import Plan, Record
from benchmarks.profiles import UPSTREAM, bake_one, measure_one, summarize, table, voice_of
from chatterbox_prewarm.bench import load
from chatterbox_prewarm.bench.starts import Starts, machine, settle, versions
from chatterbox_prewarm.errors import EngineError, ModelError
from chatterbox_prewarm.model.warmup.inputs import reference_clip
from chatterbox_prewarm.proof.prove import prove, prove_here
from chatterbox_prewarm.system.json_subprocess import parse_report, report
from chatterbox_prewarm.system.process import run as run_process
from chatterbox_prewarm.weights.record import RECORD_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chatterbox_prewarm.proof.checks import Evidence


def env(plan: Plan, record: Record) -> None:
    """The machine, its software, what its memory can do, and a checkpoint of random weights."""
    record.step("machine", lambda: {**machine(), "versions": versions()})
    record.step("checkpoint", _checkpoint, plan)
    record.step("memory bandwidth", _in_process, "bandwidth", {"device": plan.device})


def bake(plan: Plan, record: Record) -> None:
    """A warm state for each way of executing: what that takes, and how large it is."""
    for name, execution in plan.executions().items():
        record.step(name, bake_one, plan.weights, plan.state(name), plan.cache, plan.device, execution)


def proof(plan: Plan, record: Record) -> None:
    """A fresh process from each state: nothing missed, nothing compiled, the bake's own sound."""
    for name in plan.executions():
        record.step(name, _proof, plan, plan.state(name))


def start(plan: Plan, record: Record) -> None:
    """From exec to attached, ready and first audio, in turn; `compiled` also without its cache, once."""
    with tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-bench-") as scratch, reference_clip() as clip:
        starts = Starts(weights=plan.weights, clip=clip, scratch=Path(scratch), device=plan.device)
        states = {name: plan.state(name) for name in plan.executions()}
        first = next(iter(states.values()))
        systems: dict[str, Callable[[], dict[str, Any]]] = {
            "import torch": starts.torch,
            UPSTREAM: starts.upstream,
            "ours, cold": partial(starts.ours, first, policy="off"),
        }
        for name, state in states.items():
            systems[name] = partial(starts.ours, state, policy="require", cache=plan.cache)
        for number in range(1, plan.rounds + 1):
            for name, measure in systems.items():
                record.step(f"{name}, {number}", _settled, plan, states.get(name), measure)
        cold = partial(starts.ours, first, policy="off", profile="compiled")
        record.step("compiled, without its cache", _settled, plan, first, cold)


def decode(plan: Plan, record: Record) -> None:
    """Tokens a second beside what the memory allows, and flow and vocoder by length."""
    for name in plan.executions():
        record.step(name, _in_process, "decode", _places(plan, name))


def profiles(plan: Plan, record: Record) -> None:
    """The stages of a synthesis beside upstream's, and how near the results are; the table of `bench profiles`."""
    executions = plan.executions()
    runs = []
    for number in range(1, plan.rounds + 1):
        for name in (UPSTREAM, *executions):
            found = record.step(f"{name}, {number}", _stages, plan, name, number)
            if found is not None:
                runs.append({"system": name, "round": number, **found})
    if not record.failed:
        summary = summarize(runs, {}, executions, weights=plan.weights, device=plan.device)
        print(table(summary), file=sys.stderr)
        record.steps["summary"] = {key: summary[key] for key in ("medians", "ratios", "executions")}


def memory(plan: Plan, record: Record) -> None:
    """What each step of a start takes of time and memory, by itself, from each state."""
    for name in plan.executions():
        record.step(name, _in_process, "memory", _places(plan, name))


def serve(plan: Plan, record: Record) -> None:
    """A server under 1 and 16 clients who stream: time to the first chunk, and how many play without a pause."""
    on_gpu = plan.device.startswith("cuda")
    state = next(plan.state(name) for name in plan.executions() if name.startswith("aot"))
    for clients in (1, 16):
        record.step(f"{clients} clients", _load, plan, state, clients, _TOKENS if on_gpu else _TOKENS_ON_A_CPU)


#: Most speech tokens of a short, a medium and a long text, 25 a second: random weights never stop.
_TOKENS, _TOKENS_ON_A_CPU = (25, 75, 200), (6, 12, 25)
#: Of each client.
_REQUESTS = 6
#: Tokens that a stream looks ahead, so that its first chunk does not wait for its last token.
_LOOK_AHEAD = 25

#: By the name on the command line, in their order.
PARTS: Mapping[str, Callable[[Plan, Record], None]] = {
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
            raise ModelError("the checkpoint could not be made", next_step="see its output above")
    return {"size": plan.size, "seconds": round(time.monotonic() - started, 1)}


def _places(plan: Plan, name: str) -> dict[str, Any]:
    state = plan.state(name)
    return {"warm": str(state), "weights": str(plan.weights), "cache": str(plan.cache), "device": plan.device}


def _settled(plan: Plan, state: Path | None, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure with a hot page cache; within the step, so that one that was done before reads nothing."""
    settle(plan.weights, state)
    return measure()


def _in_process(module: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run one of this package's modules in a fresh process, its page cache hot."""
    if "weights" in arguments:
        settle(Path(arguments["weights"]), Path(arguments["warm"]))
    command = [sys.executable, "-m", f"benchmarks.gpu.{module}", json.dumps(arguments)]
    finished = run_process(command)
    return parse_report(finished.stdout, finished.returncode)


def _load(plan: Plan, state: Path, clients: int, tokens: tuple[int, int, int]) -> dict[str, Any]:
    """One level of `bench load`."""
    settle(plan.weights, state)
    report = load.run(
        url=None,
        weights=plan.weights,
        warm=state,
        device=plan.device,
        clients=(clients,),
        requests=_REQUESTS,
        tokens=tokens,
        seeds=1,
        look_ahead=_LOOK_AHEAD,
        say=lambda line: print(f"    {line}", file=sys.stderr),
    )
    if found := load.faults(report):
        raise ModelError("; ".join(found), next_step="see the server's log")
    return {"start": report["start"], "alone": report["alone"], **report["levels"][0]}


def _stages(plan: Plan, name: str, number: int) -> dict[str, Any]:
    reference = Path(plan.out) / "reference.pt"
    return measure_one(
        plan.weights,
        None if name == UPSTREAM else plan.state(name),
        cache=plan.cache,
        device=plan.device,
        voice=voice_of(plan.state(next(iter(plan.executions())))),
        reference=reference if number == 1 else None,
    )


def _proof(plan: Plan, state: Path) -> dict[str, Any]:
    """Set apart where the system allows it; where it does not, the counters still count."""
    isolated = True
    try:
        evidence = prove(state, plan.weights)
    except EngineError:
        isolated = False
        evidence = prove_here(state, plan.weights, plan.cache)
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
    """Run one part to its end."""
    plan = Plan(**plan_fields)
    record = Record(Path(plan.out) / f"{part}.json", plan, lambda line: print(f"  {part}: {line}", file=sys.stderr))
    PARTS[part](plan, record)
    record.write(complete=True)
    return {"failed": record.failed}


if __name__ == "__main__":
    report(run)
