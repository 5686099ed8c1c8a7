"""Serve Chatterbox from a FastAPI application.

Start it with `uvicorn fastapi_app:app`, in one process: the model runs in separate worker processes.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import StreamingResponse

from chatterbox_prewarm import ChatterboxServer
from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start the server before the first request; its constructor returns when every stage of a synthesis has run."""
    places = Path("/opt/chatterbox-prewarm")
    with ChatterboxServer(warm=places / "warm", weights=places / "weights") as app.state.speech:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/say")
def say(text: str) -> Response:  # not `async`: FastAPI calls it in a thread, where it may block
    """Return the speech as a WAV file."""
    try:
        return Response(app.state.speech.generate(text).wav, media_type="audio/wav")
    except BadInputError as error:
        raise HTTPException(400, str(error)) from error


@app.get("/stream")
def stream(text: str) -> StreamingResponse:
    """Stream 16-bit samples at 24 kHz while they are made."""
    try:
        chunks = app.state.speech.generate_stream(text)
        first = next(chunks)  # before the response starts, an error can still set its status
    except BadInputError as error:
        raise HTTPException(400, str(error)) from error
    return StreamingResponse((chunk.data for chunk in itertools.chain([first], chunks)), media_type="audio/pcm")
