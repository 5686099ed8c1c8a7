"""Print a reference page of docs/: `python docs/reference.py metrics > docs/metrics.md`.

The pages are metrics, configuration, labels and claims. Names, types, defaults and help texts come from the code, and
the claims from recorded results. This program adds only what these do not say, and tests compare both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).parent.parent

#: The meaning of the values of each label of a metric.
METRIC_LABELS = {
    "device": "the device of a worker, such as `cuda:0`",
    "family": "a [cache family](families.md)",
    "key": "the key of a warm state: its variant, device and profile",
    "le": "the upper bound of a bucket",
    "model": "the [variant](variants.md) of the model; empty for a request that was refused before its model was known",
    "moment": "`attached` (the model and the state are loaded) or `ready` (every stage of a synthesis has run)",
    "phase": "a phase of a start, such as `import` or `weights`",
    "status": "the HTTP status of an answer",
    "worker": "the number of a worker, from 0",
}
#: Environment variables that are no options.
VARIABLES = {
    "CHATTERBOX_PREWARM_BASE_DIGEST": "`bake`: the digest of the base image, for the provenance of the state",
    "CHATTERBOX_PREWARM_BUILDER": "`bake`: the builder, for the provenance of the state",
    "CHATTERBOX_PREWARM_CPU_REQUEST": "`serve`: the CPU request of the pod, which limits the number of threads. "
    "The manifests set it",
    "CHATTERBOX_PREWARM_DEBUG": "errors end with a traceback. `--debug` sets it",
    "CHATTERBOX_PREWARM_PASSPHRASE": "`sign`: the passphrase of an encrypted key",
    "CHATTERBOX_PREWARM_SOURCE_REVISION": "`bake`: the commit of this project, for the provenance of the state",
    "CHATTERBOX_PREWARM_TOKEN": "`serve`: the token of the clients. `--token-file` is safer",
    "CHATTERBOX_PREWARM_WARMUP": "`off` turns the warm-up of the Python API off",
}
#: Labels of an image, and what they contain.
IMAGE_LABELS = {
    "org.opencontainers.image.title": "`chatterbox-prewarm`",
    "org.opencontainers.image.description": "one sentence about the image",
    "org.opencontainers.image.version": "the version of this package that added the states",
    "org.opencontainers.image.licenses": "the licence of this package",
    "org.opencontainers.image.created": "the time of the newest bake. The same states give the same labels",
    "org.opencontainers.image.base.name": "the reference of the image that the states were added to",
    "org.opencontainers.image.base.digest": "the digest of the manifest of that image",
    "io.chatterbox-prewarm.schema": "the schema of the manifests of the states",
    "io.chatterbox-prewarm.variant": "the [model variant](variants.md)",
    "io.chatterbox-prewarm.profile": "the [profile](profiles.md)",
    "io.chatterbox-prewarm.gpu": "the GPU that the state is for, as NVML names it",
    "io.chatterbox-prewarm.compute-capability": "the compute capability of that GPU",
    "io.chatterbox-prewarm.driver": "the version of the driver of the bake",
    "io.chatterbox-prewarm.torch": "the version of torch",
    "io.chatterbox-prewarm.set-digest": "the SHA-256 digest of all files of the state",
    "io.chatterbox-prewarm.states": "JSON for this project: each state, what its families require, and what the bake "
    "measured",
    "io.chatterbox-prewarm.packages": "`lean` or `full`: the [packages](images.md#packages-of-an-image) of the image. "
    "The Dockerfile sets it",
    "io.chatterbox-prewarm.evidence": "the digest of the evidence with which the image passed its proof",
}

#: The first paragraph of each page.
INTRODUCTIONS = {
    "metrics": """\
`GET /metrics` answers in Prometheus' text format. `docs/reference.py` writes this page.
[kubernetes.md](kubernetes.md#metrics-scaling-alerts) shows how to scrape, scale and alert, and
`k8s/components/dashboard` has a Grafana dashboard.""",
    "configuration": """\
`docs/reference.py` writes this page from the help of the commands. An option with a variable can be set in the
environment, too; the command line has priority. Values of an option that can be repeated are separated by spaces in a
variable. A switch is `1` or `0`.""",
    "labels": """\
`docs/reference.py` writes this page. `build`, `append` and `publish` set all labels; a plain `docker build` sets only
some, and the other commands then read the state in the image. `docker inspect --format '{{json .Config.Labels}}' IMAGE`
shows them. With several states, a label has each value once, separated by a comma; for a CPU, the labels of the GPU are
`none`.""",
    "claims": """\
The claims about a warm start, each with its measured value and a verdict. `docs/reference.py` writes this page from
recorded runs of models with random weights of the full size, which take as long as models with real weights.
`chatterbox-prewarm bench report` [measures this](benchmarks.md#report) on your machine with your checkpoint. Its page
has the same tables, and charts. Values in brackets are the range over the rounds.""",
}
#: The recorded report of the claims, and the recorded calls of the Multilingual T3.
CLAIMS, MULTILINGUAL_CALLS = "report-cpu.json", "calls-cpu-multilingual.json"


def metrics() -> str:
    """Return the page of the metrics of `/metrics`."""
    rows = [
        f"| `{family.name}{'_total' if family.type == 'counter' else ''}` | {family.type} "
        f"| {', '.join(f'`{label}`' for label in labels)} | {family.documentation} |"
        for family, labels in _families()
    ]
    return "\n".join(
        [
            "# Metrics",
            "",
            INTRODUCTIONS["metrics"],
            "",
            "| metric | type | labels | meaning |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            (
                "A histogram has the samples `…_bucket`, `…_sum` and `…_count`. Counters and histograms also have "
                "`…_created`, the time of their first sample."
            ),
            "",
            "| label | values |",
            "| --- | --- |",
            *(f"| `{label}` | {text} |" for label, text in METRIC_LABELS.items()),
            "",
        ]
    )


def _families() -> Iterator[tuple[Any, list[str]]]:
    """Yield each family of metrics with its labels, for a server whose worker has started."""
    from prometheus_client.parser import text_string_to_metric_families

    from chatterbox_prewarm.serve.http.http_metrics import HttpMetrics
    from chatterbox_prewarm.serve.workers.messages import Usage
    from chatterbox_prewarm.serve.workers.pools import Pools

    counts = {"aot": 1}
    log = {
        "state": "key",
        **dict.fromkeys(("loaded", "hits", "misses"), counts),
        "phases": [{"name": "import", "seconds": 1.0}],
        "marks": {"attached": 1.0},
    }
    worker: Any = SimpleNamespace(
        config=SimpleNamespace(device="cuda"), usage=Usage(), ready=True, busy=True, restarts=0, log=log
    )
    pool: Any = SimpleNamespace(
        model="english",
        attached=True,
        ready=True,
        waiting=0,
        leading=worker,
        workers=[worker],
        backlog=SimpleNamespace(size=0),
    )
    admission: Any = SimpleNamespace(in_flight=0, limit=1)
    collected = HttpMetrics(Pools([pool]), admission)
    collected.responses.labels("english", "200")
    families = text_string_to_metric_families(collected.render().decode())
    for family in sorted((one for one in families if not one.name.endswith("_created")), key=lambda one: one.name):
        yield family, sorted({label for sample in family.samples for label in sample.labels} - {"le"})


def configuration() -> str:
    """Return the page of the options of all commands and of the environment variables."""
    import click

    from chatterbox_prewarm.cli import cli

    parts = [
        "# Configuration",
        INTRODUCTIONS["configuration"],
        "## Environment variables that are no options",
        _table(("variable", "use"), [(f"`{name}`", text) for name, text in VARIABLES.items()]),
    ]
    for path, command in _commands(cli, ()):
        rows = [_option(option) for option in command.params if isinstance(option, click.Option) and not option.hidden]
        rows = [row for row in rows if row[0] != "`--help`"]
        parts += [f"## {' '.join(path)}", _plain(command.help or "")]
        if rows:
            parts.append(_table(("option", "variable", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each command that is no group, with its path."""
    import click

    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        if (child := command.get_command(context, name)) is not None:
            yield from _commands(child, (*path, name))


def _option(option: Any) -> tuple[str, str, str, str]:
    import click

    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts) if name.startswith("--"))
    shown = "" if option.is_flag else _default(option.default)
    values = ""
    if isinstance(option.type, click.Choice):
        values = f" ({', '.join(f'`{choice}`' for choice in option.type.choices if choice)})"
    return names, f"`{option.envvar}`" if option.envvar else "", shown, _plain(option.help or "") + values


def _default(value: Any) -> str:
    """Return a default as text; empty without a default, for which click has None or a sentinel."""
    return f"`{value}`" if isinstance(value, (str, int, float, Path)) and value != "" else ""


def _plain(text: str) -> str:
    """Return a help text on one line, with the characters escaped that a table or Markdown would interpret."""
    for mark in ("\b", "\f"):
        text = text.replace(mark, "")
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def labels() -> str:
    """Return the page of the labels of images."""
    rows = [(f"`{name}`", text) for name, text in IMAGE_LABELS.items()]
    return (
        "\n\n".join(
            [
                "# Labels of images",
                INTRODUCTIONS["labels"],
                _table(("label", "content"), rows),
            ]
        )
        + "\n"
    )


def claims() -> str:
    """Return the page of the claims, with their measured values and verdicts."""
    from chatterbox_prewarm.bench.report.claims import NOT_MEASURED, budgets, claims

    results = ROOT / "benchmarks" / "results"
    report = json.loads((results / CLAIMS).read_text(encoding="utf-8"))
    calls = json.loads((results / MULTILINGUAL_CALLS).read_text(encoding="utf-8"))
    multilingual = [one for one in claims({"calls": calls}) if one.verdict != NOT_MEASURED]
    sections = [
        "# Claims",
        INTRODUCTIONS["claims"],
        f"English, {_conditions(report['plan'])}, rounds: {report['plan']['rounds']}:",
        _claims_table(claims(report["steps"])),
        "The budgets of a warm start, in the same run, with two warm starts in each round:",
        _claims_table(budgets(report["steps"])),
        f"Multilingual, whose T3 has the alignment analyzer, {_conditions(calls)}, calls of each: {calls['calls']}:",
        _claims_table(multilingual),
    ]
    return "\n\n".join(sections) + "\n"


def _conditions(run: dict[str, Any]) -> str:
    return f"on {run['machine']['cores']} cores of {run['machine']['cpu']} with torch {run['versions']['torch']}"


def _claims_table(rows: Iterable[Any]) -> str:
    cells = [(one.claim, one.claimed, one.measured or "-", one.verdict, one.note) for one in rows]
    return _table(("claim", "claimed", "measured", "verdict", "how"), cells)


PAGES = {"metrics": metrics, "configuration": configuration, "labels": labels, "claims": claims}

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.stdout.write(PAGES[sys.argv[1]]())
