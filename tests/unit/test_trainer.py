"""What `trainer=` resolves to, and who writes where several processes run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from graft.reporting import report
from graft.runs.startup import is_first_process
from graft.training.build import processes
from graft.training.trainer import describe_device, trainer_options
from tests.conftest import Train, compose

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}
SRUN = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_processes_started_for_one_device_are_an_error(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would train alone, and only the first would write anything."""
    set_all(monkeypatch, variables)
    with pytest.raises(ValueError, match=r"2 processes were started for trainer\.devices=1"):
        trainer_options(compose("trainer=cpu")["trainer"])
    assert trainer_options(compose("trainer=ddp_cpu")["trainer"])["strategy"] == "ddp"


def test_one_process_of_a_larger_slurm_job_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --ntasks=1` within a job of eight."""
    set_all(monkeypatch, {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"})
    assert trainer_options(compose("trainer=cpu")["trainer"])["strategy"] == "auto"


@pytest.mark.parametrize("override", ["trainer.devices=2", "trainer.num_nodes=2"])
def test_several_devices_are_ddp_as_we_set_it_up(
    override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's own choice would broadcast buffers in evaluation too, where ranks may hang."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # where two nodes meet
    assert trainer_options(compose("trainer=cpu", override)["trainer"])["strategy"] == "ddp"


@pytest.mark.parametrize(
    ("devices", "gpus", "strategy", "count"),
    [
        ("1", 2, "auto", 1), ("[1]", 2, "auto", 1), ("auto", 1, "auto", 1),
        ("[0,1]", 2, "ddp", 2), ("2", 2, "ddp", 2), ("auto", 2, "ddp", 2), ("-1", 2, "ddp", 2),
    ],
)  # fmt: skip
def test_one_device_is_one_process_however_it_is_named(
    devices: str, gpus: int, strategy: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = compose(f"trainer.devices={devices}", "trainer.precision=32-true")["trainer"]
    assert trainer_options(config)["strategy"] == strategy
    assert processes(config) == count


def test_a_list_of_devices_is_of_gpus() -> None:
    with pytest.raises(ValueError, match=r"trainer\.devices=\[1\]: a list names GPUs"):
        trainer_options(compose("trainer=cpu", "trainer.devices=[1]")["trainer"])


@pytest.mark.parametrize(
    ("rank", "node", "first"), [(0, None, True), (0, "0", True), (0, "1", False), (1, "0", False)]
)
def test_the_first_process_of_all_nodes_makes_the_run_folder(
    rank: int, node: str | None, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    if node is not None:
        monkeypatch.setenv("NODE_RANK", node)
    assert is_first_process() is first


def test_tables_are_not_cut_where_output_goes_to_a_file(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "console", Console(width=80))
    train_tiny("transfer=linear_probe", "trainer.max_epochs=1")
    header = next(line for line in capsys.readouterr().out.splitlines() if "tensors" in line)
    assert "weight_decay" in header
    assert "…" not in header


def test_the_device_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    options = trainer_options(compose("trainer=cpu")["trainer"])
    for threads, words in {1: "CPU, 1 thread, devices=1", 2: "CPU, 2 threads, devices=1"}.items():
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        assert describe_device(options) == f"{words}, precision 32-true"


@pytest.mark.parametrize(
    ("devices", "first"), [(1, 0), ("auto", 0), (-1, 0), ([1], 1), ([2, 0], 2)]
)
def test_the_gpu_that_is_named_is_the_first_of_the_run(
    devices: Any, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: f"GPU {device}")
    options = {"accelerator": "gpu", "devices": devices, "precision": "32-true"}
    assert describe_device(options) == f"GPU {first}, devices={devices}, precision 32-true"
    assert describe_device({**options, "devices": [3]}).startswith("gpu, devices=[3]")
