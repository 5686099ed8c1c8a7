"""A voice as it is uploaded: a form with a name and a clip, read with a bound on all of it.

Of a form that is too large, too slow or broken nothing is kept, and no part of one ever goes to a disk.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.serve.voices.voice_errors import SlowUploadError, UploadTooLargeError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.datastructures import FormData, Headers
    from starlette.requests import Request

#: What a form may have besides its clip: boundaries, headers, and the fields that OpenAI's clients send.
_FORM_BYTES = 1 << 16
_MAX_FIELDS = 8
#: The clip's field as most servers name it, and as OpenAI's API does.
_CLIP_FIELDS = ("file", "audio_sample")
_HOW = "send a form with name and file: curl -F name=NAME -F file=@CLIP URL"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A voice to be: its name, which can name one, and the bytes of a clip."""

    name: str
    clip: bytes


async def read_upload(request: Request, *, clip_bytes: int, seconds: float) -> Upload:
    """Read the form of `POST /v1/audio/voices`.

    Args:
        request: its body is read as it comes.
        clip_bytes: the most that the clip may have.
        seconds: until all of the form must be there.

    Raises:
        UploadTooLargeError: the body has more bytes than such a form can.
        SlowUploadError: it did not arrive in time.
        BadInputError: it is no such form.
        starlette.requests.ClientDisconnect: the client went away.
    """
    limit = clip_bytes + _FORM_BYTES
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and len(announced) < 20 and int(announced) > limit:
        raise _too_large(limit)
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise BadInputError("the body is no multipart form", next_step=_HOW)
    parser = _Form(request.headers, _bounded(request, limit), limit)
    try:
        form = await asyncio.wait_for(parser.parse(), seconds)
        if not parser.is_whole:
            raise BadInputError("the form ends before its last boundary", next_step=_HOW)
        return await _upload_of(form)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise SlowUploadError(
            f"the upload did not arrive within {seconds:.0f} s", next_step="send a smaller clip, or over a faster line"
        ) from error
    except (MultiPartException, FormParserError) as error:
        raise BadInputError(f"the form cannot be read: {error}", next_step=_HOW) from error
    finally:
        parser.close()


class _Form(MultiPartParser):
    """Starlette's parser, which would put a large file on the disk and takes a form without an end for a whole one."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], limit: int) -> None:
        super().__init__(headers, stream, max_files=1, max_fields=_MAX_FIELDS, max_part_size=_FORM_BYTES)
        self.spool_max_size = limit + 1
        self.is_whole = False

    def on_end(self) -> None:
        self.is_whole = True

    def close(self) -> None:
        for file in self._files_to_close_on_error:
            file.close()


async def _bounded(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body, up to more bytes than it may have."""
    total = 0
    async for part in request.stream():
        total += len(part)
        if total > limit:
            raise _too_large(limit)
        yield part


async def _upload_of(form: FormData) -> Upload:
    """What the fields say; others than ours are of no interest."""
    name = _one(form, ("name",))
    if not isinstance(name, str):
        raise BadInputError("the form has no field 'name'", next_step=_HOW)
    check_voice_name(name)
    clip = _one(form, _CLIP_FIELDS)
    if not isinstance(clip, UploadFile):
        raise BadInputError("the form has no file in its field 'file'", next_step=_HOW)
    data = await clip.read()
    if not data:
        raise BadInputError("the clip is empty", next_step="give 5 to 10 s of clean speech")
    return Upload(name=name, clip=data)


def _one(form: FormData, names: tuple[str, ...]) -> Any:
    values = [value for name in names for value in form.getlist(name)]
    if len(values) > 1:
        raise BadInputError(f"the form has more than one {' or '.join(map(repr, names))}", next_step=_HOW)
    return values[0] if values else None


def _too_large(limit: int) -> UploadTooLargeError:
    return UploadTooLargeError(
        f"the upload is larger than {limit} bytes",
        next_step="give 5 to 10 s of clean speech, as FLAC or MP3 if need be",
    )
