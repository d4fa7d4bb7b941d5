"""Cache of one teacher's outputs for all training images, from which students are distilled.

A cache is a folder. teacher.json contains the card and the hash of the teacher. The output for an image is a zarr v3
array HASH[:2]/HASH.zarr, where HASH is the SHA-256 of the image's pixels: (channel, y, x) float16 as in
`hover_batch.model.heads`. Its attributes contain the SHA-256 of its bytes. An array gets its final name once it is
complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.errors import InputError, PackageError
from hover_batch.files import read_whole, write_atomically
from hover_batch.model.card import Card
from hover_batch.model.heads import Heads
from hover_batch.model.package import Package
from hover_batch.taxonomy import Taxonomy
from kd.data.samples import Sample

FORMAT = "hover-batch teacher cache 1"
"""Value of `format` in teacher.json."""
CHUNK = 256
"""Side in pixels of a compressed chunk; the chunks of an image are in one file."""


@dataclass(frozen=True)
class TeacherCache:
    """Cache of one teacher's outputs. Only one process at a time may write the output for an image."""

    path: Path
    """Folder of the cache."""
    taxonomy: Taxonomy
    """Classes of the teacher."""
    sha256: str
    """Hash of the teacher's package (`Package.sha256`)."""
    card: dict[str, Any]
    """Card of the teacher's package, as JSON."""
    tta: int = 1
    """Number of rotated and flipped views of an image over which each output is averaged; 1 for no averaging."""

    @classmethod
    def open(cls, path: Path) -> TeacherCache:
        """Open the cache at `path`, which `kd teach` wrote.

        Raises InputError if there is no cache, or its teacher.json cannot be read.
        """
        try:
            about = json.loads(read_whole(path / "teacher.json"))
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']}, not {FORMAT}")
            taxonomy = Card.from_json(about["card"]).taxonomy
            sha256, tta = about["sha256"], about.get("tta", 1)
            if not isinstance(sha256, str) or type(tta) is not int:
                raise ValueError(f"sha256 is {sha256!r:.40}, and tta {tta!r:.40}")
            return cls(path, taxonomy, sha256, about["card"], tta)
        except FileNotFoundError:
            reason = "it has no teacher.json"
        except (OSError, ValueError, KeyError, TypeError, RecursionError, PackageError) as error:
            reason = f"its teacher.json cannot be read: {error}"
        raise InputError(
            f"{path}: not a cache of a teacher's outputs ({reason}); write one with `hover-batch kd teach`"
        )

    @classmethod
    def create(cls, path: Path, teacher: Package, tta: int = 1) -> TeacherCache:
        """Open the cache at `path` for the outputs of `teacher`. If there is none, create it, and missing folders.

        `teacher`: package of the teacher. `tta`: number of views that are averaged, 8 or 1.

        Raises InputError if the cache is of another teacher or another `tta`, its teacher.json cannot be read, or the
        folder cannot be created; OSError if teacher.json cannot be written.
        """
        if not (path / "teacher.json").exists():
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"-o {path}: {error.strerror}; give a folder that can be written") from error
            about = {"format": FORMAT, "sha256": teacher.sha256, "card": teacher.card.to_json(), "tta": tta}
            write_atomically(path / "teacher.json", json.dumps(about, indent=2) + "\n")
        cache = cls.open(path)
        if cache.sha256 != teacher.sha256:
            raise InputError(
                f"-o {path}: holds the outputs of another teacher, {cache.card['name']} (sha256 {cache.sha256[:12]}…), "
                f"not of {teacher.card.name} ({teacher.sha256[:12]}…); give another folder, or delete this one"
            )
        if cache.tta != tta:
            raise InputError(
                f"-o {path}: holds outputs with --tta {cache.tta}, not {tta}; give another folder, or delete this one"
            )
        return cache

    def logits(self, sample: Sample) -> NDArray[np.float16]:
        """Return the stored output for the whole image of `sample`, (channel, y, x) float16.

        `hover_batch.model.heads` describes the channels. Raises InputError if the output is missing, cannot be read, is
        corrupted, or is of another teacher.
        """
        path = self._array(sample)
        if not self.covers(sample):
            raise InputError(
                f"{self.path}: no output for the image {sample.id} of {sample.source}; run `hover-batch kd teach` on "
                "these images first"
            )
        import zarr

        try:
            array = zarr.open_array(path, mode="r")
            logits = np.asarray(array[:])
            expected = (Heads(len(self.taxonomy.classes)).channels, *sample.image.shape[:2])
            if logits.shape != expected or logits.dtype != np.float16:
                raise ValueError(f"it is {logits.dtype} {logits.shape}, not float16 {expected}")
            if array.attrs["teacher_sha256"] != self.sha256:
                raise ValueError("it is an output of another teacher")
            if array.attrs["sha256"] != _sha256(logits):
                raise ValueError("checksum mismatch")
        except Exception as error:  # zarr, zstd and JSON raise many kinds for corrupted files
            raise InputError(f"{path}: corrupted ({error}); delete it and run `hover-batch kd teach` again") from error
        return logits

    def covers(self, sample: Sample) -> bool:
        """True if an output is stored for the image of `sample`. It is not read, so it may be corrupted."""
        return self._array(sample).is_dir()

    def has_intact(self, sample: Sample) -> bool:
        """True if an intact output of this teacher is stored for the image of `sample`.

        A stored output that cannot be read, is corrupted or is of another teacher is deleted, so that it can be written
        again.

        Raises OSError if it cannot be deleted.
        """
        if not self.covers(sample):
            return False
        try:
            self.logits(sample)
        except InputError:
            shutil.rmtree(self._array(sample))
            return False
        return True

    def write(self, sample: Sample, logits: NDArray[np.floating[Any]]) -> None:
        """Store a teacher's output for the image of `sample` as float16. No output may be stored for it yet.

        Values beyond ±65504, the range of float16, are clipped.

        `logits`: output (channel, y, x), of any float dtype.

        Raises PackageError if a value is not finite, OSError if the output cannot be written.
        """
        import zarr
        from zarr.codecs import ZstdCodec

        if not np.isfinite(logits).all():
            raise PackageError(
                f"--teacher {self.card['name']}: its output for the image {sample.id} is not finite; give another one"
            )
        limit = float(np.finfo(np.float16).max)
        halves = logits.clip(-limit, limit).astype(np.float16)
        path = self._array(sample)
        temporary = path.with_name(f".{path.name}.partial")  # overwritten if a killed run left one behind
        path.parent.mkdir(exist_ok=True)
        channels, height, width = halves.shape
        array = zarr.create_array(
            temporary,
            shape=halves.shape,
            shards=(channels, -(-height // CHUNK) * CHUNK, -(-width // CHUNK) * CHUNK),
            chunks=(channels, CHUNK, CHUNK),
            dtype="float16",
            compressors=ZstdCodec(level=1),
            attributes={"sha256": _sha256(halves), "teacher_sha256": self.sha256},
            dimension_names=("channel", "y", "x"),
            zarr_format=3,
            overwrite=True,
        )
        array[:] = halves
        os.replace(temporary, path)

    def _array(self, sample: Sample) -> Path:
        return self.path / sample.image_sha256[:2] / f"{sample.image_sha256}.zarr"


def _sha256(logits: NDArray[np.float16]) -> str:
    return hashlib.sha256(np.ascontiguousarray(logits, "<f2").tobytes()).hexdigest()
