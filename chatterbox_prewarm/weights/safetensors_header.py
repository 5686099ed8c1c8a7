"""Read and check the header of a safetensors file without loading a tensor."""

from __future__ import annotations

import json
import math
import os
import struct
from typing import TYPE_CHECKING, BinaryIO

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.system.regular_files import open_regular

if TYPE_CHECKING:
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


def read_safetensors_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the header of a safetensors file: the dtype and shape of each tensor.

    Raises:
        WeightsError: the file is a pickle, is truncated, or is not a safetensors file.
    """
    with open_regular(path, follow_links=True) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            shapes, _, required = parse_safetensors_header(stream, size)
        except ValueError as error:
            stream.seek(0)
            if stream.read(8).startswith(_PICKLES):
                raise WeightsError(
                    f"{path} is a pickle instead of safetensors; loading a pickle runs the code in it",
                    next_step="convert it with safetensors, or fetch the published safetensors file",
                ) from error
            raise WeightsError(f"{path} is not a safetensors file: {error!r}", next_step=FETCH_AGAIN) from error
    if required != size:
        raise WeightsError(
            f"{path} is truncated: its header requires {required} bytes, but it has {size}", next_step=FETCH_AGAIN
        )
    return shapes


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata in the header of a safetensors file; {} if the header cannot be read.

    Raises:
        OSError: the file cannot be opened.
    """
    with open_regular(path, follow_links=True) as stream:
        try:
            return parse_safetensors_header(stream, os.fstat(stream.fileno()).st_size)[1]
        except ValueError:
            return {}


def parse_safetensors_header(
    stream: BinaryIO, size: int
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str], int]:
    """Read a safetensors header from the beginning of a stream.

    The format is an 8-byte little-endian header length, that many bytes of JSON, then the data.

    Args:
        stream: positioned at the beginning; read up to the end of the header.
        size: total bytes of the stream.

    Returns:
        the dtype and shape of each tensor, the metadata, and the size in bytes that the file must have.

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
        shapes = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(repr(error)) from error
    return shapes, metadata, 8 + length + end
