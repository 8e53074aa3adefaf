"""`graft predict`: what a model says of images or texts. An exported ONNX model needs no torch."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from graft.commands import Parser
from graft.config.names import visible
from graft.config.words import plural
from graft.deploy.artefact import open_model
from graft.deploy.listing import LIST, Paths, takes_texts
from graft.deploy.predict import Row, predict
from graft.deploy.screen import FEW, Progress, Screen
from graft.deploy.spec import Model
from graft.deploy.writers import WRITERS, Columns, CsvWriter, Writer
from graft.runs.allowed import add_trust
from graft.storage.disk import replacing

BROKEN_PIPE = 128 + signal.SIGPIPE  # as a shell reports who was stopped by it


def main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="graft predict",
        description="What a model says of images or texts, a row for each: the class, its "
        "probability, and those of all classes (p_CLASS); labels above one half; or the predicted "
        "numbers.",
        epilog=f"Without --out, up to {FEW} images are printed as a table on a terminal; more, and "
        "everything that is piped, as CSV. Images that cannot be read are rows with an error; the "
        "exit status is then 1.",
    )
    option = parser.add_argument
    option("model", type=Path, metavar="MODEL", help="a run folder, or a file of graft export")
    option(
        "paths",
        nargs="*",
        metavar="PATH",
        help="images, folders of images at any depth, patterns ('photos/**/*.jpg'), or - for a "
        "list on standard input, a path a line; of a run on texts, files with a text a line",
    )
    option("--text", action="append", default=[], metavar="TEXT", help="a text, of a run on texts")
    option("--out", type=Path, metavar="FILE", help="write FILE: .csv, .jsonl or .parquet")
    option("--force", action="store_true", help="replace FILE if it is there")
    option("--top", type=_positive, default=0, metavar="K", help="the K likeliest classes, too")
    option("--embeddings", action="store_true", help="the features instead of predictions")
    option("--mirror", action="store_true", help="mean features of an image and its mirror image")
    option("--ckpt", default="best", help="best (default) or last of the last stage, or a file")
    option("--batch-size", type=_positive, metavar="N", help="default: 16, on a GPU 64")
    option("--device", metavar="D", help="cpu, cuda, cuda:1; default: a GPU where there is one")
    add_trust(parser)
    settings = parser.parse_intermixed_args(arguments)
    if not (settings.paths or settings.text):
        parser.error("name what is to be predicted: PATH, or --text TEXT for a run on texts")
    if settings.force and settings.out is None:
        parser.error("--force is for --out")
    if settings.embeddings and settings.top:
        parser.error("--top is for predictions, not for --embeddings")
    warnings.filterwarnings("ignore", module="PIL")  # odd metadata of images: their pixels count
    try:
        failed = _predict(settings)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python says at its end what was lost
        sys.exit(BROKEN_PIPE)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        from graft.config.resolved import explain

        sys.exit(f"graft: error: {explain(error)}")
    if failed:
        sys.exit(f"graft: error: {failed}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number above 0")
    return int(text)


def _predict(settings: argparse.Namespace) -> str:
    """What to say of images that could not be read; nothing if there are none."""
    out: Path | None = settings.out
    if out is not None:
        _check_out(out, settings.force)
    if settings.model.is_dir():
        from graft.runs.startup import import_libraries

        import_libraries()
    paths = None
    if settings.text or takes_texts(settings.model):
        kind, columns, batches = "text", *_of_texts(settings)
    else:
        paths = Paths(settings.paths)
        kind, columns, batches = "image", *_of_images(settings, paths)
    on_screen = out is None and sys.stdout.isatty()
    progress = Progress(silent=on_screen)
    unreadable: list[Row] = []
    failed = 0
    with _stopped_by_signals(), closing(batches):  # what is queued is not computed after an end
        first = next(batches, None)
        if first is None:
            places = ["standard input" if path == LIST else path for path in settings.paths]
            raise ValueError(f"no {kind}s in {', '.join(places)}")
        try:
            with _writer(out, columns) as writer:
                for rows in chain([first], batches):
                    writer.write(rows)
                    progress.add(len(rows))
                    bad = [row for row in rows if row.error]
                    failed += len(bad)
                    unreadable = unreadable or bad[:1]
                writer.close()
        except BaseException:
            progress.clear()
            raise
    progress.finish(f", in {visible(str(out))}" if out else "")
    if paths is not None and paths.left_out:
        left = plural(paths.left_out, "file")
        print(f"{left} left out, no image by the name's extension", file=sys.stderr)
    if not failed:
        return ""
    row = unreadable[0]
    return (
        f"{failed:,} of {plural(progress.done, kind)} could not be read, "
        f"first: {visible(row.path)}: {visible(row.error)}"
    )


def _of_images(settings: argparse.Namespace, paths: Paths) -> tuple[Columns, Generator[list[Row]]]:
    model = open_model(
        settings.model, ckpt=settings.ckpt, mirror=settings.mirror, device=settings.device
    )
    if settings.top and model.spec.output_kind == "numbers":
        raise ValueError("--top is for classes and labels: this model predicts numbers")
    columns = Columns(model.spec, settings.top, _width(model) if settings.embeddings else 0)
    return columns, predict(
        model, paths, embeddings=settings.embeddings, batch_size=settings.batch_size
    )


def _of_texts(settings: argparse.Namespace) -> tuple[Columns, Generator[list[Row]]]:
    if not settings.model.is_dir():
        raise ValueError(f"--text: {settings.model} is no run folder, and texts need one")
    if settings.mirror:
        raise ValueError("--mirror: texts have no mirror image")
    from graft.deploy.texts import TextModel, read_texts

    model = TextModel(settings.model, settings.ckpt, settings.device)
    features = model.backbone.num_features if settings.embeddings else 0

    def batches() -> Generator[list[Row]]:
        yield from model.rows(
            read_texts(settings.paths, settings.text),
            embeddings=settings.embeddings,
            batch_size=settings.batch_size,
        )
        if model.cut:
            most = model.preprocessing.length
            print(f"{plural(model.cut, 'text')} cut to {most} tokens", file=sys.stderr)

    return Columns(model.spec, settings.top, features, "text"), batches()


def _check_out(out: Path, force: bool) -> None:
    """Raises a ValueError now for what could not be written after all the work."""
    if out.suffix not in WRITERS:
        raise ValueError(f"--out {out}: must end in {', '.join(WRITERS)}")
    if out.exists() and not out.is_file():
        raise ValueError(f"--out {out}: there is something else of this name, not a file")
    if out.exists() and not force:
        raise ValueError(f"--out {out} exists: add --force to replace it")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: {out.parent} cannot be written to")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(f"--out {out} needs pyarrow: pip install 'graft[parquet]'")


def _width(model: Model) -> int:
    """How many features the model has."""
    side = model.spec.stored.resize_size
    height, width = model.spec.input_size or (side, side)
    return int(model.embed_rows(np.zeros((1, 3, height, width), np.uint8)).shape[1])


@contextmanager
def _writer(out: Path | None, columns: Columns) -> Iterator[Writer]:
    if out is None:
        yield (Screen if sys.stdout.isatty() else CsvWriter)(_Output(), columns)
        return
    with replacing(out) as file:
        yield WRITERS[out.suffix](file, columns)


class _Output:
    """Standard output for bytes of any kind; none is left in a buffer when it breaks."""

    def write(self, data: bytes) -> int:
        done = 0
        while done < len(data):
            done += os.write(sys.stdout.fileno(), data[done:])
        return done


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Signals that end the process clean up before."""

    def end(signum: int, frame: Any) -> NoReturn:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signum)

    before = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:
            before[signum] = signal.signal(signum, end)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
