"""Map the tensor files of a checkpoint into memory, without torch: a start reads them while it imports torch."""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from chatterbox_prewarm.system.regular_files import open_regular
from chatterbox_prewarm.weights.safetensors_header import read_open_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatterbox_prewarm.weights.safetensors_header import Header
    from chatterbox_prewarm.weights.variants import Variant

#: The parts of the model, and the tensors of each that a synthesis uses, by the beginnings of their names. S3Gen's
#: other tensors and the voice encoder make voices from clips.
SYNTHESIS: Mapping[str, tuple[str, ...]] = MappingProxyType({"t3": ("",), "s3gen": ("flow.", "mel2wav.")})
#: The speech tokenizer, which a voice conversion needs, and a synthesis does not.
SPEECH_TOKENIZER: Mapping[str, tuple[str, ...]] = MappingProxyType({"s3gen": ("tokenizer.",)})
#: The tensors of a voice conversion, which needs no T3.
CONVERSION: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"s3gen": (*SYNTHESIS["s3gen"], *SPEECH_TOKENIZER["s3gen"])}
)
#: Tensors that only a training uses. Those of Turbo have 412 MB.
_UNUSED = ("text_head.", "tfmr.wte.")
#: `madvise(2)`, since Linux 5.14: map all pages now instead of one page fault each, and read missing pages from disk.
MADV_POPULATE_READ = 22
#: The kernel reads at most the largest request of the device for one call of `posix_fadvise`.
_ADVISED_BYTES = 1 << 20
_madvise = ctypes.CDLL(None).madvise  # found here, because a later search waits for libraries that a thread loads
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, kw_only=True)
class MappedFile:
    """A file of tensors in memory. Writing to it does not change the file.

    Attributes:
        part: the part of the model, "t3" or "s3gen".
        path: of the file.
        memory: the complete file.
        header: of the file.
        used: names of the tensors that are used.
    """

    part: str
    path: Path
    memory: mmap.mmap
    header: Header
    used: tuple[str, ...]

    @property
    def stem(self) -> str:
        """Name of the file without its suffix."""
        return self.path.stem

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where runs of used tensors begin in the file, rounded down to a page, and where they end."""
        offsets = self.header.offsets
        spans: list[tuple[int, int]] = []
        for name in sorted(self.used, key=offsets.__getitem__):
            begin, end = offsets[name], offsets[name] + self.header.size_of(name)
            if spans and begin - spans[-1][1] < _ADVISED_BYTES:
                spans[-1] = spans[-1][0], end
            else:
                spans.append((begin // mmap.PAGESIZE * mmap.PAGESIZE, end))
        return spans


class MappedWeights:
    """Files of a checkpoint, mapped into memory.

    Args:
        directory: of the checkpoint.
        variant: has the names of the files.
        parts: the parts of the model, and the beginnings of the names of the tensors that are used; by default those of
            a synthesis.

    Raises:
        WeightsError: a file is not a safetensors file, or is truncated.
        OSError: a file cannot be opened.
    """

    def __init__(self, directory: Path, variant: Variant, parts: Mapping[str, tuple[str, ...]] = SYNTHESIS) -> None:
        self.directory = directory
        self.files = [_map(directory / variant.tensor_files[part], part, prefixes) for part, prefixes in parts.items()]

    def read_ahead(self) -> None:
        """Let the kernel read the used tensors into the page cache. It continues after this call.

        Reading the files instead would take 0.2 s of a CPU where the page cache already has them.

        Raises:
            OSError: a file cannot be opened.
        """
        for file in self.files:
            with open_regular(file.path, follow_links=True) as stream:
                for span in file.spans:
                    for position in range(*span, _ADVISED_BYTES):
                        os.posix_fadvise(stream.fileno(), position, _ADVISED_BYTES, os.POSIX_FADV_WILLNEED)

    def populate(self) -> None:
        """Map all pages of the used tensors, so that no use causes a page fault.

        The page faults of 3 GB took 0.4 s of the first synthesis; this call takes 0.06 s. It holds the lock of the
        process's memory map, so it would block the imports of another thread. An older kernel refuses it, which does no
        harm.
        """
        for file in self.files:
            address = ctypes.addressof(ctypes.c_char.from_buffer(file.memory))
            for begin, end in file.spans:
                _madvise(address + begin, end - begin, MADV_POPULATE_READ)


def _map(path: Path, part: str, prefixes: tuple[str, ...]) -> MappedFile:
    with open_regular(path, follow_links=True) as stream:
        header = read_open_header(stream, path)
        memory = mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    used = tuple(
        name
        for name, (_, shape) in header.tensors.items()
        if name.startswith(prefixes) and not name.startswith(_UNUSED) and 0 not in shape
    )
    return MappedFile(part=part, path=path, memory=memory, header=header, used=used)
