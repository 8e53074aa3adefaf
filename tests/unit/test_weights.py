"""Weights files as people share them: prefixes, wrappers, and what is none or could run code."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision import models

from graft.models.resnet_cifar import resnet_cifar
from graft.models.timm import timm_backbone
from graft.models.torchvision import torchvision_backbone
from graft.storage.digests import weights_digest
from graft.training.build import build_backbone
from graft.transforms.preprocessing import Preprocessing

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(1)
    return models.squeezenet1_1().state_dict()


def other(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


def with_prefix(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def squeezenet(path: Path) -> Any:
    return torchvision_backbone(model="squeezenet1_1", weights=str(path))


PREFIXES = (
    *("module.", "model.", "net.", "encoder_q.", "module.encoder_q.", "backbone.", "student."),
    *("teacher.", "_orig_mod.", "module.model.", ""),
)
WRAPPERS: list[Callable[[State], Any]] = [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": s}}}},
    lambda s: {"model": s, "args": argparse.Namespace(lr=0.1), "acc": np.float64(0.5)},
    lambda s: {"model_state_dict": s, "loss": 0.1},
    lambda s: {"model": other(s), "ema": s},
    lambda s: {"state_dict": other(s), "state_dict_ema": s},
    lambda s: {"model": other(s), "model_ema": {"module": s}},
    lambda s: {"student": other(s), "teacher": s},
    lambda s: {**with_prefix("student.", other(s)), **with_prefix("teacher.", s)},
    lambda s: {"state_dict": {**s, "projector.0.weight": torch.ones(3, 3), "queue": torch.ones(9)}},
    lambda s: {"encoder": s, "decoder": {"weight": torch.ones(2)}},
]


def test_weights_are_found_by_their_names_and_shapes(state: State, tmp_path: Path) -> None:
    cases = [(WRAPPERS[-1], prefix) for prefix in PREFIXES]
    cases += [(wrapper, "module.") for wrapper in WRAPPERS]
    for number, (wrapper, prefix) in enumerate(cases):
        path = tmp_path / f"{number}.pth.tar"
        torch.save(wrapper(with_prefix(prefix, state)), path)
        backbone = squeezenet(path)
        found = backbone.blocks.get_parameter("stem.0.weight")
        assert torch.equal(found, state["features.0.weight"]), (number, prefix)
        assert backbone.taken.startswith("52 tensors of "), backbone.taken
        assert not prefix or f"{prefix} taken off" in backbone.taken


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt", "ckpt", "model"])
def test_the_content_of_a_file_counts_not_its_name(
    suffix: str, state: State, tmp_path: Path
) -> None:
    save_file(state, tmp_path / f"a.{suffix}")
    assert squeezenet(tmp_path / f"a.{suffix}").taken


def test_weights_of_the_three_backbones_are_read_alike(tmp_path: Path) -> None:
    for build in (
        partial(resnet_cifar, depth=8),
        partial(timm_backbone, model="test_vit"),
        partial(timm_backbone, model="test_resnet"),
    ):
        one = build(weights=None)
        state = {f"module.backbone.{key}": value for key, value in one.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / "x.pth")
        two = build(weights=str(tmp_path / "x.pth"))
        assert weights_digest(one) == weights_digest(two)


class Foreign:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"", "cannot be read"),
        (b"\x80\x02garbage", "cannot be read"),
        (
            Foreign(),
            r"reading its tests\.unit\.test_weights\.Foreign could run code.*state_dict\(\)",
        ),
        (SimpleNamespace(a=1), r"reading its types\.SimpleNamespace could run code"),
        ({"state_dict": {"a": torch.ones(1)}}, "no tensor in it has the name"),
        (torch.ones(3), "holds a Tensor, not names and tensors"),
        ({}, "no tensor in it"),
    ],
)
def test_what_holds_no_weights_says_what_it_is(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        squeezenet(path)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_channels_and_broken_values_are_named(state: State, tmp_path: Path) -> None:
    first = "features.0.weight"
    for channels in (1, 4):
        torch.save({**state, first: torch.ones(64, channels, 3, 3)}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=f"takes {channels}-channel images .*have 3"):
            squeezenet(tmp_path / "x.pth")
    torch.save({**state, first: state[first] * float("nan")}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"not finite in 1 tensor, first {first}"):
        squeezenet(tmp_path / "x.pth")
    torch.save({**state, first: torch.tensor(1.0)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth does not fit .*of another shape"):
        squeezenet(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="in_chans=1: images here have 3 channels"):
        timm_backbone(model="test_resnet", weights=None, in_chans=1)


def run_folder(path: Path, backbone: Any, preprocessing: Any) -> Path:
    stages = dict.fromkeys(("probe", "finetune", "later"))
    for stage in ("probe", "finetune"):
        (path / "checkpoints" / stage).mkdir(parents=True)
    (path / "run.json").write_text(
        json.dumps({"format": 2, "config": {"transfer": {"stages": stages}}})
    )
    (path / "checkpoints/probe/best.ckpt").write_bytes(b"not this one")
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    checkpoint = {"state_dict": {**state, "head.weight": torch.ones(2)}}
    checkpoint["graft"] = {"preprocessing": preprocessing}
    torch.save(checkpoint, path / "checkpoints/finetune/best.ckpt")
    return path


def test_a_run_folder_stands_for_its_best_checkpoint_and_preprocessing(tmp_path: Path) -> None:
    one = resnet_cifar(depth=8, weights=None)
    own = {"resize_size": 40, "crop_size": 36, "mean": [0.1] * 3, "std": [0.2] * 3}
    two = resnet_cifar(depth=8, weights=str(run_folder(tmp_path / "run", one, own)))
    assert weights_digest(one) == weights_digest(two)
    assert two.preprocessing == Preprocessing(40, 36, (0.1,) * 3, (0.2,) * 3)
    assert two.preprocessing.origin == f"as in {tmp_path}/run/checkpoints/finetune/best.ckpt"
    broken = run_folder(tmp_path / "broken", one, {**own, "std": [0, 0, 0]})
    with pytest.raises(ValueError, match=r"its preprocessing is damaged: std=\[0, 0, 0\]"):
        resnet_cifar(depth=8, weights=str(broken))
    with pytest.raises(ValueError, match="neither a file nor a run folder"):
        resnet_cifar(depth=8, weights=str(tmp_path))


def test_the_preprocessing_of_weights_of_ones_own_is_a_group_of_keys() -> None:
    config = {
        "_target_": "graft.models.resnet_cifar.resnet_cifar",
        "weights": None,
        "preprocessing": {"mean": [0.5, 0.5, 0.5], "std": None, "interpolation": "bicubic"},
    }
    p = build_backbone(config).preprocessing
    assert (p.mean, p.interpolation, p.crop_size) == ((0.5,) * 3, "bicubic", 32)
    assert p.origin == "as backbone.preprocessing says"
    for key, value in (
        ("mean", [1, 2]), ("std", [0, 1, 1]), ("crop_size", 64), ("interpolation", "lanczos"),
        ("resize_size", "x"), ("typo", 3),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"backbone\.preprocessing: .*{key}"):
            build_backbone({**config, "preprocessing": {key: value}})


def test_published_weights_are_downloaded_checked_and_read_safely(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a server, with the hash in the name; a file that is there is never unpickled."""
    torch.save(state, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    name = f"squeezenet1_1-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    served = tmp_path / "served"
    served.mkdir()
    (served / name).write_bytes(content)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *a: None)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    entry = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    build = partial(torchvision_backbone, model="squeezenet1_1", weights="IMAGENET1K_V1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        monkeypatch.setattr(type(entry), "url", url, raising=False)
        backbone = build()
        server.shutdown()
    assert torch.equal(backbone.blocks.get_parameter("stem.0.weight"), state["features.0.weight"])
    assert backbone.weights == "torchvision squeezenet1_1 IMAGENET1K_V1"
    cached = tmp_path / "hub/checkpoints" / name
    assert cached.read_bytes() == content
    torch.save(other(state), cached)
    assert "another file than the published one" in build().weights
    torch.save(Foreign(), cached)
    with pytest.raises(OSError, match=r"reading its .*Foreign could run code"):
        build()


def test_blocks_above_the_highest_tap_are_left_out(state: State, tmp_path: Path) -> None:
    """They would count as trainable and never learn."""
    whole = torchvision_backbone(model="squeezenet1_1").eval()
    tapped = torchvision_backbone(model="squeezenet1_1", taps=["fire2", "fire4"]).eval()
    assert tapped.block_names == ["stem", "fire1", "fire2", "fire3", "fire4"]
    assert tapped.learnable_blocks[-1] == "fire4"
    save_file(whole.state_dict(), tmp_path / "ours.safetensors")
    torch.save(state, tmp_path / "theirs.pth")
    for name in ("ours.safetensors", "theirs.pth"):
        file = str(tmp_path / name)
        again = torchvision_backbone(model="squeezenet1_1", taps="fire4", weights=file)
        again(torch.rand(2, 3, 64, 64)).sum().backward()
        assert all(p.grad is not None for p in again.parameters())
