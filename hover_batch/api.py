"""Python API: segment a slide, load its table and its maps, and run a model on images in memory."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from hover_batch.bucket import fetch_file
from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.manifest import one_slide
from hover_batch.cohort.record import Url
from hover_batch.config import Settings, nested
from hover_batch.errors import InputError, SlideError
from hover_batch.export.read import NucleiTable, unreadable
from hover_batch.files import given_path, read_json
from hover_batch.geometry import Box, Grid, Mpp, Size
from hover_batch.model.card import Card
from hover_batch.model.images import batch_of, predict_image
from hover_batch.model.package import find_package
from hover_batch.nuclei.systems import splitter_of
from hover_batch.nuclei.table import TableContext, to_arrow
from hover_batch.slide.survey import read_info
from hover_batch.store import PredictionStore
from hover_batch.uncertainty import Uncertainty
from hover_batch.version import __version__

if TYPE_CHECKING:
    import pandas as pd

    from hover_batch.dataset.opened import Dataset
    from hover_batch.model.predict import Predictor

CATEGORIES = ["slide_id", "type"]
"""Columns with few distinct values, loaded as categories."""


def _place(name: str, value: str | Path) -> Path | Url:
    """Return the argument `name` as a path or URL, with ~ expanded. InputError if it is not a valid path."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(text, str):
        raise InputError(f"{name} {value!r}: must be a str or Path, not {type(value).__name__}")
    try:
        return Url.of(text) or given_path(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _text(name: str, value: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} {value!r}: must be a str, not {type(value).__name__}")
    return value


def segment_slide(
    path: str | Path,
    output: str | Path,
    *,
    model: str | Path = "starter",
    mpp: float | None = None,
    slide_id: str | None = None,
    **settings: Any,
) -> Path:
    """Find the nuclei of one slide, as `hover-batch segment` does. Return the path of the table, for `load_nuclei`.

    Repeat the call to resume a run that stopped. Call it from the main thread, so that Ctrl-C is handled. Progress is
    printed on stderr.

    `path`: a slide file, a DICOM folder or a URL. `output`: the run's folder. Slides may share one if their settings
    are the same, but slides.csv and the summary then list only the last one. `model`: name of a package, a .safetensors
    file or a folder that holds one. `mpp`: pixel size of level 0 in µm; needed only if the file gives none or a wrong
    one. `slide_id`: by default the file's stem or the folder's name. `settings`: settings of the command, by their
    names in settings.toml (`batch=4`, `backend="local"`, `class_map={"stroma": ["spindle"], …}`).

    InputError if an argument is invalid, or the output folder cannot be used; SettingsChanged, a subclass of it, if the
    folder holds results of other settings. PackageError if the model cannot be used, SlideError if the slide cannot be
    processed, HoverBatchError if Ray does not start or the network crashes repeatedly, OSError if a result cannot be
    written. With `max_failures=0`, TooManyFailures instead of SlideError. KeyboardInterrupt after Ctrl-C or SIGTERM.
    """
    from hover_batch.segment import run_segment

    folder = _place("output", output)
    if isinstance(folder, Url):
        raise InputError(
            f"output {folder}: is a URL; give a folder, or use `hover-batch segment -o {folder} --work FOLDER`"
        )
    place = _place("path", path)
    source = place.text if isinstance(place, Url) else place  # str(place) would leave out the credentials of a URL
    cohort = one_slide(source, mpp, None if slide_id is None else _text("slide_id", slide_id))
    run_settings = Settings.from_dict({"model": str(model), **nested(settings)})
    if run_settings.sample.stop_at:
        raise InputError("stop_at: would give an estimate, not a table; use `hover-batch segment --stop-at`")
    command = ["hover_batch.segment_slide", str(place)]
    outcome = run_segment(cohort, folder, run_settings, skip_invalid=False, force=False, command=command)
    if outcome.failures:
        raise SlideError(outcome.failures[0].reason)
    return outcome.layout.slide(cohort.records[0].slide_id).nuclei_parquet


def load_nuclei(path: str | Path) -> pd.DataFrame:
    """Return the nuclei of one slide as a table with one row per nucleus, loaded from its nuclei.parquet or its folder.

    The table has the columns of the file except `bbox`. `geometry` holds shapely polygons in level-0 pixels; `slide_id`
    and `type` are categories. `attrs["hover_batch"]` holds the file's metadata: pixel size, classes with colours,
    model. `geopandas.GeoDataFrame(nuclei)` converts the table to a GeoDataFrame.

    `path`: path or URL of the file or folder. A URL must be a str; its file is first copied to a temporary folder.

    SlideError if the table is missing or corrupted, or cannot be fetched; InputError if a URL does not exist, access to
    it is denied, or a package for its storage is missing; OSError if the disk for temporary files is full.
    """
    table = _place("path", path)
    if isinstance(table, Url):
        url = table if table.name.endswith(".parquet") else Url(f"{table.text.rstrip('/')}/nuclei.parquet")
        with tempfile.TemporaryDirectory() as folder:
            fetch_file(url, Path(folder) / "nuclei.parquet")
            return load_nuclei(folder)
    if table.is_dir():
        table = table / "nuclei.parquet"
    if not table.exists():
        raise SlideError(f"{table}: does not exist; give the folder of a finished slide, out/slides/ID, or its table")
    NucleiTable.open(table)  # raises SlideError for a file that is not a table of nuclei
    try:
        with pq.ParquetFile(table) as file:
            return _frame(file.read(), json.loads(file.metadata.metadata[b"hover_batch"]))
    except (OSError, pa.ArrowException, shapely.errors.ShapelyError) as error:
        raise unreadable(table, error) from error


def _frame(table: pa.Table, about: Mapping[str, Any]) -> pd.DataFrame:
    frame: pd.DataFrame = table.drop_columns("bbox").to_pandas(categories=CATEGORIES)
    frame["geometry"] = shapely.from_wkb(frame["geometry"].to_numpy())
    frame.attrs["hover_batch"] = dict(about)
    return frame


def open_cohort(path: str | Path, clinical: str | Path | None = None, on: str = "patient_id") -> Dataset:
    """Open a data set, which `hover-batch cohort` makes from runs, to query it in SQL.

    The result has the DuckDB tables `nuclei`, `slides` and, if a clinical file is given, `clinical`.
    `cohort.sql("SELECT …")` returns a DataFrame, and `cohort.window("case-01", (x0, y0, x1, y1))` the nuclei of a
    field. Close it with `close`, or use it in a `with` block. Ids that only the slides or only the file have are listed
    in `cohort.notes`; each note is also issued as a UserWarning.

    `path`: folder of the data set, or its URL in cloud storage. `clinical`: CSV or Parquet file with one row per
    patient; None for no such table. `on`: column by which this file and the slides are joined. Its values are read as
    text, so that 007 stays 007.

    InputError if a file cannot be read or joined, or the data set holds no slides; UploadError if cloud storage cannot
    be reached; OSError if slides.parquet cannot be read.
    """
    from hover_batch.dataset.opened import Dataset

    table = None if clinical is None else _place("clinical", clinical)
    if isinstance(table, Url):
        raise InputError(f"clinical {table}: is a URL; copy the file to a disk and give its path")
    cohort = Dataset(_place("path", path), table, _text("on", on))
    for note in cohort.notes:
        warnings.warn(note, stacklevel=2)
    return cohort


@dataclass(frozen=True)
class Plane:
    """One channel of a prediction store, read on indexing: `plane[y0:y1, x0:x1]`, `plane[:]` or `numpy.asarray(plane)`.

    Values are float32 (y, x) in the channel's own unit (see `Predictions`), and 0 where nothing was predicted.
    """

    array: Any = field(repr=False)
    """Array (plane, y, x) uint8 of the store."""
    index: int
    """Position of the channel in the store."""
    steps: float
    """Stored steps per unit."""
    signed: bool = False
    """Whether stored bytes are in two's complement."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns (y, x), in inference pixels."""
        return self.array.shape[1], self.array.shape[2]

    def __getitem__(self, window: Any) -> NDArray[np.float32]:
        """Read rows and columns, float32, given as integers or slices of inference pixels, as for numpy."""
        window = window if isinstance(window, tuple) else (window,)
        stored = np.asarray(self.array[(self.index, *window)], np.uint8)
        return (stored.view(np.int8) if self.signed else stored).astype(np.float32) / np.float32(self.steps)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or np.float32, copy=False)


@dataclass(frozen=True)
class Predictions:
    """Maps of a slide as the network predicted them, on the inference grid, which starts at level-0 pixel (0, 0)."""

    np: Plane
    """Probability of a nucleus, 0 to 1."""
    h: Plane
    """Signed distance to the nucleus's centroid along x, -1 to 1."""
    v: Plane
    """Signed distance to the nucleus's centroid along y, -1 to 1."""
    classes: Mapping[str, Plane]
    """Probability of each class by name, background included; 0 where np < 0.25."""
    hematoxylin: Plane
    """Optical density of hematoxylin; 0 where np < 0.25."""
    eosin: Plane
    """Optical density of eosin; 0 where np < 0.25."""
    card: Card = field(repr=False)
    """Card of the model."""
    mpp: Mpp
    """Size of an inference pixel in µm."""
    level0_per_pixel: tuple[float, float]
    """Level-0 pixels per inference pixel: (x, y)."""
    level0: Size
    """Size of the canvas in level-0 pixels."""
    bounds: Box | None
    """Scanned part of the canvas in level-0 pixels; None if the slide has no bounds."""


def _refuse_missing_shards(store: PredictionStore, layout: SlideLayout) -> None:
    """Raise ValueError if a unit's marker names a shard that does not exist, since it would be read as zeros."""
    side = (store.array.shards or store.array.chunks)[1]
    for marker in layout.markers.glob("*.json"):
        x, y = (int(cell) * side for cell in marker.stem.split("_"))
        unit = Box(x, y, x + side, y + side)
        if (read_json(marker) or {}).get("shard_sha256") and not store.has_shard(unit):
            raise ValueError(f"the shard of the unit {marker.stem} (column_row) is missing")


def load_predictions(slide_folder: str | Path) -> Predictions:
    """Open the prediction maps of a slide. Pixels are read only when a `Plane` of the result is indexed.

    Away from nuclei, h and v are 0 unless the run used `sobel_norm="window"`.

    `slide_folder`: folder of the slide in its run, out/slides/ID.

    InputError if the folder holds no predictions, as after --discard-predictions; SlideError or PackageError if their
    metadata is corrupted or a shard is missing; OSError if a file cannot be read.
    """
    place = _place("slide_folder", slide_folder)
    if isinstance(place, Url):
        raise InputError(f"slide_folder {place}: is a URL; copy the folder to a disk and give its path")
    folder = place.absolute()
    if folder.is_file():
        raise InputError(f"{folder}: is a file; give the folder of the slide, out/slides/ID")
    layout = SlideLayout(folder.parent.parent, folder.name)
    path = layout.predictions_zarr
    # Another slide could lie where the layout expects a folder that was moved out of its run.
    if path.parent != folder or not (path / "zarr.json").is_file():
        raise InputError(
            f"{folder}: holds no predictions, or is not in the folder slides of a run; give out/slides/ID of a run "
            "that kept predictions"
        )
    try:
        store = PredictionStore.open(path, read_only=True)
        _refuse_missing_shards(store, layout)
        array = store.array
        attributes: Mapping[str, Any] = dict(array.attrs)
        card = Card.from_json(attributes["model"])
        mpp_x, mpp_y = map(float, attributes["mpp"])
        scale_x, scale_y = map(float, attributes["level0_per_pixel"])
        width, height = map(int, attributes["level0_size"])
        if array.shape[0] != card.layout.planes:
            raise ValueError(f"{array.shape[0]} planes")
    except (LookupError, TypeError, ValueError) as error:
        raise SlideError(f"{path}: cannot be read ({error!r}); run the slide again") from error
    planes = card.layout
    return Predictions(
        np=Plane(array, planes.NP, 256),
        h=Plane(array, planes.H, 127, signed=True),
        v=Plane(array, planes.V, 127, signed=True),
        classes={c.name: Plane(array, planes.tp.start + c.id, 255) for c in card.taxonomy.classes},
        hematoxylin=Plane(array, planes.hematoxylin, planes.OD_SCALE),
        eosin=Plane(array, planes.eosin, planes.OD_SCALE),
        card=card,
        mpp=Mpp(mpp_x, mpp_y),
        level0_per_pixel=(scale_x, scale_y),
        level0=Size(width, height),
        bounds=read_info(layout.survey_json).bounds if layout.survey_json.is_file() else None,
    )


class Model:
    """Network that is ready to be run on images in memory; make it with `load_model`.

    Images must have a pixel size of `card.mpp` µm. `sha256`: hash of the model's package.
    """

    def __init__(self, predictor: Predictor, sha256: str) -> None:
        self.card = predictor.card
        self.predictor = predictor
        self.sha256 = sha256

    def predict(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the quantised maps of an image, (plane, y, x) uint8, with the height and width of the image.

        The planes are np, h, v, the classes (background first), hematoxylin and eosin.
        `hover_batch.model.heads.MapLayout` gives their scales; h and v are signed bytes. The image is reflected at its
        border.

        `rgb`: (y, x, 3) uint8 RGB of any size, with pixels of `card.mpp` µm.

        InputError for other or empty arrays, PackageError if the network cannot be compiled, torch.OutOfMemoryError if
        one tile does not fit in the GPU's memory.
        """
        if (
            not isinstance(rgb, np.ndarray)
            or rgb.dtype != np.uint8
            or rgb.ndim != 3
            or rgb.shape[2] != 3
            or not rgb.size
        ):
            given = f"{rgb.dtype} {rgb.shape}" if isinstance(rgb, np.ndarray) else type(rgb).__name__
            raise InputError(f"an image must be an array (y, x, 3) of uint8, RGB, not {given}")
        return predict_image(self.predictor, rgb)

    def nuclei(self, rgb: NDArray[np.uint8]) -> tuple[NDArray[np.int32], pd.DataFrame]:
        """Return the instance map (y, x) int32 of an image, 0 = background, and the table of its nuclei.

        The table has the columns of `load_nuclei`, with positions in pixels of the image, and `nucleus_id`, the
        nucleus's number 1 … n in the instance map. Post-processing uses the default settings of a run.

        `rgb`: (y, x, 3) uint8 RGB of any size, with pixels of `card.mpp` µm.

        InputError for other or empty arrays, PackageError if the network cannot be compiled or the constants on its
        card are invalid, torch.OutOfMemoryError if one tile does not fit in the GPU's memory.
        """
        from hover_batch.nuclei.image import nuclei_of

        maps = self.predict(rgb)
        card = self.card
        labels, nuclei = nuclei_of(maps, splitter_of(card), card.layout)
        # Number the nuclei in the order of the table, which is not that of their labels.
        numbers = np.arange(1, len(nuclei) + 1, dtype=np.uint32)
        number_of_label = np.zeros(len(nuclei) + 1, np.int32)
        number_of_label[labels[nuclei.anchor_y, nuclei.anchor_x]] = numbers
        mpp = Mpp(card.mpp, card.mpp)
        context = TableContext(
            slide_id="",
            taxonomy=card.taxonomy,
            grid=Grid.over(Size(rgb.shape[1], rgb.shape[0]), mpp, card.mpp),
            slide_mpp=mpp,
            mpp_source="model",
            bounds=None,
            model_id=card.name,
            model_sha256=self.sha256,
            software=__version__,
            scalings=Uncertainty.from_json(card.uncertainty).probabilities,
        )
        table = to_arrow(nuclei, context).drop_columns(["anchor_y", "anchor_x"])
        table = table.add_column(1, "nucleus_id", pa.array(numbers))
        return number_of_label[labels], _frame(table, context.to_json())


def load_model(name_or_path: str | Path = "starter", **settings: Any) -> Model:
    """Load the network of a package, on a GPU if there is one.

    In the whole process, torch's number of threads is set for a CPU, and TF32 is switched off in cuDNN for a GPU. With
    OpenVINO, the converted network is cached on disk.

    `name_or_path`: `starter`, the name of a package in the cache, a .safetensors file or a folder that holds one.
    `settings`: settings of inference, `device`, `precision`, `batch`, `runtime` and `threads`, with the values that
    `hover_batch.config.InferSettings` describes, such as device="cuda:1". The default of `batch` suits the model's
    architecture.

    PackageError if the package cannot be found or loaded, or its network cannot be compiled; InputError if a setting is
    invalid or the device cannot be used.
    """
    from hover_batch.model.predict import load_predictor

    package = find_package(str(name_or_path), "model")
    infer = Settings.from_dict(nested(settings)).infer
    if "batch" not in settings:
        infer = replace(infer, batch=batch_of(package.card))
    return Model(load_predictor(package, infer), package.sha256)
