"""Write AnnData (.h5ad) and SpatialData (a zarr folder), for scanpy, squidpy, napari-spatialdata and similar tools.

The libraries of these names, from the extra `spatialdata`, write both, with all nuclei of a slide in memory. A nucleus
is an observation, named by its UUID, and its measurements (the table's float32 columns) are the variables. `obs` holds
its class and the other columns, `obsm["spatial"]` its centroid, and `uns` the classes' colours in scanpy's format and
the slide's pixel size. SpatialData holds the same table, which annotates the polygons. Positions are level-0 pixels of
the full canvas; SpatialData's coordinate system `um` gives them in µm.
"""

from __future__ import annotations

import io
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hover_batch.errors import InputError
from hover_batch.export.read import NucleiTable
from hover_batch.files import replacing, replacing_folder

if TYPE_CHECKING:
    from anndata import AnnData

_SHAPES = "nuclei"


def require_extra() -> None:
    """Check that the packages anndata and spatialdata are installed. InputError if one of them is not."""
    if not (find_spec("anndata") and find_spec("spatialdata")):
        raise InputError(
            "--to spatialdata and --to anndata need packages that are not installed; run: pip install "
            "'hover-batch[spatialdata]'"
        )


def write_anndata(nuclei: NucleiTable, path: Path) -> None:
    """Write the table `nuclei` to `path` (.h5ad) as AnnData. An existing file is replaced only when all is written.

    The variables are the table's float32 columns. `obs` holds slide_id, nucleus_id, type, type_id, touches_border and
    seam_uncertain, indexed by the nuclei's UUIDs. `obsm["spatial"]` holds the centroids in level-0 pixels, and `uns`
    the entries `type_colors` (#rrggbb by class) and `mpp` (x and y in µm).

    All nuclei, and the file itself, are held in memory, since HDF5 on a full disk crashes Python at its exit. The
    pandas option future.infer_string is False in the whole process while the file is made. Call `require_extra` first.

    OSError if the file cannot be written, SlideError if the table is corrupted.
    """
    import h5py
    from anndata.io import write_elem

    content = io.BytesIO()
    with h5py.File(content, "w") as file, _plain_strings():
        write_elem(file, "/", _anndata(nuclei), dataset_kwargs={"compression": "gzip", "compression_opts": 1})
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def write_spatialdata(nuclei: NucleiTable, path: Path) -> None:
    """Write the table `nuclei` to the folder `path` (.zarr) as SpatialData.

    Its table `table` has the content that `write_anndata` writes, and a column `region` in `obs`, by which it annotates
    the polygons, `nuclei`. The polygons have the coordinate systems `global` (level-0 pixels) and `um` (µm). Without
    nuclei, only the table is written, without `region`, since the library does not support empty polygons. An existing
    folder is replaced only when all is written.

    All nuclei are held in memory. In the whole process, Python's warnings are suppressed while the library is imported.
    While the folder is written, anndata's warning about sharding is suppressed, and the pandas option
    future.infer_string is False. Call `require_extra` first.

    OSError if the folder cannot be written, SlideError if the table is corrupted.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import, its dependencies give warnings that users cannot fix
        from spatialdata import SpatialData
    import geopandas
    import pandas as pd
    from spatialdata.models import ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    with replacing_folder(path) as temporary, _plain_strings(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "zarr v3 autosharding")  # a default will change; readers take both
        table = _anndata(nuclei)
        if nuclei.rows == 0:
            SpatialData(tables={"table": TableModel.parse(table)}).write(temporary)
            return
        table.obs["region"] = pd.Categorical.from_codes(np.zeros(nuclei.rows, np.int8), pd.Index([_SHAPES]))
        geometry = np.concatenate([nuclei.polygons(batch) for batch in nuclei.batches(["geometry"])])
        shapes = geopandas.GeoDataFrame(geometry=geometry, index=table.obs["nucleus_id"].to_numpy())
        um = Scale([nuclei.mpp.x, nuclei.mpp.y], axes=("x", "y"))
        SpatialData(
            shapes={_SHAPES: ShapesModel.parse(shapes, transformations={"global": Identity(), "um": um})},
            tables={"table": TableModel.parse(table, region=_SHAPES, region_key="region", instance_key="nucleus_id")},
        ).write(temporary)


def _anndata(nuclei: NucleiTable) -> AnnData:
    """Return the table as AnnData: (nuclei, measurements) float32, with the annotations that the module describes."""
    import pandas as pd
    from anndata import AnnData

    names = [name for name in nuclei.schema.names if name not in ("bbox", "geometry")]
    batches = list(nuclei.batches(names))
    table = pa.Table.from_batches(batches, pa.schema([nuclei.schema.field(name) for name in names]))
    classes = nuclei.taxonomy.nuclei
    obs = pd.DataFrame(
        {
            "slide_id": pd.Categorical.from_codes(np.zeros(nuclei.rows, np.int8), pd.Index([nuclei.slide_id])),
            "nucleus_id": table["nucleus_id"].to_numpy(),
            "type": pd.Categorical.from_codes(table["type_id"].to_numpy() - 1, pd.Index([c.name for c in classes])),
            **{name: table[name].to_numpy() for name in ("type_id", "touches_border", "seam_uncertain")},
        },
        index=[identity for batch in batches for identity in nuclei.uuids(batch)],
    )
    return AnnData(
        np.column_stack([table[name].to_numpy() for name in nuclei.measured]),
        obs,
        pd.DataFrame(index=nuclei.measured),
        uns={
            "type_colors": np.array(["#{:02x}{:02x}{:02x}".format(*c.color) for c in classes]),
            "mpp": np.array([nuclei.mpp.x, nuclei.mpp.y]),
        },
        obsm={"spatial": np.column_stack([table["centroid_x"], table["centroid_y"]])},
    )


def _plain_strings() -> Any:
    """Return a context in which pandas 3 makes strings as pandas 2 does; anndata < 0.13 cannot write the new ones."""
    import pandas as pd

    return pd.option_context("future.infer_string", False)
