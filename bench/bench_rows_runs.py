"""More rows of bench/bench.py: fine-tuning, peers, and everything around training."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench_contestants import Bench
from bench_measure import (
    Contestant,
    Line,
    Sample,
    Skip,
    gemm_gflops,
    interleave,
    run_process,
    spread,
    timed,
)
from bench_rows import (
    WEIGHTS,
    batch,
    features_file,
    probe_options,
    probe_overrides,
    row,
    warm_cache,
)

TINY = [
    "data=synthetic",
    "data.source.per_class=12",
    "data.batch_size=8",
    "backbone.depth=8",
    "backbone.weights=null",
    "trainer.max_epochs=1",
]


# ---------------------------------------------------------------- training
@row("head-epoch")
def head_epoch(bench: Bench) -> Iterator[Line]:
    """A linear head on cached features, seconds per epoch: a bare loop over one tensor."""
    features = features_file(bench)
    pair = {
        "ours": bench.graft(*probe_overrides(bench), cache=warm_cache(bench), clock=True),
        "theirs": bench.baseline(
            "bare-head",
            features=features,
            batch=batch(bench, 512),
            epochs=bench.epochs or 10,
        ),
    }
    yield bench.versus("head-epoch", pair, 0.95)


@row("partial-finetune")
def partial_finetune(bench: Bench) -> Iterator[Line]:
    """ResNet-18 64 px, last stage, random weights, 10 epochs: the same with cache=off."""

    def run(cache: str) -> Contestant:
        return bench.graft(
            "experiment=cifar10_finetune",
            "backbone=resnet18",
            "backbone.weights=null",
            "data.image_size=64",
            f"data.root='{bench.images}'",
            f"data.batch_size={batch(bench, 64)}",
            f"trainer.max_epochs={bench.epochs or 10}",
            "transfer.stages.finetune.trainable=1",
            "transfer.stages.finetune.augment=false",
            f"++transfer.stages.finetune.cache={cache}",
        )

    yield bench.versus("partial-finetune", {"cached": run("on"), "off": run("off")}, 2.5)


def finetune_overrides(bench: Bench, model: str, weights: str | None, size: int) -> list[str]:
    return [
        "experiment=cifar10_finetune",
        f"backbone={model}",
        f"backbone.weights={weights or 'null'}",
        f"data.image_size={size}",
        f"data.root='{bench.images}'",
        f"data.batch_size={batch(bench, 64)}",
        f"trainer.max_epochs={bench.epochs or 2}",
    ]


def finetune(
    bench: Bench, name: str, goal: float | None, baseline: str, model: str = "squeezenet1_1",
    weights: str | None = WEIGHTS, size: int = 64,
) -> Line:  # fmt: skip
    size_of_batch, kept = batch(bench, 64), 0
    for folder in (bench.images / "train").iterdir():
        images = sum(1 for _ in folder.iterdir())
        kept += images - max(1, int(0.1 * images + 0.5))
    options = {
        "images": bench.images,
        "model": model,
        "weights": weights,
        "size": size,
        "batch": size_of_batch,
        "epochs": bench.epochs or 2,
    }
    pair = {
        "ours": bench.graft(*finetune_overrides(bench, model, weights, size), clock=True),
        "theirs": bench.baseline(baseline, **options),
    }
    # Both leave out a smaller last batch; the seconds are those of an epoch's training batches.
    return bench.versus(name, pair, goal, items=kept // size_of_batch * size_of_batch)


@row("finetune-lightning")
def finetune_lightning(bench: Bench) -> Iterator[Line]:
    """SqueezeNet 64 px, all of it, images/s: a conventional Lightning module."""
    yield finetune(bench, "finetune-lightning", 1.3, "lightning")


@row("finetune-bare")
def finetune_bare(bench: Bench) -> Iterator[Line]:
    """The same: a bare hand-optimised loop."""
    yield finetune(bench, "finetune-bare", 0.95, "bare-finetune")


@row("gpu-finetune")
def gpu_finetune(bench: Bench) -> Iterator[Line]:
    """ResNet-50 224 px bf16, images/s on a GPU: a conventional module, and a bare loop."""
    import torch

    if not torch.cuda.is_available():
        raise Skip("no GPU")
    rate = gemm_gflops(8192, 20, "bfloat16") / 1000
    for name, baseline, goal in (("lightning", "lightning", 3.0), ("bare", "bare-finetune", 0.95)):
        line = finetune(bench, f"gpu-finetune ({name})", goal, baseline, "resnet50", None, 224)
        images = float(line.ours.split()[0])
        note = f"{images * 24.5e-3 / rate:.0%} of the {rate:.0f} TFLOP/s of a bf16 GEMM"
        yield dataclasses.replace(line, note=f"{line.note}; {note} at 24.5 GFLOP an image")


# ---------------------------------------------------------------- everything around training
def limit(name: str, values: list[float], most: float | None, unit: str, note: str = "") -> Line:
    """A figure that has to stay below a bound; there is no contestant."""
    if most is None:
        return Line(name, f"{spread(values)} {unit}", note=note)
    middle = statistics.median(values)
    passed = "met" if middle <= most else f"missed: {middle / most:.2f} times as much"
    return Line(name, f"{spread(values)} {unit}", "", "", f"{most:g} {unit}", passed, note)


@row("startup")
def startup(bench: Bench) -> Iterator[Line]:
    """graft --help; a config error; process start to the first training step of the default run."""

    def clock(*arguments: str, fails: bool = False) -> list[float]:
        seconds = []
        for _ in range(bench.repeats + 1):  # the first reads the files from disk
            started = time.perf_counter()
            try:
                run_process([sys.executable, "-m", "graft", *arguments], bench.env)
            except RuntimeError as error:
                if not fails or "graft: error" not in str(error):
                    raise
            seconds.append(time.perf_counter() - started)
        return seconds[1:]

    yield limit("startup (--help)", clock("--help"), 0.5, "s")
    wrong = clock("train", "optimizer.lr=-1", fails=True)
    yield limit("startup (config error)", wrong, 2.0, "s")
    steps = []
    for repeat in range(bench.repeats + 1):
        folder, started = bench.folder("startup"), time.time()
        command = [sys.executable, "-m", "graft", "train", "debug=fdr", f"seed={repeat}"]
        command.append("+callbacks.clock._target_=baselines_lightning.FirstStep")
        command.append(f"+callbacks.clock.file='{folder}/first.json'")
        run_process(command, {**bench.env, "GRAFT_LOGS": str(folder)})
        steps.append(json.loads((folder / "first.json").read_text()) - started)
    yield limit("startup (first step)", steps[1:], None, "s", "goal: half the first version's")


@row("sweep-20")
def sweep_20(bench: Bench) -> Iterator[Line]:
    """20 tiny runs as one sweep: 20 processes, one after the other."""

    def command(folder: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
        env = {**bench.env, "GRAFT_LOGS": str(folder), "GRAFT_CACHE": str(folder / "cache")}
        return [sys.executable, "-m", "graft", "train", *TINY, *arguments], env

    def ours(repeat: int) -> Sample:
        seeds = ",".join(map(str, range(20)))
        sample, _ = run_process(*command(bench.folder("sweep"), "-m", f"seed={seeds}"))
        return sample

    def theirs(repeat: int) -> Sample:
        folder = bench.folder("processes")

        def work() -> None:
            for seed in range(20):
                run_process(*command(folder, f"seed={seed}"))

        return timed(work)

    yield bench.versus("sweep-20", {"ours": ours, "theirs": theirs}, 10)


@row("memory")
def memory(bench: Bench) -> Iterator[Line]:
    """Peak resident memory of a probe on the class folders, all its processes together."""
    run = bench.graft(*probe_overrides(bench), watch=True)
    peaks = [sample.peak for sample in interleave({"ours": run}, bench.repeats)["ours"]]
    if not any(peaks):
        raise Skip("needs /proc")
    yield limit("memory", peaks, 1.5, "GB", "proportional set size, sampled every 0.1 s")


PAST_MEMORY = """
import sys
from pathlib import Path
import numpy as np, torch
from graft.storage.stored import StoredFeatures
from graft.storage.shards import ShardedRows

rows = ShardedRows(Path(sys.argv[1]), int(sys.argv[2]) * 2**20 // 4096, (1024,))
rows.fill(lambda positions: np.ones((len(positions), 1024), np.float32))
features = StoredFeatures(rows)
order = torch.randperm(len(features))
for start in range(0, len(order), 512):
    features[order[start : start + 512]]
"""


@row("cache-memory")
def cache_memory(bench: Bench) -> Iterator[Line]:
    """Peak resident memory while features are built and read once in random order, as they grow."""
    for megabytes in (256, 1024, 2048, 4096):
        folder = bench.folder("rows")
        command = [sys.executable, "-c", PAST_MEMORY, str(folder), str(megabytes)]
        sample, _ = run_process(command, bench.env, True)
        shutil.rmtree(folder)
        note = f"{megabytes / 1024 / sample.seconds:.2g} GB/s written, checked and read"
        yield limit(f"cache-memory ({megabytes} MB)", [sample.peak], None, "GB", note)


@row("scaling")
def scaling(bench: Bench) -> Iterator[Line]:
    """How a probe's cost grows: images (cold and warm), and heads trained at once (warm)."""
    sizes = [bench.limit // 4, bench.limit] if bench.limit else [5_000, 15_000, 60_000]
    for size in sizes:
        images = bench.subset(size if bench.limit else size * 5 // 6 if size < 60_000 else None)
        caches = [bench.folder("cache") for _ in range(bench.repeats)]

        def run(repeat: int, root: Path = images, places: list[Path] = caches) -> Sample:
            return bench.graft(*probe_overrides(bench, root), cache=places[repeat])(repeat)

        samples = interleave({"cold": run, "warm": run}, bench.repeats)
        for name, found in samples.items():
            seconds = [sample.seconds for sample in found]
            accuracies = [sample.accuracy or 0.0 for sample in found]
            note = f"test {statistics.median(accuracies):.2f} %"
            yield limit(f"scaling ({size} images, {name})", seconds, None, "s", note)
    for heads in (1, 8, 32, 128):
        seeds = f"head.grid.seed=[{','.join(map(str, range(heads)))}]"
        grid = ["head=linear_grid", "head.grid.lr=[0.001]", "head.grid.weight_decay=[0.01]", seeds]
        run_grid = bench.graft(*probe_overrides(bench), *grid, cache=warm_cache(bench))
        found = interleave({f"{heads} heads": run_grid}, bench.repeats)[f"{heads} heads"]
        yield limit(f"scaling ({heads} heads, warm)", [s.seconds for s in found], None, "s")


# ---------------------------------------------------------------- peers
def installed(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise Skip(f"{name} is not installed (pip install {name})")


@row("peer-lightly")
def peer_lightly(bench: Bench) -> Iterator[Line]:
    """The cold probe: lightly's LinearClassifier on images (its own optimizer and schedule)."""
    installed("lightly")
    theirs = bench.baseline("lightly", **probe_options(bench))
    pair = {"ours": bench.graft(*probe_overrides(bench)), "theirs": theirs}
    yield bench.versus("peer-lightly", pair)


@row("peer-timm")
def peer_timm(bench: Bench) -> Iterator[Line]:
    """ResNet-18 64 px from random weights, images/s: timm's model, loaders and optimizer."""
    installed("timm")
    yield finetune(bench, "peer-timm", None, "timm", "resnet18", None)


@row("peer-sklearn")
def peer_sklearn(bench: Bench) -> Iterator[Line]:
    """lbfgs_probe on a warm cache: LogisticRegression on the same features, end to end."""
    theirs = bench.baseline("sklearn", features=features_file(bench))
    overrides = [*probe_overrides(bench), "transfer=lbfgs_probe"]
    ours = bench.graft(*overrides, cache=warm_cache(bench))
    yield bench.versus("peer-sklearn", {"ours": ours, "theirs": theirs})
