"""Names that configs of format 2 hold still lead to what they meant."""

from __future__ import annotations

import pytest

from graft.config.objects import find
from graft.config.renamed import as_current, current_name, current_override
from tests.conftest import compose

OLD = (
    "graft.backbones.resnet_cifar.resnet_cifar",
    "graft.backbones.timm.timm_backbone",
    "graft.backbones.torchvision.torchvision_backbone",
    "graft.data.batch_transforms.Augment",
    "graft.data.cifar.Cifar10",
    "graft.data.datamodule.TransferDataModule",
    "graft.data.digits.Digits",
    "graft.data.folder.EvalFolder",
    "graft.data.folder.ImageFolder",
    "graft.data.synthetic.Synthetic",
    "graft.heads.CosineHead",
    "graft.heads.LinearHead",
    "graft.heads.MLPHead",
    "graft.loggers.CSV",
    "graft.loggers.TensorBoard",
    "graft.runs.study.Prune",
    "graft.trackers.MLFlow",
    "graft.trackers.WandB",
    "graft.transfer.ema.EMA",
    "graft.transfer.schedules.constant",
    "graft.transfer.schedules.cosine",
    "graft.transfer.schedules.one_cycle",
)


@pytest.mark.parametrize("name", OLD)
def test_an_old_name_leads_to_the_same_class_or_function(name: str) -> None:
    if "study" in name:
        pytest.importorskip("optuna")
    assert find(current_name(name)).__name__ == name.rpartition(".")[2]
    assert current_name(current_name(name)) == current_name(name)


def test_only_targets_are_renamed_at_any_depth() -> None:
    old = {
        "_target_": "graft.heads.LinearHead",
        "name": "graft.heads.LinearHead",
        "stages": {"probe": {"scheduler": {"_target_": "graft.transfer.schedules.cosine"}}},
        "list": [{"_target_": "mine.graft.heads.Head"}, {"_target_": None}, 1],
    }
    assert as_current(old) == {
        "_target_": "graft.models.heads.LinearHead",
        "name": "graft.heads.LinearHead",
        "stages": {"probe": {"scheduler": {"_target_": "graft.plan.schedules.cosine"}}},
        "list": [{"_target_": "mine.graft.heads.Head"}, {"_target_": None}, 1],
    }
    assert current_override("head._target_=graft.heads.MLPHead") == (
        "head._target_=graft.models.heads.MLPHead"
    )


def test_the_task_of_format_2_is_todays_default() -> None:
    now = compose()
    old = {key: value for key, value in now.items() if key != "task"} | {"label_smoothing": 0.1}
    old["data"] = {key: value for key, value in now["data"].items() if key != "sampling"}
    now["task"]["label_smoothing"] = 0.1
    assert as_current(old) == now
    assert current_override("label_smoothing=0.1") == "task.label_smoothing=0.1"
