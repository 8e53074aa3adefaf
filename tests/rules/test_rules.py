"""Rules of a transfer that any implementation can be held to: Graft here, others by hand.

    GRAFT_RULES_SUBJECT=BackboneFinetuning make test-all ARGS=tests/rules    # or BaseFinetuning

docs/correctness.md has what comes of that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest
import torch

from graft.training.build import build
from tests.conftest import TINY, Graft, compose, same
from tests.rank_states import State, read_states
from tests.rules import lightning_finetuning
from tests.rules.watch import Stopped

ROOT = Path(__file__).parents[2]
SUBJECT = os.environ.get("GRAFT_RULES_SUBJECT", "graft")


class Subject(Protocol):
    """Trains the head alone, then everything; `tests.rules.watch` tells what happened in it."""

    states: Path

    def train(self, ranks: int = 1) -> None: ...

    def stop_and_resume(self) -> None:
        """Stopped after an epoch of the second part, and resumed."""

    def kept(self) -> State:
        """What the first part ends with, for the second to go on from."""
        ...


class GraftPlan:
    # Rates at which ranks that train on their own are far apart after a step.
    overrides = (
        "transfer=lp_ft", "transfer.stages.probe.epochs=2", "transfer.stages.probe.lr=0.05",
        "transfer.stages.probe.cache=off", "transfer.stages.finetune.layer_decay=0.5",
        "trainer.max_epochs=3", "scheduler=constant", "optimizer.lr=0.05",
        "+callbacks.watch._target_=tests.rules.watch.Watch",
    )  # fmt: skip

    def __init__(self, graft: Graft, graft_process: Graft, folder: Path) -> None:
        self.graft, self.graft_process = graft, graft_process
        self.folder, self.states = folder, folder / "states"

    def train(self, ranks: int = 1) -> None:
        done = self._call(self.graft if ranks == 1 else self.graft_process, ranks)
        assert done.returncode == 0, done.stderr

    def _call(self, graft: Graft, ranks: int) -> subprocess.CompletedProcess[str]:
        several = ["trainer=ddp_cpu", f"data.batch_size={8 // ranks}"] if ranks > 1 else []
        return graft(
            "train", *TINY, *several, *self.overrides, f"+callbacks.watch.folder={self.states}"
        )

    def stop_and_resume(self) -> None:
        assert self._call(self.graft, 1).returncode == 1
        done = self.graft("resume", str(self._run()))
        assert done.returncode == 0, done.stderr

    def _run(self) -> Path:
        (run,) = (self.folder / "logs").iterdir()
        return run

    def kept(self) -> State:
        return torch.load(self._run() / "checkpoints/probe/best.ckpt")["state_dict"]


class LightningCallback:
    def __init__(self, callback: str, folder: Path) -> None:
        self.callback, self.states = callback, folder / "states"

    def train(self, ranks: int = 1) -> None:
        if ranks == 1:
            lightning_finetuning.train(self.callback, self.states)
            return
        command = [sys.executable, "-m", lightning_finetuning.__name__, self.callback]
        subprocess.run([*command, str(self.states), str(ranks)], check=True, timeout=200)

    def stop_and_resume(self) -> None:
        with pytest.raises(Stopped):
            lightning_finetuning.train(self.callback, self.states)
        lightning_finetuning.train(self.callback, self.states, checkpoint=self.states / "last.ckpt")

    def kept(self) -> State:
        return read_states(self.states, "probe", "end")[0]


@pytest.fixture
def subject(
    graft: Graft, graft_process: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Subject:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    (tmp_path / "states").mkdir()
    if SUBJECT == "graft":
        return GraftPlan(graft, graft_process, tmp_path)
    return LightningCallback(SUBJECT, tmp_path)


def backbone(state: State) -> State:
    return {k: v for k, v in state.items() if k.startswith("backbone.")}


def distance(a: State, b: State) -> float:
    """The largest, counters of batches left out."""
    return max(float((a[k] - b[k]).abs().max()) for k in a if a[k].is_floating_point())


def test_a_frozen_backbone_stays_as_it_was_loaded(subject: Subject) -> None:
    """Rule 1, BatchNorm statistics too: `requires_grad=False` alone lets them drift."""
    subject.train()
    (start,), (end,) = (read_states(subject.states, "probe", m) for m in ("start", "end"))
    assert not same(start, end), "the head learns"
    moved = [key for key in backbone(start) if not torch.equal(start[key], end[key])]
    assert not moved, f"moved by up to {distance(backbone(start), end):.3g}: {len(moved)} tensors"


def test_a_head_learns_from_the_features_it_is_evaluated_with(subject: Subject) -> None:
    """Rule 1: not from a frozen backbone that normalises with the statistics of a batch."""
    subject.train()
    (start,) = read_states(subject.states, "probe", "start")
    loaded = build(compose(*TINY))[0].backbone.eval()
    loaded.load_state_dict({k.removeprefix("backbone."): v for k, v in backbone(start).items()})
    images, features = torch.load(subject.states / "features.pt")
    with torch.no_grad():
        error = (loaded(images) - features).norm() / features.norm()
    assert error < 1e-5, f"features are off by {error:.0%}"


@pytest.mark.slow
def test_ranks_are_equal_after_every_part(subject: Subject) -> None:
    """Rules 2 and 12: all that learns moves, on each rank alike, from the head of the probe on."""
    subject.train(ranks=2)
    learning = {name for name, _ in build(compose(*TINY))[0].named_parameters()}
    for part in ("probe", "finetune"):
        starts, ends = (read_states(subject.states, part, m) for m in ("start", "end"))
        assert len(starts) == len(ends) == 2
        first, second = ({k: end[k] for k in learning} for end in ends)
        apart, moved = distance(first, second), distance(first, starts[0])
        assert apart == 0, f"{part}: weights are {apart:.3g} apart, having moved by {moved:.3g}"
        for key in learning if part == "finetune" else ("head.linear.weight", "head.linear.bias"):
            assert not torch.equal(starts[0][key], ends[0][key]), f"{part}: {key}"
    assert same(starts[0], subject.kept())
    assert same(*ends), "buffers too"


def test_after_a_resume_what_was_unfrozen_goes_on_learning(subject: Subject) -> None:
    (subject.states / "stop").touch()
    subject.stop_and_resume()
    (start,), (stopped,), (end,) = (
        read_states(subject.states, part, moment)
        for part, moment in (("probe", "end"), ("finetune", "stopped"), ("finetune", "end"))
    )
    learned = {key for key in backbone(start) if not torch.equal(start[key], stopped[key])}
    assert len(learned) > 10
    frozen = {key for key in learned if torch.equal(stopped[key], end[key])}
    assert not frozen, f"{len(frozen)} of {len(learned)} tensors no longer move"


def test_each_parameter_that_learns_is_in_one_group(subject: Subject) -> None:
    """Rule 4, with a rate for each block. New BatchNorms of a width have equal values."""
    subject.train()
    places = torch.load(subject.states / "finetune-places.pt")
    assert places.keys() == {name for name, _ in build(compose(*TINY))[0].named_parameters()}
    wrong = {name: count for name, count in places.items() if count != 1}
    assert not wrong, "groups of a parameter"
