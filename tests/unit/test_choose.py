"""`graft choose`: its decisions, and what it refuses."""

from __future__ import annotations

import math
import urllib.request
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graft.choose.costs import NotAtHand, measure
from graft.choose.entrants import FEATURES, read_entrants, seconds_of
from graft.choose.halving import (
    Arm,
    Cost,
    Result,
    better_half,
    first_part,
    halved,
    interval,
    learns,
    next_round,
    shortened,
    winner,
    work,
)
from graft.choose.neighbours import vote
from graft.choose.race import run_race
from graft.choose.runs import Runs
from graft.config.job import compose_job
from graft.config.resolved import CONFIGS
from tests.conftest import TINY, Graft, compose

COST = Cost(
    seconds=0.01, macs=1, parameters=1, features=64, train=1000, val=100, test=500, epoch=1000,
    batch=64,
)  # fmt: skip
RESULT = Result(0.9, share=1.0, seconds=1.0, spent=1.0, full=10.0, memory=100.0)
A, B, C = Arm("a", "probe"), Arm("b", "finetune"), Arm("c", "finetune")


def test_a_round_is_as_long_as_the_time_allows_and_the_last_are_left_out() -> None:
    def seconds(arm: Arm, share: float) -> float:
        return 8 * share

    assert next_round([A, B], 16, seconds) == (1.0, [A, B])
    assert next_round([A, B], 15, seconds) == (0.5, [A, B])
    assert next_round([A, B, C], 2.5, seconds) == (0.125, [A, B])
    assert next_round([A, B], 0.5, seconds)[1] == []
    # Longer than before, for fewer: the same again would tell nothing.
    assert next_round([A, B], 8, seconds, above=0.25) == (0.5, [A, B])
    assert next_round([A, B], 4, seconds, above=0.25) == (0.5, [A])
    assert next_round([A], 99, seconds, above=1.0)[1] == []


def test_the_better_half_of_each_plan_stays_and_the_best_of_each_comes_first() -> None:
    scores = {"a": 0.5, "b": 0.7, "c": 0.6}
    tuned = {Arm(name, "finetune"): replace(RESULT, score=s) for name, s in scores.items()}
    probed = {Arm(name, "lp_ft"): replace(RESULT, score=s + 0.3) for name, s in scores.items()}
    kept = halved([*tuned, *probed, Arm("d", "lp_ft")], {**tuned, **probed})
    assert [(arm.candidate, arm.plan) for arm in kept] == [
        ("b", "finetune"), ("b", "lp_ft"), ("c", "finetune"), ("c", "lp_ft"),
    ]  # fmt: skip


def test_the_first_stage_keeps_the_better_half_and_who_is_within_the_noise() -> None:
    results = {A: RESULT, B: replace(RESULT, score=0.95)}
    results[C] = replace(RESULT, score=0.89)
    assert better_half(results, images=100) == [B, A, C]
    assert better_half(results, images=10_000) == [B, A]
    # Nearest neighbours tell equal ones apart.
    assert better_half({A: RESULT, B: replace(RESULT, knn=0.5)}, images=9)[0] == B


def test_of_those_within_the_noise_the_one_that_has_still_to_gain_wins_then_the_cheaper() -> None:
    short = replace(RESULT, score=0.89, share=0.25)
    assert winner({A: RESULT, B: short}, images=100) == B
    assert winner({A: RESULT, B: replace(short, score=0.8)}, images=100) == A
    assert winner({A: RESULT, B: short}, images=100_000) == A
    assert winner({A: RESULT, B: replace(RESULT, full=5.0)}, images=100) == B
    perfect = replace(RESULT, score=1.0)  # whose binomial error would be none
    assert winner({A: perfect, B: replace(perfect, score=59 / 60, share=0.5)}, images=60) == B


def test_features_of_a_part_of_the_images_and_of_those_who_are_quick_enough() -> None:
    slow = replace(COST, seconds=1.0)
    assert first_part({"a": COST}, 600, overhead=1) == (1.0, {})
    part, left_out = first_part({"a": COST, "slow": slow}, 60, overhead=1)
    assert part == 1.0
    assert list(left_out) == ["slow"]
    part, left_out = first_part({"a": COST, "b": COST}, 60, overhead=1)
    assert left_out == {}
    assert 2 * (1 + 0.01 * (1000 * part + 100)) == pytest.approx(60 / 3)
    with pytest.raises(ValueError, match=r"--budget: 3 s of it are left .* a, take 4 s: add 9 s"):
        first_part({"a": COST}, 3, overhead=1)


def test_work_is_counted_in_forward_passes() -> None:
    probe, both, full = (compose(f"transfer={p}") for p in ("linear_probe", "lp_ft", "finetune"))
    assert [learns(config) for config in (probe, both, full)] == [False, True, True]
    assert work(probe, COST) == 1000 + 100
    assert work(probe, COST, part=0.1) == 100 + 100
    assert work(probe, COST, stored=True) == 0
    assert work(full, COST) == 10 * (3 * 1000 + 100)
    assert work(full, COST, share=0.25) == 2.5 * 3 * 1000 + 2 * 100
    assert work(both, COST) == work(probe, COST) + work(full, COST)


def test_a_shorter_training_keeps_its_batches_and_trains_its_probe_in_full() -> None:
    config = compose("transfer=lp_ft")
    assert shortened(1, config, COST) == []
    assert shortened(0.5, config, COST) == ["trainer.max_epochs=5"]
    own = compose("transfer=lp_ft", "transfer.stages.finetune.epochs=20")
    assert "transfer.stages.finetune.epochs=10" in shortened(0.5, own, COST)
    command = shortened(1 / 20, config, COST)
    short = compose_job(["data.shots_per_class=100", "transfer=lp_ft", *command]).config
    stages = short["transfer"]["stages"]
    assert short["data"]["epoch_images"] * stages["finetune"]["epochs"] == 500
    assert short["data"]["epoch_images"] * stages["probe"]["epochs"] == 30 * 1000
    assert short["data"]["batch_size"] == COST.batch


def test_wilsons_interval() -> None:
    low, high = interval(0.9, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)  # Newcombe 1998's formula
    assert interval(1.0, 50)[0] < 0.95 < interval(1.0, 50)[1] == 1.0


@pytest.mark.parametrize("k", [1, 5, 500])
def test_neighbours_vote_by_the_cosine_of_centred_features(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(90, 6, generator=generator) + 5
    labels = torch.randint(3, (90,), generator=generator)
    train[:, 0] += 2 * labels
    val = train[:40] + 0.5 * torch.randn(40, 6, generator=generator)
    mean = train.numpy().mean(0)
    a, b = train.numpy() - mean, val.numpy() - mean
    expected = []
    for row in b:
        cosine = a @ row / np.linalg.norm(a, axis=1) / np.linalg.norm(row)
        votes = np.zeros(3)
        for i in np.argsort(-cosine)[:k]:
            votes[labels[i]] += math.exp(cosine[i] / 0.07)
        expected.append(votes.argmax())
    assert vote(train, labels, val, classes=3, k=k).tolist() == expected


def test_budgets() -> None:
    assert [seconds_of(text) for text in ("90s", "10m", "1.5h")] == [90, 600, 5400]
    for text in ("10", "m", "0m", "-5m", "ten minutes", "infm"):
        with pytest.raises(ValueError, match=rf"--budget {text}: write a time like 90s, 10m"):
            seconds_of(text)


@pytest.mark.slow
def test_a_larger_budget_decides_anew(tmp_path: Path) -> None:
    entrants: Any = None
    first = Runs(tmp_path, entrants, 60, print)
    first.save(rounds=[{"share": 0, "arms": []}], part=0.5)
    assert Runs(tmp_path, entrants, 60, print).state["rounds"]
    assert Runs(tmp_path, entrants, 600, print).state["rounds"] == []


def test_every_candidate_and_plan_of_the_file_composes() -> None:
    pytest.importorskip("timm", reason="one of the candidates is timm's")
    entrants = read_entrants("digits", [])
    plans = cycle([*entrants.plans, FEATURES])
    for candidate, plan in zip(entrants.candidates, plans, strict=False):
        compose_job(entrants.overrides(candidate, plan))
    first = (CONFIGS / "choose.yaml").read_text().splitlines()[0]
    assert first.startswith("# What `graft choose` races")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--candidates", "resnet20"], "no candidate resnet20: did you mean "),
        (["digits", "--plans", "fintune"], "no plan fintune: did you mean finetune?"),
        (["digit"], "data=digit: neither a folder nor a config of data: did you mean digits?"),
        (["digits", "backbone=resnet18"], "backbone=resnet18: backbones are what is compared"),
        (["digits", "transfer=lora"], "transfer=lora: plans are what is compared: --plans"),
        (["digits", "trainer.limit_test_batches=1"], "no run of the race looks at the test split"),
        (["digits", "optimizer.lr=x"], "optimizer.lr=x: must be a number above 0"),
        (["digits", "trainer=ddp_cpu"], "a race takes one device"),
        (["digits", "task=regression"], "graft choose compares classifiers by val/acc"),
        (["digits", "--budget", "soon"], "--budget soon: write a time"),
        (["digits", "--from", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_what_cannot_be_raced_is_said_in_one_line(
    graft: Graft, arguments: list[str], message: str
) -> None:
    done = graft("choose", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("graft: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plans: {p: [transfer=finetune]}", "candidates must be names"),
        ("candidates: {a: backbone=x}\nplans: {}", "candidates.a must be a list of overrides"),
        ("candidates: {a b: [backbone=x]}\nplans: {}", "a b: a name is of letters"),
        ("candidates: {features: [backbone=x]}\nplans: {}", "features: a name is of letters"),
    ],
)
def test_a_file_of_candidates_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_entrants("digits", [], file=tmp_path / "mine.yaml")


def test_an_override_goes_to_the_plans_that_it_acts_on() -> None:
    own = ["data.augment.flip=0", "seed=3", "sample_transform=rand_augment"]
    entrants = read_entrants("digits", own, plans=["linear_probe", "finetune"])
    for plan, acting in (("linear_probe", own[1:2]), ("finetune", own), (FEATURES, own[1:2])):
        overrides = entrants.overrides("resnet20_cifar", plan)
        assert [o for o in own if o in overrides] == acting
    with pytest.raises(ValueError, match=r"optimizer.lr=0.1: every stage of this plan has its own"):
        read_entrants("digits", ["optimizer.lr=0.1"], plans=["linear_probe"])


def test_weights_that_are_not_at_hand_are_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(urllib.request, "urlopen", asked)
    with pytest.raises(NotAtHand):
        measure(compose("backbone=squeezenet1_1", "data=synthetic"))


def test_costs_are_those_of_the_model_and_of_the_data() -> None:
    cost = measure(compose(*TINY, "data.train_fraction=0.5", "data.image_size=16"))
    assert (cost.train, cost.val, cost.test) == (24, 4, 80)
    assert cost.epoch == 24
    # The stem; six convolutions of 3 x 3 at 16, 8 and 4 px, two of which halve; two of 1 x 1.
    stem = 16**2 * 3 * 4 * 9
    first, second, third = (2 * 16**2 * 4 * 4, 8**2 * (4 + 8) * 8, 4**2 * (8 + 16) * 16)
    shortcuts = 8**2 * 4 * 8 + 4**2 * 8 * 16
    assert cost.macs == stem + 9 * (first + second + third) + shortcuts
    assert cost.seconds > 0


def test_a_disk_that_does_not_hold_the_features_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    entrants = read_entrants("synthetic", [f"paths.logs={tmp_path}"], candidates=["resnet20_cifar"])
    message = r"features of 1 candidate take [\d.]+ kB, and the disk has 1.0 kB free: make room"
    with pytest.raises(OSError, match=message):
        run_race(entrants, 600, print)
