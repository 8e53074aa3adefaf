"""The model card of a run: what model hubs read of it, what it says, and what is not in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

import graft
from graft.commands.export import main as export
from graft.config.names import visible
from graft.deploy.card import write_card
from graft.deploy.card_data import front_matter
from graft.deploy.card_facts import Facts, general
from graft.deploy.markdown import code, escaped
from graft.deploy.markdown import table as table_of
from graft.runs.open import CONFIG
from tests.unit.test_stores import Touch
from tests.unit.test_targets import table

NAMES = ["---", "<b>x|y", "[a](b) `c` www.d.org", "two\nlines *e* _f_ \\g", "plain_name"]
TINY = ["backbone.depth=8", "backbone.width=4", "backbone.weights=null", "trainer=cpu"]
TINY += ["logger=csv", "data.batch_size=8"]


def trained(root: Path, data: str, *more: str, **keywords: Any) -> Path:
    own = [*TINY, f"paths.cache={root / 'cache'}", *more]
    where = root / "photos" if data == "photos" else data
    return graft.finetune(
        where, backbone="resnet20_cifar", epochs=1, overrides=own, logs=root / "logs", **keywords
    ).path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of classes with names that mean something in Markdown and YAML."""
    root = tmp_path_factory.mktemp("card")
    rng = np.random.default_rng(0)
    for c, name in enumerate(NAMES):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.normal(30 + 45 * c, 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "photos" / name / f"{i}.png")
    return trained(root, "photos")


@pytest.fixture(scope="module")
def card(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_card(run, tmp_path_factory.mktemp("cards") / "card", license="apache-2.0")


def rendered(card: Path) -> list[Token]:
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard.load(card).text)
    return [token for outer in tokens for token in (outer, *(outer.children or []))]


def test_the_command_writes_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export([str(run), "--card", str(tmp_path / "card"), "--license", "mit"])
    assert capsys.readouterr().out.endswith(f"wrote     {tmp_path / 'card' / 'README.md'}\n")
    assert ModelCard.load(tmp_path / "card" / "README.md").data.license == "mit"


def test_what_hubs_read_is_what_was_measured(run: Path, card: Path) -> None:
    loaded = ModelCard.load(card)
    data, kept = loaded.data, json.loads((run / "eval/test.json").read_text())
    assert (data.library_name, data.license) == ("graft", "apache-2.0")
    assert data.pipeline_tag == "image-classification"
    assert data.metrics == ["accuracy", "f1"]
    accuracy, f1 = data.eval_results
    assert isinstance(accuracy, EvalResult)
    assert (accuracy.task_type, accuracy.dataset_name) == ("image-classification", "photos")
    assert (accuracy.dataset_split, accuracy.metric_type) == ("test", "accuracy")
    assert accuracy.metric_value == kept["metrics"]["acc"]
    assert f1.metric_value == kept["metrics"]["macro_f1"]
    assert accuracy.verified is None  # which a hub says itself
    again = ModelCard(loaded.content)
    assert again.data.to_dict() == data.to_dict()
    assert again.text == loaded.text


def test_the_snippet_runs(
    run: Path, card: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = (t.content for t in rendered(card) if t.type == "fence" and t.info == "python")
    image = next((run.parents[1] / "photos" / "plain_name").iterdir())
    shutil.copy(image, card.parent / "image.jpg")
    try:
        monkeypatch.chdir(card.parent)
        (card.parent / run.name).symlink_to(run)
        exec(snippet, {})
    finally:
        (card.parent / "image.jpg").unlink()
        (card.parent / run.name).unlink()
    (expected,) = graft.load(run).predict(image)
    assert capsys.readouterr().out == f"image.jpg {expected.label} {expected.probability}\n"


def test_names_of_others_are_shown_and_never_obeyed(card: Path) -> None:
    tokens = rendered(card)
    assert not {t.type for t in tokens} & {
        "html_inline",
        "html_block",
        "link_open",
        "em_open",
        "hr",
    }
    pictures = [str(t.attrs["src"]) for t in tokens if t.type == "image"]
    assert pictures == ["confusion.png", "calibration.png", "examples.png", "mistakes.png"]
    text = ["".join(c.content for c in t.children or []) for t in tokens if t.type == "inline"]
    for name in NAMES:
        assert visible(name) in text, name  # the first cell of its row
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    assert len(headings) == 9


def test_pictures_are_pictures_of_all_classes(card: Path) -> None:
    assert {p.name for p in card.parent.iterdir()} == {
        "README.md", "confusion.png", "calibration.png", "examples.png", "mistakes.png",
    }  # fmt: skip
    for path in card.parent.glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 100
            assert np.asarray(image.convert("L")).std() > 5
            assert not image.info.keys() - {"dpi"}


def test_nothing_of_the_machine_is_in_it(run: Path, card: Path) -> None:
    content = b"".join(path.read_bytes() for path in card.parent.iterdir())
    assert str(run.parents[1]).encode() not in content
    assert not re.search(rb"(?<![\w.])/(tmp|home|root|work|usr)\b", card.read_bytes())
    record = json.loads((run / "run.json").read_text())
    assert record["host"] == socket.gethostname()
    words = re.findall(r"[\w.-]+", card.read_text())
    assert record["host"] not in words
    assert "graft train" in card.read_text()


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_tasks_without_classes_have_a_card(tmp_path: Path, task: str) -> None:
    table(tmp_path / "photos")
    file = "labels.csv" if task == "multilabel" else "numbers.csv"
    root = f"data.root={tmp_path / 'photos'}"
    run = trained(tmp_path, "image_table", root, f"data.source.table={file}", task=task)
    path = write_card(run, tmp_path / "card", title="Löwe: a 'card'")
    assert [p.name for p in path.parent.iterdir()] == ["README.md"]
    data = ModelCard.load(path).data
    kept = json.loads((run / "eval/test.json").read_text())
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    names = {"multilabel": {"f1": "f1", "accuracy": "acc"}, "regression": {"mae": "mae"}}[task]
    for metric, name in names.items():
        assert found[metric] == pytest.approx(kept["metrics"][name])
        low, high = kept["intervals"][name]
        shown = f"{100 * low:.2f} % to {100 * high:.2f} %"
        assert (shown if task == "multilabel" else f"{low:.4f} to {high:.4f}") in path.read_text()
    assert data.model_name == "Löwe: a 'card'"
    assert "# Löwe: a 'card'\n" in path.read_text()


def test_a_card_that_is_there_stays_unless_told(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "card"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"README\.md exists: "):
        write_card(run, folder)
    assert [*folder.iterdir()] == [folder / "README.md"]
    write_card(run, folder, examples=False, force=True)
    assert {p.name for p in folder.glob("*.png")} == {"confusion.png", "calibration.png"}
    assert (folder / "README.md").read_text().startswith("---\n")
    with pytest.raises(ValueError, match="is a file: a card is a folder"):
        write_card(run, folder / "README.md")
    with pytest.raises(ValueError, match="is not a run folder"):
        write_card(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_card_is_written_whole_or_not_at_all(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        if target.name == "README.md":
            raise OSError(28, "No space left on device")
        os.rename(self, target)  # noqa: PTH104 (the method is replaced here)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=r"README\.md: the disk is full"):
        write_card(run, tmp_path / "card")
    assert not (tmp_path / "card").exists()


def test_without_the_images_a_card_has_none(run: Path, tmp_path: Path) -> None:
    write_card(run, tmp_path / "first")  # which evaluates
    copy = shutil.copytree(run, tmp_path / "run")
    config = (copy / CONFIG).read_text()
    (copy / CONFIG).write_text(config.replace(str(run.parents[1] / "photos"), "/nowhere/photos"))
    path = write_card(copy, tmp_path / "card")
    assert {p.name for p in path.parent.glob("*.png")} == {"confusion.png", "calibration.png"}
    assert "examples.png" not in path.read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"acc": "high"}},
        {"metrics": None},
        {"classes": ["a"]},
        {"per_class": {"other": {"images": 3}}},
        {"intervals": {"acc": 3}},
    ],
)
def test_a_damaged_evaluation_is_named(run: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    write_card(run, tmp_path / "first", examples=False)
    copy = shutil.copytree(run, tmp_path / "run")
    kept = copy / "eval/test.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | change))
    with pytest.raises(ValueError, match=r"test\.json") as caught:
        write_card(copy, tmp_path / "card")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "card").exists()


def test_kept_predictions_are_not_unpickled(run: Path, tmp_path: Path) -> None:
    write_card(run, tmp_path / "first", examples=False)
    copy, mark = shutil.copytree(run, tmp_path / "run"), tmp_path / "MARK"
    np.savez(copy / "eval/test.npz", index=np.array([Touch(mark)], object))
    with pytest.raises(ValueError, match=r"test\.npz is damaged"):
        write_card(copy, tmp_path / "card")
    assert not mark.exists()


def test_an_evaluation_of_earlier_weights_is_made_anew(run: Path, tmp_path: Path) -> None:
    write_card(run, tmp_path / "first", examples=False)
    copy = shutil.copytree(run, tmp_path / "run")
    kept, (best,) = copy / "eval/test.json", copy.glob("checkpoints/*/best.ckpt")
    changed = json.loads(kept.read_text())
    changed["metrics"]["acc"] = 0.123
    kept.write_text(json.dumps(changed))
    later = kept.stat().st_mtime + 10
    os.utime(best, (later, later))
    path = write_card(copy, tmp_path / "card", examples=False)
    assert ModelCard.load(path).data.eval_results[0].metric_value != 0.123


def test_an_evaluation_of_another_checkpoint_is_made_anew(run: Path, tmp_path: Path) -> None:
    """A copied folder has other times: what the evaluation says of itself counts too."""
    write_card(run, tmp_path / "first", examples=False)
    copy = shutil.copytree(run, tmp_path / "run")
    kept = copy / "eval/test.json"
    changed = json.loads(kept.read_text())
    changed["metrics"]["acc"] = 0.123
    changed["epoch"] += 1
    kept.write_text(json.dumps(changed))
    path = write_card(copy, tmp_path / "card", examples=False)
    assert ModelCard.load(path).data.eval_results[0].metric_value != 0.123


def test_what_an_evaluation_notes_is_in_the_card(run: Path, tmp_path: Path) -> None:
    write_card(run, tmp_path / "first", examples=False)
    assert "neither trained nor chosen on" in (tmp_path / "first/README.md").read_text()
    copy = shutil.copytree(run, tmp_path / "run")
    kept = copy / "eval/test.json"
    changed = json.loads(kept.read_text()) | {"notes": ["the data has changed since"]}
    kept.write_text(json.dumps(changed))
    text = write_card(copy, tmp_path / "card", examples=False).read_text()
    assert "the data has changed since" in text
    assert "neither trained nor chosen on" not in text


def test_a_bar_in_code_ends_no_cell() -> None:
    html = MarkdownIt("commonmark").enable("table").render(table_of(["a"], [[code("x|<img>|y")]]))
    assert "<img>" not in html
    assert html.count("<td") == 1


@pytest.mark.parametrize("text", ["1. a", "# b", "- c", "+ d", "= e", "__f__", "~~g~~", "&amp;"])
def test_a_text_stays_a_text(text: str) -> None:
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).renderInline(escaped(text))
    assert html == text.replace("&", "&amp;")
    assert MarkdownIt("commonmark").parse(escaped(text))[0].type == "paragraph_open"
    inline = MarkdownIt("commonmark").parseInline(code(f"`{text}``"))[0].children
    assert inline is not None
    assert [token.content for token in inline] == [f"`{text}``"]


@pytest.mark.parametrize(
    ("source", "shown", "base"),
    [
        ("timm tf_efficientnet_lite0 in1k", None, "timm/tf_efficientnet_lite0.in1k"),
        ("/home/me/my weights/w.safetensors", "w.safetensors", None),
        ("random", "random", None),
    ],
)
def test_of_weights_only_what_others_know_is_said(
    run: Path, card: Path, source: str, shown: str | None, base: str | None
) -> None:
    facts = Facts.of(run)
    facts = replace(facts, record={**facts.record, "weights": {"source": source}})
    assert facts.weights == (shown or source)
    assert facts.base_model == base
    front = yaml.safe_load(front_matter(facts, "title", None).split("---\n")[1])
    assert front.get("base_model") == base
    assert "license" not in front


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("data.root='/home/me/photos'", "data.root=FOLDER"),
        ("backbone.weights='/home/me/w.pth'", "backbone.weights=FILE"),
        ("backbone.weights=null", "backbone.weights=null"),
        ("backbone.weights=IMAGENET1K_V2", "backbone.weights=IMAGENET1K_V2"),
        ("paths.logs='/home/me/logs'", None),
        ("hydra.searchpath=['file:///home/me/configs']", "hydra.searchpath=[FOLDER]"),
        ("+callbacks.own.file=/home/me/x", "+callbacks.own.file=PATH"),
        ("+callbacks.own={file: ~/x}", "+callbacks.own=PATH"),
        ("task.monitor=val/f1", "task.monitor=val/f1"),
        ("+logger.wandb.api_key=abc", None),
    ],
)
def test_the_command_is_shown_without_paths(override: str, shown: str | None) -> None:
    assert general(override) == shown


def test_metadata_is_plain_yaml(card: Path) -> None:
    front = card.read_text().split("---\n")[1]
    assert yaml.safe_load(front)["model-index"][0]["results"][0]["task"]["name"]
