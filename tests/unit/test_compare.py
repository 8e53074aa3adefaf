"""`graft compare`: which runs are one group, what tells groups apart, what the numbers mean."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from PIL import Image

from graft.compare.groups import ABSENT, Comparison, grouped
from graft.compare.plots import learning_curve
from graft.compare.statistics import paired, summarise, t_inside, t_quantile
from graft.compare.tables import left_out
from graft.runs.folder import FORMAT
from graft.runs.records import find_runs, read_run, text
from tests.conftest import Graft


def add_run(
    parent: Path,
    acc: float | None,
    *,
    seed: int = 0,
    plan: str = "finetune",
    lr: float = 0.1,
    labels: float = 1.0,
    logs: str = "logs",
    overrides: list[str] | None = None,
    extra: dict[str, Any] | None = None,
    **record: Any,
) -> Path:
    """A run folder as `graft train` leaves it, its config cut short."""
    stage = {"finetune": {"trainable": "all", "lr": lr}, "probe": {"trainable": "head", "lr": lr}}
    name = {"finetune": "finetune"}.get(plan, "probe")
    config = {
        "seed": seed,
        "paths": {"logs": logs, "cache": f"{logs}/cache"},
        "data": {"train_fraction": labels, "source": {"cache": f"{logs}/cache"}},
        "optimizer": {"lr": lr},
        "transfer": {"stages": {name: stage[name]}},
    }
    for group, values in (extra or {}).items():
        config.setdefault(group, {}).update(values)  # type: ignore[attr-defined]
    folder = parent / f"run{len(list(parent.iterdir())):04d}" if parent.is_dir() else parent / "run"
    folder.mkdir(parents=True)
    whole: dict[str, Any] = {
        "format": FORMAT,
        "status": "done" if acc is not None else "failed",
        "started": folder.name,
        "metrics": {} if acc is None else {"val/acc": acc, "test/acc": acc, "test/loss": 1 - acc},
        "seconds": 20.0,
        "stages": [{"name": name, "seconds": 4.0}, {"name": "more", "seconds": 6.0}],
        "memory_mb": 800.0 + seed,
        "train_images": int(1000 * labels),
        "choices": {"transfer": plan, "data": "digits", "experiment": None},
        "overrides": overrides or [],
        "config": config,
        **record,
    }
    (folder / "run.json").write_text(json.dumps(whole))
    return folder


def compared(parent: Path) -> Comparison:
    return grouped(find_runs([parent]))


def test_runs_that_differ_by_the_seed_alone_are_one_group(tmp_path: Path) -> None:
    for seed, acc in enumerate((0.5, 0.6, 0.7)):
        add_run(tmp_path, acc, seed=seed)
    add_run(tmp_path, 0.9, seed=0, lr=0.2)
    one, other = compared(tmp_path).groups
    assert one.numbers("test/acc") == {"0": 0.5, "1": 0.6, "2": 0.7}
    assert other.numbers("test/acc") == {"0": 0.9}
    assert one.numbers("fit_seconds") == {"0": 10.0, "1": 10.0, "2": 10.0}


def test_where_the_folders_lie_makes_no_other_experiment(tmp_path: Path) -> None:
    """The same run on two machines, whose data and cache lie elsewhere."""
    add_run(tmp_path, 0.5, seed=0, logs="/here/logs")
    add_run(tmp_path, 0.6, seed=1, logs="/there")
    (group,) = compared(tmp_path).groups
    assert len(group.runs) == 2


def test_columns_are_what_was_set_and_not_what_follows_from_it(tmp_path: Path) -> None:
    """Another learning rate is also that of the stage; another plan differs in many keys."""
    for lr in (0.01, 0.1):
        for plan in ("finetune", "linear_probe"):
            add_run(tmp_path, 0.5, lr=lr, plan=plan, overrides=[f"optimizer.lr={lr}"])
    comparison = compared(tmp_path)
    assert comparison.columns == ["optimizer.lr", "transfer"]
    assert set(comparison.along) == {
        f"transfer.stages.{stage}.{key}"
        for stage in ("finetune", "probe")
        for key in ("lr", "trainable")
    }
    assert [comparison.cells(group) for group in comparison.groups] == [
        ["0.01", "finetune"], ["0.01", "linear_probe"], ["0.1", "finetune"], ["0.1", "linear_probe"]
    ]  # fmt: skip


def test_a_value_is_the_same_however_it_was_typed() -> None:
    assert text(1) == text(1.0) == "1"
    assert text(1e-3) == "0.001"
    assert text("007") == "007"
    assert [text(v) for v in (None, True, [0.1, 2], "all")] == ["null", "true", "[0.1,2]", "all"]


def test_what_is_not_done_is_listed_and_never_in_a_mean(graft: Graft, tmp_path: Path) -> None:
    """A preempted run has metrics of an earlier stage; they must not count."""
    logs = tmp_path / "logs"
    add_run(logs, 0.5, seed=0)
    add_run(logs, 0.9, seed=1, status="preempted")
    add_run(logs, 0.9, seed=2, status="running")
    failed = add_run(logs, None, seed=3, error="the loss is nan")
    torn = add_run(logs, 0.9, seed=4)
    (torn / "run.json").write_text('{"format": 2, "st')
    newer = add_run(logs, 0.9, seed=5, format=99)
    done = graft("compare", "logs")
    assert done.returncode == 0, done.stderr
    assert "50.00" in done.stdout
    assert "90.00" not in done.stdout
    (counts,) = [line for line in done.stdout.splitlines() if line.startswith("left out: ")]
    assert sorted(counts.removeprefix("left out: ").split(", ")) == [
        "1 failed", "1 preempted", "1 running", "2 unreadable"
    ]  # fmt: skip
    lines = done.stdout.splitlines()
    for reason, folder in (
        ("failed: the loss is nan", failed),
        ("unreadable: run.json is damaged: Unterminated string", torn),
        ("unreadable: written by a newer graft", newer),
    ):
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"- {reason}")]
        assert lines[at + 1] == f"  - {folder.relative_to(tmp_path)}"


def test_an_error_is_told_once_and_fits_the_terminal(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = "the loss of stage finetune is nan in epoch 0, step 7: lower optimizer.lr or " * 3
    logs = tmp_path / "logs"
    add_run(logs, 0.5)
    failed = [add_run(logs, None, seed=seed, error=error.strip()) for seed in (1, 2)]
    monkeypatch.setenv("COLUMNS", "80")
    lines = graft("compare", "logs").stdout.splitlines()
    start = lines.index("left out: 2 failed") + 1
    assert [line.strip(" -") for line in lines[-2:]] == [f"logs/{run.name}" for run in failed]
    assert lines[start].startswith("- failed: the loss")
    assert all(line.startswith("  ") for line in lines[start + 1 :])
    assert " ".join(line.strip(" -") for line in lines[start:-2]) == f"failed: {error.strip()}"
    assert max(map(len, lines)) <= 80
    monkeypatch.delenv("COLUMNS")
    assert f"- failed: {error.strip()}\n  - logs" in graft("compare", "logs").stdout


def test_of_runs_of_one_config_and_seed_the_newest_counts(tmp_path: Path) -> None:
    """Twice the same seed is no second sample."""
    add_run(tmp_path, 0.5, started="2026-01-02")
    add_run(tmp_path, 0.7, started="2026-01-01")
    comparison = compared(tmp_path)
    assert comparison.groups[0].numbers("test/acc") == {"0": 0.5}
    assert left_out(comparison) == ["left out: 1 older run of a config and seed that ran again"]


def test_a_record_without_the_config_is_completed_from_its_file(tmp_path: Path) -> None:
    folder = add_run(tmp_path, 0.5)
    record = json.loads((folder / "run.json").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(record.pop("config")))
    (folder / "run.json").write_text(json.dumps(record))
    assert read_run(folder).values["optimizer.lr"] == "0.1"


def test_students_t_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 4, 9, 30):
        assert t_quantile(0.975, df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)
        for t in (0.1, 1.0, 5.0):
            assert t_inside(t, df) == pytest.approx(1 - 2 * stats.t.sf(t, df), rel=1e-9)


def test_mean_spread_and_interval_of_a_few_runs() -> None:
    """Worked by hand: t(0.975, 2) = 4.3027."""
    summary = summarise([1.0, 2.0, 3.0])
    assert summary is not None
    assert (summary.n, summary.mean, summary.sd) == (3, 2.0, 1.0)
    assert summary.half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert summarise([2.0]) is not None
    assert summarise([2.0]).half is None  # type: ignore[union-attr]


def test_significance_is_paired_over_the_seeds_both_have() -> None:
    """Seeds that are good for both: unpaired, the spread between seeds would hide the gain."""
    theirs = {str(seed): seed / 10 for seed in range(5)}
    ours = {seed: value + gain for (seed, value), gain in zip(
        theirs.items(), (0.01, 0.012, 0.011, 0.009, 0.01), strict=True)}  # fmt: skip
    result = paired({**ours, "77": 100.0}, {**theirs, "88": -100.0})
    assert result is not None
    assert result.n == 5
    assert result.difference == pytest.approx(0.0104)
    assert result.p is not None
    assert result.p < 1e-4
    assert paired({"0": 1.0}, {"1": 1.0}) is None
    assert paired({"0": 1.0}, {"0": 0.5}).p is None  # type: ignore[union-attr]


def test_a_baseline_is_the_one_with_the_same_other_keys(graft: Graft, tmp_path: Path) -> None:
    """Probe against fine-tuning at each number of labels, not across them."""
    for labels, gain in ((0.1, 0.2), (1.0, -0.1)):
        for seed in (0, 1):
            base = 0.5 + 0.1 * seed
            add_run(tmp_path / "logs", base, seed=seed, labels=labels)
            add_run(tmp_path / "logs", base + gain, seed=seed, labels=labels, plan="linear_probe")
    file = tmp_path / "out.csv"
    done = graft("compare", "--baseline", "transfer=finetune", "--csv", str(file))
    assert done.returncode == 0, done.stderr
    assert "paired t-test over common seeds (not corrected for 2 comparisons)" in done.stdout
    with file.open() as lines:
        table = list(csv.DictReader(lines))
    found = {
        (row["transfer"], row["data.train_fraction"]): row["test/acc difference"] for row in table
    }
    assert found == {
        ("finetune", "0.1"): "",
        ("finetune", "1"): "",
        ("linear_probe", "0.1"): "0.2",
        ("linear_probe", "1"): "-0.1",
    }


def fill(logs: Path) -> None:
    for plan, base in (("finetune", 0.6), ("linear_probe", 0.5)):
        for labels in (0.1, 1.0):
            for seed in (0, 1):
                acc = base + labels / 10 + seed / 100
                add_run(logs, acc, seed=seed, plan=plan, labels=labels)


def test_a_pivot_has_one_key_down_and_another_across(graft: Graft, tmp_path: Path) -> None:
    fill(tmp_path / "logs")
    file = tmp_path / "out.md"
    done = graft(
        "compare", "--pivot", "transfer", "data.train_fraction", "--where", "optimizer.lr=1e-1",
        "--md", str(file),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert file.read_text().splitlines()[:6] == [
        "test/acc %: mean ± standard deviation over 2 seeds",
        "",
        "| transfer \\ data.train_fraction | 0.1 (100 images) | 1 (1,000 images) |",
        "| --- | ---: | ---: |",
        "| finetune | 61.50 ± 0.71 | 70.50 ± 0.71 |",
        "| linear_probe | 51.50 ± 0.71 | 60.50 ± 0.71 |",
    ]
    assert "10.0, 801" in done.stdout  # seconds of the stages, largest memory
    add_run(tmp_path / "logs", 0.9, lr=0.3)
    mixed = graft("compare", "--pivot", "transfer", "data.train_fraction")
    assert mixed.returncode == 1
    assert "transfer=finetune, data.train_fraction=1 also differ in optimizer.lr" in mixed.stderr


def test_filters_and_sorting(graft: Graft, tmp_path: Path) -> None:
    fill(tmp_path / "logs")

    def first_key(*arguments: str) -> list[str]:
        lines = graft("compare", *arguments).stdout.splitlines()
        end = next(i for i, line in enumerate(lines) if line.startswith("mean ±"))
        at = lines[0].index(" n  ") + 4  # keys come after the metrics and n
        return [line[at:].split()[0] for line in lines[1:end]]

    best_first = ["finetune", "finetune", "linear_probe", "linear_probe"]
    assert first_key("--sort", "test/acc") == best_first
    assert first_key("--sort", "test/acc", "--reverse") == best_first[::-1]
    assert first_key("--sort", "test/loss") == best_first
    assert first_key("--sort", "transfer", "--reverse") == best_first[::-1]
    assert first_key("--where", "transfer=finetune") == ["0.1", "1"]
    assert first_key("--where", "data.train_fraction=0.1,5", "--where", "seed=1") == [
        "finetune", "linear_probe"
    ]  # fmt: skip


def test_each_run_and_each_key_that_differs(graft: Graft, tmp_path: Path) -> None:
    fill(tmp_path / "logs")
    add_run(tmp_path / "logs", None, seed=9, error="of no use")
    file = tmp_path / "out.csv"
    assert graft("compare", "--each", "--csv", str(file)).returncode == 0
    with file.open() as lines:
        table = list(csv.DictReader(lines))
    assert len(table) == 9
    assert table[0]["test/acc"] == "0.61"
    assert (table[-1]["status"], table[-1]["test/acc"]) == ("failed", "")
    assert table[-1]["error"] == "of no use"
    keys = graft("compare", "--keys").stdout
    assert "data.train_fraction                 0.1, 1" in keys
    assert f"transfer.stages.probe.trainable     {ABSENT}, head" in keys


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty: no run folder in it"),
        (["logs", "--where", "optimzer.lr=1"], "no config key optimzer.lr in these runs: did you"),
        (["logs", "--where", "optimizer.lr"], "--where optimizer.lr: write KEY=VALUE"),
        (["logs", "--where", "seed=7"], "--where seed=7: no run; there is 0, 1"),
        (["logs", "--status", "failed"], "--status failed: no run; they are done"),
        (["logs", "--metric", "test/ac"], "no metric test/ac in these runs: did you mean test/acc"),
        (["logs", "--sort", "lr"], "no metric or differing key lr in these runs"),
        (["logs", "--where", "lr=1"], "no config key lr in these runs: did you mean optimizer.lr"),
        (["logs", "--pivot", "transfer", "labels"], "no config key labels in these runs"),
        (["logs", "--pivot", "transfer"], "--pivot: expected 2 arguments: write --pivot ROW_KEY "),
        (["logs", "--where"], "--where: expected one argument: write --where KEY=VALUE[,VALUE] ("),
        (["logs", "--status", "lost"], "--status: invalid choice: 'lost' (choose from"),
        (
            ["logs", "--pivots", "a"],
            "unrecognized arguments: --pivots a (see graft compare -",
        ),
        (["logs", "--baseline", "transfer=lora"], "baseline transfer=lora: no finished run"),
        (["logs", "--baseline", "data=digits"], "baseline data=digits: 4 groups have that; name"),
        (["logs", "--plot", "out.doc"], "Format 'doc' is not supported"),
    ],
)
def test_bad_input_is_one_line(
    graft: Graft, tmp_path: Path, arguments: list[str], message: str
) -> None:
    fill(tmp_path / "logs")
    (tmp_path / "empty" / "below").mkdir(parents=True)
    done = graft("compare", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"graft: error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_plot_has_the_curves_and_the_groups(graft: Graft, tmp_path: Path) -> None:
    fill(tmp_path / "logs")
    folder = add_run(tmp_path / "logs", 0.5, seed=7)
    (folder / "metrics.csv").write_text("epoch,step,val/acc,x\n0,9,0.5,\n0,12,,3\n1,19,0.7,\n")
    assert learning_curve(read_run(folder), "val/acc") == {9: 0.5, 19: 0.7}
    done = graft("compare", "--plot", "out.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as image:
        assert image.size[0] > 1000


def test_the_interval_of_an_accuracy_ends_where_accuracies_do(graft: Graft, tmp_path: Path) -> None:
    """Two seeds ten points apart: t gives 0.9 ± 0.64."""
    for seed, acc in enumerate((0.85, 0.95)):
        add_run(tmp_path / "logs", acc, seed=seed)
    assert "[26.47, 100.00]" in graft("compare", "logs").stdout


def test_thousands_of_runs_are_one_table(graft: Graft, tmp_path: Path) -> None:
    for i in range(1000):
        add_run(tmp_path / "logs" / f"{i // 100}", i / 1000, seed=i % 10, lr=float(1 + i // 10))
    done = graft("compare", "--csv", "out.csv")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out.csv").open() as lines:
        assert [row["n"] for row in csv.DictReader(lines)] == ["10"] * 100


def test_it_starts_without_torch(graft_process: Graft, tmp_path: Path, monkeypatch: Any) -> None:
    fill(tmp_path / "logs")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )
    done = graft_process("compare", "logs", "--pivot", "transfer", "data.train_fraction")
    assert done.returncode == 0, done.stderr


def digests(train: str, test: str = "t") -> dict[str, Any]:
    return {"train": {"items": 8, "digest": train}, "test": {"items": 2, "digest": test}}


def test_what_no_result_depends_on_makes_no_other_experiment(tmp_path: Path) -> None:
    """Workers, batches of the evaluation, times of checkpoints, tags, where equal data lies, what
    would have been done about unreadable images, and the number of a trial of Optuna's.
    """
    prune = {"_target_": "graft.sweeps.study.Prune", "pruner": {"_target_": "a.Pruner"}}
    source = {"root": "/here", "on_error": "fail"}
    first = {
        "data": {"root": "/here", "source": source},
        "callbacks": {"prune": {**prune, "trial": 3}},
    }
    add_run(tmp_path, 0.5, data=digests("a"), extra=first)
    more = {
        "callbacks": {"prune": {**prune, "trial": 14}},
        "data": {
            "root": "/there", "num_workers": 4, "eval_batch_size": 7, "pin_memory": True,
            "source": {"root": "/there", "on_error": "skip"},
        },
        "trainer": {"checkpoint_every_n_steps": 5, "log_every_n_steps": 1},
    }  # fmt: skip
    add_run(tmp_path, 0.6, seed=1, data=digests("a"), extra=more)
    (group,) = compared(tmp_path).groups
    assert len(group.runs) == 2


@pytest.mark.parametrize(
    ("one", "other", "column"),
    [
        ({"data": digests("a")}, {"data": digests("b")}, "data.digest"),
        ({"data": digests("a")}, {"data": digests("a", test="u")}, "data.digest"),
        ({"train_images": 28}, {"train_images": 44}, "train_images"),
        ({"weights": {"digest": "a"}}, {"weights": {"digest": "b"}}, "backbone.weights.digest"),
        ({"extra": {"data": {"root": "007"}}}, {"extra": {"data": {"root": "07"}}}, "data.root"),
        ({"extra": {"data": {"root": "/a"}}}, {"extra": {"data": {"root": "/b"}}}, "data.root"),
        (
            {"extra": {"data": {"source": {"on_error": "fail"}}}},
            {"extra": {"data": {"source": {"on_error": "skip"}}}},
            "data.source.on_error",  # the images are not recorded, and some may have been skipped
        ),
    ],
)
def test_runs_on_other_data_or_weights_are_never_averaged(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], column: str
) -> None:
    """The same command after files were added, removed or overwritten."""
    add_run(tmp_path, 0.5, seed=0, **one)
    add_run(tmp_path, 0.6, seed=1, **other)
    comparison = compared(tmp_path)
    assert [len(group.runs) for group in comparison.groups] == [1, 1]
    assert comparison.columns == [column]


def test_one_odd_record_does_not_end_the_comparison_of_a_folder(
    graft: Graft, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    whole = json.loads((add_run(logs, 0.5) / "run.json").read_text())
    odd: Any = (None, True, "2", -1, 10**400, 1.5, [], [1], [None], {}, {"a": []}, {"a": {"b": 1}})
    for field in (*whole, "data", "weights", "error", "job", "slurm_job", "gpu_memory_mb"):
        for value in odd:
            folder = add_run(logs, 0.5)
            (folder / "run.json").write_text(json.dumps({**whole, field: value}))
    for content in (b"", b"[" * 5000, b'{"a":' * 5000, b"null", b"\xff", b"{}", b'{"format": 2}'):
        (add_run(logs, 0.5) / "run.json").write_bytes(content)
    for arguments in ([], ["--each"], ["--keys"], ["--plot", "x.png"], ["--sort", "seconds"]):
        done = graft("compare", "logs", *arguments)
        assert done.returncode == 0, done.stderr
    assert "run.json is damaged: metrics has the wrong type" in graft("compare", "--each").stdout


def mixed(logs: Path) -> None:
    """Groups that differ in many keys, each in two or three of them."""
    for i in range(6):
        deep = {"optimizer": {f"long_name_of_option_{k}": 1 + (i == k) for k in range(5)}}
        given = [f"optimizer.long_name_of_option_{k}=1" for k in range(5)]
        add_run(logs, 0.5 + i / 100, overrides=given, extra={**deep, "data": {"root": "/x" * 60}})


@pytest.mark.parametrize("arguments", [[], ["--each"], ["--keys"]])
def test_a_table_fits_the_terminal_with_metrics_and_settings_first(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    mixed(tmp_path / "logs")
    monkeypatch.setenv("COLUMNS", "80")
    lines = graft("compare", *arguments).stdout.splitlines()
    table = lines[: next((i for i, s in enumerate(lines) if s.startswith("left out")), None)]
    assert max(map(len, table)) <= 80
    if arguments != ["--keys"]:
        assert table[0].startswith("test/acc %  val/acc %")
        assert "settings" in table[0]
        assert any("long_name_of_option_4=2" in line for line in table)
    monkeypatch.delenv("COLUMNS")
    assert "optimizer.long_name_of_option_4" in graft("compare", *arguments).stdout


def test_names_are_shown_as_they_are_and_escaped_where_that_cannot_be(
    graft: Graft, tmp_path: Path
) -> None:
    names = {"[bold]": "[bold]", ":x:": ":x:", "a|b": r"a\|b", "\x1b[31mred\n": r"\x1b[31mred\n",
             "猫": "猫", b"caf\xe9".decode(errors="surrogateescape"): r"caf\xe9"}  # fmt: skip
    for name in names:
        add_run(tmp_path / "logs", 0.5, overrides=["data.root=x"], extra={"data": {"root": name}})
    done = graft("compare", "--md", "out.md", "--csv", "out.csv", "--plot", "out.png")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    markdown, table = ((tmp_path / f"out.{end}").read_text() for end in ("md", "csv"))
    for name, shown in names.items():
        assert f"| {shown} |" in markdown
        plain = shown.replace(r"\|", "|")
        assert plain in done.stdout
        assert plain in table, name
    assert "\x1b" not in done.stdout + markdown + table
    rows = done.stdout.splitlines()[:7]  # a wide letter takes two columns
    assert len({row.index("10.0") + ("猫" in row) for row in rows[1:]}) == 1


def test_runs_are_found_by_their_tags_and_told_apart_by_their_names(
    graft: Graft, tmp_path: Path
) -> None:
    for i, tags in enumerate((["a", "b"], ["b"], [])):
        extra = {"name": f"run{i}", "tags": tags}
        folder = add_run(tmp_path / "logs", 0.5 + i / 10, overrides=[f"name=run{i}"])
        record = json.loads((folder / "run.json").read_text())
        record["config"] |= extra
        (folder / "run.json").write_text(json.dumps(record))
    shown = graft("compare", "--where", "tags=b").stdout
    assert ("run0" in shown, "run1" in shown, "run2" in shown) == (True, True, False)
    assert "name" in shown.splitlines()[0]
    assert "run1" not in graft("compare", "--where", "tags=a,c").stdout
    assert "70.00" in graft("compare", "--where", "name=run2").stdout
