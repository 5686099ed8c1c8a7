"""Test the bytecode pack: round trip, imports from it, and misses for stale entries."""

from __future__ import annotations

import importlib
import importlib.util
import marshal
import os
import sysconfig
from pathlib import Path
from types import CodeType

import pytest

from chatterbox_prewarm.families.bytecode import BytecodeFamily, bytecode, is_packed, read_pack, write_pack
from tests.helpers.children import call

#: Small modules of the standard library that no other code in these tests imports.
MODULES = ["colorsys", "sched", "stringprep"]


@pytest.fixture
def modules() -> dict[str, bytes]:
    return {source(name): bytecode(source(name)) for name in MODULES}


def source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


def test_pack_returns_the_written_modules(tmp_path: Path) -> None:
    modules = {"/lib/b.py": b"second", "/lib/a.py": b"first", "/lib/empty.py": b"", "/lib/ü.py": bytes(range(256))}
    write_pack(tmp_path / "pack", modules)
    pack = read_pack(tmp_path / "pack")
    assert len(pack) == 4
    assert {path: bytes(pack[path]) for path in modules} == modules
    assert "/lib/c.py" not in pack


def test_order_of_modules_does_not_change_the_bytes(tmp_path: Path) -> None:
    write_pack(tmp_path / "one", {"/a.py": b"1", "/b.py": b"2"})
    write_pack(tmp_path / "two", {"/b.py": b"2", "/a.py": b"1"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_empty_pack_can_be_read(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", {})
    assert len(read_pack(tmp_path / "pack")) == 0


def test_bytecode_has_the_header_that_python_writes() -> None:
    content = bytecode(source("colorsys"))
    status = Path(source("colorsys")).stat()
    assert content[:4] == importlib.util.MAGIC_NUMBER
    assert int.from_bytes(content[8:12], "little") == int(status.st_mtime)
    assert int.from_bytes(content[12:16], "little") == status.st_size
    code = marshal.loads(content[16:])
    assert isinstance(code, CodeType)
    assert code.co_filename == source("colorsys")


def test_bytecode_that_python_has_cached_is_used_if_its_source_is_the_same(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("x = 1\n")
    compiled = bytecode(str(module))
    cached = Path(importlib.util.cache_from_source(module))
    cached.parent.mkdir()
    cached.write_bytes(compiled + b"mark")
    assert bytecode(str(module)) == compiled + b"mark"
    os.utime(module, (1, 1))
    assert bytecode(str(module))[8:12] == b"\1\0\0\0", "the source has changed, so it is compiled"
    cached.write_bytes(b"")
    assert marshal.loads(bytecode(str(module))[16:]).co_filename == str(module)


def test_start_sources_are_the_imported_modules_without_our_own() -> None:
    importlib.import_module("colorsys")
    importlib.import_module("chatterbox_prewarm.model.text")
    sources = BytecodeFamily().start_sources()
    assert source("colorsys") in sources
    assert not [path for path in sources if path.endswith("chatterbox_prewarm/model/text.py")]
    assert __file__ not in sources


def test_only_installed_and_standard_modules_are_packed() -> None:
    paths = sysconfig.get_paths()
    assert is_packed("colorsys", f"{paths['stdlib']}/colorsys.py")
    assert is_packed("librosa.filters", f"{paths['purelib']}/librosa/filters.py")
    assert not is_packed("chatterbox_prewarm.model.text", f"{paths['purelib']}/chatterbox_prewarm/model/text.py")
    assert not is_packed("__main__", f"{paths['purelib']}/tool.py")
    assert not is_packed("generated", "/tmp/generated.py")


def test_imports_use_the_pack_and_are_counted(tmp_path: Path, modules: dict[str, bytes]) -> None:
    write_pack(tmp_path / "pack", modules)
    seen = call("import_from_pack", pack=str(tmp_path / "pack"), imports=MODULES)
    assert seen["metrics"]["hits"] == {"bytecode": len(MODULES)}
    assert seen["metrics"]["misses"] == {}
    assert set(seen["imported"]) == set(modules)
    assert "rgb_to_hsv" in seen["public"]["colorsys"]


def test_code_from_the_pack_runs(tmp_path: Path, modules: dict[str, bytes]) -> None:
    content = modules[source("colorsys")]
    other = marshal.dumps(compile("from_the_pack = True", source("colorsys"), "exec"))
    write_pack(tmp_path / "pack", {**modules, source("colorsys"): content[:16] + other})
    seen = call("import_from_pack", pack=str(tmp_path / "pack"), imports=["colorsys"])
    assert seen["public"]["colorsys"] == ["from_the_pack"]


@pytest.mark.parametrize("position", [0, 8, 12], ids=["another Python", "another time", "another size"])
def test_stale_entry_is_a_miss(tmp_path: Path, modules: dict[str, bytes], position: int) -> None:
    stale = bytearray(modules[source("colorsys")])
    stale[position] ^= 1
    write_pack(tmp_path / "pack", {**modules, source("colorsys"): bytes(stale)})
    seen = call("import_from_pack", pack=str(tmp_path / "pack"), imports=["colorsys", "sched"])
    assert seen["metrics"]["hits"] == {"bytecode": 1}
    assert seen["metrics"]["misses"] == {"bytecode": 1}
    (reason,) = seen["metrics"]["reasons"]
    assert reason == f"bytecode: {source('colorsys')} has changed"
    assert seen["metrics"]["next_steps"][reason].startswith("bake again with `chatterbox-prewarm bake`")
    assert "rgb_to_hsv" in seen["public"]["colorsys"]


def test_module_missing_in_the_pack_is_a_miss_even_if_python_has_cached_it(
    tmp_path: Path, modules: dict[str, bytes]
) -> None:
    del modules[source("stringprep")]
    write_pack(tmp_path / "pack", modules)
    prefix = {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    for _ in range(2):  # the second process finds the bytecode written by the first
        seen = call("import_from_pack", env=prefix, pack=str(tmp_path / "pack"), imports=MODULES)
        assert seen["metrics"]["hits"] == {"bytecode": 2}
        assert seen["metrics"]["misses"]["bytecode"] == 1
        missed = [reason for reason in seen["metrics"]["reasons"] if source("stringprep") in reason]
        assert len(missed) == 1
        assert "is not in the pack" in missed[0]
        assert "in_table_a1" in seen["public"]["stringprep"]


def test_imports_without_a_pack_are_recorded_but_not_counted() -> None:
    seen = call("import_from_pack", pack="", imports=MODULES)
    assert set(seen["imported"]) == {source(name) for name in MODULES}
    assert (seen["metrics"]["hits"], seen["metrics"]["misses"]) == ({}, {})
