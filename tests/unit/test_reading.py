"""Files that somebody else may have written: plain values, or one line that names the file."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.storage.reading import read_csv, read_json, read_yaml, read_yaml_mapping, read_yaml_texts

CONFIG = """\
seed: 0
optimizer:
  lr: 1.0e-05
  betas: [0.9, 0.999]
name: '1e-3'
when: 2024-11-05
path: /a/${b}
odd: "\\U0001F600 \\x1b"
none: null
"""


def test_yaml_is_read_as_omegaconf_reads_it_but_resolves_nothing(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    file = tmp_path / "config.yaml"
    numbers = "\n".join(
        f"k{i}: {text}"
        for i, text in enumerate(
            ("1e-3", "1E5", "-1.5e+3", "1.", ".5", "1_000.5", "12", "0x1f", ".inf", "-.inf", "1e",
             "e1", "1.2.3", "2024-11-05", "on", "~", "1:30", "0o17", "+3")
        )
    )  # fmt: skip
    file.write_text(numbers)
    assert read_yaml(file) == OmegaConf.to_container(OmegaConf.load(file))
    file.write_text(CONFIG)
    values = read_yaml_mapping(file)
    assert values["path"] == "/a/${b}"
    assert values["when"] == "2024-11-05"
    assert values["optimizer"] == {"lr": 1e-5, "betas": [0.9, 0.999]}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
WRONG_YAML = {
    "anchors": BOMB,
    "merge of an anchor": "a: &a {x: 1}\nb:\n  <<: *a\n",
    "deep": "[" * 5000 + "]" * 5000,
    "deep mappings": "".join(" " * i + "a:\n" for i in range(900)),
    "a Python object": "!!python/object/apply:os.system ['touch MARK']",
    "a set": "!!set {a, b}",
    "bytes": "!!binary aGVsbG8=",
    "no number": "a: !!int ''",
    "no date": "a: !!timestamp x",
    "a key that is a list": "? [a]\n: 1\n",
    "no key": "null: 1",
    "torn": 'a: "x',
    "control characters": "a: \x01",
    "a number too long": "a: " + "9" * 5000,
    "large": "a: " + "x" * (1 << 20),
    "a list": "[1]",
    "nothing": "",
}


@pytest.mark.parametrize("text", WRONG_YAML.values(), ids=WRONG_YAML)
def test_yaml_that_is_no_plain_mapping_is_one_line_at_once(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"config\.yaml") as error:
        read_yaml_mapping(file)
    assert "\n" not in str(error.value)
    assert time.process_time() - began < 10  # a bomb takes minutes


WRONG_JSON = ["[1]", "null", '"x"', '{"a": ', "{" * 9999, '{"a":' * 900 + "1" + "}" * 900,
              "[" * 99999, '{"a": ' + "9" * 5000 + "}", "\x00", '{"a": "\n"}', ""]  # fmt: skip


@pytest.mark.parametrize("text", WRONG_JSON, ids=range(len(WRONG_JSON)))
def test_json_that_is_no_plain_object_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"run\.json") as error:
        read_json(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [read_json, read_yaml, read_csv], ids=lambda read: read.__name__)
def test_only_regular_files_are_read(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "."):
        with pytest.raises(ValueError, match="not a regular file"):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file as disks, editors and attackers leave it."""
    kind = draw.randrange(5)
    at, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[end:]
    if kind == 2:
        return content[:at] + draw.randbytes(draw.randrange(1, 9)) + content[at:]
    if kind == 3:
        other = bytearray(content)
        other[at % len(content)] ^= 1 << draw.randrange(8)
        return bytes(other)
    odd = [b"null", b"[]", b"{}", b"-1", b"1e999", b'"\\u0000"', b"&a *a", b"${x}", b"\xff", b","]
    return content[:at] + draw.choice(odd) + content[end:]


SAMPLES: dict[Callable[[Path], Any], bytes] = {
    read_json: b'{"format": 2, "config": {"seed": 0, "paths": {"x": ""}}, "stages": [1, 2.5]}\n',
    read_yaml: CONFIG.encode(),
    read_yaml_texts: b"- seed=1\n- '+a.b=[1,2]'\n- optimizer.lr=${x}\n",
    read_csv: b'step,val/acc,note\n1,0.5,"a,b"\n2,0.75,\n3,,x\n',
}
COUNTS = [500, pytest.param(3_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("read", SAMPLES, ids=lambda read: read.__name__)
def test_damaged_files_give_plain_values_or_one_line(
    tmp_path: Path, read: Callable[[Path], Any], count: int
) -> None:
    draw, file = random.Random(0), tmp_path / "file"
    for _ in range(count):
        content = SAMPLES[read]
        for _ in range(draw.randrange(1, 4)):
            content = damaged(content, draw) or b"\n"
        file.write_bytes(content)
        said = f"{file}: read"
        try:
            read(file)
        except ValueError as error:
            said = str(error)
        assert str(file) in said, content
        assert "\n" not in said, content
