"""The images of a request, and the limits on what one may ask."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one request may ask of the server.

    Args:
        megabytes: of its body, so of an image too.
        megapixels: of an image; a model's own limit holds if it is lower.
        images: in one request.
        seconds: until it is answered; the body must be there by then, too.
        requests: at work at the same time; others are told to try again.
    """

    megabytes: float = 10
    megapixels: float = 50
    images: int = 64
    seconds: float = 30
    requests: int = 64


async def images_of(request: Request, limits: Limits) -> list[tuple[str, BinaryIO]]:
    """The images of a request, with the names that the client gives them."""
    kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0]
    kind = kind.strip().lower()
    limited = Request(request.scope, _limited(request, limits))
    if kind == "application/octet-stream" or kind.startswith("image/"):
        return [("image", io.BytesIO(await limited.body()))]
    if kind != "multipart/form-data":
        how = "curl -F images=@photo.jpg, or an image as the body with Content-Type: image/jpeg"
        raise HTTPException(415, f"{kind}: send images as multipart/form-data ({how})")
    most = limits.images
    try:
        form = await limited.form(max_files=most, max_fields=most)
    except HTTPException as error:
        if error.detail.startswith("Too many"):
            raise HTTPException(413, f"more than {most} images in a request") from None
        raise
    uploads = [file for _, file in form.multi_items() if isinstance(file, UploadFile)]
    if not uploads:
        raise HTTPException(400, "no file in the form: curl -F images=@photo.jpg")
    return [(upload.filename or "image", upload.file) for upload in uploads]


def _limited(request: Request, limits: Limits) -> Receive:
    """Receives what the request does, until that is too much."""
    most, received = limits.megabytes * 1e6, 0
    refusal = HTTPException(413, f"more than {limits.megabytes:g} MB in a request")

    async def receive() -> Message:
        nonlocal received
        if int(request.headers.get("content-length", 0)) > most:
            raise refusal
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > most:
            raise refusal
        return message

    return receive


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """What `work` gives; it is cancelled if the client leaves first, or this is.

    Raises:
        ClientDisconnect: the client left.
    """

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(leaves())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
