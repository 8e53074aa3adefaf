"""`graft serve`: a model over HTTP, on this machine unless told otherwise."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import math
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from graft.commands import Parser, errors_in_one_line
from graft.config.names import visible
from graft.config.words import plural
from graft.deploy.artefact import open_model
from graft.deploy.spec import Model
from graft.runs.trust import add_trust

NEEDED = ("starlette", "uvicorn", "python_multipart")
GRACE = 5  # seconds that requests have to end after Ctrl-C


def main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="graft serve",
        description="Serve a model over HTTP: a page to try it, POST /predict, /openapi.json.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run folder or exported file")
    option = parser.add_argument
    option("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    option("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    option("--top", type=_count, default=5, metavar="K", help="classes per answer (default: 5)")
    option(
        "--max-megabytes", type=_amount, default=10, metavar="MB", help="of a request (default: 10)"
    )
    option(
        "--timeout", type=_amount, default=30, metavar="SECONDS", help="of a request (default: 30)"
    )
    option("--batch-size", type=_count, default=32, metavar="N", help="run together (default: 32)")
    option("--device", metavar="D", help="cpu, cuda, ... (default: a GPU where there is one)")
    add_trust(parser)
    given = parser.parse_args(arguments)
    with errors_in_one_line():
        serve(given)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number above 0")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return value


def serve(given: argparse.Namespace) -> None:
    """Until it is stopped.

    Raises:
        ValueError: no model, one that fails, or an extra is missing.
        OSError: the address cannot be listened at.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f'graft serve needs {missing[0]}: pip install "graft[serve]"')
    # Before the model is read: a port that is taken is known at once.
    with listening(given.host, given.port) as listener:
        model = open_model(given.model, device=given.device)
        run(model, listener, given)


def run(model: Model, listener: socket.socket, given: argparse.Namespace) -> None:
    import uvicorn

    from graft.deploy.requests import Limits
    from graft.deploy.server import Service

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """As uvicorn's, but the signal is not raised again: being stopped is no failure."""
            signals = (signal.SIGINT, signal.SIGTERM)
            before = {number: signal.signal(number, self.handle_exit) for number in signals}
            yield
            for number, handler in before.items():
                signal.signal(number, handler)

    spec = model.spec
    side = spec.input_size or (spec.stored.resize_size,) * 2
    model.predict_rows(np.zeros((1, 3, *side), np.uint8))  # fails now, or is quick from now on
    local = is_local(given.host)
    names = ["localhost", "127.0.0.1", "[::1]", _bracketed(given.host)]
    service = Service(
        model,
        Limits(megabytes=given.max_megabytes, seconds=given.timeout),
        top=given.top,
        batch_size=given.batch_size,
        hosts=names if local else None,
    )
    one, many = ("class", "classes") if spec.output_kind == "classes" else ("output", "outputs")
    outputs = plural(len(spec.classes), one, many)
    port = listener.getsockname()[1]
    if not local:
        print(f"note: --host {given.host}: whoever can reach this machine can use the model, and")
        print("      read its class names; there is no password and no encryption")
    address = f"http://{_bracketed(given.host)}:{port}"
    print(f"{visible(given.model.name)} ({outputs}): {address} (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(
        service.app,
        log_config=None,
        log_level="critical",  # our own log says what a model does wrong
        access_log=False,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )
    try:
        Server(config).run([listener])
    finally:
        service.close()
    print(f"stopped after {plural(service.answered, 'image')}")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises:
        ValueError: the port is none, or taken, or the address is not one of this machine.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port}: must be from 0 to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = f"--port {port} is taken: another number, or --port 0 for any that is free"
        else:
            reason = str(error.strerror).partition(" (while")[0]  # it repeats the address
            why = f"--host {host} --port {port}: {reason}"
        raise ValueError(f"cannot listen there: {why}") from error


def is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
