"""Which files of a folder are the images of which split and class, and what is left unused."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from graft.config.names import visible
from graft.data.sources.decode import EXTENSIONS
from graft.data.sources.walk import entries, is_image_name, is_junk, look, walk

# In any case, with or without a suffix: Train, test_set, val-images. As Hugging Face's
# datasets reads them: eval is a test split, dev a validation split.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "holdout"),
}
SUFFIX = re.compile(r"[-_ ]?(set|data|images|split)$")

# Files that describe images: none of them is an image that got lost.
NOTES = {
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".log"),
    *(".pdf", ".ini", ".py", ".ipynb", ".sh", ".md5", ".sha256", ".db", ".xlsx", ".zip"),
}


@dataclass
class Listing:
    """The files of a data set in a fixed order; `digest` covers names, sizes and mtimes."""

    classes: list[str] = field(default_factory=list)
    folders: dict[str, str] = field(default_factory=dict)  # split -> its folder: val -> valid
    images: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # (path, label)
    broken: list[tuple[str, str]] = field(default_factory=list)  # (path, why): no files at all
    ignored: list[str] = field(default_factory=list)  # no images by their extension
    unused: list[str] = field(default_factory=list)  # beside the splits or the classes
    junk: Counter[str] = field(default_factory=Counter)
    digest: str = ""


def list_images(root: Path, *, evaluation: bool = False) -> Listing:
    """Walk the class folders; every complaint is one line that names the path.

    The images are in `train/<class>/*`, with `val` and `test` beside it if they are there, or
    straight in `<class>/*`.

    Args:
        evaluation: list the test split or, without one, the class folders alone, as "train"; one
            class is enough, and a class may be empty.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{visible(str(root))}: no such folder; data.root= says where the images are"
        )
    return _Lister(root, evaluation).listed()


def list_unlabelled(root: Path) -> Listing:
    """Every image below a folder, however it is sorted into others, as "train" of one class.

    Raises:
        ValueError: there are none.
    """
    lister = _Lister(root, evaluation=True)
    listing = lister.listing
    listing.classes, listing.folders["train"], listing.images["train"] = ["image"], ".", []
    if not root.is_dir():
        raise FileNotFoundError(
            f"{visible(str(root))}: no such folder; data.root= says where the images are"
        )
    lister.list_class("train", "image", ["."])
    if not listing.images["train"]:
        raise ValueError(f"{visible(str(root))}: no images ({', '.join(sorted(EXTENSIONS))})")
    listing.digest = lister.digest.hexdigest()[:32]
    return listing


def class_name(folder: str) -> str:
    """The class that a folder's name stands for: one for all Unicode normal forms of a name, and
    text that every writer takes where the name is not UTF-8.
    """
    if folder.isascii():
        return folder
    return unicodedata.normalize("NFC", os.fsencode(folder).decode("utf-8", "backslashreplace"))


class _Lister:
    def __init__(self, root: Path, evaluation: bool) -> None:
        self.root, self.evaluation = root, evaluation
        self.listing = Listing()
        self.digest = hashlib.sha256(os.fsencode(f"{root.resolve()}\0"))

    def listed(self) -> Listing:
        listing = self.listing
        folders, files = self._level(".")
        named = {name: _split_of(name) for name in folders if _split_of(name)}
        found = self._split_folders(named)
        splits = found if "train" in found else {"train": ".", **found}
        if self.evaluation:
            splits = {"train": found.get("test") or found.get("val") or "."}
        for split, place in splits.items():
            inner, beside = (folders, files) if place == "." else self._level(place)
            groups: dict[str, list[str]] = {}
            for name in inner:
                # Class folders at the root: a flat test/ beside them is unlabelled images.
                if place != "." or self.evaluation or named.get(name) in (None, "train"):
                    groups.setdefault(class_name(name), []).append(_join(place, name))
            if split == "train":
                listing.classes = sorted(groups)
                self._check_classes(place)
            elif not groups.keys() & set(listing.classes):
                listing.unused.append(f"{place}/ (none of its folders is a class of train)")
                continue
            listing.folders[split] = place
            listing.images[split] = []
            for name in sorted(groups):
                self.list_class(split, name, groups[name])
            if place != ".":
                listing.unused += [f"{place}/{name}" for name in beside]
        known = {*found.values(), *(listing.classes if splits["train"] == "." else ())}
        for name in folders:
            if class_name(name) not in known:
                flat = " (no class folders in it)" if name in named else ""
                listing.unused.append(f"{name}/{flat}")
        listing.unused += files
        if self.evaluation:
            self._leave_out_empty_classes()
        self.digest.update("\0".join(listing.classes).encode("utf-8", "surrogateescape"))
        listing.digest = self.digest.hexdigest()[:32]
        return listing

    def _leave_out_empty_classes(self) -> None:
        """What is evaluated on has the classes it has images of."""
        listing = self.listing
        there = sorted({label for images in listing.images.values() for _, label in images})
        names = [listing.classes[label] for label in there]
        if not names:
            return
        for split, images in listing.images.items():
            listing.images[split] = [(path, there.index(label)) for path, label in images]
        listing.classes = names

    def _level(self, place: str) -> tuple[list[str], list[str]]:
        """Names of the folders and of the files in a folder, sorted."""
        folders: list[str] = []
        files: list[str] = []
        for entry in entries(str(self.root / place), self._count_junk):
            is_folder, _, why = look(entry)
            if why:
                self._note_broken(_join(place, entry.name), why)
            else:
                (folders if is_folder else files).append(entry.name)
        return sorted(folders), sorted(files)

    def _split_folders(self, named: dict[str, str]) -> dict[str, str]:
        """split -> its folder, of those that hold folders; of a flat one the labels are unknown."""
        found: dict[str, str] = {}
        for name, split in named.items():
            with os.scandir(self.root / name) as inside:
                if not any(entry.is_dir() and not is_junk(entry.name) for entry in inside):
                    continue
            if split in found:
                raise ValueError(
                    f"{visible(str(self.root))}: both {found[split]} and {name}; "
                    f"which one is the {split} split?"
                )
            found[split] = name
        return {split: found[split] for split in SPLITS if split in found}

    def _check_classes(self, place: str) -> None:
        names, where = self.listing.classes, self._shown(place)
        if all(_split_of(name) for name in names) and place == "." and not self.evaluation:
            inner = f"no class folders in {names[0]}" if names else "no train folder"
            raise ValueError(
                f"{where}: {inner}; expected {where}/train/<class>/<image> or "
                f"{where}/<class>/<image>"
            )
        if not names:
            raise ValueError(f"{where}: no class folders; expected {where}/<class>/<image>")
        if len(names) == 1 and not self.evaluation:
            inner, hint = self._shown(_join(place, names[0])), ""
            if place == "." and any(
                _split_of(name) == "train" for name in self._level(names[0])[0]
            ):
                hint = f"; {inner} has a train folder: data.root={inner}"
            raise ValueError(f"{where}: only one class, {visible(names[0])}; 2 are needed{hint}")

    def list_class(self, split: str, name: str, folders: list[str]) -> None:
        listing, shown = self.listing, self._shown(folders[0])
        if name not in listing.classes:
            train = self._shown(listing.folders["train"])
            raise ValueError(f"{shown}: no such class in {train}")
        label = listing.classes.index(name)
        images, lost = listing.images[split], Counter[str]()
        before, broken_before = len(images), len(listing.broken)
        for path, status in sorted(pair for folder in folders for pair in self._walk(folder)):
            if is_image_name(path):
                images.append((path, label))
                self.digest.update(os.fsencode(f"{path}\0{status}\n"))
            else:
                listing.ignored.append(path)
                if (suffix := Path(path).suffix.lower()) not in NOTES:
                    lost[suffix or "no extension"] += 1
        if broken := len(listing.broken) - broken_before:
            lost[listing.broken[-1][1]] = broken
        kept, gone = len(images) - before, lost.total()
        if gone > kept:
            raise ValueError(
                f"{shown}: {gone} of {kept + gone} files are no images that can be read "
                f"({counted(lost)}): convert them, or take them out of the folder"
            )
        if kept == 0 and split == "train" and not self.evaluation:
            raise ValueError(f"{shown}: no images ({', '.join(sorted(EXTENSIONS))})")
        if kept == 0:
            listing.unused.append(f"{folders[0]}/ (no images in it)")

    def _walk(self, place: str) -> Iterator[tuple[str, str]]:
        """(path below root, "size mtime") of all files, subfolders included."""
        for path, status, why in walk(str(self.root), place, self._count_junk):
            if status is None or why:
                self._note_broken(path, why)
            else:
                yield path, f"{status.st_size} {status.st_mtime_ns}"

    def _count_junk(self, name: str) -> None:
        hidden = name[0] == "." and name != ".ipynb_checkpoints"
        self.listing.junk["hidden files" if hidden else name] += 1

    def _note_broken(self, path: str, why: str) -> None:
        self.listing.broken.append((path, why))
        self.digest.update(os.fsencode(f"{path}\0{why}\n"))

    def _shown(self, place: str) -> str:
        return visible(str(self.root / place))


def _split_of(folder: str) -> str:
    """The split that a folder's name stands for, or nothing."""
    name = folder.lower()
    for split, names in SPLITS.items():
        if name in names or SUFFIX.sub("", name) in names:
            return split
    return ""


def _join(place: str, name: str) -> str:
    return name if place == "." else f"{place}/{name}"


def counted(names: Counter[str]) -> str:
    """The five most frequent: ".gif 2, .txt 1"."""
    return ", ".join(f"{visible(name)} {count}" for name, count in names.most_common(5))
