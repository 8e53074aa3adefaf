"""BERT's two tasks: which tokens were hidden, and whether the second text follows the first."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.data.datasets import Batch
from graft.models.backbone import Backbone
from graft.tasks.base import Model, Tally, Task

if TYPE_CHECKING:
    from torchmetrics import Metric


class PretrainBert(Task):
    """Masked-language and next-sentence losses, added (Devlin et al. 2019, section 3.1).

    The run's head says which texts follow each other. Hidden tokens are predicted by a layer of the
    task's own and the encoder's embeddings, whose weights it shares. The masked loss of a row is
    the mean over its hidden tokens, that of a batch the mean over rows, so that ranks and
    accumulated batches add up to what one large batch gives.

    Metrics are those of next sentence (`acc`, `next_loss`), of hidden tokens (`masked_acc`,
    `masked_loss`, each token counting alike), and `loss`, their sum.

    Raises:
        ValueError: a backbone that is not `backbone=bert`, or data that hides no tokens.
    """

    classifies = True
    output_kind = "classes"

    def __init__(
        self,
        *,
        monitor: str = "val/masked_loss",
        mode: str = "min",
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, metrics=metrics)

    def build(self, num_outputs: int, backbone: Backbone) -> None:
        pieces = getattr(backbone.blocks[0], "pieces", None)
        if pieces is None or len(backbone.blocks) < 3 or backbone.taps is not None:
            raise ValueError("task=pretrain_bert needs an encoder in blocks, without taps")
        count, width = pieces.shape
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(count))

    def _outputs(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 2) of next sentence, (M, pieces) of all M hidden tokens, and the row of each (M,)."""
        if "masked" not in batch:
            raise ValueError("task=pretrain_bert: this data hides no tokens: use data=text_corpus")
        state: Any = batch["input"]
        blocks = model.backbone.blocks
        for block in islice(blocks, len(blocks) - 1):
            state = block(state)
        rows, places = (batch["masked"] >= 0).nonzero(as_tuple=True)
        hidden = self.transform(state[0][rows, places])
        logits = F.linear(hidden, blocks[0].pieces, self.bias)  # type: ignore[arg-type]
        return model.head(blocks[-1](state)), logits, rows

    def loss(self, model: Model, batch: Any) -> Tensor:
        following, hidden, rows = self._outputs(model, batch)
        masked = batch["masked"]
        count = (masked >= 0).sum(1)
        losses = F.cross_entropy(hidden, masked[masked >= 0], reduction="none")
        return (losses / count[rows]).sum() / len(masked) + F.cross_entropy(
            following, batch["label"]
        )

    def evaluate(self, model: Model, batch: Batch, tally: Tally) -> Tensor:
        following, hidden, _ = self._outputs(model, batch)
        label, masked = batch["label"], batch["masked"]
        wanted = masked[masked >= 0]
        for metric in self.own_metrics.values():
            metric.update(following, label)  # type: ignore[operator]
        tally.add(
            next_loss=F.cross_entropy(following, label, reduction="sum"),
            right=(following.argmax(1) == label).sum(),
            texts=len(label),
            masked_loss=F.cross_entropy(hidden, wanted, reduction="sum"),
            masked_right=(hidden.argmax(1) == wanted).sum(),
            tokens=len(wanted),
        )
        return following

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        next_loss = sums["next_loss"] / sums["texts"]
        masked_loss = sums["masked_loss"] / sums["tokens"]
        return {
            "loss": next_loss + masked_loss,
            "acc": sums["right"] / sums["texts"],
            "next_loss": next_loss,
            "masked_acc": sums["masked_right"] / sums["tokens"],
            "masked_loss": masked_loss,
        }

    def predicted(self, outputs: Tensor) -> Tensor:
        return outputs.float().softmax(-1)
