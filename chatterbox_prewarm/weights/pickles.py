"""Convert a pickle of tensors, as upstream publishes some of its files, to safetensors."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, WeightsError, first_line, from_os_error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

#: The key in a converted file's metadata for the digest of the pickle, as the hub announces it.
SOURCE = "converted-from"


def convert_pickle(path: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Read tensors from a pickle without running code from it, and write them as safetensors.

    Args:
        path: written by `torch.save`: tensors by their names.
        target: replaced as a whole.
        metadata: written into the header.

    Raises:
        WeightsError: the pickle contains something else than tensors, for example code, or torch is missing.
        BadInputError: the target cannot be written.
    """
    try:
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise WeightsError(
            f"{path.name} is a pickle, which is read with torch: {error}",
            next_step="install the lean extra: pip install 'chatterbox-prewarm[lean]'",
        ) from error
    step = "fetch the published file, and do not use this one"
    try:
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(tensors, dict) or not all(torch.is_tensor(tensor) for tensor in tensors.values()):
            raise WeightsError(f"{path} does not contain tensors by their names", next_step=step)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a pickle of tensors: {first_line(error)}", next_step=step) from error
    part = target.with_name(f".{target.name}.part")
    try:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, part, dict(metadata))
        part.replace(target)
    except OSError as error:
        raise from_os_error(error, f"writing {target.name}") from error
    except SafetensorError as error:  # its message contains the operating system's error
        raise BadInputError(
            f"writing {target.name}: {error}", next_step="free some space there, or give another directory"
        ) from error
    finally:
        part.unlink(missing_ok=True)
