"""Sign a warm state with a private key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.state.keys import read_private_key
from chatterbox_prewarm.state.places import check_output_place
from chatterbox_prewarm.state.signature import default_signature, verify_signature
from chatterbox_prewarm.system.atomic_files import atomic_file

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.state.state import State


def sign(state: State, key: Path, output: Path | None = None, *, passphrase: str | None = None) -> Path:
    """Sign a warm state after checking that its files match its manifest. Uses no network.

    Args:
        state: the state; nothing is written into its directory.
        key: a private key in PEM, of the curve P-256, P-384 or P-521.
        output: the path of the signature; by default `default_signature` of the state.
        passphrase: the passphrase of an encrypted key.

    Returns:
        the path of the signature.

    Raises:
        IntegrityError: a file of the state differs from its manifest.
        BadInputError: the key cannot be used, or `output` cannot be written or is inside a state or a checkpoint.
    """
    output = output or default_signature(state.path)
    check_output_place(output)
    if output.resolve() == key.resolve():
        raise BadInputError(f"the signature would replace the key {key}", next_step="name another path with --output")
    private_key = read_private_key(key, passphrase)
    state.check_files()
    from model_signing import hashing, signing

    config = signing.Config().use_elliptic_key_signer(
        private_key=key,
        password=passphrase and passphrase.encode(),  # declared as str, but passed on to a function that needs bytes
    )
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=(), ignore_git_paths=False))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as temporary:
            config.sign(state.path.resolve(), temporary)  # it refuses links, also a link to the state
            # Hand out only what a start accepts.
            verify_signature(temporary, private_key.public_key(), state.path, state.manifest_bytes)
    except OSError as error:
        raise from_os_error(error, "writing the signature") from error
    return output
