"""The task contract: what is optimised, what is measured, and which of it is "best"."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from graft.data.datasets import Batch
from graft.models.backbone import Backbone

if TYPE_CHECKING:
    from torchmetrics import Metric

OutputKind = Literal["classes", "labels", "numbers"]
Reduce = Callable[[Tensor], Tensor]  # the sum over ranks


class Model(Protocol):
    """What a task sees of a `TransferModule`."""

    @property
    def backbone(self) -> Backbone: ...

    @property
    def head(self) -> nn.Module: ...

    @property
    def progress(self) -> float:
        """Which part of the stage's steps is done: from 0 to 1."""

    def features(self, batch: Batch) -> Tensor:
        """(N, num_features) what the head is given."""

    def outputs(self, batch: Batch) -> Tensor:
        """(N, num_outputs) outputs of the head, or (N, K, num_outputs) of K heads."""


class Tally:
    """Sums over the examples of an epoch, in float64: exact over ranks, whatever their shares."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, **sums: Tensor | float) -> None:
        """Each name always with a tensor of the same shape."""
        for name, value in sums.items():
            value = torch.as_tensor(value, dtype=torch.float64)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self, reduce: Reduce = lambda sums: sums, device: Any = None) -> dict[str, Tensor]:
        """The sums over all ranks, by one reduction; the tally starts anew."""
        sums, self.sums = self.sums, {}
        if not sums:
            return {}
        total = reduce(torch.cat([value.to(device).reshape(-1) for value in sums.values()]))
        parts = total.split([value.numel() for value in sums.values()])
        return {
            name: part.reshape(value.shape)
            for (name, value), part in zip(sums.items(), parts, strict=True)
        }


class Task(nn.Module, ABC):
    """What a stage optimises and measures. Parameters of its own (a decoder, a discriminator)
    train with the head's rate, in every stage.

    Attributes:
        streams: splits of the data that a training batch holds. Of "train" alone, `loss` is called
            with its batch; of several, with a batch for each: batch["train"], batch["target"].
        classifies: whether outputs are logits of classes, so that a test shows its mistakes.
        two_views: whether a batch has a second augmentation of its images, batch["second"].
        pretrains: whether the task is self-supervised: it sees no label, its encoder is kept with
            BatchNorm statistics of clean images, and there is no test.
        output_kind: of what `predicted` gives: probabilities of "classes" that exclude each other,
            of "labels" that do not, or "numbers".

    Args:
        monitor: the metric that the best checkpoint, sweeps and Optuna go by; "val/..." of what
            `metrics` gives.
        mode: "max", or "min" if smaller is better.
        metrics: of torchmetrics, by name; tasks of ours call them with (outputs, labels).

    Raises:
        ValueError: an impossible value.
    """

    streams: tuple[str, ...] = ("train",)
    classifies = False
    two_views = False
    pretrains = False
    output_kind: OutputKind = "numbers"

    def __init__(
        self, *, monitor: str, mode: str, metrics: Mapping[str, Metric] | None = None
    ) -> None:
        super().__init__()
        if mode not in ("max", "min"):
            raise ValueError(f"task.mode={mode}: must be max or min")
        self.monitor, self.mode = monitor, mode
        self.own_metrics = nn.ModuleDict(dict(metrics or {}))

    def build(self, num_outputs: int, backbone: Backbone) -> None:
        """Make what depends on the number of outputs or the backbone, before weights are loaded."""

    def prepare(self, labels: NDArray[Any], classes: Sequence[str]) -> None:
        """Look at the training labels (N,) or targets (N, T), once before training.

        Raises:
            ValueError: the task can't learn them.
        """

    def start_stage(self, label_smoothing: float | None) -> None:
        """Called before each stage, with what it sets of the task's options.

        Raises:
            ValueError: the task has no such option.
        """
        if label_smoothing is not None:
            raise ValueError(f"label_smoothing of a stage: {type(self).__name__} has none")

    @abstractmethod
    def loss(self, model: Model, batch: Any) -> Tensor:
        """The training loss, a mean over examples: (), or (K,) for K heads."""

    @abstractmethod
    def evaluate(self, model: Model, batch: Batch, tally: Tally) -> Tensor:
        """Add what `metrics` needs of a batch; returns the model's outputs."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Metrics by name ("loss", "acc"), of the sums over all examples; each (), or (K,)."""

    def predicted(self, outputs: Tensor) -> Tensor:
        """What a user is told of the head's outputs (N, num_outputs): see `output_kind`."""
        return outputs.float()

    def scores(self, outputs: Tensor, target: Tensor) -> dict[str, float]:
        """The metrics of outputs that are there already."""
        tally = Tally()
        self.evaluate(_Known(outputs), {"target": target}, tally)
        return {name: float(value) for name, value in self.metrics(tally.take()).items()}

    def own_values(self) -> dict[str, Tensor]:
        """What the metrics of torchmetrics come to over all ranks; they start anew. Of one that
        gives a number for each class or column, their mean.
        """
        values = {
            name: metric.compute().float().mean()  # type: ignore[operator]
            for name, metric in self.own_metrics.items()
        }
        for metric in self.own_metrics.values():
            metric.reset()  # type: ignore[operator]
        return values

    def better(self, score: float, best: float | None) -> bool:
        return best is None or (score > best if self.mode == "max" else score < best)


class _Known:
    """A model whose outputs are there already."""

    backbone: Any = None
    head: Any = None
    progress: Any = None
    features: Any = None

    def __init__(self, outputs: Tensor) -> None:
        self._outputs = outputs

    def outputs(self, batch: Batch) -> Tensor:
        return self._outputs


def as_wide(target: Tensor, outputs: Tensor) -> Tensor:
    """Targets (N, T) beside outputs (N, T), or (N, K, T) of K heads."""
    return (target[:, None] if outputs.ndim == 3 else target).expand_as(outputs)


def gathered(rows: Tensor) -> Tensor:
    """Rows of all ranks, of equally many each. In a backward the gradients that all ranks have for
    a row are added; with the mean over ranks that DDP takes, it is that of one process.
    """
    if not dist.is_initialized():
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows.contiguous()))
