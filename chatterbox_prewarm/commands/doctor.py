"""doctor: the command that checks this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chatterbox_prewarm.commands.options import (
    DEVICE,
    cache_option,
    json_option,
    option,
    show,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.commands.progress import say
from chatterbox_prewarm.image.doctor import USES, Request, examine, require
from chatterbox_prewarm.image.engines.engine import ENGINES

if TYPE_CHECKING:
    from pathlib import Path


@click.command(short_help="Check what this machine can do.")
@click.option("--for", "uses", multiple=True, type=click.Choice(USES), help="Fail unless this works here; repeatable.")
@option(
    "--device", default="", type=DEVICE, help="Torch device, such as cpu or cuda. Default: the GPU, if there is one."
)
@weights_option
@warm_option
@cache_option
@option("--engine", default="docker", type=click.Choice(ENGINES), help="Engine of `build`.")
@json_option
def doctor(*, uses: tuple[str, ...], device: str, weights: Path, warm: Path, cache: Path, engine: str) -> None:
    """Check this machine, and say what works here: `bake`, `serve` and `build`; and what to do about the rest.

    The exit code is 0, unless --for names something that cannot work. The command changes nothing.
    """
    say("checking this machine")
    findings = examine(Request(device=device, weights=weights, warm=warm, cache=cache, engine=engine))
    works = {use: not any(use in finding.blocks for finding in findings) for use in USES}
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        mark = "FAIL" if finding.blocks else "note" if finding.next_step else "ok"
        lines.append(f"{mark:<4} {finding.subject:<{width}}  {finding.seen}")
        if finding.next_step:
            lines.append(f"     {'':<{width}}  next: {finding.next_step}")
    lines += [f"{use:<5} {'works here' if works[use] else 'cannot work here'}" for use in USES]
    document = {
        "works": works,
        "findings": [
            {
                "subject": finding.subject,
                "seen": finding.seen,
                "blocks": list(finding.blocks),
                "next_step": finding.next_step,
            }
            for finding in findings
        ],
    }
    show("\n".join(lines), document)
    require(findings, uses)
