"""Paths are typed as they are: Hydra's grammar does not get to read them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from graft.config.overrides import quote_paths, whole_command
from graft.config.resolved import explain

NAMES = [
    "a b", "a (1)", "été", "a&b", "a#b", "[x]", "a[x]", "{x}", "a=b", "it's", 'say "x"', "a;b",
    "a!b", "a,b", "a, b (2)", "2024", "007", "1e3", "a:b", "a@b", "50%", "back\\slash\\",
    "epoch=3-acc=0.9.ckpt",
]  # fmt: skip


def value(override: str) -> object:
    return OverridesParser.create().parse_override(override).value()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "key", ["data.root", "backbone.weights", "paths.logs", "+data.source.root"]
)
def test_a_path_that_exists_is_taken_as_it_is(
    key: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    for text in (name, f"{tmp_path}/{name}"):
        (override,) = quote_paths([f"{key}={text}"])
        assert value(override) == text
        assert quote_paths([override]) == [override]  # further ranks get it again


@pytest.mark.parametrize("name", [*(n for n in NAMES if n not in ("a,b", "[x]")), "~/x"])
def test_a_path_that_can_be_nothing_else_need_not_exist(name: str) -> None:
    (override,) = quote_paths([f"data.root={name}"])
    assert value(override) == name


@pytest.mark.parametrize(
    "override",
    [
        "data.root=${paths.data}/x", "data.root='a b'", "data.root=null", "data.root=a,b",
        "backbone.weights=null,IMAGENET1K_V1", "seed=2024", "seed=0,1", "optimizer=sgd,adamw",
        "head.grid={lr:[0.1]}", "data.root=choice(a,b)", "~data.root", "--cfg", "-m", "",
    ],
)  # fmt: skip
def test_what_is_no_path_stays_as_it_is(override: str, tmp_path: Path) -> None:
    assert quote_paths([override]) == [override]


def test_values_of_a_sweep_are_quoted_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a (1)", "été", "a"):
        Path(name).mkdir()
    (override,) = quote_paths(["backbone.weights=null,a (1),été,a"])
    parsed = OverridesParser.create().parse_override(override)
    values = list(parsed.sweep_string_iterator())
    assert values == ["null", "'a (1)'", "'été'", "a"]


@pytest.mark.parametrize("name", ["a (1)", "it's", "été", "a=b", "x;y"])
def test_where_a_value_may_be_something_else_the_line_to_type_is_shown(name: str) -> None:
    (override,) = quote_paths([f"label_smoothing={name}"])
    with pytest.raises(HydraException) as caught:
        OverridesParser.create().parse_overrides([override])
    message = explain(caught.value)
    assert message.startswith(f"label_smoothing={name}: ")
    (typed,) = shlex.split(message.partition("type ")[2])
    assert value(typed) == name


def test_of_a_sweep_only_the_values_that_are_paths_are_recorded_from_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/run.json").touch()
    hydra = OmegaConf.create({"runtime": {"config_sources": []}})
    given = ["backbone.weights=DEFAULT,'a b',null,x/w.pth,teacher"]
    paths = f"'{tmp_path}/x/w.pth','{tmp_path}/teacher'"
    assert whole_command(hydra, given) == [f"backbone.weights=DEFAULT,'a b',null,{paths}"]
