"""Graft: transfer learning with a pretrained backbone and a new head, done right and fast.

From Python, `graft.finetune` trains a model and `graft.load` loads that of a run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft.deploy.finetune import Run, finetune
    from graft.deploy.model import load

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "finetune", "load"]

_MODULES = {"Run": "finetune", "finetune": "finetune", "load": "model"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: `import graft` alone takes no time, and no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"graft.deploy.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
