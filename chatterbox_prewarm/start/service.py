"""`ChatterboxService`: one warm model in this process, for a service with several threads."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.start.defaults import default_device
from chatterbox_prewarm.start.pretrained import PrewarmedChatterbox

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    import torch

    from chatterbox_prewarm.model.chunk import Chunk


class ChatterboxService:
    """One warm model in this process. Any thread may call it; the calls run one after another.

    `ChatterboxServer` has the same use, but runs its models in worker processes that it replaces when they die.

    Example:
        >>> service = ChatterboxService()
        >>> samples = service.generate("Hello.", audio_prompt_path="voice.wav")

    Args:
        device: a torch device; by default a GPU if there is one.
        **arguments: the other arguments of `PrewarmedChatterbox.from_pretrained_with_warmup`.

    Attributes:
        model: the model.

    Raises:
        PrewarmError: the model could not be loaded.
    """

    def __init__(self, device: str | None = None, **arguments: Any) -> None:
        self.model = PrewarmedChatterbox.from_pretrained_with_warmup(device or default_device(), **arguments)
        self._lock = threading.Lock()

    @property
    def warmup_completed(self) -> bool:
        """Whether the warm-up ran to its end."""
        return self.model.warmup_completed

    def generate(self, text: str, **arguments: Any) -> torch.Tensor:
        """Speak a text; see `PrewarmedChatterbox.generate`. The voice of the service stays as it was."""
        with self._lock, self._kept_voice():
            return self.model.generate(text, **arguments)

    def generate_stream(self, text: str, **arguments: Any) -> Generator[Chunk]:
        """Speak a text in chunks; see `PrewarmedChatterbox.generate_stream`. Other calls wait until it is closed."""
        with self._lock, self._kept_voice():
            yield from self.model.generate_stream(text, **arguments)

    @contextlib.contextmanager
    def _kept_voice(self) -> Iterator[None]:
        """Restore the model's voice when the block ends, so that one request's clip does not speak in the next."""
        voice = self.model.conds
        try:
            yield
        finally:
            self.model.conds = voice
