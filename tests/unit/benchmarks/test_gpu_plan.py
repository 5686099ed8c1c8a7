"""Test the plan of the measurement on a GPU."""

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.plan import Plan


def test_the_parts_and_the_executions_on_a_gpu() -> None:
    assert list(PARTS) == ["env", "bake", "prove", "start", "decode", "profiles", "memory", "serve"]
    plan = Plan(out="/out", device="cuda", size="full", rounds=3)
    assert [(name, how.profile, how.graphs, how.t3_dtype) for name, how in plan.executions().items()] == [
        ("eager", "eager", False, "float32"),
        ("eager, graphs", "eager", True, "float32"),
        ("compiled, graphs", "compiled", True, "float32"),
        ("aot, graphs", "aot", True, "float32"),
        ("aot, graphs, bf16", "aot", True, "bfloat16"),
    ]
    assert len({plan.state(name) for name in plan.executions()}) == 5
