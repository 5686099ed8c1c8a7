"""Make a voice from an uploaded clip in a process of its own.

Voices need upstream's model, which the workers do not load. So an upload does not delay a request, and its memory is
free again afterwards. The clip comes on standard input and the voice leaves on standard output, because the clip
contains a person's voice: a killed process must not leave a copy on a disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import sys
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, ModelError, as_prewarm_error, first_line
from chatterbox_prewarm.serve.voices.voice_file import make_metadata
from chatterbox_prewarm.serve.workers import log_lines
from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig
from chatterbox_prewarm.system.children import child_environment, die_with_parent
from chatterbox_prewarm.system.json_subprocess import claim_stdout, describe, parse_report, rebuild
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from chatterbox.tts import ChatterboxTTS

#: A voice takes 4 to 20 s on a CPU, most of it for the imports and the weights.
_SECONDS = 180.0


async def make_voice(config: WorkerConfig, clip: bytes) -> bytes:
    """Compute a voice from a reference clip.

    Args:
        config: of a worker that will use the voice.
        clip: a WAV file, as `decode_clip.decode` returned it.

    Returns:
        the voice as a safetensors file for `VoiceStore.add`.

    Raises:
        BadInputError: the model cannot make a voice from this clip.
        PrewarmError: the process failed for another reason.
    """
    # Started from the event loop's thread, because the kernel ends a child with the thread that started it.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chatterbox_prewarm.serve.workers.voice_process", config.to_json()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(),
        start_new_session=True,  # Ctrl-C in the terminal should reach only the server
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(clip), _SECONDS)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise ModelError(
            f"the voice was not complete after {_SECONDS:.0f} s", next_step="try again when the machine is less busy"
        ) from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        status = await process.wait()
    if status == 0:
        return output
    with contextlib.suppress(ValueError, LookupError, TypeError):
        raise rebuild(json.loads(output))
    parse_report("", status)  # raises an error that explains the status
    raise AssertionError("a failed process has no report")


def main() -> None:
    """Run the subprocess. Its argument is the configuration of a worker."""
    die_with_parent()
    config = WorkerConfig.from_json(sys.argv[1])
    with claim_stdout() as out:
        log_lines.install(config.log_format, process="voice", level=logging.INFO)
        try:
            voice = _voice_bytes(config, sys.stdin.buffer.read())
        except Exception as error:  # noqa: BLE001 - the server reports every error to the client
            failure = as_prewarm_error(error)
            json.dump(describe(failure), out)
            out.flush()
            sys.exit(failure.exit_code)
        out.buffer.write(voice)


def _voice_bytes(config: WorkerConfig, clip: bytes) -> bytes:
    # Imported here, because the server imports this module while it starts.
    from chatterbox_prewarm.start.attach import set_threads
    from chatterbox_prewarm.start.prepare import prepare
    from chatterbox_prewarm.start.upstream import attach_upstream

    # The voice is the same for every device. On the CPU it takes no memory from the workers' GPU.
    prepared = prepare(config.start)
    model = attach_upstream(prepared)
    set_threads(config.threads)
    record = read_record(config.start.weights)
    return voice_bytes(
        model,
        clip,
        make_metadata(variant=record.variant, weights=record.set_digest, clip_sha256=hashlib.sha256(clip).hexdigest()),
    )


def voice_bytes(model: ChatterboxTTS, clip: bytes, metadata: dict[str, str]) -> bytes:
    """Compute the conditionals of a clip, a WAV file, and return them as a safetensors file.

    Raises:
        BadInputError: the model cannot make a voice from this clip.
    """
    from chatterbox_prewarm.families.base import tensor_bytes
    from chatterbox_prewarm.families.conditionals import voice_tensors
    from chatterbox_prewarm.model.voices import prepare_voice

    try:
        voice = prepare_voice(model, io.BytesIO(clip))
    except ModelError as error:
        raise BadInputError(
            f"no voice could be made from the clip: {first_line(error.__cause__ or error)}",
            next_step="give 5 to 10 s of clean speech",
        ) from error
    return tensor_bytes(voice_tensors(voice), metadata)


if __name__ == "__main__":
    main()
