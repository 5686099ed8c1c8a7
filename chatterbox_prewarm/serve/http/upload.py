"""Read a multipart form with fields and an audio clip, limited in size and time.

The form stays in memory: no part of it is written to disk, and nothing remains of a form that is refused.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.clips import REFERENCE
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.serve.http.error_responses import RequestError
from chatterbox_prewarm.serve.http.request_body import check_encoding

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.datastructures import FormData, Headers
    from starlette.requests import Request

#: Bytes of a form in addition to its clip: boundaries, headers, and the other fields that OpenAI's clients send.
_FORM_BYTES = 1 << 16
_MAX_FIELDS = 16
#: The names of the clip's field: the usual one, and the one in OpenAI's API.
_CLIP_FIELDS = ("file", "audio_sample")


@dataclass(frozen=True, kw_only=True)
class FormKind:
    """The fields of a form, and the advice in its error messages.

    Attributes:
        fields: the names of its fields besides the clip. Unknown fields are ignored.
        example: how to send one, for messages.
        length_step: what to do if the clip is too large, or empty.
    """

    fields: tuple[str, ...]
    example: str
    length_step: str


#: The form of `POST /v1/audio/voices`.
VOICE_FORM = FormKind(
    fields=("name",),
    example="send a form with name and file: curl -F name=NAME -F file=@CLIP URL",
    length_step=REFERENCE.speech_step.replace("give", "send"),
)


async def read_upload(request: Request, *, clip_bytes: int, seconds: float) -> tuple[str, bytes]:
    """Read the form of `POST /v1/audio/voices`.

    Args:
        request: its body is read as a stream.
        clip_bytes: the maximum size of the clip.
        seconds: the time limit for the complete form.

    Returns:
        the name, which is a valid voice name, and the content of the clip.

    Raises:
        RequestError, BadInputError, starlette.requests.ClientDisconnect: as `read_form`.
    """
    fields, clip = await read_form(request, VOICE_FORM, clip_bytes=clip_bytes, seconds=seconds)
    if "name" not in fields:
        raise BadInputError("the form has no field 'name'", next_step=VOICE_FORM.example)
    return check_voice_name(fields["name"]), clip


async def read_form(
    request: Request, kind: FormKind, *, clip_bytes: int, seconds: float
) -> tuple[dict[str, str], bytes]:
    """Read a form with a clip.

    Args:
        request: its body is read as a stream.
        kind: what the form is for.
        clip_bytes: the maximum size of the clip.
        seconds: the time limit for the complete form.

    Returns:
        the values of the fields, and the content of the clip.

    Raises:
        RequestError: the body is compressed (status 415), too large (status 413) or too slow (status 408).
        BadInputError: the body is not such a form.
        starlette.requests.ClientDisconnect: the client disconnected.
    """
    check_encoding(request.headers)
    limit = clip_bytes + _FORM_BYTES
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and len(length) < 20 and int(length) > limit:
        raise _too_large(limit, kind)
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise BadInputError("the body is not a multipart form", next_step=kind.example)
    parser = _FormParser(request.headers, _limited(request, limit, kind), limit)
    try:
        form = await asyncio.wait_for(parser.parse(), seconds)
        if not parser.is_complete:
            raise BadInputError("the form ends before its last boundary", next_step=kind.example)
        return await _fields_and_clip(form, kind)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise RequestError(
            f"the upload did not arrive within {seconds:.0f} s",
            next_step="send a smaller clip, or use a faster connection",
            status=408,
            code="timeout",
        ) from error
    except (MultiPartException, FormParserError) as error:
        raise BadInputError(f"the form is invalid: {error}", next_step=kind.example) from error
    finally:
        parser.close()


class _FormParser(MultiPartParser):
    """Starlette's form parser, changed to keep large files in memory and to detect a form without an end."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], limit: int) -> None:
        super().__init__(headers, stream, max_files=1, max_fields=_MAX_FIELDS, max_part_size=_FORM_BYTES)
        self.spool_max_size = limit + 1
        self.is_complete = False

    def on_end(self) -> None:
        self.is_complete = True

    def close(self) -> None:
        for file in self._files_to_close_on_error:
            file.close()


async def _limited(request: Request, limit: int, kind: FormKind) -> AsyncGenerator[bytes, None]:
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limit:
            raise _too_large(limit, kind)
        yield chunk


async def _fields_and_clip(form: FormData, kind: FormKind) -> tuple[dict[str, str], bytes]:
    """Return the fields of a form, and its clip. Unknown fields are ignored."""
    fields = {name: value for name in kind.fields if (value := _only_value(form, (name,), kind)) is not None}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise BadInputError(f"the field {name!r} of the form is a file", next_step=kind.example)
    clip = _only_value(form, _CLIP_FIELDS, kind)
    if not isinstance(clip, UploadFile):
        raise BadInputError("the form has no file in its field 'file'", next_step=kind.example)
    content = await clip.read()
    if not content:
        raise BadInputError("the clip is empty", next_step=kind.length_step)
    return fields, content


def _only_value(form: FormData, names: tuple[str, ...], kind: FormKind) -> Any:
    values = [value for name in names for value in form.getlist(name)]
    if len(values) > 1:
        raise BadInputError(f"the form has more than one {' or '.join(map(repr, names))}", next_step=kind.example)
    return values[0] if values else None


def _too_large(limit: int, kind: FormKind) -> RequestError:
    return RequestError(
        f"the upload is larger than {limit} bytes",
        next_step=f"{kind.length_step}, if necessary as FLAC or MP3",
        status=413,
        code="too_large",
    )
