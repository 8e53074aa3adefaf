"""docs/correctness.md names tests: they exist, and what it calls slow is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.findall(
    r"`(\w+/test_\w+\.py)::(test_\w+)`(\*?)", (ROOT / "docs/correctness.md").read_text()
)


@pytest.mark.parametrize(("file", "test", "star"), sorted(set(NAMED)))
def test_a_test_that_the_doc_names_exists(file: str, test: str, star: str) -> None:
    source = (ROOT / "tests" / file).read_text()
    found = re.search(rf"((?:^@.*\n(?:^[ )\]].*\n)*)*)^def {test}\(", source, re.MULTILINE)
    assert found, f"no {test} in {file}"
    slow = "mark.slow" in found[1] or "\npytestmark = pytest.mark.slow" in source
    assert slow is bool(star)


def test_every_rule_of_the_doc_names_one() -> None:
    rows = re.findall(r"^\| (\d+)\. .*", (ROOT / "docs/correctness.md").read_text(), re.MULTILINE)
    assert rows == [str(i) for i in (*range(1, 22), 23, 24, 25, 26)]
