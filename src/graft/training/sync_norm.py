"""SyncBatchNorm for a stage: statistics over the batches of all ranks."""

from __future__ import annotations

from lightning.pytorch.plugins import LayerSync
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorms(LayerSync):
    """Puts SyncBatchNorm in place of each BatchNorm whose statistics move, for the time of a fit.

    Lightning's own plugin (`Trainer(sync_batchnorm=True)`) also converts what is frozen, drops the
    activation inside timm's layers, and leaves layers of another class behind. Here the layers that
    come back are the ones that went, with the values of the fit.
    """

    def __init__(self) -> None:
        self.replaced: dict[str, _BatchNorm] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        """
        Raises:
            ValueError: a layer with a forward of its own, which a SyncBatchNorm would not have.
        """
        for name, layer in list(model.named_modules()):
            if isinstance(layer, _BatchNorm) and layer.training:
                model.set_submodule(name, _synced(layer, name))
                self.replaced[name] = layer
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for name, layer in self.replaced.items():
            synced = model.get_submodule(name)
            # The same tensors still, unless the model changed its device in between.
            layer._parameters.update(synced._parameters)
            layer._buffers.update(synced._buffers)
            model.set_submodule(name, layer.train(synced.training))
        self.replaced.clear()
        return model


def _synced(layer: _BatchNorm, name: str) -> nn.Module:
    """Shares the layer's parameters and buffers: optimizers and checkpoints see no change."""
    if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    if type(layer).__module__.startswith("timm."):
        from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm

        if type(layer) is BatchNormAct2d:
            return convert_sync_batchnorm(layer)
    raise ValueError(
        f"trainer.sync_batchnorm: {name} is a {type(layer).__name__}, for which there is no "
        "synchronised form: set trainer.sync_batchnorm=false, or norm=frozen in this stage"
    )
