"""Plain text files as pairs of texts, for BERT's two tasks (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graft.config.names import visible
from graft.config.words import plural
from graft.data.sources.base import save_items, seal
from graft.data.sources.texts import StoredTexts, decoded, lines_of, save_rows, text_files
from graft.storage.digests import content_digest
from graft.transforms.text import MaskedInputs, TextPreprocessing

CLASSES = ["next", "random"]
FEWEST = 2  # documents of a split: a random text is of another one
SHORT = 0.1  # of the pairs are shorter than they could be, as texts of other data are

Document = list[list[int]]
"""Token ids of each sentence."""


class TextCorpus(StoredTexts):
    """Text files with a sentence a line and an empty line between documents.

    A row is a pair: some sentences of a document, and for half of the rows those that follow them
    ("next"), for the other half a place of another document ("random"). No pair is made of
    documents of two splits.

    Args:
        root: a .txt file, or a folder of them.
        held_out: the share of documents for validation, and again for test.
        copies: how many times pairs are drawn from each document, each time other ones.
        seed: of these draws, not the run's.

    Raises:
        ValueError: too few documents, or texts of one sentence only.
    """

    inputs = MaskedInputs

    def __init__(
        self,
        root: str | Path,
        cache: str | Path,
        held_out: float = 0.05,
        copies: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__(root, cache)
        self.held_out, self.copies, self.seed = held_out, copies, seed

    def _files(self) -> list[Path]:
        return [path for path in text_files(self.root) if path.suffix != ".csv"]

    def _options(self) -> tuple[Any, ...]:
        return self.held_out, self.copies, self.seed

    def _build(self, folder: Path, preprocessing: TextPreprocessing) -> None:
        documents = [
            text
            for path, content in self.content.items()
            for text in _documents(decoded(path, content))
        ]
        held = max(FEWEST, round(self.held_out * len(documents)))
        if preprocessing.length < 8:
            raise ValueError(f"data.length={preprocessing.length}: a pair of texts needs 8 or more")
        if len(documents) >= 3 * FEWEST and len(documents) - 2 * held < FEWEST:
            raise ValueError(
                f"data.source.held_out={self.held_out}: leaves too few of "
                f"{plural(len(documents), 'document')} to train on"
            )
        if len(documents) < 3 * FEWEST:
            raise ValueError(
                f"{visible(str(self.root))}: {plural(len(documents), 'document')}: pairs for "
                f"training, validation and test need {3 * FEWEST}: separate documents by an empty "
                "line"
            )
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(len(documents))
        parts = {"val": order[:held], "test": order[held : 2 * held], "train": order[2 * held :]}
        for split, numbers in parts.items():
            room = preprocessing.length - 3  # for both texts: there are three special tokens
            half = room // 2  # a longer sentence becomes several
            encoded: list[Document] = [
                [ids[at : at + half] for ids in sentences for at in range(0, len(ids), half)]
                for sentences in (preprocessing.pieces(documents[i]) for i in sorted(numbers))
            ]
            pairs = [
                pair
                for _ in range(self.copies if split == "train" else 1)
                for pair in draw_pairs(encoded, room, rng)
            ]
            if not pairs:
                raise ValueError(
                    f"{visible(str(self.root))}: no document of {split} has two sentences: put "
                    "each sentence on a line of its own"
                )
            p = preprocessing
            rows = [[p.cls, *a, p.sep, *b, p.sep] for a, b, _ in pairs]
            digests = [content_digest(np.array(row, np.int32).data) for row in rows]
            save_rows(folder, split, rows, p.length, p)
            save_items(folder, split, [label for _, _, label in pairs], digests)
        seal(folder, CLASSES)


def _documents(text: str) -> Iterator[list[str]]:
    sentences: list[str] = []
    for line in (*lines_of(text), ""):
        if line.strip():
            sentences.append(line.strip())
        elif sentences:
            yield sentences
            sentences = []


def draw_pairs(
    documents: Sequence[Document], room: int, rng: np.random.Generator
) -> Iterator[tuple[list[int], list[int], int]]:
    """(text, text, label) of all documents: label 0 where the second text follows the first.

    Args:
        room: tokens of both texts together.
    """
    for number, document in enumerate(documents):
        start = 0
        while start < len(document) - 1:
            target = room if rng.random() >= SHORT else int(rng.integers(4, room + 1))
            end, tokens = start, 0
            while end < len(document) and (tokens < target or end - start < 2):
                tokens += len(document[end])
                end += 1
            middle = int(rng.integers(start + 1, end))
            first, second = _joined(document[start:middle]), _joined(document[middle:end])
            label = int(rng.random() < 0.5)
            start = end
            if label:
                start = middle  # what followed is used for the next pair
                other = int(rng.integers(len(documents) - 1))
                elsewhere = documents[other + (other >= number)]
                at = int(rng.integers(len(elsewhere))) if elsewhere else 0
                second = _joined(elsewhere[at:])
            second = second[: max(1, target - len(first))]
            if second:
                yield first[: target - 1], second, label


def _joined(sentences: Sequence[Sequence[int]]) -> list[int]:
    return [token for sentence in sentences for token in sentence]
