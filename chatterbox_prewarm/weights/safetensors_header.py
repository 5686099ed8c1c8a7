"""The header of a safetensors file, read and checked without loading a tensor."""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, BinaryIO

from chatterbox_prewarm.errors import WeightsError

if TYPE_CHECKING:
    from pathlib import Path

FETCH_AGAIN = "fetch them again with `chatterbox-prewarm weights fetch`"


#: How a pickle of protocol 2 to 5 begins, and a zip archive of torch's. So may the length of a safetensors header.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


#: Bytes of a number of each dtype that safetensors has.
_WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


def read_safetensors_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the header of a safetensors file: the dtype and shape of each tensor.

    Raises:
        WeightsError: the file is a pickle, truncated, or no safetensors file at all.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        try:
            shapes, _, promised = parse_safetensors_header(stream, size)
        except ValueError as error:
            stream.seek(0)
            if stream.read(8).startswith(_PICKLES):
                raise WeightsError(
                    f"{path} is a pickle where safetensors belong; loading one runs whatever code is in it",
                    next_step="convert it with safetensors, or fetch the published safetensors file",
                ) from error
            raise WeightsError(f"{path} is not a safetensors file: {error!r}", next_step=FETCH_AGAIN) from error
    if promised != size:
        raise WeightsError(
            f"{path} is truncated: its header promises {promised} bytes, {size} are there", next_step=FETCH_AGAIN
        )
    return shapes


def parse_safetensors_header(
    stream: BinaryIO, size: int
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str], int]:
    """Read the header of safetensors from a stream at its beginning.

    The format is an 8-byte little-endian header length, that many bytes of JSON, then the data.

    Args:
        stream: read up to the end of the header.
        size: of all that the stream holds, in bytes.

    Returns:
        the dtype and shape of each tensor, the metadata, and the size in bytes that the header promises.

    Raises:
        ValueError: it is none.
    """
    start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(stream.read(length))
        metadata = {str(name): str(value) for name, value in header.pop("__metadata__", {}).items()}
        end = 0
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):  # one after the other
            first, last = entry["data_offsets"]
            if first != end or last - first != _WIDTHS[entry["dtype"]] * math.prod(entry["shape"]):
                raise ValueError(f"{entry} does not follow the {end} bytes before it, or is not as long as it says")
            end = last
        shapes = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(repr(error)) from error
    return shapes, metadata, 8 + length + end
