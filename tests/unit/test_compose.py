"""The configs of a sweep's jobs are those that Hydra composes."""

from __future__ import annotations

from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from graft.config.resolved import CONFIGS
from graft.sweeps.compose import Composer

JOBS = {
    "values": ["optimizer.lr=0.1", "seed=1"],
    "a value twice": ["seed=1", "seed=2"],
    "an option, and a value within another option": ["optimizer.lr=0.1", "optimizer=sgd"],
    "an experiment, which changes options": ["experiment=cifar10_linear_probe", "seed=3"],
    "a value that another option has": ["data.source.per_class=12", "data=synthetic"],
    "a list": ["data.augment.ratio=[1,2]", "data=cifar10"],
    "a dictionary in place of an option": ["optimizer.lr=0.1", "optimizer={lr:0.2}"],
    "a value within a dictionary that comes later": ["optimizer.lr=1", "optimizer={lr:2}", "+a=1"],
    "around an added key": ["trainer.max_epochs=1", "seed=1", "++trainer.max_epochs=2", "seed=2"],
    "a value between related ones": ["+b={x:1,y:0}", "b.y=2", "b={x:3}", "++b.z=4"],
    "a new key": ["seed=4", "+note=1", "seed=5"],
    "a value before what replaces it": ["optimizer.lr=0.1", "++optimizer.lr=0.2"],
    "a value of a key that is added before": ["+note.x=1", "note.x=2"],
    "a value of what is deleted after": ["callbacks=early_stopping", "seed=6", "~logger"],
    "an option in another place": ["+transfer@other=linear_probe", "other.stages.probe.epochs=3"],
    "of Hydra itself": ["hydra.job.name=x", "seed=7"],
    "an interpolation": ["optimizer.weight_decay=${optimizer.lr}", "optimizer.lr=0.5"],
    "odd text": ["paths.cache='a b,=c'", "seed=8"],
}
WRONG = {
    "no such key": ["optimizer.lrr=1"],
    "no such option": ["optimizer=nope", "seed=1"],
    "deleted and set": ["~logger", "logger.csv.x=1"],
    "not a group": ["seed@here=1"],
}


@pytest.fixture(scope="module")
def loader() -> ConfigLoaderImpl:
    setup_globals()
    return ConfigLoaderImpl(create_config_search_path(str(CONFIGS)))


@pytest.fixture(scope="module")
def composer(loader: ConfigLoaderImpl) -> Composer:
    overrides = ["seed=1,2", "hydra.sweep.dir=somewhere"]
    return Composer(loader, loader.load_configuration("train", overrides, RunMode.MULTIRUN))


@pytest.mark.parametrize("kind", JOBS)
def test_a_job_is_composed_as_by_hydra(
    loader: ConfigLoaderImpl, composer: Composer, kind: str
) -> None:
    expected = OmegaConf.to_yaml(loader.load_sweep_config(composer.master, list(JOBS[kind])))
    for _ in range(2):  # the second time from what the first one left
        assert OmegaConf.to_yaml(composer.compose(JOBS[kind])) == expected


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said_as_by_hydra(
    loader: ConfigLoaderImpl, composer: Composer, kind: str
) -> None:
    errors = []
    compositions: list[Any] = [
        lambda job: loader.load_sweep_config(composer.master, job),
        composer.compose,
    ]
    for compose in compositions:
        with pytest.raises(HydraException) as caught:
            compose(list(WRONG[kind]))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_jobs_that_differ_in_values_read_no_config_file_again(
    composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    composer.compose(["optimizer=sgd", "seed=0"])
    monkeypatch.setattr(composer, "loader", LoadsNothing(composer.loader))
    assert composer.compose(["optimizer=sgd", "seed=1", "trainer.max_epochs=2"]).seed == 1


class LoadsNothing:
    def __init__(self, loader: ConfigLoaderImpl) -> None:
        self.repository = loader.repository
