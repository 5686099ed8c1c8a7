"""What is refused about voices, with the HTTP status that says so."""

from __future__ import annotations

from chatterbox_prewarm.errors import BadInputError


class VoiceError(BadInputError):
    """Base of what is refused about voices.

    Attributes:
        status: the HTTP status of the answer.
        code: the answer's, for programs.
    """

    status = 400
    code = "invalid_request"


class UnusableVoiceError(VoiceError):
    """A file is no voice that this server can speak with."""

    code = "voice_unusable"


class UnknownVoiceError(VoiceError):
    """There is no voice of that name."""

    status, code = 404, "voice_not_found"


class VoiceExistsError(VoiceError):
    """There is a voice of that name already."""

    status, code = 409, "voice_exists"


class BakedVoiceError(VoiceError):
    """The voice is part of the image, or made at start, and cannot be deleted."""

    status, code = 403, "voice_is_baked"


class StoreFullError(VoiceError):
    """There is no room for another voice: on the disk, or by the limit on their number."""

    status, code = 507, "voices_full"


class StoreUnavailableError(VoiceError):
    """Voices cannot be added or deleted here: there is no directory, or it cannot be written."""

    status, code = 503, "voices_unavailable"


class UploadTooLargeError(VoiceError):
    """An upload has more bytes than a clip may have."""

    status, code = 413, "too_large"


class SlowUploadError(VoiceError):
    """An upload did not arrive in time."""

    status, code = 408, "timeout"
