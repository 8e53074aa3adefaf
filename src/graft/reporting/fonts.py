"""Fonts for names in pictures: one that has their letters, else letters are escaped."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from graft.config.names import JOINERS, visible

UNDRAWN = JOINERS + "\ufe0e\ufe0f "  # nothing of their own to draw


@cache
def drawable(name: str) -> tuple[str, Path | None]:
    """`name` as it can be drawn, and the font to draw it with; None: any font has its letters.

    It is the first font that has all of its letters, or the one that has most of them; what that
    lacks is escaped rather than drawn as a box.
    """
    text = visible(name)
    letters = {ord(letter) for letter in text if letter not in UNDRAWN}
    if text.isascii():
        return text, None
    best, known = None, frozenset[int]()
    for path in _fonts():
        if len(letters & _letters(path)) > len(letters & known):
            best, known = path, _letters(path)
        if letters <= known:
            break
    shown = (
        letter
        if letter.isascii() or letter in UNDRAWN or ord(letter) in known
        else letter.encode("unicode_escape").decode()
        for letter in text
    )
    return "".join(shown), best


def _fonts() -> Iterator[Path]:
    """That of matplotlib, which has the alphabets of Europe and the Near East; then the system's,
    upright ones first.
    """
    import matplotlib

    yield Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    from matplotlib.font_manager import findSystemFonts  # takes a second

    styles = ("Bold", "Italic", "Oblique", "Mono")
    yield from map(
        Path, sorted(findSystemFonts(), key=lambda path: (any(s in path for s in styles), path))
    )


@cache
def _letters(path: Path) -> frozenset[int]:
    """None of a font that cannot be read, or has pictures in place of outlines."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(str(path))
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
