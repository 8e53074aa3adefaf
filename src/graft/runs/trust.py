"""What a file of somebody else's may name and set: nothing runs because a file says so.

The config of one's own command line may name anything: it is one's own code. One that was read from
a file (a run folder, a sweep) may come from anybody.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.config.names import visible
from graft.config.objects import find
from graft.config.overrides import SEARCHPATH
from graft.config.resolved import CONFIGS, leaves
from graft.runs.allowed import add_trust as add_trust
from graft.runs.allowed import allowed_packages
from graft.runs.allowed import trusts as trusts
from graft.runs.allowed import trusts_all as trusts_all

LIBRARIES = ("graft", "torch", "torchvision", "timm", "torchmetrics", "lightning", "optuna")
# Arguments that say where something is written or sent, or what else is read.
PLACES = {
    "args", "cfg", "dir", "dirpath", "dirs", "entity", "file", "filename", "folder", "location",
    "log_model", "overlay", "path", "root", "save_code", "settings", "uri", "url",
}  # fmt: skip

# What a sweep's own file may set of Hydra, which runs what its other keys name before we see it:
# KEY=VALUE, with no new line in a script of SLURM's.
OF_HYDRA = re.compile(
    r"(hydra/launcher=(in_process|processes|slurm)"
    r"|hydra/sweeper=(grid|optuna)"
    r"|(hydra\.sweeper\.(n_trials|seed|max_batch_size|(sampler|pruner)(\.\w+)*"
    r"|params\.(?!.*(\bhydra\b|\b_[a-z]+_\b))[\w./@+-]+)"
    r"|hydra\.launcher\.(n_jobs|devices|jobs_per_device|timeout_min|cpus_per_task|mem_gb|cluster"
    r"|options\.slurm_(account|constraint|partition|qos)))=[\w.,:@+\-\[\] ]*)"
)


def require_trusted(config: dict[str, Any], source: Path) -> None:
    """Nothing runs because a file names it.

    Each `_target_` is looked up, and what is found must be defined in one of our libraries or in a
    package that the user allows (its own module counts: through attributes of modules any name
    leads to anything), and be of the kind that its place in the config takes.

    Raises:
        ValueError: it is not; `source` is where the config comes from.
    """
    allowed = allowed_packages()
    if trusts_all():
        return
    named = list(_targets(config))
    packages = (*LIBRARIES, *allowed)
    for key, node in named:  # by its name, before anything is imported
        name = node["_target_"]
        if not isinstance(name, str) or not _within(name, packages) or "._" in name:
            raise _refusal(source, key, node, "it is not of " + ", ".join(packages))
    for key, node in named:
        if reason := _reason(key, node, packages, allowed):
            raise _refusal(source, key, node, reason)
    for key in ("backbone", "callbacks", "logger", "trainer"):
        _refuse_places(config.get(key), key, source, allowed)


def _refusal(source: Path, key: str, node: Mapping[str, Any], reason: str) -> ValueError:
    name = str(node["_target_"])
    hint = f"if you know this code, add --trust {name.partition('.')[0]}"
    return ValueError(
        visible(f"{source}: {key}._target_={name[:200]} is not run: {reason} ({hint})")
    )


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a `_target_`, with the key it stands at; items of lists have no own."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node
        for name, value in node.items():
            yield from _targets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for item in node:
            yield from _targets(item, key)


def _reason(
    key: str, node: Mapping[str, Any], packages: tuple[str, ...], allowed: tuple[str, ...]
) -> str | None:
    """Why what a node names must not be called; None if it may."""
    try:
        found = find(node["_target_"])
    except Exception as error:  # of any kind: a module is imported
        return " ".join(str(error).split())[:200]
    module = getattr(found, "__module__", None)
    if not isinstance(module, str) or not _within(module, packages):
        return f"it is of {module}, not of {', '.join(packages)}"
    for pattern, what, is_one in _kinds():
        if re.fullmatch(pattern, key):
            return None if is_one(found) else f"it is not {what}"
    return None if _within(module, allowed) or _is_layer(found) else f"{key} takes no such code"


def _kinds() -> list[tuple[str, str, Callable[[Any], bool]]]:
    """What places in a config take, and how to know it."""
    from lightning import Callback
    from lightning.pytorch.loggers.logger import Logger
    from torch.optim import Optimizer
    from torchmetrics import Metric

    from graft.data.datamodule import TransferDataModule
    from graft.data.sources.base import Source
    from graft.models.backbone import Backbone
    from graft.models.heads import Head
    from graft.tasks.base import Task
    from graft.transforms.images import Augment

    def backbone(found: Any) -> bool:
        returned = inspect.isfunction(found) and found.__annotations__.get("return")
        return _is_a(Backbone)(found) or returned in (Backbone, Backbone.__name__)

    def logger(found: Any) -> bool:  # Lightning's own write where `name` and `version` say
        return _is_a(Logger)(found) and not found.__module__.startswith("lightning.")

    return [
        (r"backbone", "a Backbone or a function annotated to return one", backbone),
        (r"head", "a Head", _is_a(Head)),
        (r"task", "a Task", _is_a(Task)),
        (r"task\.metrics\.[^.]+", "a metric of torchmetrics", _is_a(Metric)),
        (r"data", "a TransferDataModule", _is_a(TransferDataModule)),
        (r"data\.(target\.)?source", "a Source", _is_a(Source)),
        (r"data\.augment", "an Augment", _is_a(Augment)),
        (r"(.+\.)?optimizer", "an optimizer of torch", _is_a(Optimizer)),
        (r"(.+\.)?scheduler", "a function (step, total, ...)", _is_schedule),
        (r"callbacks\.[^.]+", "a callback of Lightning", _is_a(Callback)),
        (r"logger\.[^.]+", "a logger of graft's", logger),
        (r"(.+\.)?pruner(\..+)?", "a pruner of Optuna", _is_pruner),
        (r"sampler(\..+)?", "a sampler of Optuna that does not unpickle", _is_sampler),
    ]


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda found: isinstance(found, type) and issubclass(found, kind)


def _is_schedule(found: Any) -> bool:
    first = [*inspect.signature(found).parameters][:2] if inspect.isfunction(found) else []
    return first == ["step", "total"]


def _is_layer(found: Any) -> bool:
    """A layer of torch or a transform of torchvision, which only computes."""
    from torch import nn

    own = ("torch.nn.modules", "torchvision.transforms", "torchvision.ops")
    return _is_a(nn.Module)(found) and _within(found.__module__, own)


def _is_pruner(found: Any) -> bool:
    from optuna.pruners import BasePruner

    return _is_a(BasePruner)(found)


def _is_sampler(found: Any) -> bool:
    """But not one that unpickles its state from the study."""
    from optuna.samplers import BaseSampler, CmaEsSampler

    return _is_a(BaseSampler)(found) and not issubclass(found, CmaEsSampler)


def _refuse_places(node: Any, key: str, source: Path, allowed: tuple[str, ...]) -> None:
    """What a run folder names writes into that folder, wherever it was made."""
    if isinstance(node, list):
        for item in node:
            _refuse_places(item, key, source, allowed)
    if not isinstance(node, dict) or _within(str(node.get("_target_")), allowed):
        return
    for name, value in node.items():
        if value is not None and PLACES & {str(name), *str(name).split("_")}:
            package = str(node.get("_target_", "lightning")).partition(".")[0]
            raise ValueError(
                visible(
                    f"{source}: {key}.{name} is not used: files could be read and written anywhere "
                    f"(if the run is yours, add --trust {package})"
                )
            )
        _refuse_places(value, f"{key}.{name}", source, allowed)


def require_harmless(overrides: Sequence[str], source: Path) -> None:
    """Overrides that a file holds set values of a run, and of Hydra little.

    What else they name is looked at in the configs that they lead to: see `require_trusted`.

    Raises:
        ValueError: one of them would do more.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for text in overrides:
        reason = "it is an option" if text.startswith("-") else ""
        allowed = f"to allow it: graft resume {source.parent} {shlex.quote(text[:1000])}"
        if not reason:
            override = parser.parse_override(text)
            key, package = override.key_or_group, override.package or ""
            value = override.value()
            if key == SEARCHPATH:
                reason = f"Hydra runs what configs name before it can be looked at; {allowed}"
            elif "${" in text + str(value):  # a few lines of them unfold to gigabytes
                reason = f"${{...}} of a file is not resolved; {allowed}"
            elif any(re.match(r"hydra(\W|$)", part) for part in (key, package)):
                pairs = [f"{k}={getattr(v, 'text', v)}" for k, v in leaves(value, key)]
                known = not package and all(map(OF_HYDRA.fullmatch, pairs))
                reason = "" if known else "it sets more of Hydra than a sweep needs"
            elif (CONFIGS / key).is_dir() and re.search(r"\.\.|^/", text.partition("=")[2]):
                reason = "it chooses a file outside of the configs"
        if reason:
            raise ValueError(visible(f"{source}: {text[:200]} is not used: {reason}"))
