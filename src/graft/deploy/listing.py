"""Which images a command is given: files, folders, patterns, and a list on standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from graft.data.sources.walk import is_image_name, is_junk, walk

LIST = "-"  # the argument that stands for paths on standard input


def takes_texts(model: Path) -> bool:
    """Whether it is a run folder whose model takes texts."""
    return (model / "tokenizer.json").is_file() and (model / "run.json").is_file()


class Paths:
    """Paths of images in the order given, what is in a folder sorted; none is kept.

    Files that are named are taken for images whatever their name. Of folders, and of patterns,
    which are for shells that do not fill in so many names, those with an image's extension are.

    Args:
        arguments: files, folders, patterns (`photos/**/*.jpg`), or `-`.
        standard_input: where `-` reads a path from each line.

    Attributes:
        left_out: how many files of folders were no images by their extension.

    Raises:
        ValueError: an argument that leads to nothing.
    """

    def __init__(self, arguments: Sequence[str], standard_input: BinaryIO | None = None) -> None:
        self.arguments = arguments
        self.standard_input = standard_input or sys.stdin.buffer
        self.left_out = 0
        for argument in arguments:
            if argument == LIST or os.path.lexists(argument):
                continue
            if not glob.has_magic(argument):
                raise ValueError(f"{argument}: no such file or folder")
            if next(self._of_pattern(argument), None) is None:
                raise ValueError(f"{argument}: matches no image")

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(path, why it is no file): what is given and cannot be read is not left out."""
        self.left_out = 0
        for argument in self.arguments:
            if argument == LIST:
                yield from self._of_list()
            elif os.path.lexists(argument):
                yield from self._of_path(argument)
            else:
                yield from self._of_pattern(argument)

    def _of_path(self, path: str) -> Iterator[tuple[str, str]]:
        if os.path.isdir(path):  # noqa: PTH112
            yield from self._of_folder(path)
        else:
            yield path, ""

    def _of_folder(self, folder: str) -> Iterator[tuple[str, str]]:
        top = folder.rstrip("/") if folder.strip("/") else "/."
        for path, _, why in walk("", top, lambda name: None, lenient=True):
            if why or is_image_name(path):
                yield path, why
            else:
                self.left_out += 1

    def _of_pattern(self, pattern: str) -> Iterator[tuple[str, str]]:
        deep = "**" in pattern  # such a pattern matches what is in folders, too
        parts = pattern.split("/")
        named = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        for path in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207
            if any(map(is_junk, filter(None, path.split("/")[named:]))):
                continue
            if os.path.isdir(path):  # noqa: PTH112
                if not deep:
                    yield from self._of_folder(path)
            elif is_image_name(path):
                yield path, ""

    def _of_list(self) -> Iterator[tuple[str, str]]:
        for line in self.standard_input:
            path = os.fsdecode(line.removesuffix(b"\n"))
            if path.endswith("\r") and not os.path.lexists(path):  # a list from Windows
                path = path[:-1]
            if path and "\0" not in path:
                yield from self._of_path(path)
            elif path:
                yield path, "no path: it holds a zero byte (one path a line)"
