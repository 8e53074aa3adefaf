"""Who races: candidates and plans of a YAML file, and what the user says of the data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.config.job import compose_job, data_overrides
from graft.config.overrides import key_of, place, search_path
from graft.config.resolved import CONFIGS
from graft.config.words import did_you_mean
from graft.storage.reading import read_yaml_mapping

FEATURES = "features"  # in place of a plan: ridge and nearest neighbours on stored features
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
# What the race itself decides, and what takes its place.
DECIDED = {
    "backbone": "backbones are what is compared: --candidates NAMES, --from FILE",
    "transfer": "plans are what is compared: --plans NAMES, --from FILE",
    "name": "the race names its runs",
    "tags": "the race names its runs",
}


@dataclass(frozen=True)
class Entrants:
    """Overrides by name: of the data, of candidates, and of plans with the user's own that act on
    them; the own come last. `config`: of a run of the first plan with the default backbone.
    """

    data: list[str]
    candidates: dict[str, list[str]]
    plans: dict[str, list[str]]
    config: dict[str, Any]

    def overrides(self, candidate: str, plan: str) -> list[str]:
        """What `graft train` takes for a full run of a pair."""
        return [*self.data, *self.candidates[candidate], *self.plans[plan]]


def read_entrants(
    data: str | Path,
    overrides: Sequence[str],
    *,
    candidates: Sequence[str] = (),
    plans: Sequence[str] = (),
    file: Path | None = None,
) -> Entrants:
    """Those of configs/choose.yaml, or of another file like it.

    Args:
        candidates, plans: names, to race some; all that the file has, without any.

    Raises:
        ValueError: a name that is not there, or an override of what the race decides.
    """
    for override in overrides:
        group = key_of(override).partition(".")[0]
        if group in DECIDED:
            raise ValueError(f"{override}: {DECIDED[group]}")
        if key_of(override) in ("task", "task.monitor", "task.mode"):  # ridge knows classes
            raise ValueError(f"{override}: graft choose compares classifiers by val/acc")
        if key_of(override) == "trainer.limit_test_batches":
            raise ValueError(f"{override}: no run of the race looks at the test split")
    path = CONFIGS / "choose.yaml" if file is None else place(file)
    if not path.is_file():
        raise ValueError(f"--from {path}: no such file")
    content = read_yaml_mapping(path)
    named = {key: _lists(path, key, content.get(key)) for key in ("candidates", "plans")}
    transfers = {p.stem: [f"transfer={p.stem}"] for p in (CONFIGS / "transfer").glob("*.yaml")}
    racing = _chosen("candidate", candidates, named["candidates"], {})
    chosen = _chosen("plan", plans, named["plans"], transfers)
    of_data = data_overrides(data, search_path(overrides))
    acting, config = _acting(of_data, chosen, overrides)
    first = ["transfer=ridge_probe", "head.norm=standardize"]
    acting |= _acting(of_data, {FEATURES: first}, overrides)[0]
    for override in overrides:
        if all(override not in acting[plan] for plan in chosen):
            compose_job([*of_data, *chosen[next(iter(chosen))], override])  # which says why
    return Entrants(of_data, racing, acting, config)


def _acting(
    data: list[str], plans: Mapping[str, list[str]], own: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Plans with those of the user's overrides that act on them, and the config of the first.

    A rate has no meaning for a head in closed form, which is no reason not to race it against
    plans that have one.
    """
    found, configs = {}, []
    for name, plan in plans.items():
        left = [*own]
        while name not in found:
            try:
                configs.append(compose_job([*data, *plan, *left]).config)
                found[name] = [*plan, *left]
            except ValueError as error:
                idle = [o for o in left if str(error).startswith((f"{o}: ", f"data.{key_of(o)}: "))]
                if not idle:
                    raise
                left.remove(idle[0])
    return found, configs[0]


def _lists(path: Path, key: str, node: object) -> dict[str, list[str]]:
    if not isinstance(node, dict) or not node:
        raise ValueError(f"{path}: {key} must be names, each with a list of overrides")
    for name, values in node.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name == FEATURES:
            raise ValueError(f"{path}: {key}: {name}: a name is of letters, digits, _ . and -")
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise ValueError(f"{path}: {key}.{name} must be a list of overrides, not {values}")
    return node


def _chosen(
    what: str,
    names: Sequence[str],
    there: Mapping[str, list[str]],
    more: Mapping[str, list[str]],
) -> dict[str, list[str]]:
    for name in names:
        if name not in there and name not in more:
            hint = did_you_mean(name, [*there, *more]) or f": there is {', '.join(there)}"
            raise ValueError(f"no {what} {name}{hint}")
    return {name: there.get(name) or more[name] for name in names or there}


def seconds_of(budget: str) -> float:
    """Of 90s, 10m, 1.5h.

    Raises:
        ValueError: it is not of that form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)
    if not match or float(match[1]) == 0:
        raise ValueError(f"--budget {budget}: write a time like 90s, 10m or 1.5h")
    return float(match[1]) * UNITS[match[2]]
