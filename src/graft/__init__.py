"""Graft: transfer learning with a pretrained backbone and a new head, done right and fast."""

__version__ = "0.1.0"
