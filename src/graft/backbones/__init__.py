"""Pretrained models as ordered blocks. Knows nothing of Lightning or Hydra."""

from graft.backbones.base import Backbone, Preprocessing

__all__ = ["Backbone", "Preprocessing"]
