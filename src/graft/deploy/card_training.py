"""The sections of a model card that tell how the model came about."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np

from graft.config.words import plural
from graft.deploy.card_facts import Facts
from graft.deploy.markdown import block, code, escaped, table

FEW = 30  # classes that are named or have a row


def count(facts: Facts) -> str:
    n = len(facts.model.classes)
    kinds = {"classes": ("class", "classes"), "labels": ("label", ""), "numbers": ("number", "")}
    return plural(n, *kinds[facts.kind])


def names(facts: Facts) -> str:
    names = [escaped(name) for name in facts.model.classes[:FEW]]
    more = len(facts.model.classes) - FEW
    return ", ".join(names) + (f" and {more:,} more" if more > 0 else "")


def data(facts: Facts) -> str:
    rows = []
    for name in ("train", "val", "test"):
        split = (facts.record.get("data") or {}).get(name, {})
        counts = ""
        if facts.kind == "classes" and facts.splits is not None:
            labels = facts.splits.splits[name].labels
            found = np.bincount(labels, minlength=len(facts.model.classes))
            counts = " to ".join(f"{n:,}" for n in sorted({found.min(), found.max()}))
        items = int(split.get("items", 0))
        digest = code(str(split.get("digest", "")))
        rows.append([name, f"{items:,}", *([counts] if counts else []), digest])
    header = ["split", "images", *(["images of a class"] if len(rows[0]) == 4 else []), "digest"]
    return (
        f"{escaped(facts.dataset)}, with {count(facts)}: {names(facts)}.\n\n"
        + table(header, rows)
        + "\n\nThe digests are of the images and their classes, whatever the names of the files."
    )


def plan(facts: Facts) -> str:
    done = {stage["name"]: stage for stage in facts.record.get("stages") or []}
    rows = []
    for name, stage in facts.config["transfer"]["stages"].items():
        groups = (facts.record.get("groups") or {}).get(name) or []
        learning = [group for group in groups if group["trainable"] == "yes"]
        whole = sum(int(group["parameters"]) for group in groups)
        share = f"{sum(int(g['parameters']) for g in learning):,} of {whole:,}" if whole else ""
        solved = stage.get("solver", "sgd") != "sgd"
        rates = [g["lr"] for g in learning if isinstance(g["lr"], int | float)]
        rate = "" if solved or not rates else f"{max(rates):g}"
        epochs = str(stage["solver"]) if solved else str(stage["epochs"])
        seconds = done.get(name, {}).get("seconds")
        time = "" if seconds is None else f"{seconds:,.0f} s"
        rows.append([escaped(name), escaped(_learns(stage)), share, epochs, rate, time])
    header = ["stage", "what learns", "parameters", "epochs", "highest learning rate", "time"]
    chosen = facts.choice("transfer") or "of its own"
    text = f"The transfer plan is {code(chosen)}:\n\n{table(header, rows, left=2)}"
    command = " ".join(["graft train", *map(shlex.quote, facts.overrides)])
    return (
        f"{text}\n\nThe seed is {int(facts.config['seed'])}. The command, without the paths of "
        f"the machine it ran on:\n\n{block(command, 'text')}"
    )


def _learns(stage: Mapping[str, Any]) -> str:
    part = stage.get("trainable", "all")
    words = {"head": "the head", "all": "all"}
    if isinstance(part, list):
        text = ", ".join(map(str, part))
    else:
        text = words.get(
            str(part), f"the top {part} blocks" if isinstance(part, int) else str(part)
        )
    if stage.get("lora"):
        text += f" (LoRA adapters of rank {stage['lora'].get('rank')})"
    if part != "head":
        text += " and the head" if stage.get("train_head", True) and part != "all" else ""
        text += "" if stage.get("train_head", True) else ", not the head"
    return text


def preprocessing(facts: Facts) -> str:
    spec = facts.model.spec
    p = spec.preprocessing
    how = (
        f"both sides to {p.resize_size} px"
        if p.crop_mode == "squash"
        else f"the shorter side to {p.resize_size} px"
    )
    numbers = [", ".join(f"{v:.4g}" for v in values) for values in (p.mean, p.std)]
    return "\n".join(
        [
            "All of it is part of the model; this is what happens to an image:",
            "",
            "1. EXIF orientation is applied; grey, palette and CMYK images become RGB, transparent "
            f"parts {escaped(spec.reading.background)}.",
            f"2. It is resized ({how}, {p.interpolation}), and the central {p.crop_size} x "
            f"{p.crop_size} px are kept.",
            f"3. Values from 0 to 1 are normalised with mean ({numbers[0]}) and standard deviation "
            f"({numbers[1]}).",
        ]
    )


def origin(facts: Facts) -> str:
    record = facts.record
    hardware = record.get("hardware") or {}
    gpus = ", ".join(map(str, hardware.get("gpus") or [])) or "no GPU"
    commit = str(record.get("git_commit") or "not recorded")
    changed = " with changes" if record.get("git_dirty") else ""
    versions = ", ".join(f"{n} {v}" for n, v in (record.get("versions") or {}).items())
    digest = (record.get("weights") or {}).get("digest")
    peak = [
        f"{record[key] / 1000:.1f} GB of {where}"
        for key, where in (("memory_mb", "memory"), ("gpu_memory_mb", "GPU memory"))
        if record.get(key)
    ]
    rows = [
        ["run", code(facts.name)],
        ["finished", escaped(str(record.get("finished") or "").partition("T")[0])],
        ["device", escaped(str(record.get("device") or "not recorded"))],
        [
            "machine",
            escaped(
                f"{hardware.get('cpu')}, {hardware.get('cores')} cores, "
                f"{hardware.get('memory_gb')} GB; {gpus}"
            ),
        ],
        ["time", f"{float(record.get('seconds') or 0):,.0f} s in all"],
        ["peak", ", ".join(peak)],
        [
            "weights at the start",
            code(facts.weights) + (f", SHA-256 {code(digest)}" if digest else ""),
        ],
        ["code", f"commit {code(commit)}{changed}"],
        ["versions", escaped(f"Python {record.get('python')}, {versions}")],
    ]
    return table(["", ""], [row for row in rows if row[1]], left=2)
