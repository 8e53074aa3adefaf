"""Names that people give are shown verbatim where that is possible, and escaped where not."""

import pytest
from rich.table import Table

from graft.config.names import file_word, shortened, visible
from graft.config.words import plural
from graft.reporting.console import LiteralConsole


@pytest.mark.parametrize(
    "name",
    [
        "cat",
        "[bold]",
        ":x:",
        "a|b",
        "naïve café",
        "猫",
        "кот",
        "قطة",
        "می‌خواهم",
        "👩‍🔬",
        "a\u00a0b",
        "\\x1b",
    ],
)
def test_what_can_be_shown_is_shown_verbatim(name):
    assert visible(name) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\x00\x7f\x9b", r"\x00\x7f\x9b"),
        ("cod\u202egpj.exe", r"cod\u202egpj.exe"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("line\u2028break", r"line\u2028break"),
        (b"caf\xe9".decode(errors="surrogateescape"), r"caf\xe9"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_cannot_be_shown_is_escaped(name, shown):
    assert visible(name) == shown
    shown.encode()


def test_newlines_of_a_message_stay():
    assert visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"


@pytest.mark.parametrize("name", ["[bold]", "[/]", ":x:", "[link=x]y[/link]", "\x1b[31m\nb"])
def test_the_console_prints_names_and_obeys_none(name, capsys):
    table = Table("class", title=name)
    table.add_row(name)
    console = LiteralConsole(width=80)
    console.print(name)
    console.print(table)
    shown = capsys.readouterr().out
    assert shown.count(visible(name)) == 3
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a/../b c", "a-..-b-c"),
        ("猫 и قطة", "猫-и-قطة"),
        ("हिन्दी", "हिन्दी"),
        ("cafe\u0301", "cafe\u0301"),
        ("\x1b[31m\n\u202e\udce9=", "31m"),
        ("-[1e-3,0.1]-", "1e-3-0.1"),
        ("/" * 120, ""),
        ("(..)", "__"),
        (".", "_"),
    ],
)
def test_a_word_of_a_files_name_has_letters_and_no_ways_out(text, word):
    assert file_word(text) == word


def test_long_names_are_cut_in_bytes_and_stay_different():
    assert shortened("a" * 120) == "a" * 120
    one, other = (shortened("猫" * 80 + end) for end in "ab")
    assert one != other
    assert max(len(name.encode()) for name in (one, other)) <= 120
    assert one.startswith("猫" * 30)


def test_one_is_no_plural():
    assert [plural(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [plural(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]
