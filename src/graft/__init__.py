"""Graft: transfer learning with a pretrained backbone and a new head, done right and fast.

From Python, `graft.finetune` trains a model, and `graft.load` loads that of a run or of an exported
file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft.deploy.artefact import open_model as load
    from graft.deploy.finetune import Run, finetune

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "finetune", "load"]

_PLACES = {
    "Run": ("finetune", "Run"),
    "finetune": ("finetune", "finetune"),
    "load": ("artefact", "open_model"),
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: `import graft` alone takes no time, and no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(f"graft.deploy.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
