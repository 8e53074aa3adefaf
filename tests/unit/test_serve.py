"""The server: what it answers, and what it refuses, without a network."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from graft import __version__
from graft.commands import serve as command
from graft.data.sources.decode import Reading
from graft.deploy.batching import Batcher, ModelError
from graft.deploy.images import read_image
from graft.deploy.model import load
from graft.deploy.openapi import openapi
from graft.deploy.requests import Limits
from graft.deploy.server import Service
from graft.deploy.spec import Spec
from graft.transforms.preprocessing import Preprocessing
from tests.asgi import Answer, form, request
from tests.conftest import Graft, Train

SIZES = Preprocessing(resize_size=16, crop_size=16)


class Fake:
    """Its first two outputs are an image's red and green, the third is 0.25."""

    def __init__(self, kind: Any = "classes") -> None:
        self.spec = Spec(["red", "green", "none"], kind, SIZES, SIZES, Reading())
        self.gate, self.started = threading.Event(), threading.Event()
        self.gate.set()
        self.batches: list[tuple[int, ...]] = []

    def predict_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.batches.append(images.shape)
        self.started.set()
        assert self.gate.wait(30)
        if (images[:, 2] == 255).all((1, 2)).any():
            raise RuntimeError("blue images are too much")
        colours = images[:, :2].mean((2, 3)).astype(np.float32) / 256
        colours[(images[:, 2] == 254).all((1, 2))] = np.nan
        return np.c_[colours, np.full(len(images), 0.25, np.float32)]

    def embed_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise NotImplementedError


def png(red: int = 0, green: int = 0, blue: int = 0, side: int = 4) -> bytes:
    return encoded(Image.new("RGB", (side, side), (red, green, blue)))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def expected(red: int, green: int) -> list[dict[str, Any]]:
    named = [("red", red / 256), ("green", green / 256), ("none", 0.25)]
    named.sort(key=lambda one: -one[1])
    return [{"class": name, "probability": value} for name, value in named]


Serve = Callable[..., Service]


@pytest.fixture
def serve() -> Iterator[Serve]:
    services: list[Service] = []

    def call(model: Any, top: int = 3, hosts: list[str] | None = None, **limits: Any) -> Service:
        services.append(Service(model, Limits(**limits), top=top, hosts=hosts))
        return services[-1]

    yield call
    for service in services:
        service.close()


def ask(service: Service, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.run(request(service.app, method, path, [body], named))


def post(service: Service, *files: bytes, name: str = "a.png") -> Answer:
    body, headers = form([(name, file) for file in files])
    return asyncio.run(request(service.app, "POST", "/predict", [body], headers))


def posting(service: Service, file: bytes, **more: Any) -> Coroutine[Any, Any, Answer]:
    body, headers = form([("a.png", file)])
    return request(service.app, "POST", "/predict", [body], headers, **more)


async def waiting(service: Service, images: int) -> None:
    async with asyncio.timeout(30):
        while len(service.batcher) < images:
            await asyncio.sleep(0.001)


def test_answers_are_those_of_the_model_on_the_file(
    serve: Serve, train_tiny: Train, image_folders: Path
) -> None:
    model = load(train_tiny().folder, device="cpu")
    service = serve(model, top=4)
    files = sorted(image_folders.glob("test/*/[01].jpg"))
    with Image.open(files[0]) as image:
        image.resize((70, 50)).save(files[0])
    for path in files:
        (outputs,) = model.predict_rows(read_image(path, model.spec)[None])
        (answer,) = post(service, path.read_bytes(), name=path.name).json["predictions"]
        assert answer["name"] == path.name
        assert answer["class"] == model.classes[outputs.argmax()]
        assert answer["probability"] == float(outputs.max())
        found = {one["class"]: one["probability"] for one in answer["top"]}
        assert [found[name] for name in model.classes] == outputs.tolist()


def test_a_request_may_hold_many_images_and_each_has_its_answer_or_its_error(serve: Serve) -> None:
    service = serve(Fake(), top=2)
    strange = "<img src=x onerror=alert(1)>.png"
    files = [("a.png", png(200, 20)), ("b.png", b"not one"), (strange, png(10, 100, side=9)),
             ("c.jpg", encoded(Image.new("L", (50, 20)), "JPEG")[:-200]), ("", b"")]  # fmt: skip
    body, headers = form(files, field="anything")
    answer = asyncio.run(request(service.app, "POST", "/predict", [body], headers))
    assert answer.status == 200
    red, bad, green, cut, empty = answer.json["predictions"]
    assert red == {"name": "a.png", **expected(200, 20)[0], "top": expected(200, 20)[:2]}
    assert green == {"name": strange, **expected(10, 100)[0], "top": expected(10, 100)[:2]}
    assert bad["name"] == "b.png"
    assert bad["error"].startswith("not an image in a format that can be read")
    assert "truncated" in cut["error"].lower()
    assert empty["name"] == "image"
    assert empty.keys() == {"name", "error"}


def test_an_image_may_be_the_body(serve: Serve) -> None:
    service = serve(Fake())
    for kind in ("image/png", "application/octet-stream", "IMAGE/x; a=b"):
        answer = ask(service, "POST", "/predict", png(200), content_type=kind)
        assert answer.json["predictions"][0]["top"] == expected(200, 0)
    assert ask(service, "POST", "/predict", png(200)).status == 200
    answer = ask(service, "POST", "/predict", png(200), content_type="text/plain")
    assert answer.status == 415
    assert "curl -F images=@photo.jpg" in answer.json["error"]


def test_what_has_no_readable_image_is_a_bad_request(serve: Serve) -> None:
    service = serve(Fake())
    answer = post(service, b"no", b"no image")
    assert answer.status == 400
    assert answer.json["error"] == "no image could be read"
    assert len(answer.json["predictions"]) == 2
    assert post(service).json == {"error": "no file in the form: curl -F images=@photo.jpg"}
    kind = "multipart/form-data; boundary=x"
    for body in (b"--x", b"--x\r\nno: name\r\n\r\n\r\n--x--", b"\0" * 100):
        assert ask(service, "POST", "/predict", body, content_type=kind).status == 400
    no_boundary = ask(service, "POST", "/predict", b"--x", content_type="multipart/form-data")
    assert no_boundary.status == 400
    assert "boundary" in no_boundary.json["error"]


@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=x"])
def test_a_body_is_read_no_further_than_it_may_be_long(serve: Serve, kind: str) -> None:
    service = serve(Fake(), megabytes=0.1)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n'
        while True:
            sent += 1
            yield b"0" * 1000

    headers = {"content-type": kind}
    answer = asyncio.run(request(service.app, "POST", "/predict", endless(), headers))
    assert answer.status == 413
    assert answer.json == {"error": "more than 0.1 MB in a request"}
    assert sent <= 101
    sent = 0
    headers["content-length"] = "100001"
    answer = asyncio.run(request(service.app, "POST", "/predict", endless(), headers))
    assert (answer.status, sent) == (413, 0)


def test_images_of_a_request_are_counted(serve: Serve) -> None:
    service = serve(Fake(), images=3)
    assert post(service, *[png()] * 3).status == 200
    answer = post(service, *[png()] * 4)
    assert answer.status == 413
    assert answer.json == {"error": "more than 3 images in a request"}


def test_images_that_grow_without_bounds_are_refused(serve: Serve) -> None:
    service = serve(Fake(), megapixels=1)
    bomb, strip = (encoded(Image.new("1", size)) for size in ((6_000, 5_000), (70_000, 1)))
    scans = encoded(Image.new("L", (8, 8)), "JPEG") + b"\xff\xda" * 1000
    large = encoded(Image.new("L", (1001, 1000)))
    reasons = [one["error"] for one in post(service, bomb, strip, scans, large).json["predictions"]]
    assert reasons == [
        "6000 x 5000 are 30 megapixels, more than this server reads",
        "70000 x 1: too long a strip, it is 1120000 x 16 if resized",
        "a JPEG of more than 200 scans",
        "1001 x 1000 are 1 megapixels, more than this server reads",
    ]
    assert post(service, encoded(Image.new("L", (1000, 1000)))).status == 200


def test_bytes_that_mark_a_scan_are_counted_in_a_jpeg_alone(serve: Serve) -> None:
    """In other formats they are colours: here every pixel has them."""
    image = Image.new("RGB", (60, 60), (0xFF, 0xDA, 0))
    answer = post(serve(Fake()), encoded(image, "PPM"))
    assert answer.status == 200


def test_other_methods_and_paths_are_json_errors_and_head_works(serve: Serve) -> None:
    service = serve(Fake())
    answer = ask(service, "GET", "/predict")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert answer.json == {"error": "Method Not Allowed"}
    assert ask(service, "DELETE", "/health").status == 405
    for path in ("/nothing", "/predict/", "/../etc/passwd", "/page.html"):
        answer = ask(service, "GET", path)
        assert (answer.status, answer.json) == (404, {"error": "Not Found"})
    for path in ("/", "/health", "/metadata", "/openapi.json"):
        assert ask(service, "HEAD", path).status == 200


def test_only_names_of_this_machine_are_answered(serve: Serve) -> None:
    service = serve(Fake(), hosts=["localhost", "127.0.0.1", "[::1]"])
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert ask(service, "GET", "/health", host=host).status == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", ""):
        assert ask(service, "GET", "/health", host=host).status == 400


def test_many_requests_share_batches_and_each_gets_its_own_answer(serve: Serve) -> None:
    model = Fake()
    service = serve(model, requests=100)
    model.gate.clear()

    async def all_at_once() -> list[Answer]:
        tasks = []
        for i in range(90):
            file = png(2 * i, 200 - 2 * i, side=4 + i % 2)
            tasks.append(asyncio.create_task(posting(service, file)))
            if i == 0:  # it is with the model, which waits for the gate, while others gather
                await asyncio.to_thread(model.started.wait, 30)
        await waiting(service, 89)
        model.gate.set()
        return await asyncio.gather(*tasks)

    for i, answer in enumerate(asyncio.run(all_at_once())):
        assert answer.json["predictions"][0]["top"] == expected(2 * i, 200 - 2 * i)
    sizes = [shape[0] for shape in model.batches]
    assert sum(sizes) == 90
    assert max(sizes) == 32
    assert len(sizes) <= 5


def test_a_client_that_leaves_takes_its_image_along_and_no_other(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    model = Fake()
    service = serve(model)
    model.gate.clear()

    async def with_leaver() -> tuple[Answer, Answer, Answer]:
        first = asyncio.create_task(posting(service, png(10)))
        await asyncio.to_thread(model.started.wait, 30)
        left = asyncio.Event()
        leaver = asyncio.create_task(posting(service, png(20), then=left.wait))
        stays = asyncio.create_task(posting(service, png(30)))
        await waiting(service, 2)
        left.set()
        gone = await leaver
        model.gate.set()
        return await first, gone, await stays

    first, gone, stays = asyncio.run(with_leaver())
    assert first.json["predictions"][0]["top"] == expected(10, 0)
    assert stays.json["predictions"][0]["top"] == expected(30, 0)
    assert gone.body == b""
    assert [shape[0] for shape in model.batches] == [1, 1]
    assert service.busy == 0
    gc.collect()
    assert caplog.records == []  # asyncio complains of errors that nobody took


def test_a_failure_of_the_model_is_of_its_batch_alone(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    service = serve(Fake())
    answer = post(service, png(blue=255))
    assert answer.status == 500
    assert answer.json == {"error": "the model failed on this image: the server's log says why"}
    assert "blue images are too much" in caplog.text
    assert post(service, png(7)).json["predictions"][0]["top"] == expected(7, 0)
    answer = post(service, png(blue=254), png(7))
    unfit, fine = answer.json["predictions"]
    assert unfit == {"name": "a.png", "error": "the model's outputs for it are not finite numbers"}
    assert fine["top"] == expected(7, 0)


def test_slow_requests_end(serve: Serve) -> None:
    model = Fake()
    service = serve(model, seconds=0.05)

    async def never() -> Answer:
        async def receive() -> Any:
            await asyncio.Event().wait()

        return await request(lambda s, _, send: service.app(s, receive, send), "POST", "/predict")

    answer = asyncio.run(never())
    assert (answer.status, answer.json) == (408, {"error": "no whole request in 0.05 s"})
    model.gate.clear()
    answer = post(service, png())
    assert answer.status == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json["error"].startswith("no answer in 0.05 s")
    model.gate.set()
    assert service.busy == 0


def test_more_requests_than_it_takes_are_told_to_come_again(serve: Serve) -> None:
    model = Fake()
    service = serve(model, requests=1)
    model.gate.clear()

    async def two() -> tuple[Answer, Answer]:
        first = asyncio.create_task(posting(service, png(9)))
        await asyncio.to_thread(model.started.wait, 30)
        second = await posting(service, png())
        model.gate.set()
        return await first, second

    first, second = asyncio.run(two())
    assert first.json["predictions"][0]["top"] == expected(9, 0)
    assert (second.status, second.headers["retry-after"]) == (503, "1")
    assert post(service, png()).status == 200


def test_labels_and_numbers_have_answers_of_their_own(serve: Serve) -> None:
    (answer,) = post(serve(Fake("labels"), top=2), png(200, 150)).json["predictions"]
    assert answer == {
        "name": "a.png", "labels": ["red", "green"], "top": expected(200, 150)[:2],
    }  # fmt: skip
    (answer,) = post(serve(Fake("numbers")), png(64, 32)).json["predictions"]
    assert answer == {"name": "a.png", "numbers": {"red": 0.25, "green": 0.125, "none": 0.25}}


def test_metadata_tells_of_the_model_and_not_of_the_machine(serve: Serve) -> None:
    model = Fake()
    model.spec.provenance.update(
        run="mine", metrics={"test/acc": 0.5, "test/loss": float("nan")}, root="/home/me/data"
    )
    found = ask(serve(model), "GET", "/metadata").json
    assert found["provenance"] == {"run": "mine", "metrics": {"test/acc": 0.5, "test/loss": None}}
    assert found["classes"] == ["red", "green", "none"]
    assert found["preprocessing"]["crop_size"] == 16


def fits(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> bool:
    """Whether a value is as a JSON schema says, of the words that ours uses."""
    if ref := schema.get("$ref"):
        return fits(value, schemas[ref.rpartition("/")[2]], schemas)
    if "anyOf" in schema:
        return any(fits(value, one, schemas) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float)}
    if not isinstance(value, kinds[schema["type"]]):  # type: ignore[arg-type]
        return False
    if schema["type"] == "array":
        return len(value) >= schema.get("minItems", 0) and all(
            fits(one, schema["items"], schemas) for one in value
        )
    if schema["type"] == "object":
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        return set(schema.get("required", ())) <= value.keys() and all(
            fits(one, known[key], schemas) if key in known
            else others is not False and (not others or fits(one, others, schemas))
            for key, one in value.items()
        )  # fmt: skip
    return schema["type"] == "string" or (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
    )


def test_the_interface_is_as_it_is_described(serve: Serve) -> None:
    service = serve(Fake(), megabytes=0.1)
    described = ask(service, "GET", "/openapi.json").json
    assert described == openapi(__version__)
    schemas = described["components"]["schemas"]

    def check(answer: Answer, path: str, method: str = "get") -> None:
        responses = described["paths"][path][method]["responses"]
        schema = responses[str(answer.status)]["content"]["application/json"]["schema"]
        assert fits(answer.json, schema, schemas), (path, answer)
        assert not fits({"other": 1}, schema, schemas)

    for path in ("/health", "/metadata"):
        check(ask(service, "GET", path), path)
    answers = [
        post(service, png(), b"no"), post(service, b"no"), post(service, png(blue=255)),
        post(service, bytes(200_000)), ask(service, "POST", "/predict", content_type="text/x"),
        post(serve(Fake(), requests=0), png()), post(serve(Fake("labels")), png(200)),
        post(serve(Fake("numbers")), png(), b"no"),
    ]  # fmt: skip
    statuses = [answer.status for answer in answers]
    assert statuses == [200, 400, 500, 413, 415, 503, 200, 200]
    for answer in answers:
        check(answer, "/predict", "post")
    routes = {route.path for route in service.app.routes}  # type: ignore[attr-defined]
    assert routes - {"/openapi.json"} == described["paths"].keys()


def test_the_page_asks_for_nothing_from_elsewhere(serve: Serve) -> None:
    answer = ask(serve(Fake()), "GET", "/")
    page, policy = answer.body.decode(), answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http://" not in page
    assert "https://" not in page
    assert "innerHTML" not in page


def test_what_waits_is_cancelled_when_the_server_closes() -> None:
    model = Fake()
    model.gate.clear()
    batcher = Batcher(model, 1)
    images = [np.full((3, 2, 2), value, np.uint8) for value in (1, 2)]
    runs = batcher.submit(images[0])
    assert model.started.wait(30)
    waits = batcher.submit(images[1])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while not waits.cancelled():
        pass
    model.gate.set()
    closing.join(30)
    assert runs.result(30).tolist() == [1 / 256, 1 / 256, 0.25]
    assert batcher.submit(images[0]).cancelled()


def test_an_image_that_fails_takes_no_other_with_it() -> None:
    model = Fake()
    model.gate.clear()
    batcher = Batcher(model, 4)
    images = [np.zeros((3, 2, 2), np.uint8) for _ in range(3)]
    images[1][2] = 255
    first = batcher.submit(images[0])
    assert model.started.wait(30)
    good, bad = batcher.submit(images[0]), batcher.submit(images[1])  # one batch, after the first
    model.gate.set()
    assert first.result(30).tolist() == good.result(30).tolist() == [0, 0, 0.25]
    with pytest.raises(ModelError):
        bad.result(30)
    batcher.close()


def test_a_model_that_loses_rows_fails() -> None:
    model = Fake()
    model.predict_rows = lambda images: np.zeros((0, 3), np.float32)  # type: ignore[method-assign]
    batcher = Batcher(model, 4)
    with pytest.raises(ModelError):
        batcher.submit(np.zeros((3, 2, 2), np.uint8)).result(30)
    batcher.close()


def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, graft: Graft, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = graft("serve", str(tmp_path), "--port", port)
    assert done.returncode == 1
    assert done.stderr == (
        f"graft: error: cannot listen there: --port {port} is taken: another number, or --port 0 "
        "for any that is free\n"
    )
    wrong = {
        ("--port", "70000"): "--port 70000: must be from 0 to 65535\n",
        ("--port", "0"): f"{tmp_path} is not a run folder: it has no config.yaml and run.json\n",
        ("--top", "0"): "--top: 0: must be a whole number above 0 (see graft serve --help)\n",
        ("--timeout", "inf"): "--timeout: inf: must be a number above 0 (see graft serve --help)\n",
    }
    for arguments, message in wrong.items():
        done = graft("serve", str(tmp_path), *arguments)
        assert (done.returncode, done.stderr) == (1, f"graft: error: {message}")
    monkeypatch.setattr(command, "NEEDED", ("graft_no_such_package",))
    done = graft("serve", str(tmp_path))
    assert done.stderr == (
        'graft: error: graft serve needs graft_no_such_package: pip install "graft[serve]"\n'
    )


def test_local_addresses_are_known() -> None:
    assert all(map(command.is_local, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(command.is_local, ("0.0.0.0", "::", "192.168.1.2", "example.org", "")))
    assert json.dumps(openapi("1"))
