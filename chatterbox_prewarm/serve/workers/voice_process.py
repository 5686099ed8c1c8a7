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
from chatterbox_prewarm.model.clips import read_clip
from chatterbox_prewarm.serve.voices.voice_file import make_metadata
from chatterbox_prewarm.serve.workers import log_lines
from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig
from chatterbox_prewarm.system.children import child_environment, die_with_parent
from chatterbox_prewarm.system.json_subprocess import claim_stdout, describe, parse_report, rebuild
from chatterbox_prewarm.weights.record import read_record, read_variant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.conditionals import Conditionals

#: The limit for each model. A voice takes 4 to 20 s on a CPU, most of it for the imports and the weights.
_SECONDS = 180.0


async def make_voice(configs: Sequence[WorkerConfig], clip: bytes) -> bytes:
    """Compute a voice from a reference clip.

    Args:
        configs: of one worker of each model that will use the voice.
        clip: a WAV file, as `decode_clip.decode` returned it.

    Returns:
        the voice as a safetensors file for `VoiceStore.add`.

    Raises:
        BadInputError: the model cannot make a voice from this clip.
        PrewarmError: the process failed for another reason.
    """
    seconds = _SECONDS * len(configs)
    # Started from the event loop's thread, because the kernel ends a child with the thread that started it.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chatterbox_prewarm.serve.workers.voice_process"),
        *(config.to_json() for config in configs),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(),
        start_new_session=True,  # Ctrl-C in the terminal should reach only the server
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(clip), seconds)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise ModelError(
            f"the voice was not complete after {seconds:.0f} s", next_step="try again when the machine is less busy"
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
    """Run the subprocess. Its arguments are the configurations of the workers."""
    die_with_parent()
    configs = [WorkerConfig.from_json(argument) for argument in sys.argv[1:]]
    with claim_stdout() as out:
        log_lines.install(configs[0].log_format, process="voice", level=logging.INFO)
        try:
            voice = _voice_bytes(configs, sys.stdin.buffer.read())
        except Exception as error:  # noqa: BLE001 - the server reports every error to the client
            failure = as_prewarm_error(error)
            json.dump(describe(failure), out)
            out.flush()
            sys.exit(failure.exit_code)
        out.buffer.write(voice)


def _voice_bytes(configs: Sequence[WorkerConfig], clip: bytes) -> bytes:
    """Compute the conditionals of a clip, a WAV file, for each model, and return the file of the voice."""
    # Imported here, because the server imports this module while it starts.
    from chatterbox_prewarm.start.attach import set_threads
    from chatterbox_prewarm.start.prepare import prepare
    from chatterbox_prewarm.start.upstream import attach_upstream

    for config in configs:  # checked here, too, because loading upstream's model takes seconds
        read_clip(io.BytesIO(clip), what="the clip", longer_than=read_variant(config.start.weights).clip_seconds)
    voices: dict[str, Conditionals] = {}
    weights: dict[str, str] = {}
    # All before the first model is loaded, because packages read their settings when they are imported.
    for config, prepared in [(config, prepare(config.start)) for config in configs]:
        record = read_record(config.start.weights)
        # The voice is the same for every device. On the CPU it takes no memory from the workers' GPU.
        model = attach_upstream(prepared)
        set_threads(config.threads)
        voices[record.variant], weights[record.variant] = make_conditionals(model, clip), record.set_digest
        del model  # before the next one is loaded
    return voice_bytes(voices, weights, clip)


def voice_bytes(voices: Mapping[str, Conditionals], weights: Mapping[str, str], clip: bytes) -> bytes:
    """Return the file of a voice.

    Args:
        voices: its conditionals by the variant of each model.
        weights: set digest of the checkpoint by the same variants.
        clip: the WAV file that they were computed from.
    """
    from chatterbox_prewarm.families.base import tensor_bytes
    from chatterbox_prewarm.families.conditionals import voice_tensors

    tensors = {
        f"{variant}/{name}" if len(voices) > 1 else name: tensor
        for variant, voice in voices.items()
        for name, tensor in voice_tensors(voice).items()
    }
    return tensor_bytes(tensors, make_metadata(weights, clip_sha256=hashlib.sha256(clip).hexdigest()))


def make_conditionals(model: ChatterboxTTS, clip: bytes) -> Conditionals:
    """Compute the conditionals of a clip, a WAV file.

    Raises:
        BadInputError: the model cannot make a voice from this clip.
    """
    from chatterbox_prewarm.model.voices import prepare_voice

    try:
        return prepare_voice(model, io.BytesIO(clip))
    except ModelError as error:
        raise BadInputError(
            f"no voice could be made from the clip: {first_line(error.__cause__ or error)}",
            next_step="give 5 to 10 s of clean speech",
        ) from error


if __name__ == "__main__":
    main()
