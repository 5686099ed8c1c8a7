"""Make a signed warm state for tests of signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.state.signature import Trust
from chatterbox_prewarm.state.signing import sign
from chatterbox_prewarm.state.state import State
from tests.helpers.children import call
from tests.helpers.keys import make_keys
from tests.helpers.states import make_state, record_weights

if TYPE_CHECKING:
    from pathlib import Path

FILES = {"numba": {"librosa/filters.nbc": b"machine code"}, "signal": {"constants.safetensors": b"constants"}}
#: The path of a file with code in the state.
CODE = "numba/librosa/filters.nbc"


class SignedState:
    """A signed state in `folder / "warm"`, its key pair and its signature.

    Attributes:
        manifest: the manifest as it was signed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.warm = folder, folder / "warm"
        self.manifest = make_state(self.warm, FILES)
        self.private, self.public = make_keys(folder)
        self.signature = sign(State.open(self.warm), self.private)

    @property
    def digest(self) -> str:
        """Return the present digest of the manifest in the form of `--expect-digest`."""
        return f"sha256:{State.read(self.warm).manifest_digest}"

    def check(self, **trust: Any) -> tuple[str, ...]:
        """Check the present bytes of the manifest; by default the state must be signed with the key."""
        return Trust(**{"key": self.public, **trust}).check(self.warm, (self.warm / "manifest.json").read_bytes())

    def prepare(self, policy: str, **trust: Any) -> dict[str, Any]:
        """Run `prepare` with this state in another process, and return its report."""
        record_weights(self.folder / "weights")
        arguments: dict[str, Any] = {name: str(value) for name, value in trust.items()}
        arguments |= {name: str(self.folder / name) for name in ("warm", "weights", "cache")}
        return call("prepare", policy=policy, **arguments)


def flip_bit(path: Path, position: int = 0) -> None:
    """Flip a bit of the byte at `position` of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
