"""Texts as inputs of a model: token ids, cut to a length, padded no further than a batch needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graft.config.words import plural
from graft.transforms.draws import uniform
from graft.transforms.inputs import Inputs, Views

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MULTIPLE = 8  # lengths of batches: matrix products like it, and compiled code sees few shapes
LONGEST = 1 << 16  # tokens of a row at most: where the draws of the next row begin
KEPT_SEED = 0  # of the masks that validation and test see in every epoch


@dataclass(frozen=True)
class TextPreprocessing:
    """How the weights expect their texts: it travels with them, in checkpoints too.

    Args:
        tokenizer: of the library `tokenizers`, as its JSON.
        length: tokens of a text at most, the special ones counted.
        pad, cls, sep, mask: the numbers of the special tokens; -1: there is none.
        architecture: the encoder's own config as JSON, so that a run can be opened on a machine
            without the folder that the encoder came from.
        origin: for the start-up summary: whose tokenizer it is.
    """

    tokenizer: str
    length: int
    pad: int
    cls: int
    sep: int
    mask: int = -1
    architecture: str = ""
    origin: str = field(default="", compare=False, repr=False)

    def with_own(self, values: Mapping[str, Any]) -> TextPreprocessing:
        """With these values in place of its own.

        Raises:
            ValueError: one that texts do not have.
        """
        try:
            return replace(self, **values)
        except TypeError as error:
            raise ValueError(f"backbone.preprocessing: texts have none of it: {error}") from error

    def at(self, length: int | None) -> TextPreprocessing:
        """The same for texts of another length.

        Raises:
            ValueError: it is longer than the encoder takes.
        """
        if length is not None and length < 3:
            raise ValueError(f"data.length={length}: two tokens are a text's ends: give 3 or more")
        if length is not None and length > self.length:
            raise ValueError(
                f"data.length={length}: this encoder takes {self.length} tokens at most"
            )
        return self if length is None else replace(self, length=length)

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """The token ids of each text, and whether it was cut.

        What looks like a special token in a text is ordinary text.
        """
        tokenizer = read_tokenizer(self.tokenizer)
        tokenizer.enable_truncation(self.length)
        return [(text.ids, bool(text.overflowing)) for text in tokenizer.encode_batch(list(texts))]

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, whole and without special tokens."""
        tokenizer = read_tokenizer(self.tokenizer)
        tokenizer.no_truncation()
        return [t.ids for t in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def rows(self, texts: Sequence[Sequence[int]], width: int) -> NDArray[np.int32]:
        """(N, width) token ids, padded."""
        rows = np.full((len(texts), width), self.pad, np.int32)
        for row, ids in zip(rows, texts, strict=True):
            row[: len(ids)] = ids
        return rows


@lru_cache(maxsize=8)
def read_tokenizer(text: str) -> Tokenizer:
    """From its JSON; it pads nothing.

    Raises:
        ValueError: `tokenizers` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError("texts need tokenizers: pip install 'graft[text]'") from error
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


class PrepareTokens(nn.Module):
    """int32 rows (N, T) -> (ids, mask, types), each (N, t), t being the longest text's length.

    ids and types are int64, the mask is true where there is text; the type is 1 after the first
    separator, in the second text of a pair.
    """

    def __init__(self, pad: int, sep: int) -> None:
        super().__init__()
        self.pad, self.sep = pad, sep

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = rows != self.pad
        longest = int(mask.sum(1).max())
        width = min(rows.shape[1], -(-longest // MULTIPLE) * MULTIPLE)
        ids, mask = rows[:, :width].long(), mask[:, :width]
        ends = (ids == self.sep).long()
        return ids, mask, ((ends.cumsum(1) > ends) & mask).long()


class TextInputs(Inputs):
    """int32 token ids (N, T), padded -> what `PrepareTokens` gives.

    Args:
        preprocessing: the backbone's.
        length: tokens of a text at most, if fewer than the encoder takes.
    """

    takes, unit, rows = TextPreprocessing, "tokens", "texts"
    preprocessing: TextPreprocessing

    def __init__(self, preprocessing: TextPreprocessing, *, length: int | None = None) -> None:
        self.preprocessing = preprocessing.at(length)
        self.prepare = PrepareTokens(preprocessing.pad, preprocessing.sep)
        self.size = self.preprocessing.length

    def of_stage(
        self,
        *,
        augment: bool | Mapping[str, Any] = True,
        size: int | None = None,
        views: Views = "none",
    ) -> Self:
        if isinstance(augment, Mapping) or size is not None or views != "none":
            raise ValueError("a stage on texts has no augment, image_size or views of its own")
        return self

    def example(self, count: int) -> Tensor:
        p = self.preprocessing
        return torch.tensor([[p.cls, p.sep]] * count, dtype=torch.int32)

    def problem(self, rows: NDArray[Any]) -> str | None:
        if rows.ndim != 2 or rows.dtype != np.int32 or 0 in rows.shape:
            return f"texts must be int32 token ids (N, T), not {rows.dtype} {rows.shape}"
        return None

    def describe(self) -> str:
        pieces = read_tokenizer(self.preprocessing.tokenizer).get_vocab_size()
        return f"up to {self.size} tokens of {pieces:,} kinds, {self.preprocessing.origin}"

    def notes(self, cut: int) -> Iterator[str]:
        if cut:
            yield f"{plural(cut, 'text')} longer than {self.size} tokens: the rest is not seen"

    def files(self) -> dict[str, str]:
        return {"tokenizer.json": self.preprocessing.tokenizer}


class MaskedInputs(TextInputs):
    """Texts of which some tokens are hidden: a batch has `masked` (N, t) too, the ids of those that
    are to be predicted, and -1 elsewhere (Devlin et al. 2019, section 3.1).

    Of each row the same share of tokens is chosen, at least one. Of these 80 % become the mask
    token, 10 % any other and 10 % stay. A pure function of (seed, epoch, index): masks differ by
    epoch, and in validation and test they are always the same.

    Args:
        mask: the share.

    Raises:
        ValueError: the tokenizer has no mask token.
    """

    def __init__(
        self, preprocessing: TextPreprocessing, *, length: int | None = None, mask: float = 0.15
    ) -> None:
        super().__init__(preprocessing, length=length)
        if not 0 < mask < 1:
            raise ValueError(f"data.mask={mask}: must be above 0 and below 1")
        if preprocessing.mask < 0:
            raise ValueError("this tokenizer has no mask token: choose another backbone")
        self.mask = mask
        tokenizer = read_tokenizer(preprocessing.tokenizer)
        special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
        ordinary = sorted({*range(tokenizer.get_vocab_size())} - {*special})
        self.special, self.ordinary = torch.tensor(special), torch.tensor(ordinary)

    @property
    def augments(self) -> bool:
        return True

    def augment(
        self, batch: dict[str, Tensor], num_classes: int, *, seed: int, epoch: int
    ) -> dict[str, Tensor]:
        ids, mask, types = self.prepare(batch["input"])
        n, t = ids.shape
        place = batch["index"][:, None] * LONGEST + torch.arange(t, device=ids.device)
        u = uniform(seed, epoch, place.reshape(-1), 3).view(n, t, 3)
        may = mask & ~torch.isin(ids, self.special.to(ids.device))
        # As many as the share says, those with the smallest draws: a number that is a row's own,
        # whatever is beside it in the batch.
        count = (may.sum(1, keepdim=True) * self.mask).round().clamp(min=1)
        order = torch.where(may, u[..., 0], 2.0).argsort(1).argsort(1)
        chosen = may & (order < count)
        other = self.ordinary.to(ids.device)[(u[..., 2] * len(self.ordinary)).long()]
        hidden = torch.where(u[..., 1] < 0.8, self.preprocessing.mask, ids)
        hidden = torch.where(u[..., 1] >= 0.9, other, hidden)
        masked = torch.where(chosen, ids, -1)
        return {**batch, "input": (torch.where(chosen, hidden, ids), mask, types), "masked": masked}  # type: ignore[dict-item]

    def evaluated(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.augment(batch, 0, seed=KEPT_SEED, epoch=0)

    def key(self, views: Views) -> dict[str, Any]:
        return {**super().key(views), "mask": self.mask}
