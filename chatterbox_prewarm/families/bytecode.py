"""Family `bytecode`: the compiled form of every module that a start imports, in one file.

A start imports a thousand modules before the first audio. On a fresh node Python would parse and compile each of them,
and would open one cache file per module. The pack is read and verified in one pass. Python's own rules decide whether
an entry is used: a `.pyc` records the size and the modification time of its source, and Python compiles the module
again if they do not match. A second pack has the modules that upstream's model and voices from clips import besides.
It is compressed, because it is three times as large, and most starts do not read it.

Layout of a pack, which follows safetensors: the length of the index (8 bytes, little-endian), the index as JSON (source
path → [offset, size]), then the `.pyc` files. The packs leave out this project's own modules, because they may change
without a new bake.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import logging
import mmap
import py_compile
import struct
import sys
import sysconfig
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.families.base import Family
from chatterbox_prewarm.system.regular_files import open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_prewarm.families.base import FamilyContext
    from chatterbox_prewarm.system.metrics import StartMetrics

PACK_NAME = "modules.pack"
UPSTREAM_PACK_NAME = "upstream.pack.z"
_OWN = "chatterbox_prewarm"
#: The next step after Python did not use the pack for a module.
_BAKE_AGAIN = (
    "bake again with `chatterbox-prewarm bake` after the last change of the packages; an image whose packages were "
    "installed by `build/sync` keeps their file times"
)
#: Header of a `.pyc` (PEP 552): magic number, flags (0: checked by time and size), time and size of the source.
_PYC_HEADER = struct.Struct("<4sIII")


class BytecodeFamily(Family):
    """See the module's docstring."""

    name = "bytecode"
    timers = ("import",)

    def __init__(self) -> None:
        #: Source files of all imports since `prepare`, including imports that failed and modules that replaced
        #: themselves in `sys.modules`.
        self.imported: set[str] = set()
        self._pack: dict[str, memoryview] = {}

    def environment(self, cache: Path) -> dict[str, str]:  # noqa: ARG002
        """Keep later child processes from writing bytecode."""
        return {"PYTHONDONTWRITEBYTECODE": "1"}

    def prepare(self, directory: Path | None, cache: Path, metrics: StartMetrics) -> None:  # noqa: ARG002
        """Make all later imports look into the pack first. Without a pack, only record which modules are imported."""
        if directory is not None:
            sys.dont_write_bytecode = True
            self._pack = read_pack(directory / PACK_NAME)
        install(self._pack if directory else None, metrics, self.imported)

    def add_upstream_modules(self, directory: Path | None) -> None:
        """Take the modules that upstream's model imports from the second pack, if the state has one."""
        if directory is not None and (directory / UPSTREAM_PACK_NAME).exists():
            self._pack |= read_pack(directory / UPSTREAM_PACK_NAME)

    def save(self, directory: Path, context: FamilyContext) -> tuple[str, ...]:
        """Pack the modules that a start imports, without the modules that only the warm-up needed."""
        write_pack(directory / PACK_NAME, {source: bytecode(source) for source in context.sources})
        further = context.upstream_sources - context.sources
        if further:
            write_pack(directory / UPSTREAM_PACK_NAME, {source: bytecode(source) for source in further})
        return ("python", "site_packages", "torch", "transformers", "chatterbox")

    def start_sources(self) -> frozenset[str]:
        """Return the source files of all imported modules that belong in a pack.

        The result includes modules loaded before `prepare`, because another process may import them later.
        """
        earlier = {
            loader.path: name
            for name, module in sys.modules.items()
            if isinstance(loader := getattr(module, "__loader__", None), importlib.machinery.SourceFileLoader)
        }
        packed = {source for source, name in earlier.items() if is_packed(name, source)}
        return frozenset(packed | self.imported)


def read_pack(path: Path) -> dict[str, memoryview]:
    """Read a pack and return source path → content of its `.pyc`. A pack that is not compressed is mapped."""
    with open_regular(path) as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        data = memoryview(zlib.decompress(mapped) if path.suffix == ".z" else mapped)
    (length,) = struct.unpack("<Q", data[:8])
    contents = data[8 + length :]
    index: dict[str, tuple[int, int]] = json.loads(bytes(data[8 : 8 + length]))
    return {source: contents[offset : offset + size] for source, (offset, size) in index.items()}


def write_pack(path: Path, modules: Mapping[str, bytes]) -> None:
    """Write a pack: source path → content of its `.pyc`, sorted by path. The suffix `.z` compresses it."""
    index: dict[str, list[int]] = {}
    offset = 0
    for source in sorted(modules):
        index[source] = [offset, len(modules[source])]
        offset += len(modules[source])
    header = json.dumps(index, separators=(",", ":")).encode()
    parts = [struct.pack("<Q", len(header)), header, *(modules[source] for source in sorted(modules))]
    if path.suffix == ".z":
        parts = [zlib.compress(b"".join(parts))]
    with path.open("wb") as stream:
        stream.writelines(parts)


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return (paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"])


def is_packed(name: str, source: str) -> bool:
    """Return whether a module belongs in a pack: modules of the standard library and of installed packages do.

    This project's own modules do not, and neither do modules that a package generates in every process, as
    torch.distributed does.
    """
    return name.partition(".")[0] not in {_OWN, "__main__"} and source.startswith(_installed())


def bytecode(source: str) -> bytes:
    """Return the `.pyc` of a source file, which records the path of its source.

    A bake has imported most modules, so Python has just compiled them. The others are compiled now.
    """
    path, stat = Path(importlib.util.cache_from_source(source)), Path(source).stat()
    header = _PYC_HEADER.pack(
        importlib.util.MAGIC_NUMBER, 0, int(stat.st_mtime) & 0xFFFFFFFF, stat.st_size & 0xFFFFFFFF
    )
    if path.is_file() and (cached := path.read_bytes()).startswith(header):
        return cached
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "module.pyc"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about the source, such as invalid escapes
            py_compile.compile(
                source,
                cfile=str(compiled),
                dfile=source,
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP,
            )
        return compiled.read_bytes()


def install(pack: Mapping[str, memoryview] | None, metrics: StartMetrics, imported: set[str]) -> None:
    """Put a path hook before Python's own. Its loader takes bytecode from `pack` and counts hits and misses.

    Args:
        pack: as `read_pack` returns it. Without a pack, nothing is counted.
        metrics: counts a hit for each module taken from the pack, and a miss for every other module, until the mark
            "ready": what is imported later is not part of the start.
        imported: collects the source file of each module that belongs in a pack.
    """

    class PackLoader(importlib.machinery.SourceFileLoader):
        compiled = False
        packed = False

        def get_code(self, fullname: str) -> Any:
            """Load the code and count where Python found it."""
            code = super().get_code(fullname)
            if is_packed(fullname, self.path):
                imported.add(self.path)
                if pack is not None and "ready" not in metrics.marks:
                    self._count()
            return code

        def _count(self) -> None:
            """Count where the code of a module came from."""
            if self.packed and not self.compiled:
                metrics.hit("bytecode")
                return
            reason = "has changed" if self.packed else "is not in the pack"
            if not self.compiled:
                reason += "; Python used its __pycache__"
            # Imports after the model is attached, such as those for a voice from a clip, delay one call only.
            attached = "attached" in metrics.marks
            metrics.miss(
                "bytecode",
                f"{self.path} {reason}",
                next_step="" if attached else _BAKE_AGAIN,
                level=logging.INFO if attached else logging.WARNING,
            )

        def get_data(self, path: str) -> bytes:
            """Read the `.pyc` of this loader's source from the pack, and every other file from disk."""
            if pack is not None and path != self.path and path.endswith(".pyc") and self.path in pack:
                self.packed = True
                return bytes(pack[self.path])
            return super().get_data(path)

        def source_to_code(self, data: Any, path: Any, **settings: Any) -> Any:  # type: ignore[override]
            """Compile the source. Python calls this only if it has no valid cached bytecode."""
            self.compiled = True
            return super().source_to_code(data, path, **settings)

    machinery = importlib.machinery
    hook = machinery.FileFinder.path_hook(
        (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
        (PackLoader, machinery.SOURCE_SUFFIXES),
        (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
    )
    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()
