"""The rows of bench/bench.py: one function each, which yields the lines of its table."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench_contestants import Bench
from bench_measure import (
    Contestant,
    Line,
    Sample,
    gemm_gflops,
    interleave,
    run_process,
    spread,
    timed,
    verdict,
)

Row = Callable[[Bench], Iterable[Line]]
ROWS: dict[str, Row] = {}
WEIGHTS = "IMAGENET1K_V1"
SQUEEZENET = ["backbone=squeezenet1_1", f"backbone.weights={WEIGHTS}"]


def row(name: str) -> Callable[[Row], Row]:
    def register(function: Row) -> Row:
        ROWS[name] = function
        return function

    return register


# ---------------------------------------------------------------- probes
def probe_overrides(bench: Bench, images: Path | None = None) -> list[str]:
    return [
        "experiment=cifar10_linear_probe",
        *SQUEEZENET,
        "data.image_size=96",
        f"data.root='{images or bench.images}'",
        f"data.batch_size={batch(bench, 512)}",
        f"trainer.max_epochs={bench.epochs or 10}",
    ]


def batch(bench: Bench, size: int) -> int:
    """A check on a few images takes smaller batches, so that there are some."""
    return size if bench.limit is None else min(size, max(8, bench.limit // 16))


def probe_options(bench: Bench) -> dict[str, Any]:
    """The same for a baseline."""
    return {
        "images": bench.images,
        "weights": WEIGHTS,
        "batch": batch(bench, 512),
        "epochs": bench.epochs or 10,
    }


def probes(bench: Bench) -> dict[str, list[Sample]]:
    """Cold, warm and the reference recipe, interleaved once for both rows: it takes long."""
    if "probes" not in bench.memory:
        caches = [bench.folder("cache") for _ in range(bench.repeats)]
        run = bench.graft

        def probe(repeat: int) -> Sample:
            return run(*probe_overrides(bench), cache=caches[repeat])(repeat)

        bench.memory["probes"] = interleave(
            {
                "cold": probe,
                "warm": probe,
                "reference": bench.baseline("reference", **probe_options(bench)),
            },
            bench.repeats,
        )
    samples: dict[str, list[Sample]] = bench.memory["probes"]
    return samples


@row("probe-cold")
def probe_cold(bench: Bench) -> Iterator[Line]:
    """SqueezeNet 96 px, from class folders to test accuracy, nothing cached: reference recipe."""
    samples = probes(bench)
    yield bench.compare("probe-cold", samples["cold"], samples["reference"], 15)


@row("probe-warm")
def probe_warm(bench: Bench) -> Iterator[Line]:
    """The same again, with what the first run cached: reference recipe."""
    samples = probes(bench)
    yield bench.compare("probe-warm", samples["warm"], samples["reference"], 150)


def warm_cache(bench: Bench) -> Path:
    """The caches after one probe."""
    if "warm" not in bench.memory:
        cache = bench.folder("warm")
        bench.graft(*probe_overrides(bench), "trainer.max_epochs=1", cache=cache)(0)
        bench.memory["warm"] = cache
    found: Path = bench.memory["warm"]
    return found


@row("grid-32")
def grid_32(bench: Bench) -> Iterator[Line]:
    """32 heads in one warm run: 32 Hydra jobs of the conventional module on the same features.

    Once with the probe's batch size and once with that of the recipe everyone starts from.
    """
    for size in (512, 32):
        yield grid_at(bench, batch(bench, size))


def grid_at(bench: Bench, size: int) -> Line:
    cache, features = warm_cache(bench), features_file(bench)
    grid = composed(["head=linear_grid", "transfer=linear_probe"])["head"]["grid"]
    rates, decays = list(grid["lr"]), list(grid["weight_decay"])
    seeds = list(grid.get("seed") or [0])
    heads = len(rates) * len(decays) * len(seeds)
    few = rates[len(rates) // 4 :][: bench.jobs]  # where the winners are

    def theirs(repeat: int) -> Sample:
        if bench.jobs >= heads:
            return conventional(bench, features, size, rates, decays, seeds)
        # Start-up is paid once per sweep: only what a further job adds is multiplied.
        one = conventional(bench, features, size, few[:1], decays[:1], seeds[:1])
        several = conventional(bench, features, size, few, decays[:1], seeds[:1])
        more = (heads - 1) / (len(few) - 1)
        return dataclasses.replace(
            several,
            seconds=one.seconds + more * (several.seconds - one.seconds),
            cpu=one.cpu + more * (several.cpu - one.cpu),
        )

    overrides = [*probe_overrides(bench), f"data.batch_size={size}", "head=linear_grid"]
    ours = bench.graft(*overrides, cache=cache)
    note = f"{heads} heads"
    if bench.jobs < heads:
        note += f"; theirs EXTRAPOLATED from {len(few)} jobs in one process"
    name = f"grid-32 (batch {size})"
    return bench.versus(name, {"ours": ours, "theirs": theirs}, 50, note=note)


def conventional(
    bench: Bench,
    features: Path,
    size: int,
    rates: list[float],
    decays: list[float],
    seeds: list[int],
) -> Sample:
    """One Hydra multirun over the product, in one process; the job best on val is tested."""
    folder = bench.folder("sweep")
    lists: dict[str, list[Any]] = {"lr": rates, "weight_decay": decays, "seed": seeds}
    command = [
        sys.executable,
        str(Path(__file__).with_name("baselines_lightning.py")),
        "-m",
        *(f"{key}={','.join(map(str, values))}" for key, values in lists.items()),
        f"features='{features}'",
        f"out='{folder}/results'",
        f"epochs={bench.epochs or 10}",
        f"batch={size}",
        f"hydra.sweep.dir='{folder}'",
    ]
    sample, _ = run_process(command, bench.env)
    results = [json.loads(line) for line in (folder / "results").read_text().splitlines()]
    best = max(results, key=lambda result: result["val"])
    return dataclasses.replace(sample, accuracy=best["accuracy"])


# ---------------------------------------------------------------- inside this process
def composed(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir

    from graft.config.resolved import CONFIGS, check

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return check(compose("train", overrides))


def frozen(bench: Bench, cache: Path, *overrides: str) -> tuple[Any, Any]:
    """A module and its prepared data, ready to extract."""
    from graft.training.build import build, build_stages

    config = composed([*probe_overrides(bench), f"paths.cache='{cache}'", *overrides])
    module, datamodule = build(config)
    module.start_stage(build_stages(config)[0])
    return module, datamodule


def extracted(module: Any, datamodule: Any, split: str) -> Any:
    """The features a stage would train on, computed and stored nowhere."""
    import numpy as np
    import torch

    from graft.features.prefix import Extractor, FrozenPrefix

    prefix = FrozenPrefix(module.backbone, len(module.backbone.blocks))
    extractor = Extractor(prefix, lambda rows: datamodule.prepared(split, rows, module.device))
    return torch.from_numpy(extractor.rows(np.arange(len(datamodule.splits[split]))))


def features_file(bench: Bench) -> Path:
    """What a probe stored, for baselines."""
    import torch

    from graft.features.store import FeatureStore

    file = bench.work / "features.pt"
    if not file.exists():
        cache = warm_cache(bench)
        module, data = frozen(bench, cache)
        data.start_stage(0, augment=False)
        torch.set_float32_matmul_precision("high")  # as runs do: a part of the key
        stored = FeatureStore(
            module.backbone, module.cut, data, module.stage, cache, device=module.device
        ).features(list(data.splits))
        labels = {name: torch.from_numpy(split.labels) for name, split in data.splits.items()}
        parts = {name: (x[torch.arange(len(x))], labels[name]) for name, x in stored.items()}
        torch.save(parts, file)
    return file


@row("extraction")
def extraction(bench: Bench) -> Iterator[Line]:
    """Class folders to SqueezeNet features at 96 px: the reference's loader and forward."""
    import torch
    from torchvision.models import get_model

    from baselines import reference_features

    found: dict[str, Any] = {}

    def ours(repeat: int) -> Sample:
        def work() -> None:
            module, found["data"] = frozen(bench, bench.folder("cache"))
            found["ours"] = extracted(module, found["data"], "train")

        return timed(work)

    def theirs(repeat: int) -> Sample:
        def work() -> None:
            found["theirs"] = reference_features(bench.images, "squeezenet1_1", WEIGHTS, 96)

        return timed(work)

    samples = interleave({"ours": ours, "theirs": theirs}, bench.repeats)
    data = found["data"]
    first = data.splits["train"][list(range(min(512, len(found["ours"]))))]
    plain = get_model("squeezenet1_1", weights=WEIGHTS).features.eval()
    with torch.no_grad():  # the plain model on the same pixels: PIL rounds them to whole levels
        expected = plain(data.inputs.prepare(first["input"]).contiguous()).mean((2, 3))
    apart = float((found["ours"][: len(expected)] - expected).abs().max())
    through_pil = float((found["ours"] - found["theirs"]).abs().max())
    line = bench.compare(
        "extraction",
        samples["ours"],
        samples["theirs"],
        2,
        items=len(found["ours"]),
        note=f"features differ by {apart:.1e} at most (scale {float(expected.abs().max()):.0f}), "
        f"through PIL's 8-bit resize by {through_pil:.1e}",
    )
    bound = 1e-4 * max(1.0, float(expected.abs().max()))
    yield line if apart <= bound else dataclasses.replace(line, verdict=f"void: {line.note}")


@row("extraction-gemm-share")
def extraction_gemm_share(bench: Bench) -> Iterator[Line]:
    """FLOP/s of extraction at 96 px as a share of the GEMM rate: ResNet-50 and SqueezeNet."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.models import get_model

    for model, goal, most in (("resnet50", 0.6, 1000), ("squeezenet1_1", 0.45, 4000)):
        overrides = [f"backbone={model}", "backbone.weights=null"]  # weights change no speed
        module, data = frozen(bench, warm_cache(bench), *overrides)
        train = data.splits["train"]
        train.rows, train.labels = train.rows[:most], train.labels[:most]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            get_model(model, weights=None).eval()(torch.zeros(1, 3, 96, 96))
        flops = counter.get_total_flops() * len(train)
        extracted(module, data, "train")
        rates, ceilings = [], []
        for _ in range(bench.repeats):
            ceilings.append(gemm_gflops())
            rates.append(flops / timed(lambda: extracted(module, data, "train")).seconds / 1e9)  # noqa: B023
            ceilings.append(gemm_gflops())
        share = statistics.median(rates) / statistics.median(ceilings)
        yield Line(
            f"extraction-gemm-share {model}",
            f"{spread(rates)} GFLOP/s",
            f"{spread(ceilings)} GFLOP/s (GEMM)",
            f"{share:.0%}",
            f"{goal:.0%}",
            verdict(share, goal),
            f"{counter.get_total_flops() / 1e9:.2f} GFLOP an image, {len(train)} images",
        )


@row("input")
def input_pipeline(bench: Bench) -> Iterator[Line]:
    """uint8 arrays to normalised 96 px on one core: the PIL pipeline, from files and decoded."""
    import torch
    from PIL import Image

    from baselines_parts import pil_transform

    _, data = frozen(bench, warm_cache(bench))
    train = data.splits["train"]
    count = min(2048, len(train))
    files = sorted((bench.images / "train").glob("*/*"))[:count]
    count = len(files)
    opened = [Image.open(file).convert("RGB") for file in files]
    transform = pil_transform(96)

    def ours() -> None:
        for start in range(0, count, 256):
            data.inputs.prepare(train[list(range(start, min(start + 256, count)))]["input"])

    def from_files() -> None:
        for start in range(0, count, 256):
            part = files[start : start + 256]
            torch.stack([transform(Image.open(file).convert("RGB")) for file in part])

    def decoded() -> None:
        for start in range(0, count, 256):
            torch.stack([transform(image) for image in opened[start : start + 256]])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, theirs in (("from files", from_files), ("decoded", decoded)):
            pair: dict[str, Contestant] = {
                "ours": lambda _: timed(ours),
                "theirs": lambda _, work=theirs: timed(work),  # type: ignore[misc]
            }
            yield bench.versus(f"input ({name})", pair, 5, items=count)
    finally:
        torch.set_num_threads(threads)
