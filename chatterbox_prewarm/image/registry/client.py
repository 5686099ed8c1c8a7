"""A repository in a registry: OCI's distribution API, version 1.1, and Docker's API before it."""

from __future__ import annotations

import json
import logging
import urllib.parse
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.image.byte_stream import chunk_stream
from chatterbox_prewarm.image.oci import INDEXES, MANIFESTS, OCI_INDEX, Document, digest_of
from chatterbox_prewarm.image.references import is_digest, is_tag
from chatterbox_prewarm.image.registry.downloads import download
from chatterbox_prewarm.image.registry.registry_errors import TransientError, resolve_location
from chatterbox_prewarm.image.registry.retry import RETRY_DELAYS, retry_policy
from chatterbox_prewarm.image.registry.transport import Request, Transport
from chatterbox_prewarm.image.registry.uploads import PIECE, Upload, cancel

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from chatterbox_prewarm.image.oci import Descriptor, OpenStream
    from chatterbox_prewarm.image.references import ImageReference
    from chatterbox_prewarm.image.registry.transport import Response

logger = logging.getLogger(__name__)

_MEDIA_TYPES = (*INDEXES, *MANIFESTS)


class Repository:
    """A repository in a registry as a `Store`; a context manager that closes its connections.

    Use each instance from one thread at a time. All methods raise EngineError if the registry cannot be reached or
    refuses the request.

    Args:
        reference: registry and repository; its tag and digest are ignored.
        insecure: use plain HTTP (True) or HTTPS (False). By default plain HTTP only to this machine, as Docker does.
            Passwords are never sent over plain HTTP to another machine.
        retry_delays: seconds before each retry.
        piece: bytes of a blob per upload request; memory use does not depend on it.

    Attributes:
        counters: requests and bytes so far; see `Transport`.

    Raises:
        BadInputError: `reference` is not in a registry.
    """

    def __init__(
        self,
        reference: ImageReference,
        *,
        insecure: bool | None = None,
        retry_delays: Sequence[float] = RETRY_DELAYS,
        piece: int = PIECE,
    ) -> None:
        if reference.kind != "registry":
            raise BadInputError(
                f"{str(reference)!r} is not a repository in a registry", next_step="name it as HOST/REPOSITORY[:TAG]"
            )
        self.reference = reference
        self._name = reference.repository
        self._piece = piece
        self._transport = Transport(reference, insecure=insecure, retry_delays=retry_delays)
        self.counters = self._transport.counters

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self._transport.close()

    @property
    def name(self) -> str:
        """See `Store.name`."""
        return f"{self.reference.host}/{self.reference.repository}"

    def read_manifest(self, reference: str) -> Document:
        """Read a manifest or an index by tag or digest, and verify its bytes.

        The expected digest is `reference`, or the one that the registry reports for a tag.

        Raises:
            EngineError: it does not exist, is damaged, or has an unknown media type.
            BadInputError: `reference` is neither a tag nor a digest.
        """
        request = self._manifest_request("GET", reference, {200})
        response = self._send(request)
        expected = reference if is_digest(reference) else response.headers.get("Docker-Content-Digest", "")
        digest = digest_of(response.body)
        if is_digest(expected) and digest != expected:
            raise EngineError(
                f"the {request.subject} is damaged: its digest is {digest}, expected is {expected}",
                next_step="push the image again; the copy in the registry, or in a cache in front of it, is damaged",
            )
        return Document(media_type=_media_type(response, request.subject), raw=response.body)

    def has_manifest(self, reference: str) -> bool:
        """Return whether a manifest with this tag or digest exists.

        Raises:
            BadInputError: `reference` is neither a tag nor a digest.
        """
        return self._send(self._manifest_request("HEAD", reference, {200, 404})).status == 200

    def read_referrers(self, digest: str) -> Document | None:
        """Read the index that lists the referrers of a manifest; None if the registry lacks the referrers API.

        Args:
            digest: of the manifest.

        Raises:
            EngineError: the registry failed.
        """
        request = self._request(
            "GET", f"referrers/{digest}", f"referrers of {digest}", actions="pull", expect={200, 400, 404, 405}
        )
        response = self._send(request)
        if response.status != 200 or response.headers.get("Content-Type", "").partition(";")[0] != OCI_INDEX:
            return None
        if "Link" in response.headers:
            logger.warning("the registry lists the referrers of %s on several pages; only the first is read", digest)
        return Document(media_type=OCI_INDEX, raw=response.body)

    def put_manifest(self, document: Document, reference: str, *, check: Callable[[], None] | None = None) -> None:
        """Store a manifest or an index under a tag, or under its own digest; see `Store.put_manifest`.

        Raises:
            EngineError: the registry lacks a blob that the manifest names.
            BadInputError: `reference` is neither a tag nor the document's digest.
        """
        if is_digest(reference) and reference != document.digest:
            raise BadInputError(
                f"a manifest with the digest {document.digest} cannot be stored as {reference}",
                next_step="store it under a tag, or under its own digest",
            )
        if check is not None:
            check()
        request = self._manifest_request("PUT", reference, {200, 201, 202, 204}, document)
        stored = self._send(request).headers.get("Docker-Content-Digest", document.digest)
        if stored != document.digest:
            raise EngineError(
                f"the registry {self.reference.host} stored the {request.subject} as {stored}, "
                f"not as {document.digest}",
                next_step="check whether it converts images, and turn that off",
            )

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Return whether the blob is stored already.

        Raises:
            EngineError: the stored blob has another size.
        """
        request = self._blob_request("HEAD", descriptor.digest, descriptor, {200, 404})
        response = self._send(request)
        length = response.headers.get("Content-Length", "")
        if response.status == 200 and length.isdecimal() and int(length) != descriptor.size:
            raise EngineError(
                f"the {request.subject} has {length} bytes in the registry instead of {descriptor.size}",
                next_step="the copy in the registry is damaged: delete it there, and push again",
            )
        return response.status == 200

    def open_blob(self, descriptor: Descriptor) -> BinaryIO:
        """Open a blob as a stream. The download starts with the first read, and resumes if its connection breaks.

        Digest and size are checked at the end, so a reader that stops earlier has unverified bytes.

        Raises:
            EngineError: from a read: the blob does not exist, is damaged, or its connection breaks too often.
        """
        request = self._blob_request("GET", descriptor.digest, descriptor, {200})
        return chunk_stream(download(self._transport, request, descriptor))

    def put_blob(self, descriptor: Descriptor, open_stream: OpenStream) -> None:
        """Upload a blob unless the registry has it. A failed or interrupted upload is cancelled at the registry.

        Raises:
            EngineError: the bytes differ from the descriptor.
        """
        if self.has_blob(descriptor):
            return
        Upload(
            transport=self._transport,
            start=self._blob_request("POST", "uploads/", descriptor, {202}),
            descriptor=descriptor,
            open_stream=open_stream,
            is_stored=lambda: self.has_blob(descriptor),
            piece=self._piece,
        ).run()

    def mount_blob(self, descriptor: Descriptor, source_repository: str) -> bool:
        """Ask the registry to take a blob from another of its repositories, without an upload.

        Args:
            descriptor: describes the blob.
            source_repository: the `repository` of the other `ImageReference`.

        Returns:
            True if the blob is stored now. A registry may not support this, not have the blob, or not allow this user
            to read it. If it refuses the push as well, `put_blob` raises the error.
        """
        if self.has_blob(descriptor):
            return True
        query = urllib.parse.urlencode({"mount": descriptor.digest, "from": source_repository})
        request = self._blob_request("POST", f"uploads/?{query}", descriptor, {201, 202, 401, 403, 404, 405})
        request = replace(request, scope=f"{request.scope} repository:{source_repository}:pull")
        response = self._send(request)
        if response.status == 201:
            return True
        logger.info(
            "the registry does not mount the %s from %s: %d", request.subject, source_repository, response.status
        )
        if response.status == 202 and (location := response.headers.get("Location")):
            # It started an upload instead of mounting the blob.
            cancel(self._transport, resolve_location(response.url, location), request)
        return False

    def _send(self, request: Request) -> Response:
        """Send a request, and retry it."""
        wait_before_retry = retry_policy(self._transport.retry_delays, f"{request.method} {request.subject}")
        while True:
            try:
                return self._transport.send(request)
            except TransientError as error:
                wait_before_retry(error, 0)

    def _manifest_request(
        self, method: str, reference: str, expect: Collection[int], document: Document | None = None
    ) -> Request:
        if not is_tag(reference) and not is_digest(reference):
            raise BadInputError(
                f"{reference!r} is neither a tag nor a digest",
                next_step="name a tag, or a digest as sha256: and 64 hexadecimal digits",
            )
        return self._request(
            method,
            f"manifests/{reference}",
            f"manifest {reference}",
            actions={"GET": "pull", "HEAD": "pull", "PUT": "pull,push", "DELETE": "delete"}[method],
            expect=expect,
            headers={"Content-Type": document.media_type} if document else {"Accept": ", ".join(_MEDIA_TYPES)},
            body=document.raw if document else None,
        )

    def _blob_request(self, method: str, path: str, descriptor: Descriptor, expect: Collection[int]) -> Request:
        actions = "pull,push" if method == "POST" else "pull"
        return self._request(method, f"blobs/{path}", f"blob {descriptor.digest}", actions=actions, expect=expect)

    def _request(
        self, method: str, path: str, resource: str, *, actions: str, expect: Collection[int], **options: Any
    ) -> Request:
        return Request(
            method=method,
            url=f"/v2/{self._name}/{path}",
            subject=f"{resource} of {self.reference.familiar}",
            scope=f"repository:{self._name}:{actions}",
            expect=expect,
            **options,
        )


def _media_type(response: Response, subject: str) -> str:
    """Return the media type of a manifest: the Content-Type header, or the document's own if the header is generic.

    Raises:
        EngineError: the two differ (such a document can be read in two ways), or the media type is unknown.
    """
    header = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    try:
        own = json.loads(response.body).get("mediaType", "")
    except (ValueError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"the {subject} is not a manifest: {type(error).__name__}", next_step="check that the reference is an image"
        ) from error
    if header not in _MEDIA_TYPES and own in _MEDIA_TYPES:
        return str(own)
    if header not in _MEDIA_TYPES or (own and own != header):
        raise EngineError(
            f"the {subject} is sent as {header!r} and has the mediaType {own!r}; expected is one of "
            f"{', '.join(_MEDIA_TYPES)}",
            next_step="check that the reference is an image; push an image of Docker's schema 1 again",
        )
    return header
