"""The tokenizer of an encoder that is trained from scratch: one that is there, or a new one."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from graft.data.sources.texts import MOST_BYTES, decoded, lines_of, text_files
from graft.storage.reading import read_bytes
from graft.transforms.text import read_tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MOST_LETTERS = 1000  # different ones, of which each is a piece


def tokenizer_from(where: str, pieces: int) -> str:
    """A tokenizer as JSON: see `bert_backbone`.

    Raises:
        ValueError: what is there is neither a tokenizer nor text.
        OSError: it cannot be read.
    """
    path = Path(where).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.suffix != ".json" or not file.is_file():
        return train_wordpiece(text_files(path), pieces)
    try:
        text = read_bytes(file, 1 << 28).decode()
        read_tokenizer(text)
    except Exception as error:  # the library raises bare ones
        raise ValueError(f"backbone.tokenizer={file}: no tokenizer: {error}") from error
    return text


def train_wordpiece(files: Sequence[Path], pieces: int) -> str:
    """A WordPiece tokenizer in lower case, as BERT's (Devlin et al. 2019), of the texts in files.

    The same files give the same tokenizer. The library numbers letters within words in an order
    that is another one in each process, and by these numbers decides between pieces that are
    equally frequent: it is told all of them beforehand.

    Raises:
        ValueError: there is no text, or there are more letters in it than pieces.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import WordPieceTrainer

    normalizer = normalizers.BertNormalizer(lowercase=True)
    lines = [normalizer.normalize_str(line) for path in files for line in _lines(path)]
    counted = Counter("".join(lines))
    found = [letter for letter in counted if not letter.isspace()]
    letters = sorted(found, key=lambda letter: (-counted[letter], letter))[:MOST_LETTERS]
    within = [f"##{letter}" for letter in sorted(letters)]
    if not letters:
        raise ValueError(f"backbone.tokenizer: no text in {', '.join(map(str, files))}")
    if pieces <= len(SPECIAL) + 2 * len(letters):
        raise ValueError(
            f"backbone.architecture.vocab_size={pieces}: too few: the texts have {len(letters)} "
            "letters, each of which is two pieces"
        )
    trainer = WordPieceTrainer(
        vocab_size=pieces,
        special_tokens=[*SPECIAL, *within],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(lines, trainer)
    vocabulary = trained.get_vocab()
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, trained.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return str(tokenizer.to_str())


def _lines(path: Path) -> Iterator[str]:
    text = decoded(path, read_bytes(path, MOST_BYTES))
    if path.suffix != ".csv":
        yield from lines_of(text)
        return
    for cells in csv.reader(io.StringIO(text, newline="")):
        yield from cells
