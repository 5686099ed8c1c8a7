"""Streaming: return speech in chunks while it is synthesized, with the tokens of `synthesize` and without seams.

S3Gen's flow attends to the complete utterance, so the first sample depends on the last token. There are two modes:

- The flow waits for the last token. The chunks then equal the audio of `Synthesizer.synthesize`; only the vocoder and
  the watermark run chunk by chunk.
- The flow looks only a few tokens ahead (`look_ahead`). Audio then arrives early. It has the same words and voice, but
  it differs from the audio of `synthesize`.

The context of the vocoder and of the watermark is shorter than half a second. They run on overlapping windows and
return the same samples as for the complete utterance.

This module imports torch only when a stream begins.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.sampling import MAX_NEW_TOKENS
from chatterbox_prewarm.system.limits import MIN_LOOK_AHEAD

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from chatterbox_prewarm.model.chunk import Chunk
    from chatterbox_prewarm.model.sampling import Sampling
    from chatterbox_prewarm.model.synthesis import Synthesizer

#: One second of audio.
CHUNK_TOKENS = 25


class HasSynthesizer(Protocol):
    """An object with a loaded model, such as the result of `load_warmup_cache`."""

    @property
    def synthesizer(self) -> Synthesizer: ...  # noqa: D102


def synthesizer_of(source: Any) -> Synthesizer:
    """Return the synthesizer of a loaded model, or `source` itself if it is one."""
    synthesizer: Synthesizer = source.synthesizer if hasattr(source, "synthesizer") else source
    return synthesizer


def check_chunks(chunk_tokens: int, look_ahead: int | None) -> None:
    """Check the size of the chunks of a stream, and how many tokens the flow waits for.

    Raises:
        BadInputError: one of them is too small.
    """
    if chunk_tokens < 1:
        raise BadInputError(f"a chunk of {chunk_tokens} tokens", next_step="give 1 or more; 25 tokens are one second")
    if look_ahead is not None and look_ahead < MIN_LOOK_AHEAD:
        raise BadInputError(
            f"a look ahead of {look_ahead} tokens",
            next_step=f"give {MIN_LOOK_AHEAD} or more, or None to wait for all tokens",
        )


def generate_stream(  # noqa: PLR0913 - public API with optional keyword arguments
    source: Synthesizer | HasSynthesizer,
    text: str,
    *,
    voice: str = DEFAULT_VOICE,
    language: str | None = None,
    seed: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    look_ahead: int | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Generator[Chunk]:
    """Synthesize `text` in chunks.

    With a seed, the tokens are those of `Synthesizer.synthesize`; without `look_ahead`, the audio is too. Closing the
    iterator stops the synthesis. Other code may use the global random generators between two chunks.

    Example:
        >>> attached = load_warmup_cache("warm", "weights", cache="cache")
        >>> for chunk in generate_stream(attached, "Hello.", seed=1):
        ...     play(chunk.samples)

    Args:
        source: the model; only one call may run at a time.
        text: the text to speak.
        voice: one of the voices.
        language: a code of the variant's languages; None chooses the first one.
        seed: makes the result reproducible on the same machine; None chooses a random seed.
        max_new_tokens: maximum number of speech tokens.
        sampling: the sampling settings; None uses the model's defaults.
        chunk_tokens: speech tokens (40 ms each) per chunk; the last chunk may be shorter.
        look_ahead: how many tokens after a chunk the flow waits for, at least 3. None waits for all tokens.
        stopped: called every few tokens, before each step of the flow and before each chunk. If it returns True, the
            stream ends without a last chunk. It can stop the stream before the first chunk, when nothing can close
            the iterator yet.

    Raises:
        BadInputError: at the call, an argument is invalid; at a chunk, the text or the speech is too long.
        ModelError: at a chunk, the model returned too few speech tokens for audio.
    """
    from chatterbox_prewarm.model.stream import Stream
    from chatterbox_prewarm.model.synthesis import chosen_seed

    called = time.perf_counter()
    synthesizer = synthesizer_of(source)
    check_chunks(chunk_tokens, look_ahead)
    stream = Stream(synthesizer, synthesizer.voice(voice), chunk_tokens, look_ahead, stopped or (lambda: False))
    blocks = synthesizer.token_blocks(
        text, voice=voice, language=language, max_new_tokens=max_new_tokens, sampling=sampling
    )
    return stream.chunks(blocks, chosen_seed(seed), called)
