"""Read and check the header of a safetensors file without loading a tensor."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.system.regular_files import open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FETCH_AGAIN = "fetch them again with `chatterbox-prewarm weights fetch`"


#: The first bytes of pickles of protocol 2 to 5, and of torch's zip archives. A safetensors file may start with them
#: too, as the length of its header.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


#: Bytes per element of each dtype.
_WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        tensors: dtype and shape of each tensor.
        offsets: position of each tensor in the file, in bytes.
        metadata: of the file.
        size: bytes that the file must have.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]
    size: int

    def size_of(self, name: str) -> int:
        """Return the bytes of a tensor."""
        dtype, shape = self.tensors[name]
        return _WIDTHS[dtype] * math.prod(shape)


def read_safetensors_header(path: Path) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Read the header of a safetensors file: the dtype and shape of each tensor.

    Raises:
        WeightsError: the file is a pickle, is truncated, or is not a safetensors file.
    """
    with open_regular(path, follow_links=True) as stream:
        return read_open_header(stream, path).tensors


def read_open_header(stream: BinaryIO, path: Path) -> Header:
    """Read the header of a safetensors file that has just been opened.

    Args:
        stream: the file.
        path: for the messages of errors.

    Raises:
        WeightsError: the file is a pickle, is truncated, or is not a safetensors file.
    """
    size = os.fstat(stream.fileno()).st_size
    try:
        header = parse_safetensors_header(stream, size)
    except ValueError as error:
        stream.seek(0)
        if stream.read(8).startswith(_PICKLES):
            raise WeightsError(
                f"{path} is a pickle instead of safetensors; loading a pickle runs the code in it",
                next_step="convert it with safetensors, or fetch the published safetensors file",
            ) from error
        raise WeightsError(f"{path} is not a safetensors file: {error!r}", next_step=FETCH_AGAIN) from error
    if header.size != size:
        raise WeightsError(
            f"{path} is truncated: its header requires {header.size} bytes, but it has {size}", next_step=FETCH_AGAIN
        )
    return header


def read_metadata(path: Path) -> Mapping[str, str]:
    """Read the metadata in the header of a safetensors file; {} if the header cannot be read.

    Raises:
        OSError: the file cannot be opened.
    """
    with open_regular(path, follow_links=True) as stream:
        try:
            return parse_safetensors_header(stream, os.fstat(stream.fileno()).st_size).metadata
        except ValueError:
            return {}


def parse_safetensors_header(stream: BinaryIO, size: int) -> Header:
    """Read a safetensors header from the beginning of a stream.

    The format is an 8-byte little-endian header length, that many bytes of JSON, then the data.

    Args:
        stream: positioned at the beginning; read up to the end of the header.
        size: total bytes of the stream.

    Raises:
        ValueError: it is not a safetensors header.
    """
    start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(stream.read(length))
        metadata = {str(name): str(value) for name, value in header.pop("__metadata__", {}).items()}
        end = 0
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
            first, last = entry["data_offsets"]
            if first != end or last - first != _WIDTHS[entry["dtype"]] * math.prod(entry["shape"]):
                raise ValueError(f"{entry} does not start at byte {end}, or its length does not match its shape")
            end = last
        return Header(
            tensors={name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()},
            offsets={name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()},
            metadata=metadata,
            size=8 + length + end,
        )
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(repr(error)) from error
