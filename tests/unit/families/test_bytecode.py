"""The pack of bytecode: what goes in comes out, Python takes it from there, and what does not fit is a miss."""

from __future__ import annotations

import importlib
import importlib.util
import marshal
import sysconfig
from pathlib import Path
from types import CodeType

import pytest

from chatterbox_prewarm.families.bytecode import BytecodeFamily, Pack, bytecode, is_packed, write_pack
from tests.helpers.children import call

#: Small modules of the standard library that nothing else here imports.
MODULES = ["colorsys", "sched", "stringprep"]


@pytest.fixture
def modules() -> dict[str, bytes]:
    return {source(name): bytecode(source(name)) for name in MODULES}


def source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


def test_a_pack_gives_back_what_was_put_in(tmp_path: Path) -> None:
    modules = {"/lib/b.py": b"second", "/lib/a.py": b"first", "/lib/empty.py": b"", "/lib/ü.py": bytes(range(256))}
    write_pack(tmp_path / "pack", modules)
    pack = Pack(tmp_path / "pack")
    assert len(pack) == 4
    assert {path: pack.get(path) for path in modules} == modules
    assert pack.get("/lib/c.py") is None


def test_equal_modules_give_equal_bytes_in_whatever_order(tmp_path: Path) -> None:
    write_pack(tmp_path / "one", {"/a.py": b"1", "/b.py": b"2"})
    write_pack(tmp_path / "two", {"/b.py": b"2", "/a.py": b"1"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_empty_pack_can_be_opened(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", {})
    assert len(Pack(tmp_path / "pack")) == 0


def test_bytecode_is_what_python_writes_itself() -> None:
    content = bytecode(source("colorsys"))
    status = Path(source("colorsys")).stat()
    assert content[:4] == importlib.util.MAGIC_NUMBER
    assert int.from_bytes(content[8:12], "little") == int(status.st_mtime)
    assert int.from_bytes(content[12:16], "little") == status.st_size
    code = marshal.loads(content[16:])
    assert isinstance(code, CodeType)
    assert code.co_filename == source("colorsys")


def test_a_start_needs_what_it_has_imported_but_not_our_own_modules() -> None:
    importlib.import_module("colorsys")
    importlib.import_module("chatterbox_prewarm.model.text")
    sources = BytecodeFamily().start_sources()
    assert source("colorsys") in sources
    assert not [path for path in sources if path.endswith("chatterbox_prewarm/model/text.py")]
    assert __file__ not in sources


def test_installed_and_standard_modules_belong_into_a_pack_and_others_do_not() -> None:
    paths = sysconfig.get_paths()
    assert is_packed("colorsys", f"{paths['stdlib']}/colorsys.py")
    assert is_packed("librosa.filters", f"{paths['purelib']}/librosa/filters.py")
    assert not is_packed("chatterbox_prewarm.model.text", f"{paths['purelib']}/chatterbox_prewarm/model/text.py")
    assert not is_packed("__main__", f"{paths['purelib']}/tool.py")
    assert not is_packed("generated", "/tmp/generated.py")


def test_imports_are_served_from_the_pack_and_counted(tmp_path: Path, modules: dict[str, bytes]) -> None:
    write_pack(tmp_path / "pack", modules)
    seen = call("import_from_pack", pack=str(tmp_path / "pack"), imports=MODULES)
    assert seen["metrics"]["hits"] == {"bytecode": len(MODULES)}
    assert seen["metrics"]["misses"] == {}
    assert set(seen["imported"]) == set(modules)
    assert "rgb_to_hsv" in seen["public"]["colorsys"]


def test_it_is_the_packs_code_that_runs(tmp_path: Path, modules: dict[str, bytes]) -> None:
    content = modules[source("colorsys")]
    other = marshal.dumps(compile("from_the_pack = True", source("colorsys"), "exec"))
    write_pack(tmp_path / "pack", {**modules, source("colorsys"): content[:16] + other})
    seen = call("import_from_pack", pack=str(tmp_path / "pack"), imports=["colorsys"])
    assert seen["public"]["colorsys"] == ["from_the_pack"]


@pytest.mark.parametrize("position", [0, 8, 12], ids=["another Python", "another time", "another size"])
def test_an_entry_that_does_not_fit_its_source_is_a_miss_and_not_a_hit(
    tmp_path: Path, modules: dict[str, bytes], position: int
) -> None:
    stale = bytearray(modules[source("colorsys")])
    stale[position] ^= 1
    write_pack(tmp_path / "pack", {**modules, source("colorsys"): bytes(stale)})
    seen = call("import_from_pack", pack=str(tmp_path / "pack"), imports=["colorsys", "sched"])
    assert seen["metrics"]["hits"] == {"bytecode": 1}
    assert seen["metrics"]["misses"] == {"bytecode": 1}
    assert seen["metrics"]["reasons"] == [f"bytecode: {source('colorsys')} has changed"]
    assert "rgb_to_hsv" in seen["public"]["colorsys"]


def test_a_module_that_the_pack_lacks_is_a_miss_whether_or_not_python_has_it_cached(
    tmp_path: Path, modules: dict[str, bytes]
) -> None:
    del modules[source("stringprep")]
    write_pack(tmp_path / "pack", modules)
    prefix = {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    for _ in range(2):  # the second process finds what the first has written
        seen = call("import_from_pack", env=prefix, pack=str(tmp_path / "pack"), imports=MODULES)
        assert seen["metrics"]["hits"] == {"bytecode": 2}
        assert seen["metrics"]["misses"]["bytecode"] == 1
        missed = [reason for reason in seen["metrics"]["reasons"] if source("stringprep") in reason]
        assert len(missed) == 1
        assert "is not in the pack" in missed[0]
        assert "in_table_a1" in seen["public"]["stringprep"]


def test_without_a_pack_imports_are_noted_and_nothing_is_counted() -> None:
    seen = call("import_from_pack", pack="", imports=MODULES)
    assert set(seen["imported"]) == {source(name) for name in MODULES}
    assert (seen["metrics"]["hits"], seen["metrics"]["misses"]) == ({}, {})
