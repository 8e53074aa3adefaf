"""A model behind HTTP: a page for people, JSON for programs, limits for everybody.

What a client sends is data: it is read by the decoders that training images take, held in memory
or in starlette's temporary file, and its names are only handed back.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from graft import __version__
from graft.deploy.answers import described, metadata
from graft.deploy.batching import Batcher, ModelError
from graft.deploy.images import read_image, reason
from graft.deploy.openapi import openapi
from graft.deploy.requests import Limits, images_of, unless_gone
from graft.deploy.spec import Model

log = logging.getLogger(__name__)

RETRY = {"Retry-After": "1"}
# Decoding a progressive JPEG takes its number of scans times as long; encoders write about ten.
JPEG, SCAN, MOST_SCANS = b"\xff\xd8", b"\xff\xda", 200


class Service:
    """Answers requests with a model; `close` it in the end.

    Args:
        top: how many classes an answer lists.
        hosts: names by which the server may be called, against web pages that point a name of
            their own at this machine; ["*"]: any.
    """

    def __init__(
        self,
        model: Model,
        limits: Limits,
        *,
        top: int = 5,
        batch_size: int = 32,
        hosts: list[str] | None = None,
    ) -> None:
        reading = model.spec.reading
        most = min(reading.max_megapixels, limits.megapixels)
        self.spec = replace(model.spec, reading=replace(reading, max_megapixels=most))
        self.limits, self.top, self.answered, self.busy = limits, top, 0, 0
        self.metadata = metadata(model.spec)
        self.page, self.policy = page()
        self.batcher = Batcher(model, batch_size)
        self.readers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "graft-reader")
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/predict", self._predict, methods=["POST"]),
                *(Route(f"/{name}", self._json) for name in ("health", "metadata", "openapi.json")),
            ],
            middleware=[Middleware(TrustedHostMiddleware, hosts or ["*"], www_redirect=False)],
            exception_handlers={
                HTTPException: _refused,
                ModelError: _failed,
                ClientDisconnect: _gone,
                Exception: _failed,
            },
        )
        self.app.router.redirect_slashes = False

    def close(self) -> None:
        self.batcher.close()
        self.readers.shutdown(wait=False, cancel_futures=True)

    async def _page(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": self.policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(self.page, headers=headers)

    async def _json(self, request: Request) -> Response:
        name = request.url.path
        if name == "/health":
            return JSONResponse({"status": "ready", "version": __version__})
        return JSONResponse(self.metadata if name == "/metadata" else openapi(__version__))

    async def _predict(self, request: Request) -> Response:
        if self.busy >= self.limits.requests:
            raise HTTPException(503, "too many requests at once: try again later", RETRY)
        self.busy += 1
        try:
            return await self._within_limits(request)
        finally:
            self.busy -= 1

    async def _within_limits(self, request: Request) -> Response:
        end = asyncio.get_running_loop().time() + self.limits.seconds
        try:
            async with asyncio.timeout_at(end):
                files = await images_of(request, self.limits)
        except TimeoutError:
            raise HTTPException(408, f"no whole request in {self.limits.seconds:g} s") from None
        try:
            async with asyncio.timeout_at(end):
                predictions = await unless_gone(self._predictions(files), request.receive)
        except TimeoutError:
            why = f"no answer in {self.limits.seconds:g} s: try again later, or with fewer images"
            raise HTTPException(503, why, RETRY) from None
        finally:
            for _, file in files:
                file.close()
        self.answered += len(predictions)
        if all("error" in one for one in predictions):
            body = {"error": "no image could be read", "predictions": predictions}
            return JSONResponse(body, 400)
        return JSONResponse({"predictions": predictions})

    async def _predictions(self, files: list[tuple[str, BinaryIO]]) -> list[dict[str, Any]]:
        return await asyncio.gather(*(self._prediction(name, file) for name, file in files))

    async def _prediction(self, name: str, file: BinaryIO) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(self.readers, self._read, file)
        if isinstance(image, str):
            return {"name": name, "error": image}
        outputs = await asyncio.wrap_future(self.batcher.submit(image))
        return {"name": name, **described(self.spec, outputs, self.top)}

    def _read(self, file: BinaryIO) -> NDArray[np.uint8] | str:
        """An image as the model takes it, or why it cannot be read."""
        try:
            content = file.read()
            if content.startswith(JPEG) and content.count(SCAN) > MOST_SCANS:
                return f"a JPEG of more than {MOST_SCANS} scans"
            return read_image(io.BytesIO(content), self.spec)
        except MemoryError:
            return "it takes more memory than there is"
        except Exception as error:  # PIL raises a dozen kinds
            setting = f"data.source.max_megapixels={self.spec.reading.max_megapixels:g}"
            return reason(error).replace(setting, "this server reads")


def page() -> tuple[str, str]:
    """The page and its Content-Security-Policy: its own style and script, its own server."""
    text = Path(__file__).with_name("page.html").read_text()

    def digest(tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    return text, (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; "
        f"style-src 'sha256-{digest('style')}'; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    known = isinstance(error, ModelError)
    if not known:
        log.error("a request failed", exc_info=error)
    return JSONResponse({"error": str(error) if known else "the server failed: see its log"}, 500)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
