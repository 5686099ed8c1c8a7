"""Test the report of `benchmarks containers`."""

from __future__ import annotations

from benchmarks.containers import table


def test_the_table_compares_the_bytes_of_each_layer() -> None:
    def pull(seconds: float, *sizes: int) -> dict[str, object]:
        steps = ("RUN packages", "COPY weights")
        layers = [{"bytes": size, "step": step} for size, step in zip(sizes, steps, strict=True)]
        return {"seconds": seconds, "bytes": sum(sizes), "layers": layers}

    start = {"ready": 2.0, "first_audio": 3.5, "pss_bytes": 4e8}
    report = {
        "pulls": {"gzip": pull(9.0, 3_000_000, 1_000_000), "zstd": pull(4.0, 2_500_000, 1_000_000)},
        "starts": {"hot page cache": [start]},
    }
    lines = [" ".join(line.split()) for line in table(report).splitlines()]
    assert lines == [
        "gzip 4 MB in 2 layers, pulled in 9.0 s",
        "zstd 4 MB in 2 layers, pulled in 4.0 s",
        "3.0 2.5 MB RUN packages",
        "1.0 1.0 MB COPY weights",
        "hot page cache ready 2.0 s, first audio 3.5 s, memory 400 MB each",
    ]
