"""What lies in a folder and below, but for what systems and tools put beside data."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial

from graft.data.sources.decode import EXTENSIONS, why_no_file

# What systems and tools put beside data, in lower case; hidden names (.*) are left out too.
JUNK = {
    *("@eadir", "#recycle", "#snapshot", "__macosx", "lost+found", "$recycle.bin", "recycler"),
    *("system volume information", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}
Skipped = Callable[[str], None]
"""Is told the name of what is left out."""


def walk(
    root: str,
    place: str,
    skipped: Skipped,
    *,
    lenient: bool = False,
    through: tuple[str, ...] = (),
) -> Iterator[tuple[str, os.stat_result | None, str]]:
    """(path, status, why it is no file) of all in `root/place` and below, sorted by path.

    Paths begin with `place`.

    Args:
        lenient: go on with the others where a folder cannot be listed.
        through: real paths of the folders that links were followed from, to notice a cycle.
    """
    further = partial(walk, root, skipped=skipped, lenient=lenient)
    folder = os.path.join(root, place)  # noqa: PTH118 (paths of any bytes, by the thousand)
    try:
        found = [(entry, *look(entry)) for entry in entries(folder, skipped)]
    except OSError as error:
        if not lenient:
            raise
        yield place, None, f"cannot be listed: {error.strerror}"
        return
    found.sort(key=lambda one: f"{one[0].name}/" if one[1] else one[0].name)
    for entry, is_folder, status, why in found:
        path = f"{place}/{entry.name}"
        if not is_folder:
            yield path, status, why
        elif not entry.is_symlink():
            yield from further(path, through=through)
        else:
            above, target = (*through, os.path.realpath(folder)), os.path.realpath(entry.path)
            if any(f"{real}/".startswith(f"{target}/") for real in above):
                yield path, None, "a link to a folder around it"
            else:
                yield from further(path, through=above)


def entries(folder: str, skipped: Skipped) -> Iterator[os.DirEntry[str]]:
    """Of one folder, unsorted."""
    with os.scandir(folder) as found:
        for entry in found:
            if is_junk(entry.name):
                skipped(entry.name)
            else:
                yield entry


def look(entry: os.DirEntry[str]) -> tuple[bool, os.stat_result | None, str]:
    """Whether it is a folder, a file's status, and why it is neither."""
    try:
        if entry.is_dir():
            return True, None, ""
        status = entry.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        return False, None, "a link that leads nowhere"
    return False, status, why_no_file(status) or ""


def is_junk(name: str) -> bool:
    return name[0] == "." or name.lower() in JUNK


def is_image_name(path: str) -> bool:
    """By its extension."""
    return path[path.rfind(".") :].lower() in EXTENSIONS
