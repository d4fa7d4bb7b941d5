"""Outputs of one teacher for every image, kept in a folder from which students learn.

teacher.json says whose outputs these are. Each image, known by the hash of its pixels, has a zarr v3 array
IMAGE[:2]/IMAGE.zarr, (channel, y, x) float16 as `hover_batch.model.heads` lays out. Its attributes hold the hash of its
bytes; an array takes its final name once it is complete.
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
from hover_batch.model.heads import Heads
from hover_batch.model.package import Card, Package
from hover_batch.taxonomy import Taxonomy
from kd.data.samples import Sample

FORMAT = "hover-batch teacher cache 1"
CHUNK = 256
"""Side in pixels of a compressed chunk; one file holds a whole image."""


@dataclass(frozen=True)
class TeacherCache:
    """The outputs of one teacher.

    `taxonomy`: its classes. `sha256`: of its package (`Package.sha256`). `card`: its card, as JSON.
    """

    path: Path
    taxonomy: Taxonomy
    sha256: str
    card: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> TeacherCache:
        """Open what `kd teach` has written. InputError where it is no cache."""
        try:
            about = json.loads((path / "teacher.json").read_bytes())
            if about["format"] != FORMAT:
                raise ValueError(f"it is of the format {about['format']}, not {FORMAT}")
            return cls(path, Card.from_json(about["card"]).taxonomy, about["sha256"], about["card"])
        except FileNotFoundError:
            reason = "it has no teacher.json"
        except (OSError, ValueError, KeyError, TypeError, PackageError) as error:
            reason = f"its teacher.json cannot be read: {error}"
        raise InputError(f"{path}: no outputs of a teacher ({reason}); `hover-batch kd teach` writes a folder of them")

    @classmethod
    def create(cls, path: Path, teacher: Package) -> TeacherCache:
        """Begin a cache, or open the one that is there. InputError where it is another teacher's."""
        if not (path / "teacher.json").exists():
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"-o {path}: {error.strerror}; give a folder that can be written") from error
            about = {"format": FORMAT, "sha256": teacher.sha256, "card": teacher.card.to_json()}
            temporary = path / ".teacher.json.partial"
            temporary.write_text(json.dumps(about, indent=2) + "\n", "utf-8")
            os.replace(temporary, path / "teacher.json")
        cache = cls.open(path)
        if cache.sha256 != teacher.sha256:
            raise InputError(
                f"-o {path}: holds the outputs of another teacher, {cache.card['name']} (sha256 {cache.sha256[:12]}…), "
                f"not of {teacher.card.name} ({teacher.sha256[:12]}…); give another folder, or delete this one"
            )
        return cache

    def logits(self, sample: Sample) -> NDArray[np.float16]:
        """The teacher's output (channel, y, x) float16 for the whole image, as `hover_batch.model.heads` lays out.

        InputError where there is none, or it is not what was written.
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
                raise ValueError("it is another teacher's")
            if array.attrs["sha256"] != _sha256(logits):
                raise ValueError("its bytes are not those that were written")
        except Exception as error:  # a damaged file raises whatever zarr, zstd or JSON think fit
            raise InputError(f"{path}: corrupt ({error}); delete it and run `hover-batch kd teach` again") from error
        return logits

    def covers(self, sample: Sample) -> bool:
        """Whether there is an output for this image, sound or not."""
        return self._array(sample).is_dir()

    def has(self, sample: Sample) -> bool:
        """Whether the output for this image is there and sound; one that is not is deleted."""
        if not self.covers(sample):
            return False
        try:
            self.logits(sample)
        except InputError:
            shutil.rmtree(self._array(sample))
            return False
        return True

    def keep(self, sample: Sample, logits: NDArray[np.floating[Any]]) -> None:
        """Keep the output (channel, y, x) for an image of which there is none yet. PackageError where it is not finite.

        float16 reaches to 65504: what lies beyond, which no softmax tells apart, is cut there.
        """
        import zarr
        from zarr.codecs import ZstdCodec

        if not np.isfinite(logits).all():
            raise PackageError(f"--teacher {self.card['name']}: its output for the image {sample.id} is not finite")
        limit = float(np.finfo(np.float16).max)
        halves = logits.clip(-limit, limit).astype(np.float16)
        path = self._array(sample)
        temporary = path.with_name(f".{path.name}.partial")  # of a killed run, too: the next one takes its place
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
