"""Texts as rows of token ids: made once for each tokenizer, and kept."""

from __future__ import annotations

import csv
import hashlib
import io
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from graft.config.names import visible
from graft.data.sources.base import Source, Splits, open_entry, read_entry, save_items, seal
from graft.storage.digests import content_digest
from graft.storage.npy import NpyWriter, locked, writing
from graft.storage.reading import read_bytes
from graft.transforms.text import TextInputs, TextPreprocessing

FORMAT = 1  # of what is kept; another one is made anew
MOST_BYTES = 4 << 30  # of a file
AT_ONCE = 10_000  # texts that are tokenised together
SPLITS = ("train", "val", "test")


class StoredTexts(Source):
    """What sources of texts share: their rows are in the folder `cache`."""

    inputs = TextInputs

    def __init__(self, root: str | Path, cache: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.cache = Path(cache).expanduser().absolute()

    @cached_property
    def content(self) -> dict[Path, bytes]:
        """That of all files, which decides the name of the entry."""
        return {path: read_bytes(path, MOST_BYTES) for path in self._files()}

    @abstractmethod
    def _files(self) -> list[Path]:
        """Raises an OSError or ValueError that says what to do if there are none."""

    @abstractmethod
    def _options(self) -> tuple[Any, ...]:
        """What decides the rows beside files and tokenizer."""

    @abstractmethod
    def _build(self, folder: Path, preprocessing: TextPreprocessing) -> None:
        """Write the entry."""

    def _entry(self, preprocessing: TextPreprocessing) -> Path:
        p = preprocessing
        parts = (FORMAT, type(self).__name__, self._options(), p.tokenizer, p.length)
        digest = hashlib.sha256(repr(parts).encode())
        for path, content in self.content.items():
            digest.update(f"{path.name}\0{len(content)}\n".encode() + content)
        return self.cache / f"texts-{digest.hexdigest()[:32]}"

    def prepare(self, preprocessing: TextPreprocessing) -> None:
        entry = self._entry(preprocessing)
        if read_entry(entry) is None:
            with locked(self.cache / f"{entry.name}.lock"):
                # Another process may have built it while this one waited.
                if read_entry(entry) is None:
                    with writing(entry) as folder:
                        self._build(folder, preprocessing)

    def load(self, preprocessing: TextPreprocessing) -> Splits:
        return open_entry(self._entry(preprocessing))


class TextTable(StoredTexts):
    """A CSV file, or a folder with train.csv and perhaps val.csv and test.csv: a text and its class
    in each line.

    Args:
        root: the file or the folder.
        text, label: the names of the columns.

    Raises:
        ValueError: a line that cannot be used, by its number.
    """

    def __init__(
        self, root: str | Path, cache: str | Path, text: str = "text", label: str = "label"
    ) -> None:
        super().__init__(root, cache)
        self.columns = (text, label)

    def _files(self) -> list[Path]:
        if not self.root.is_dir():
            return text_files(self.root)
        found = [self.root / f"{split}.csv" for split in SPLITS]
        if not found[0].is_file():
            raise FileNotFoundError(
                f"{visible(str(self.root))}: no train.csv in this folder; data.root= is that "
                "folder, or one CSV file that splits are drawn from"
            )
        return [path for path in found if path.is_file()]

    def _options(self) -> tuple[Any, ...]:
        return self.columns

    def _build(self, folder: Path, preprocessing: TextPreprocessing) -> None:
        tables = {path: [*self._lines(path)] for path in self.content}
        classes = sorted({label for lines in tables.values() for _, label in lines})
        encoded = {path: [*_encoded(lines, preprocessing)] for path, lines in tables.items()}
        longest = max(len(ids) for texts in encoded.values() for ids, _ in texts)
        width = min(-(-longest // 16) * 16, preprocessing.length)
        cut = 0
        for path, lines in tables.items():
            split = "train" if len(tables) == 1 else path.stem
            labels = [classes.index(label) for _, label in lines]
            digests = [content_digest("\0".join(line).encode()) for line in lines]
            cut += sum(was_cut for _, was_cut in encoded[path])
            save_rows(folder, split, [ids for ids, _ in encoded[path]], width, preprocessing)
            save_items(folder, split, labels, digests)
        seal(folder, classes, decoding=_tokens_of(preprocessing), cut=cut)

    def _lines(self, path: Path) -> Iterator[tuple[str, str]]:
        shown = visible(str(path))
        reader = csv.reader(io.StringIO(decoded(path, self.content[path]), newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
        for name in self.columns:
            if header.count(name) != 1:
                raise ValueError(
                    f"{shown}: {header.count(name) or 'no'} column {visible(name)}; it has "
                    f"{visible(', '.join(header)) or 'none'}: data.source.text= and "
                    "data.source.label= name the columns of the text and its class"
                )
        places = [header.index(name) for name in self.columns]
        some = False
        try:
            for cells in reader:
                if not cells:
                    continue
                where = f"{shown}, line {reader.line_num}"
                if len(cells) != len(header):
                    raise ValueError(f"{where}: {len(cells)} cells under {len(header)} columns")
                text, label = (cells[place].strip() for place in places)
                if not text or not label:
                    raise ValueError(f"{where}: no {self.columns[bool(text)]} in it")
                some = True
                yield text, label
        except csv.Error as error:
            raise ValueError(f"{shown}, line {reader.line_num}: {error}") from error
        if not some:
            raise ValueError(f"{shown}: no texts in it")


def _encoded(
    lines: Sequence[tuple[str, str]], preprocessing: TextPreprocessing
) -> Iterator[tuple[list[int], bool]]:
    texts = iter([text for text, _ in lines])
    while some := [*islice(texts, AT_ONCE)]:
        yield from preprocessing.encode(some)


def _tokens_of(preprocessing: TextPreprocessing) -> str:
    """What makes tokens of texts, in short: see `Split.decoding`."""
    digest = hashlib.sha256(preprocessing.tokenizer.encode()).hexdigest()[:16]
    return f"{preprocessing.length} tokens by {digest}"


def save_rows(
    folder: Path,
    split: str,
    texts: Sequence[Sequence[int]],
    width: int,
    preprocessing: TextPreprocessing,
) -> None:
    with NpyWriter(folder / f"{split}-images.npy", (width,), np.int32) as file:
        for start in range(0, len(texts), AT_ONCE):
            file.append(preprocessing.rows(texts[start : start + AT_ONCE], width))


def text_files(path: Path) -> list[Path]:
    """A file, or those of a folder that end in .txt or .csv, in the order of their names."""
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".csv"))
        if not found:
            raise ValueError(f"{visible(str(path))}: no text files (.txt, .csv) in this folder")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{visible(str(path))}: no such file or folder of texts")
    return [path]


def lines_of(text: str) -> list[str]:
    """As an editor counts them: str.splitlines ends lines at a dozen other characters too."""
    return text.replace("\r\n", "\n").split("\n")


def decoded(path: Path, content: bytes) -> str:
    """Raises a ValueError, with the line, for what is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{visible(str(path))}, line {line}: not UTF-8 (byte {content[error.start]:#x}): save "
            "the file as UTF-8"
        ) from error
