"""Make libsndfile read an MP3 file to its end.

MP3 has no field for its length. libsndfile takes it from the tag "Xing" or "Info", which most encoders write into a
first frame without audio. Without the tag, it estimates the length from the size of the first audio frame, and stops
there. With a variable bit rate, that is often a fraction of the audio. So a file without a usable tag gets a first
frame with a tag that promises more frames than any file has.

Sources: ISO/IEC 11172-3 2.4.1.3 and ISO/IEC 13818-3 2.4.1.3 (frame header), https://id3.org/id3v2.4.0-structure, and
for the tag `check_lame_tag` in mpg123's `parse.c`.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

#: A clip of the maximum length has 12 MB at the highest bit rate. The rest is for tags with pictures.
_MAX_BYTES = 32 << 20
_KBPS = 64
_MANY_FRAMES = 2**31 - 1
#: Bits in the flags of the tag: it contains the number of frames, or of bytes.
_FRAMES, _BYTES = 1, 2


def with_endless_length(source: BinaryIO) -> BinaryIO | None:
    """Return a copy of an MP3 file that promises more frames than it has, or None if it needs none.

    Args:
        source: a file of any format. It is read.
    """
    data = source.read(3)
    if data != b"ID3" and data[:1] != b"\xff":
        return None
    data += source.read(_MAX_BYTES)
    start = _end_of_id3(data)
    header = data[start : start + 4]
    # Eleven bits are the start of a frame. Then: MPEG-1 or MPEG-2, layer III, and the sampling rate.
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xF6 != 0xF2 or header[2] & 0x0C == 0x0C:
        return None
    end = data.find(b"APETAGEX", start)  # a tag after the audio, which the decoder takes for damaged frames
    audio = data[start:] if end < 0 else data[start:end]
    return None if _states_its_length(audio) else io.BytesIO(_first_frame(header) + audio)


def _end_of_id3(data: bytes) -> int:
    """Return the position after the ID3v2 tags. Their size has four bytes of seven bits."""
    position = 0
    while data[position : position + 3] == b"ID3" and len(data) >= position + 10:
        flags, *size = data[position + 5 : position + 10]
        position += 10 + sum(byte << shift for byte, shift in zip(size, (21, 14, 7, 0), strict=True))
        position += 10 if flags & 0x10 else 0  # a copy of the header at the end
    return position


def _states_its_length(audio: bytes) -> bool:
    """Tell whether the first frame has a tag with the number of frames, and not only of the first of joined files."""
    tag = max(audio.find(name, 4, 48) for name in (b"Xing", b"Info"))
    if tag < 0:
        return False
    flags, frames, length = struct.unpack(">3I", audio[tag + 4 : tag + 16].ljust(12, b"\0"))
    joined = flags & _BYTES and length < 0.99 * len(audio)
    return bool(flags & _FRAMES and frames and not joined)


def _first_frame(header: bytes) -> bytes:
    """Return a frame without audio that has the tag, for the header of another frame of the same stream."""
    mpeg1, mono = bool(header[1] & 0x08), header[3] >> 6 == 3
    rate = (44_100, 48_000, 32_000)[header[2] >> 2 & 3] // (1 if mpeg1 else 2)
    bit_rate_index = 5 if mpeg1 else 8
    side_information = {(True, False): 32, (False, True): 9}.get((mpeg1, mono), 17)
    frame = bytes([0xFF, header[1] | 1, bit_rate_index << 4 | header[2] & 0x0C, header[3]]) + bytes(side_information)
    frame += b"Xing" + struct.pack(">2I", _FRAMES, _MANY_FRAMES)
    return frame.ljust((144 if mpeg1 else 72) * _KBPS * 1000 // rate, b"\0")
