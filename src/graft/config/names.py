"""How names that people give (classes, files, runs) are shown, and made part of a file's name:
verbatim where that is possible.
"""

from __future__ import annotations

import hashlib
import unicodedata

# Control characters, formats such as bidi controls, lone surrogates, line and paragraph separators.
UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # formats that Persian, Indic scripts and emoji are spelled with


def visible(text: str, keep: str = "") -> str:
    """`text` with every character escaped that a terminal obeys, hides or cannot encode.

    A surrogate that stands for a byte of a file name that is not UTF-8 is shown as that byte.

    Args:
        keep: characters that stay as they are, such as the newlines of a message.
    """
    if text.isprintable():
        return text

    def shown(letter: str) -> str:
        if unicodedata.category(letter) not in UNSHOWN or letter in JOINERS or letter in keep:
            return letter
        if "\udc80" <= letter <= "\udcff":
            return f"\\x{ord(letter) - 0xDC00:02x}"
        return letter.encode("unicode_escape").decode()

    return "".join(map(shown, text))


def file_word(text: str) -> str:
    """`text` as a part of a file's name: letters of any script, digits, `_`, `.` and `-`.

    Never `.` or `..`, which lead elsewhere.
    """
    kept = (
        letter
        if letter.isalnum() or letter in "_." or unicodedata.category(letter)[0] == "M"
        else " "
        for letter in text
    )
    word = "-".join("".join(kept).split())
    return word if word.strip(".") else "_" * len(word)


def shortened(name: str, most: int = 120) -> str:
    """`name`, if it is longer than so many bytes cut, with a digest that tells it from others with
    the same beginning. File systems count bytes: a Chinese letter is three.
    """
    whole = name.encode()
    if len(whole) <= most:
        return name
    return f"{whole[: most - 7].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:6]}"
