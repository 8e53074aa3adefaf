"""CIFAR-10: the official archive, or the class folders it is often shared as."""

from __future__ import annotations

import hashlib
import logging
import pickle
import shutil
import tarfile
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import numpy as np
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from graft.data.sources.base import Source, Splits, open_entry, read_entry, save_items, seal
from graft.data.sources.folder import ImageFolder
from graft.storage.digests import content_digest
from graft.storage.npy import NpyWriter, locked, writing
from graft.transforms.preprocessing import Preprocessing

log = logging.getLogger(__name__)

SIDE = 32
AS_THEY_ARE = Preprocessing(SIDE, SIDE)
FORMAT = 2  # raise it when the same archive would be stored as other pixels


class Cifar10(Source):
    """50,000 training and 10,000 test images of 32 x 32 in ten classes; never resized here.

    Args:
        root: holds class folders (`train/<class>/*`, `test/<class>/*`), or the official archive
            (packed or unpacked), or nothing yet.
        cache: where the decoded images go; safe to delete.
        download: fetch the official archive into `root` when there is nothing.
        on_error: for class folders, as in `ImageFolder`.

    Attributes:
        official: names, address and checksums, as torchvision lists them. Entries in the cache
            are keyed by the checksums, so the same content is shared whatever its root.
    """

    official: type[CIFAR10] = CIFAR10

    def __init__(
        self,
        root: str | Path,
        cache: str | Path,
        download: bool = True,
        on_error: Literal["fail", "skip"] = "fail",
    ) -> None:
        self.root = Path(root).expanduser().absolute()
        self.cache = Path(cache).expanduser().absolute()
        self.download = download
        self.folders = ImageFolder(root, cache, on_error)

    def prepare(self, preprocessing: Preprocessing) -> None:
        if self._has_folders():
            self.folders.prepare(AS_THEY_ARE)
        elif read_entry(self._entry()) is None:
            with locked(self.cache / f"{self._entry().name}.lock"):
                # Another process may have built it while this one waited.
                if read_entry(self._entry()) is None:
                    self._build()

    def load(self, preprocessing: Preprocessing) -> Splits:
        return self.folders.load(AS_THEY_ARE) if self._has_folders() else open_entry(self._entry())

    def _has_folders(self) -> bool:
        return (self.root / "train").is_dir()

    def _checksums(self) -> dict[str, str]:
        meta = self.official.meta
        batches = [*self.official.train_list, *self.official.test_list]
        return {**dict(batches), meta["filename"]: meta["md5"]}

    def _entry(self) -> Path:
        content = repr((FORMAT, sorted(self._checksums().items())))
        return self.cache / f"cifar10-{hashlib.sha256(content.encode()).hexdigest()[:32]}"

    def _build(self) -> None:
        # Pickles can run code: they are opened only because their checksums are the official ones.
        files = self._read()
        meta = pickle.loads(files[self.official.meta["filename"]], encoding="latin1")
        with writing(self._entry()) as folder:
            for split, batches in (
                ("train", self.official.train_list),
                ("test", self.official.test_list),
            ):
                labels: list[int] = []
                digests: list[int] = []
                with NpyWriter(folder / f"{split}-images.npy", (3, SIDE, SIDE), np.uint8) as images:
                    for name, _ in batches:
                        batch = pickle.loads(files.pop(name), encoding="latin1")
                        images.append(batch["data"].reshape(-1, 3, SIDE, SIDE))
                        digests += map(content_digest, batch["data"])
                        labels += batch["labels"]
                save_items(folder, split, labels, digests)
            seal(folder, meta[self.official.meta["key"]], decoding="none: digests are of pixels")

    def _read(self) -> dict[str, bytes]:
        """Name -> content of the batch files, unpacked or from the archive; checksums verified."""
        checksums = self._checksums()
        folder = self.root / self.official.base_folder
        bad = [name for name, md5 in checksums.items() if not check_integrity(folder / name, md5)]
        if not bad:
            return {name: (folder / name).read_bytes() for name in checksums}
        if folder.is_dir():
            log.warning("%s: %s missing or damaged, taking the archive", folder, ", ".join(bad))
        with tarfile.open(self._archive()) as tar:
            members = [m for m in tar if m.isfile() and Path(m.name).name in checksums]
            contents = ((Path(m.name).name, tar.extractfile(m)) for m in members)
            return {name: file.read() for name, file in contents if file is not None}

    def _archive(self) -> Path:
        """The archive with the right checksum, downloaded if need be."""
        archive: Path = self.root / self.official.filename
        md5 = self.official.tgz_md5
        if check_integrity(archive, md5):
            return archive
        if not self.download:
            found = "has a wrong checksum" if archive.exists() else "not found"
            raise FileNotFoundError(self._advice(f"{archive}: {found} and download=false"))
        with locked(self.root / f".{archive.name}.lock"):
            if check_integrity(archive, md5):  # downloaded while this process waited
                return archive
            if archive.exists():
                _set_aside(archive, archive)
            part = archive.with_name(f"{archive.name}.part")
            try:
                for _ in range(2):
                    self._fetch(part)
                    if check_integrity(part, md5):
                        return part.replace(archive)
                    _set_aside(part, archive)
            finally:
                part.unlink(missing_ok=True)
        raise OSError(self._advice(f"{self.official.url}: wrong checksum, twice"))

    def _fetch(self, path: Path) -> None:
        url = self.official.url
        log.info("downloading %s to %s", url, self.root)
        try:
            with urllib.request.urlopen(url, timeout=30) as response, path.open("wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
        except (OSError, HTTPException) as error:
            why = getattr(error, "reason", error)
            raise FileNotFoundError(self._advice(f"{url}: download failed ({why})")) from error

    def _advice(self, problem: str) -> str:
        return (
            f"{problem}; put {self.official.filename}, or class folders train/<class> and "
            f"test/<class>, into {self.root} (data.root= names another folder); "
            "data=digits needs no download"
        )


def _set_aside(path: Path, archive: Path) -> None:
    corrupt = path.replace(archive.with_name(f"{archive.name}.corrupt"))
    log.warning("%s has a wrong checksum: kept as %s, downloading again", path, corrupt)
