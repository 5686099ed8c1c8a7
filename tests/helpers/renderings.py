"""Labels of states, and the deployments that are rendered from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.image.labels import FamilyLabel, StateLabel
from chatterbox_prewarm.kube.budgets import Measured
from chatterbox_prewarm.kube.nodes import Cluster
from chatterbox_prewarm.kube.render import Request, render

if TYPE_CHECKING:
    from chatterbox_prewarm.kube.documents import Rendering

IMAGE = "registry.example.com/speech@sha256:" + "a" * 64
MIB = 1 << 20


def state(
    gpu: str, capability: str, *, device: str = "cuda", driver: str = "", arch: str = "x86_64", size: int = 60 * MIB
) -> StateLabel:
    """Return the label of a state for a GPU. With a `driver`, its family depends on the driver."""
    requires = {"arch": arch, **({"gpu": gpu, "compute_capability": capability} if device == "cuda" else {})}
    if driver:
        requires["driver"] = driver
    return StateLabel(
        key=f"{device}-{gpu}-{arch}".lower().replace(" ", "-"),
        set_digest="0" * 64,
        variant="english",
        profile="aot",
        device=device,
        created="2025-01-02T03:04:05+00:00",
        gpu=gpu,
        compute_capability=capability,
        driver=driver or "550.54.15",
        torch="2.6.0",
        families=(FamilyLabel(name="aot", size=size, requires=requires),),
    )


H100 = state("NVIDIA H100 80GB HBM3", "9.0")
H200 = state("NVIDIA H200", "9.0")
L4 = state("NVIDIA L4", "8.9")
CPU = state("none", "none", device="cpu")
SLICE = state("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "9.0")


def render_for(states: list[StateLabel], **fields: Any) -> Rendering:
    """Render a deployment for an image with these states."""
    return render(Request(image=IMAGE, states=tuple(states), **fields))


RENDERINGS = {
    "cpu": render_for([CPU]),
    "one": render_for([L4]),
    "several": render_for([H100, L4, CPU], replicas=2, policy="require", queue_limit=4),
    "slice": render_for([SLICE], cluster=Cluster(mig_strategy="mixed", runtime_class="nvidia")),
    "unlabelled": render_for([L4], cluster=Cluster(feature_discovery=False, labels={"gpu": "l4"})),
    "pulled before": render_for([H100, L4], pre_pull=True, name="a" * 32, pull_secret="login"),
    "measured": render_for(
        [H100], measured=Measured(cold_seconds=200.5, request_seconds=7.5, rss_mib=5000, gpu_memory_mib=7000)
    ),
}
