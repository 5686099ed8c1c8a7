"""Family `bytecode`: the compiled form of every module that a start imports, in one file.

Thousands of modules are imported before the first sound; on a fresh node each would be parsed and compiled, and each
cached file opened. The pack is read and verified at one go. Python's own rules decide whether an entry is used: a
`.pyc` names the size and modification time of its source, and an entry that does not match is compiled anew.

Layout of the pack, as safetensors': 8 bytes little-endian length, that many bytes of JSON (source path → [offset,
size]), then the `.pyc` files one after the other. This project's own modules are left out: they may change without a
bake.
"""

from __future__ import annotations

import functools
import importlib.machinery
import json
import mmap
import py_compile
import struct
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.families.base import Family

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_prewarm.families.base import Session
    from chatterbox_prewarm.system.metrics import WarmupMetrics

PACK_NAME = "modules.pack"
_OWN = "chatterbox_prewarm"


class BytecodeFamily(Family):
    """See the module's docstring."""

    name = "bytecode"
    timers = ("import",)

    def __init__(self) -> None:
        #: Source files of all imports since `prepare`, also of those that failed or replaced themselves.
        self.imported: set[str] = set()

    def applies(self, profile: str, device: str) -> bool:  # noqa: ARG002
        """To all."""
        return True

    def environment(self, cache: Path) -> dict[str, str]:  # noqa: ARG002
        """Keep later child processes from writing bytecode anywhere."""
        return {"PYTHONDONTWRITEBYTECODE": "1"}

    def prepare(self, directory: Path | None, cache: Path, metrics: WarmupMetrics) -> None:  # noqa: ARG002
        """Let all imports from here on look into the pack first; without one, only note what is imported."""
        if directory is None:
            install(None, metrics, self.imported)
            return
        sys.dont_write_bytecode = True
        install(Pack(directory / PACK_NAME), metrics, self.imported)

    def watch(self, metrics: WarmupMetrics) -> None:
        """Nothing to do: the loader counts."""

    def attach(self, directory: Path | None, session: Session) -> None:
        """Nothing to do: imports are over."""

    def save(self, directory: Path, session: Session) -> tuple[str, ...]:
        """Pack the modules that a start imports, not those that only the warm-up needed."""
        write_pack(directory / PACK_NAME, {source: bytecode(source) for source in session.sources})
        return ("python", "site_packages", "torch", "transformers", "chatterbox")

    def start_sources(self) -> frozenset[str]:
        """Source files of everything that this process has imported by now, as far as it belongs into a pack.

        What was loaded before `prepare` is included: another process may import it later.
        """
        earlier = {
            loader.path: name
            for name, module in sys.modules.items()
            if isinstance(loader := getattr(module, "__loader__", None), importlib.machinery.SourceFileLoader)
        }
        found = {source for source, name in earlier.items() if is_packed(name, source)}
        return frozenset(found | self.imported)


class Pack:
    """A pack opened for reading, mapped rather than read."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack("<Q", self._data[:8])
        self._index: dict[str, list[int]] = json.loads(self._data[8 : 8 + length])
        self._base = 8 + length

    def __len__(self) -> int:
        return len(self._index)

    def get(self, source: str) -> bytes | None:
        """The `.pyc` of a source file, or None."""
        place = self._index.get(source)
        if place is None:
            return None
        start = self._base + place[0]
        return self._data[start : start + place[1]]


def write_pack(path: Path, modules: Mapping[str, bytes]) -> None:
    """Write a pack: source path → content of its `.pyc`, in the order of the paths."""
    index: dict[str, list[int]] = {}
    offset = 0
    for source in sorted(modules):
        index[source] = [offset, len(modules[source])]
        offset += len(modules[source])
    header = json.dumps(index, separators=(",", ":")).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)))
        stream.write(header)
        for source in sorted(modules):
            stream.write(modules[source])


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return (paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"])


def is_packed(name: str, source: str) -> bool:
    """Whether a module belongs into a pack: the standard library's and installed ones do.

    Not this project's own, and not what a package writes and imports anew in every process, as torch.distributed does.
    """
    return name.partition(".")[0] not in {_OWN, "__main__"} and source.startswith(_installed())


def bytecode(source: str) -> bytes:
    """The `.pyc` of a source file, made by Python itself; the name says where it was compiled from."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "module.pyc"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the source: invalid escapes and such
            py_compile.compile(
                source,
                cfile=str(made),
                dfile=source,
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP,
            )
        return made.read_bytes()


def install(pack: Pack | None, metrics: WarmupMetrics, imported: set[str]) -> None:
    """Put a path hook in front of Python's own whose loader takes bytecode from `pack` and counts.

    Args:
        pack: where to look first; without one, nothing is counted.
        metrics: gets a hit for each module taken from the pack, a miss for each one compiled or found elsewhere.
        imported: gets the source file of each module that belongs into a pack.
    """

    class PackLoader(importlib.machinery.SourceFileLoader):
        compiled = False
        packed = False

        def get_code(self, fullname: str) -> Any:
            """Count by how Python came by the code."""
            code = super().get_code(fullname)
            if is_packed(fullname, self.path):
                imported.add(self.path)
                if pack is None:
                    return code
                if self.compiled:
                    metrics.miss("bytecode", f"{self.path} " + ("has changed" if self.packed else "is not in the pack"))
                elif self.packed:
                    metrics.hit("bytecode")
                else:
                    metrics.miss("bytecode", f"{self.path} is not in the pack, but cached beside its source")
            return code

        def get_data(self, path: str) -> bytes:
            """Serve the cached bytecode of this loader's own source from the pack, all else from disk."""
            if pack is not None and path != self.path and path.endswith(".pyc"):
                data = pack.get(self.path)
                if data is not None:
                    self.packed = True
                    return data
            return super().get_data(path)

        def source_to_code(self, data: Any, path: Any, **settings: Any) -> Any:  # type: ignore[override]
            """Compile, which Python does only where no cached bytecode fits."""
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
