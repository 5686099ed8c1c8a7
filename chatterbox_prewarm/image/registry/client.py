"""A repository of a registry: OCI's distribution API, version 1.1, and Docker's before it."""

from __future__ import annotations

import io
import json
import logging
import urllib.parse
from typing import TYPE_CHECKING, BinaryIO, cast

from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.image.oci import INDEXES, MANIFESTS, Descriptor, Document, digest_of
from chatterbox_prewarm.image.references import is_digest, is_tag
from chatterbox_prewarm.image.registry.downloads import BlobReader
from chatterbox_prewarm.image.registry.registry_errors import resolve
from chatterbox_prewarm.image.registry.transport import WAITS, Transport
from chatterbox_prewarm.image.registry.uploads import PIECE, Upload, cancel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType

    from chatterbox_prewarm.image.references import ImageReference
    from chatterbox_prewarm.image.registry.transport import Answer, Counters

logger = logging.getLogger(__name__)

_MEDIA_TYPES = (*INDEXES, *MANIFESTS)
_BUFFER = 1 << 20


class Repository:
    """A `Store` in a registry. Of one thread at a time; closes its connections as a context manager.

    Args:
        reference: which registry and repository; its tag and digest are not looked at.
        insecure: plain HTTP (True), HTTPS (False), or as Docker has it (None): plain to this machine alone. A login is
            sent in plain to this machine alone in any case.
        waits: seconds before each further attempt of what failed and may pass.
        piece: bytes of a blob that go into one request; in memory are a few megabytes in any case.
    """

    def __init__(
        self,
        reference: ImageReference,
        *,
        insecure: bool | None = None,
        waits: Sequence[float] = WAITS,
        piece: int = PIECE,
    ) -> None:
        if reference.kind != "registry":
            raise BadInputError(
                f"{str(reference)!r} is no repository of a registry", next_step="name it as HOST/REPOSITORY[:TAG]"
            )
        self.reference = reference
        self._name = reference.repository
        self._shown = reference.familiar
        self._piece = piece
        self._transport = Transport(reference, insecure=insecure, waits=waits)

    def __enter__(self) -> Repository:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    @property
    def counters(self) -> Counters:
        """What went to and fro so far."""
        return self._transport.counters

    def read_manifest(self, reference: str) -> Document:
        """A manifest or an index, by tag or by digest; its bytes are checked against the digest.

        By a tag, against the digest that the registry says it has under it.

        Raises:
            EngineError: there is none of that name, or it is damaged, or of a kind that this program does not know.
            BadInputError: `reference` is neither a tag nor a digest.
        """
        what = f"manifest {reference} of {self._shown}"
        answer = self._manifest("GET", reference, what, {200})
        promised = reference if is_digest(reference) else answer.headers.get("Docker-Content-Digest", "")
        found = digest_of(answer.body)
        if is_digest(promised) and found != promised:
            raise EngineError(
                f"the {what} is damaged: its digest is {found}, and {promised} belongs there",
                next_step="push the image again; its copy in the registry, or a cache before it, is damaged",
            )
        return Document(media_type=_media_type(answer, what), raw=answer.body)

    def has_manifest(self, reference: str) -> bool:
        """Whether there is a manifest of that tag or digest.

        Raises:
            EngineError: the registry cannot be reached or refuses.
            BadInputError: `reference` is neither a tag nor a digest.
        """
        return self._manifest("HEAD", reference, f"manifest {reference} of {self._shown}", {200, 404}).status == 200

    def put_manifest(self, document: Document, reference: str) -> None:
        """Store a manifest or an index under a tag, or under its own digest.

        Raises:
            EngineError: the registry cannot be reached, refuses, or lacks a blob that the manifest names.
            BadInputError: `reference` is neither a tag nor the document's digest.
        """
        if is_digest(reference) and reference != document.digest:
            raise BadInputError(
                f"a manifest of digest {document.digest} cannot be stored as {reference}",
                next_step="store it under a tag, or under its own digest",
            )
        what = f"manifest {reference} of {self._shown}"
        answer = self._manifest("PUT", reference, what, {200, 201, 202, 204}, document)
        stored = answer.headers.get("Docker-Content-Digest", document.digest)
        if stored != document.digest:
            raise EngineError(
                f"the registry {self.reference.host} stored the {what} as {stored}, not as {document.digest}",
                next_step="see whether it converts images, and turn that off",
            )

    def delete_manifest(self, digest: str) -> bool:
        """Delete a manifest, and with it every tag of it; its blobs are left to the registry's own cleaning.

        Returns:
            Whether it is gone; False where the registry allows no deletion.

        Raises:
            EngineError: the registry cannot be reached or refuses the login.
            BadInputError: `digest` is none.
        """
        if not is_digest(digest):
            raise BadInputError(f"{digest!r} is no digest", next_step="name the manifest as sha256:…, not by a tag")
        what = f"manifest {digest} of {self._shown}"
        answer = self._manifest("DELETE", digest, what, {200, 202, 204, 404, 405})
        if answer.status == 405:
            logger.warning("%s", self._transport.refusal("DELETE", what, answer).message)
        return answer.status != 405

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether the blob is there already.

        Raises:
            EngineError: the registry cannot be reached or refuses, or what it has is of another size.
        """
        what = self._blob(descriptor)
        answer = self._transport.request(
            "HEAD", self._blob_url(descriptor), what=what, scope=self._scope("pull"), expect={200, 404}
        )
        if answer.status == 404:
            return False
        length = answer.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) != descriptor.size:
            raise EngineError(
                f"the {what} has {length} bytes in the registry where {descriptor.size} belong",
                next_step="its copy in the registry is damaged: delete it there, and push again",
            )
        return True

    def open_blob(self, descriptor: Descriptor) -> AbstractContextManager[BinaryIO]:
        """A blob for reading, as a stream: a cut is gone on from, and digest and size are checked at its end.

        Who reads only a part of it reads that part unchecked.

        Raises:
            EngineError: there is no such blob; from a read, it was cut too often, or is not what it should be.
        """
        reader = BlobReader(
            self._transport,
            self._blob_url(descriptor),
            scope=self._scope("pull"),
            descriptor=descriptor,
            what=self._blob(descriptor),
        )
        return cast("BinaryIO", io.BufferedReader(reader, _BUFFER))

    def put_blob(self, descriptor: Descriptor, opened: Callable[[], AbstractContextManager[BinaryIO]]) -> None:
        """Store a blob as a stream, unless it is there; `opened` opens it from its beginning, for every attempt anew.

        An upload that ends early, by an error or by Ctrl-C, is dropped at the registry as far as that lets us.

        Raises:
            EngineError: the registry cannot be reached or refuses, or got other bytes than the descriptor says.
        """
        if self.has_blob(descriptor):
            return
        Upload(
            self._transport,
            f"/v2/{self._name}/blobs/uploads/",
            scope=self._scope("pull,push"),
            descriptor=descriptor,
            opened=opened,
            what=self._blob(descriptor),
            exists=lambda: self.has_blob(descriptor),
            piece=self._piece,
        ).run()

    def mount_blob(self, descriptor: Descriptor, source_repository: str) -> bool:
        """Have the registry take a blob from another of its repositories, without sending it.

        Args:
            descriptor: of the blob.
            source_repository: as `reference.repository` has it.

        Returns:
            Whether it did. A registry need not: it may not have the blob there, or not let this user read it. One that
            refuses a push does not either; `put_blob` then says so.

        Raises:
            EngineError: the registry cannot be reached, or is not to be logged in to.
        """
        if self.has_blob(descriptor):
            return True
        scope = f"{self._scope('pull,push')} repository:{source_repository}:pull"
        what = self._blob(descriptor)
        query = urllib.parse.urlencode({"mount": descriptor.digest, "from": source_repository})
        url = f"/v2/{self._name}/blobs/uploads/?{query}"
        answer = self._transport.request(
            "POST", url, what=what, scope=scope, expect={201, 202, 401, 403, 404, 405}, body=b""
        )
        if answer.status == 201:
            return True
        logger.info("the registry does not take the %s from %s: %d", what, source_repository, answer.status)
        if answer.status == 202 and (location := answer.headers.get("Location")):
            # It began an upload in the mount's place, which is of no use here.
            cancel(self._transport, resolve(answer.url, location), scope=self._scope("pull,push"), what=what)
        return False

    def _manifest(
        self, method: str, reference: str, what: str, expect: set[int], document: Document | None = None
    ) -> Answer:
        if not is_tag(reference) and not is_digest(reference):
            raise BadInputError(
                f"{reference!r} names no manifest", next_step="name a tag, or a digest as sha256: and 64 digits"
            )
        headers = {"Content-Type": document.media_type} if document else {"Accept": ", ".join(_MEDIA_TYPES)}
        actions = {"GET": "pull", "HEAD": "pull", "PUT": "pull,push", "DELETE": "delete"}[method]
        return self._transport.request(
            method,
            f"/v2/{self._name}/manifests/{reference}",
            what=what,
            scope=self._scope(actions),
            expect=expect,
            headers=headers,
            body=document.raw if document else None,
        )

    def _scope(self, actions: str) -> str:
        return f"repository:{self._name}:{actions}"

    def _blob(self, descriptor: Descriptor) -> str:
        return f"blob {descriptor.digest} of {self._shown}"

    def _blob_url(self, descriptor: Descriptor) -> str:
        return f"/v2/{self._name}/blobs/{descriptor.digest}"


def _media_type(answer: Answer, what: str) -> str:
    """The media type of a manifest: as sent, or where that says nothing, as in the document.

    Raises:
        EngineError: the two differ (a document that is two things at once), or it is of no kind known here.
    """
    sent = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    try:
        inside = json.loads(answer.body).get("mediaType", "")
    except (ValueError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"the {what} is no manifest: {type(error).__name__}", next_step="check that the reference is of an image"
        ) from error
    if sent not in _MEDIA_TYPES and inside in _MEDIA_TYPES:
        return str(inside)
    if sent not in _MEDIA_TYPES or (inside and inside != sent):
        raise EngineError(
            f"the {what} is sent as {sent!r}, and says of itself that it is {inside!r}; expected is one of "
            f"{', '.join(_MEDIA_TYPES)}",
            next_step="check that the reference is of an image; one of Docker's first schema is to be pushed again",
        )
    return sent
