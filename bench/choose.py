"""How good `graft choose` chooses: every pair of backbone and plan trained in full, then the race.

    python bench/choose.py digits usps cifar10 --work FOLDER --out table.md [trainer=gpu ...]

Regret is the best test accuracy of all full trainings minus that of what was chosen. Beside the
race: the biggest model, and the best by LogME (You et al. 2021), nearest neighbours or ridge
regression alone, which choose a backbone and leave the plan open: with full fine-tuning, and with
the plan that is best for it in hindsight. Data and weights are found by environment variables:
GRAFT_REAL_USPS and GRAFT_REAL_CIFAR (folders with train/ and test/), GRAFT_REAL_LITE0 (a weights
file of timm's tf_efficientnet_lite0; without it, one candidate less), TORCH_HOME. What is done
already in the folder is not repeated. Images are decoded before any time is taken; the race pays
for its features.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from graft.choose.entrants import FEATURES, Entrants, read_entrants
from graft.choose.halving import Arm
from graft.choose.outcome import chosen
from graft.choose.race import run_race
from graft.config.job import compose_job
from graft.features.prefix import Extractor, FrozenPrefix
from graft.runs.folder import RunFolder
from graft.runs.records import read_run
from graft.runs.resources import hardware
from graft.runs.resume import resume_run
from graft.training.build import build

TASKS = {
    "digits": ("digits", ["data.shots_per_class=10", "trainer.max_epochs=20"]),
    "usps": ("GRAFT_REAL_USPS", ["data.augment.flip=0", "trainer.max_epochs=4"]),
    "cifar10": (
        "cifar10",
        ["data.train_fraction=0.01", "data.val_fraction=0.01", "trainer.max_epochs=20"],
    ),
}
CANDIDATES = """\
candidates:
  resnet20: [backbone=resnet20_cifar]
  random_resnet20: [backbone=resnet20_cifar, backbone.weights=null]
  squeezenet: [backbone=squeezenet1_1, data.image_size=96]
  squeezenet_taps: [backbone=squeezenet1_1, backbone.taps=all, data.image_size=96]
  squeezenet_taps_64: [backbone=squeezenet1_1, backbone.taps=all, data.image_size=64]
  lite0: [backbone=timm, backbone.model=tf_efficientnet_lite0, data.image_size=96]
plans:
  linear_probe: [transfer=linear_probe, head=linear_grid, optimizer=adamw]
  lp_ft: [transfer=lp_ft, head.norm=standardize, optimizer=adamw, optimizer.lr=3.0e-4]
  finetune: [transfer=finetune, head.norm=standardize, optimizer=adamw, optimizer.lr=1.0e-3]
"""


def full_runs(entrants: Entrants, folder: Path) -> dict[Arm, dict[str, float]]:
    """Test accuracy, validation accuracy and seconds of every pair."""
    found = {}
    for candidate in entrants.candidates:
        build(compose_job(entrants.overrides(candidate, FEATURES)).config)
    for candidate in entrants.candidates:
        for plan in (plan for plan in entrants.plans if plan != FEATURES):
            path = folder / f"{candidate}-{plan}"
            if not path.exists():
                job = compose_job(["logger=csv", *entrants.overrides(candidate, plan)])
                RunFolder.create(folder, path.name, job.config, job.overrides, job.choices)
            run = read_run(path)
            if run.status != "done":
                resume_run(path, trusted=True)
                run = read_run(path)
            found[Arm(candidate, plan)] = {**run.metrics, "seconds": run.record["seconds"]}
    return found


def logme(features: np.ndarray, labels: np.ndarray) -> float:
    """The evidence of a Bayesian linear model for each class, maximised (You et al. 2021)."""
    features = features.astype(np.float64)
    count, width = features.shape
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    squares = singular**2
    evidence = []
    for label in np.unique(labels):
        y = (labels == label).astype(np.float64)
        x2 = (left.T @ y) ** 2
        rest = max(float((y**2).sum() - x2.sum()), 0.0)
        alpha = beta = 1.0
        for _ in range(50):
            t = alpha / beta
            gamma = float((squares / (squares + t)).sum())
            m2 = float((squares * x2 / (squares + t) ** 2).sum())
            error = float((x2 / (1 + squares / t) ** 2).sum()) + rest
            alpha, beta = gamma / (m2 + 1e-12), (count - gamma) / (error + 1e-12)
            if abs(alpha / beta - t) < 1e-3 * t:
                break
        determinant = float(np.log(alpha + beta * squares).sum())
        determinant += max(0, width - len(squares)) * math.log(alpha)
        value = width * math.log(alpha) + count * math.log(beta) - determinant
        value -= beta * error + alpha * m2 + count * math.log(2 * math.pi)
        evidence.append(value / (2 * count))
    return float(np.mean(evidence))


def logme_of(entrants: Entrants, candidate: str) -> float:
    config = compose_job(entrants.overrides(candidate, FEATURES)).config
    module, data = build(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = module.backbone.to(device)
    extractor = Extractor(
        FrozenPrefix(backbone, len(backbone.blocks)),
        lambda rows: data.prepared("train", rows, device),
    )
    train = data.splits["train"]
    return logme(extractor.rows(np.arange(len(train))), train.labels)


def rows_of(
    task: str, work: Path, own: Sequence[str], shares: Sequence[float], lines: list[str]
) -> list[str]:
    """Rows of the table for a task; lines about its runs are added to `lines`."""
    data, overrides = TASKS[task]
    if data == "cifar10":
        overrides = [*overrides, f"data.root={os.environ['GRAFT_REAL_CIFAR']}"]
    data = os.environ.get(data, data)
    content = yaml.safe_load(CANDIDATES)
    if weights := os.environ.get("GRAFT_REAL_LITE0"):
        content["candidates"]["lite0"].append(f"backbone.weights={weights}")
    else:
        del content["candidates"]["lite0"]
    file = work / f"{task}.yaml"
    file.write_text(yaml.safe_dump(content))
    places = [f"paths.cache={work / task / 'cache'}", f"paths.logs={work / task}"]
    entrants = read_entrants(data, [*overrides, *own, *places], file=file)
    full = full_runs(entrants, work / task / "full")
    total = sum(run["seconds"] for run in full.values())
    best = max(full, key=lambda arm: full[arm]["test/acc"])

    races, spent, found = {}, {}, []
    for share in shares:  # of the budget
        logs = work / task / f"race-{share:g}"
        if not logs.exists():
            for stored in (work / task / "cache").glob("features-*"):
                shutil.rmtree(stored)
        racing = read_entrants(data, [*overrides, *own, places[0], f"paths.logs={logs}"], file=file)
        try:
            races[share] = run_race(racing, share * total, print)
        except ValueError as error:
            found.append(f"| {task} | graft choose, {100 * share:g} %: {error} | | | | |")
        else:
            spent[share] = races[share].runs.spent

    def regret(arm: Arm) -> str:
        return f"{100 * (full[best]['test/acc'] - full[arm]['test/acc']):.2f}"

    def hindsight(candidate: str) -> Arm:
        arms = [arm for arm in full if arm.candidate == candidate]
        return max(arms, key=lambda arm: full[arm]["test/acc"])

    for pair, run in full.items():
        lines.append(
            f"| {task} | {pair.candidate} | {pair.plan} | {100 * run['test/acc']:.2f} | "
            f"{100 * run['val/acc']:.2f} | {run['seconds']:.1f} |"
        )
    if not races:
        return found
    runs = next(iter(races.values())).runs
    first = {a.candidate: r for a, r in runs.results.items() if a.plan == FEATURES}
    scores = {
        "the biggest model": {name: runs.costs[name].macs for name in first},
        "LogME": {name: logme_of(entrants, name) for name in first},
        "kNN": {name: r.knn or 0.0 for name, r in first.items()},
        "ridge": {name: r.score for name, r in first.items()},
    }
    for share, race in races.items():
        arm = chosen(race)
        if arm.plan == FEATURES:  # the budget was spent before anything was trained
            arm = Arm(arm.candidate, "linear_probe")
        accuracy = f"{100 * full[arm]['test/acc']:.2f} | {regret(arm)} | {regret(arm)}"
        time = f"{100 * spent[share] / total:.1f}"
        found.append(f"| {task} | graft choose, {100 * share:g} %: {arm} | {accuracy} | {time} |")
    for name, by_candidate in scores.items():
        candidate = max(by_candidate, key=lambda name: by_candidate[name])
        tuned, after = Arm(candidate, "finetune"), hindsight(candidate)
        found.append(
            f"| {task} | {name}: {candidate} | {100 * full[tuned]['test/acc']:.2f} | "
            f"{regret(tuned)} | {regret(after)} | |"
        )
    found.append(
        f"| {task} | best of all: {best} | {100 * full[best]['test/acc']:.2f} | 0 | 0 | 100 |"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)}, or OVERRIDE")
    parser.add_argument("--work", type=Path, default=Path("bench-choose"))
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.15], help="budgets: of the time of all"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_intermixed_args()
    own = [word for word in options.tasks if "=" in word]
    options.work = options.work.absolute()
    options.work.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    rows: list[str] = []
    for task in [word for word in options.tasks if "=" not in word] or TASKS:
        rows += rows_of(task, options.work, own, options.shares, lines)
        machine = hardware()
        text = "\n".join(
            [
                f"{datetime.date.today()}, {machine['cpu']}, {machine['gpus'] or 'no GPU'}, "
                f"torch {torch.__version__}",
                "",
                "| task | chosen by: choice | test/acc % | regret | with its best plan | time % |",
                "|---|---|---|---|---|---|",
                *rows,
                "",
                "| task | backbone | plan | test/acc % | val/acc % | seconds |",
                "|---|---|---|---|---|---|",
                *lines,
            ]
        )
        if options.out:
            options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
