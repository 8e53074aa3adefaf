"""What turns rows of a split into inputs of a model: one class for each modality."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from numpy.typing import NDArray
from torch import Tensor, nn

from graft.transforms.draws import VIEW, uniform

Views = str | int
"""Of each row: "none" (itself), "flip" (an image, its mirror image) or a number of random ones."""


class Inputs(ABC):
    """How rows (N, ...) of a split become what a model takes: a tensor, or a tuple of tensors.

    The constructor takes the preprocessing of the backbone's weights, and by name those options
    of `data` that are of this modality.

    Attributes:
        takes: the class of preprocessing that backbones for these inputs have.
        preprocessing: a dataclass of plain values, of which sources read how to store rows.
        prepare: rows -> inputs: a module, so that an exported model has it inside.
        size: of an input, in `unit`.
        rows: what a reader calls the rows.
        sample_transform: what changes single training rows in the workers of the loader.
    """

    takes: ClassVar[type]
    preprocessing: Any
    prepare: nn.Module
    size: int
    unit: ClassVar[str]
    rows: ClassVar[str] = "images"
    sample_transform: Callable[[Tensor], Tensor] | None = None

    @abstractmethod
    def of_stage(
        self,
        *,
        augment: bool | Mapping[str, Any] = True,
        size: int | None = None,
        views: Views = "none",
    ) -> Self:
        """Those of a stage with options of its own: see `Stage`.

        Raises:
            ValueError: an option that this modality does not have.
        """

    @property
    def augments(self) -> bool:
        """Whether the stage changes training rows at random."""
        return False

    @abstractmethod
    def example(self, count: int) -> Tensor:
        """`count` rows of the kind that `prepare` takes."""

    @abstractmethod
    def problem(self, rows: NDArray[Any]) -> str | None:
        """Why the rows of a split are none of this modality; None if they are. It looks at their
        type and shape alone: they may be on disk.
        """

    @abstractmethod
    def describe(self) -> str:
        """What a model gets, for the start-up summary."""

    def notes(self, cut: int) -> Iterator[str]:
        """What a user should know where a source had to cut so many rows, in lines."""
        yield from ()

    def files(self) -> dict[str, str]:
        """Name -> content of what a run folder keeps for whoever uses its model elsewhere."""
        return {}

    def to_store(self, sizes: Sequence[int]) -> Any:
        """The preprocessing that a source stores rows for, where stages have these sizes."""
        return self.preprocessing

    def augment(
        self, batch: dict[str, Tensor], num_classes: int, *, seed: int, epoch: int
    ) -> dict[str, Tensor]:
        """A training batch, prepared as the stage trains on it: by draws that depend on nothing
        but (seed, epoch, "index"). Where rows are mixed, "target" (N, num_classes) is too.
        """
        return self.evaluated(batch)

    def evaluated(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of validation or test, prepared: the same in every epoch, whatever the seed."""
        return {**batch, "input": self.prepare(batch["input"])}

    def viewed(self, rows: Tensor, index: Tensor, view: Tensor, views: Views) -> Any:
        """Inputs of one view (N,) of each row, the same ones whatever the run's seed."""
        return self.prepare(rows)

    def key(self, views: Views) -> dict[str, Any]:
        """What decides the inputs of rows, for the names of stored features: values and code."""
        return {
            "transform": self.preprocessing,
            "views": views,
            "code": [type(self), type(self.prepare)],
        }


def views_count(views: Views) -> int:
    return {"none": 1, "flip": 2}.get(str(views)) or int(views)


def drawn_view(count: int, index: Tensor, *, seed: int, epoch: int) -> Tensor:
    """(N,) which view of each row an epoch trains on."""
    return (uniform(seed, epoch, index, 1, first=VIEW)[:, 0] * count).long()
