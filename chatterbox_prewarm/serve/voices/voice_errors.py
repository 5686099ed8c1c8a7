"""Errors about voices, with the HTTP status and the error code of the response."""

from __future__ import annotations

from chatterbox_prewarm.errors import BadInputError

_STATUS = {
    "voice_unusable": 400,
    "voice_is_baked": 403,
    "voice_not_found": 404,
    "voice_exists": 409,
    "uploads_unsupported": 501,
    "voices_unavailable": 503,
    "voices_full": 507,
}


class VoiceError(BadInputError):
    """A voice cannot be used, added or deleted.

    Attributes:
        code: "voice_is_baked", "voice_exists", "voices_full" (the disk is full or the limit is reached),
            "voices_unavailable" (the directory is missing or not writable), "uploads_unsupported" (upstream's model is
            not installed), or the code of a subclass.
        status: HTTP status of the response.
    """

    def __init__(self, message: str, *, next_step: str, code: str) -> None:
        super().__init__(message, next_step=next_step)
        self.code = code
        self.status = _STATUS[code]


class UnusableVoiceError(VoiceError):
    """A file is not a voice for the model of this server."""

    def __init__(self, message: str, *, next_step: str) -> None:
        super().__init__(message, next_step=next_step, code="voice_unusable")


class UnknownVoiceError(VoiceError):
    """No voice has this name."""

    def __init__(self, message: str, *, next_step: str) -> None:
        super().__init__(message, next_step=next_step, code="voice_not_found")
