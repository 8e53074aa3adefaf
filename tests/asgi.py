"""Requests to an ASGI application without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message

BOUNDARY = "----graft"


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def request(
    app: ASGIApp,
    method: str,
    path: str,
    chunks: Iterable[bytes] = (),
    headers: Mapping[str, str] | None = None,
    then: Callable[[], Awaitable[Any]] | None = None,
) -> Answer:
    """Sends the chunks one by one, as they are asked for.

    Args:
        then: awaited before the client leaves; without it the client stays.
    """
    answer, parts = Answer(), iter(chunks)
    named = {"host": "localhost", **(headers or {})}

    async def receive() -> Message:
        if (part := next(parts, None)) is not None:
            return {"type": "http.request", "body": part, "more_body": True}
        if not ended:
            ended.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        await (then() if then else asyncio.Event().wait())
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        answer.body += message.get("body", b"")

    ended: list[bool] = []
    scope = {
        "type": "http", "http_version": "1.1", "scheme": "http", "server": ("localhost", 80),
        "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(k.lower().encode(), v.encode()) for k, v in named.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    return answer


def form(files: Iterable[tuple[str, bytes]], field: str = "images") -> tuple[bytes, dict[str, str]]:
    """The body of a form with files, and its headers."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
        .encode() + content + b"\r\n"
        for name, content in files
    ]  # fmt: skip
    body = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    return body, {
        "content-type": f"multipart/form-data; boundary={BOUNDARY}",
        "content-length": str(len(body)),
    }
