"""Samples that libraries would turn black, pixel sizes in every form, and the memory of plain pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import InputError, SlideError
from hover_batch.geometry import Grid, Mpp, Size
from hover_batch.slide import headers
from hover_batch.slide.headers import peek
from hover_batch.slide.reader import open_slide

FIELD = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
TILES = {"tile": (128, 128)}
QUARTER_PER_CM = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}


def record(path: Path, mpp: float | None = None) -> SlideRecord:
    return SlideRecord("s1", path, 7, mpp=None if mpp is None else Mpp(mpp, mpp))


def written(path: Path, array: Any = FIELD, **options: Any) -> Path:
    tifffile.imwrite(path, array, photometric="rgb", **options)
    return path


@pytest.mark.parametrize("layout", ["tiles", "strips", "ome"])
@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (FIELD.astype(np.uint16) << 2, "16"),
        (FIELD.astype(np.uint16) << 4, "16"),
        (FIELD.astype(np.uint16) << 8, "16"),
        (FIELD.astype(np.int16) << 4, "16"),
        ((FIELD >> 1).astype(np.int8), "8"),
        (FIELD.astype(np.float32) / 255, "32"),
    ],
    ids=["10 bits", "12 bits", "16 bits", "signed 16", "signed 8", "float"],
)
def test_other_than_unsigned_8_bit_samples_are_refused(tmp_path: Path, layout: str, array: Any, kind: str) -> None:
    options: dict[str, Any] = {} if layout == "strips" else dict(TILES)
    name = "deep.ome.tif" if layout == "ome" else "deep.tif"
    path = written(tmp_path / name, array, **options, **({} if layout == "ome" else QUARTER_PER_CM))
    with pytest.raises(SlideError, match="8-bit") as caught:
        peek(record(path, mpp=0.25))
    assert kind in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", [{"tile": (128, 128)}, {"rowsperstrip": 64}], ids=["tiles", "strips"])
def test_turned_pictures_are_refused(tmp_path: Path, layout: dict[str, Any]) -> None:
    """OpenSlide would turn each tile on its own: a shuffled mosaic."""
    upright, turned = (
        written(tmp_path / f"{value}.tif", extratags=[(274, "H", 1, value, True)], **layout) for value in (1, 6)
    )
    assert peek(record(upright, mpp=0.25)).level0 == Size(FIELD.shape[1], FIELD.shape[0])
    with pytest.raises(SlideError, match="Orientation is 6.*save it upright"):
        peek(record(turned, mpp=0.25))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pictures_that_exif_turns_are_refused(tmp_path: Path, suffix: str) -> None:
    path, exif = tmp_path / f"field.{suffix}", Image.Exif()
    for orientation in (1, 6):
        exif[274] = orientation
        Image.fromarray(FIELD).save(path, exif=exif)
        if orientation == 1:
            assert peek(record(path, mpp=0.25)).warnings == ()
    with pytest.raises(SlideError, match="Orientation is 6.*save it upright"):
        peek(record(path, mpp=0.25))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("exif", [b"garbage", b"II*\0\x08\0\0\0\x05\0\x12\x01", b"II*\0\xff\xff\xff\xff"])
def test_corrupted_exif_is_ignored(tmp_path: Path, suffix: str, exif: bytes) -> None:
    Image.fromarray(FIELD).save(tmp_path / f"field.{suffix}", exif=b"Exif\0\0" + exif)
    assert peek(record(tmp_path / f"field.{suffix}", mpp=0.25)).warnings == ()


def test_levels_of_another_aspect_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    for level, warned in ((FIELD[:150, :151], False), (FIELD[:9, :10], False), (FIELD[:150, :100], True)):
        with tifffile.TiffWriter(path) as tiff:
            for kind, page in enumerate((FIELD, level)):
                tiff.write(page.copy(), photometric="rgb", subfiletype=kind, metadata=None, **TILES)
        warnings = peek(record(path, mpp=0.25)).warnings
        assert [warning.startswith("its level of 100 × 150 pixels") for warning in warnings] == [True] * warned


@pytest.mark.parametrize(("side", "warned"), [(150, False), (152, False), (160, True), (120, False)])
def test_a_padded_level_is_warned_of(tmp_path: Path, side: int, warned: bool) -> None:
    """Its nuclei would be displaced. 120 pixels are two fifths of 300: an unusual ratio, not padding."""
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as tiff:
        for kind, page in enumerate((FIELD, np.resize(FIELD, (side, side, 3)))):
            tiff.write(page, photometric="rgb", subfiletype=kind, metadata=None, **TILES)
    warnings = peek(record(path, mpp=0.25)).warnings
    assert [f"{side} × {side} pixels should have 150 × 150, 1/2 of the full size" in w for w in warnings] == [
        True
    ] * warned


def test_two_pictures_in_a_scanner_file_are_refused(tmp_path: Path) -> None:
    """OpenSlide treats them as levels, and would read the last one."""
    path = tmp_path / "stack.svs"
    with tifffile.TiffWriter(path) as tiff:
        for page in (FIELD, FIELD[:, ::-1].copy()):
            description = "Aperio Image Library v1\n300x300 |AppMag = 40|MPP = 0.25"
            tiff.write(page, photometric="rgb", compression="lzw", description=description, metadata=None, **TILES)
    with pytest.raises(SlideError, match="holds 2 full-size pictures; save each as a file of its own"):
        peek(record(path))


def test_an_ome_tiff_with_channels_in_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.ome.tif"
    planes = np.moveaxis(FIELD, 2, 0).copy()
    tifffile.imwrite(path, planes, photometric="minisblack", metadata={"axes": "CYX"}, **TILES)
    here, away = '<TiffData IFD="0" PlaneCount="1"/>', '<UUID FileName="away.ome.tif">urn:uuid:1</UUID></TiffData>'
    text = tifffile.tiffcomment(path).replace(
        '<TiffData IFD="0" PlaneCount="3"/>', f'{here}<TiffData FirstC="1" PlaneCount="2">{away}'
    )
    tifffile.tiffcomment(path, text)
    with pytest.raises(SlideError, match="lacks pixels that are in another file.*put it beside"):
        peek(record(path, mpp=0.25))


def test_a_deep_level_below_an_8_bit_label_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "label_first.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(FIELD, tile=(128, 128), photometric="rgb", metadata=None)
        tiff.write(FIELD.astype(np.uint16), tile=(128, 128), photometric="rgb", metadata=None)
    with pytest.raises(SlideError, match="16 bits a channel"):
        peek(record(path, mpp=0.25))


@pytest.mark.parametrize("layout", [TILES, {"rowsperstrip": 64}], ids=["tiles", "strips"])
def test_a_tiff_of_several_pictures_is_refused(tmp_path: Path, layout: dict[str, Any]) -> None:
    """Levels and labels are no such pictures, but larger ones are, since the first gives the pixel size.

    OpenSlide treats a tiled picture of the same size that is marked as reduced as a level, and would read it.
    """
    path = tmp_path / "stack.tif"
    for subfiletype, size, refused in (
        (0, 300, True),
        (2, 300, True),
        (1, 300, layout is TILES),
        (0, 150, False),
        (1, 600, True),
    ):
        with tifffile.TiffWriter(path) as tiff:
            for kind, page in ((0, FIELD), (subfiletype, np.resize(FIELD, (size, size, 3)))):
                tiff.write(page, photometric="rgb", subfiletype=kind, metadata=None, **layout)
        if refused:
            with pytest.raises(SlideError, match="holds 2 full-size pictures; save each"):
                peek(record(path, mpp=0.25))
        else:
            assert peek(record(path, mpp=0.25)).warnings == ()


@pytest.mark.parametrize("kind", ["imagej", "shaped", "volume", "below", "below, larger"])
def test_several_pictures_of_one_page_are_refused(tmp_path: Path, kind: str) -> None:
    path, stack = tmp_path / "a.tif", np.stack([FIELD, 255 - FIELD, FIELD])
    if kind == "imagej":
        tifffile.imwrite(path, stack, imagej=True, truncate=True, photometric="rgb", **QUARTER_PER_CM)
    elif kind == "shaped":
        tifffile.imwrite(path, stack, truncate=True, photometric="rgb", **QUARTER_PER_CM)
    elif kind == "volume":
        tifffile.imwrite(path, stack, volumetric=True, tile=(1, 128, 128), photometric="rgb", metadata=None)
    else:
        first = FIELD[::2, ::2] if kind == "below, larger" else FIELD
        with tifffile.TiffWriter(path) as tiff:
            tiff.write(np.ascontiguousarray(first), photometric="rgb", subifds=1, metadata=None, **TILES)
            tiff.write(FIELD, photometric="rgb", metadata=None, **TILES)
    with pytest.raises(SlideError, match=f"holds {2 if 'below' in kind else 3} full-size pictures; save each"):
        peek(record(path, mpp=0.25))


def test_levels_below_the_page_are_no_pictures_of_their_own(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(FIELD, photometric="rgb", subifds=1, metadata=None, **TILES)
        tiff.write(np.ascontiguousarray(FIELD[::2, ::2]), photometric="rgb", subfiletype=1, metadata=None, **TILES)
    assert peek(record(tmp_path / "a.tif", mpp=0.25)).level0 == Size(FIELD.shape[1], FIELD.shape[0])


def test_an_ome_tiff_of_several_pictures_is_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "two.ome.tif") as tiff:
        for _ in range(2):
            tiff.write(FIELD, photometric="rgb", **TILES)
    with pytest.raises(SlideError, match="holds 2 full-size pictures"):
        peek(record(tmp_path / "two.ome.tif", mpp=0.25))


def test_one_of_several_files_of_an_ome_tiff_is_never_read_as_another(tmp_path: Path) -> None:
    """Such as bfconvert writes: each file describes the images of all."""
    files = {"slide.ome.tif": (FIELD, 0.25), "macro.ome.tif": (FIELD[:90, :120].copy(), 4.0)}
    images = "".join(
        f'<Image ID="Image:{name}"><Pixels ID="Pixels:{name}" DimensionOrder="XYCZT" Type="uint8" SizeC="3" SizeZ="1" '
        f'SizeT="1" SizeX="{pixels.shape[1]}" SizeY="{pixels.shape[0]}" PhysicalSizeX="{mpp}" PhysicalSizeY="{mpp}">'
        f'<Channel ID="Channel:{name}" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1">'
        f'<UUID FileName="{name}">urn:uuid:{name}</UUID></TiffData></Pixels></Image>'
        for name, (pixels, mpp) in files.items()
    )
    for name, (pixels, _) in files.items():
        schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
        xml = f'<?xml version="1.0"?><OME xmlns="{schema}" UUID="urn:uuid:{name}">{images}</OME>'
        written(tmp_path / name, pixels, description=xml, metadata=None, **TILES)
    assert peek(record(tmp_path / "slide.ome.tif")).mpp == Mpp(0.25, 0.25)
    with pytest.raises(SlideError, match=r"largest picture is in slide\.ome\.tif.*to a folder of its own"):
        peek(record(tmp_path / "macro.ome.tif"))
    (tmp_path / "alone").mkdir()
    with open_slide(record((tmp_path / "macro.ome.tif").rename(tmp_path / "alone" / "macro.ome.tif"))) as slide:
        assert slide.info.mpp == Mpp(4.0, 4.0)
        assert (slide.thumbnail(300) == FIELD[:90, :120]).all()


@pytest.mark.parametrize(("per_cm", "warned"), [(40_000, False), (41_000, False), (20_000, True), (28, False)])
def test_an_ome_header_that_contradicts_the_resolution_gives_a_warning(
    tmp_path: Path, per_cm: float, warned: bool
) -> None:
    stated = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    resolution = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
    path = written(tmp_path / "a.ome.tif", FIELD, metadata={"axes": "YXS", **stated}, **resolution, **TILES)
    info = peek(record(path))
    assert info.mpp == Mpp(0.25, 0.25)
    said = ("its OME header gives 0.25 µm per pixel, but its resolution tag 0.5; the former is used",)
    assert tuple(warning.split(" unless")[0] for warning in info.warnings) == said * warned


def test_an_ome_tiff_of_pictures_with_different_axes_is_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "slide.ome.tif") as tiff:
        planes = np.moveaxis(FIELD[:90, :120], 2, 0).copy()
        tiff.write(planes, photometric="minisblack", metadata={"axes": "CYX"}, **TILES)
        tiff.write(FIELD, photometric="rgb", metadata={"axes": "YXS"}, **TILES)
    with pytest.raises(SlideError, match="axes CYX and the largest YXS; save the largest"):
        peek(record(tmp_path / "slide.ome.tif", mpp=0.25))


@pytest.mark.parametrize(
    "names", [None, ["Red", "Green", "Blue"], ["R", "G", "B"], ["B", "G", "R"], ["DAPI", "x", "y"]]
)
def test_separate_channels_are_taken_for_rgb_only_by_their_names(tmp_path: Path, names: list[str] | None) -> None:
    path = tmp_path / "channels.ome.tif"
    metadata = {"axes": "CYX"} | ({"Channel": {"Name": names}} if names else {})
    tifffile.imwrite(path, np.moveaxis(FIELD, 2, 0).copy(), photometric="minisblack", metadata=metadata, **TILES)
    if names and names[0][0] != "R":
        with pytest.raises(SlideError, match=f"separate channels {', '.join(names)}; Red, Green, Blue in this order"):
            peek(record(path, mpp=0.25))
        return
    with open_slide(record(path, mpp=0.25)) as slide:
        assert (slide.thumbnail(300) == FIELD).all()
        assert ["have no names" in warning for warning in slide.info.warnings] == [True] * (names is None)


@pytest.mark.parametrize("name", ["sparse.tif", "sparse.ome.tif"])
def test_tiles_that_are_not_stored_are_not_black(tmp_path: Path, name: str) -> None:
    tiles = (None if number == 4 else FIELD[:128, :128] for number in range(9))
    tifffile.imwrite(tmp_path / name, tiles, shape=FIELD.shape, dtype=np.uint8, photometric="rgb", **TILES)
    with pytest.raises(SlideError, match="1 of its 9 tiles are not stored"):
        peek(record(tmp_path / name, mpp=0.25))


@pytest.mark.parametrize(("name", "colours"), [("ycbcr.ome.tif", "ycbcr"), ("lab.tif", "cielab")])
def test_colours_that_are_converted_wrongly_are_refused(tmp_path: Path, name: str, colours: str) -> None:
    path = tmp_path / name
    tifffile.imwrite(path, FIELD, photometric=colours, **TILES)
    with pytest.raises(SlideError, match=f"colours of type {colours.upper()}; save it as RGB"):
        peek(record(path, mpp=0.25))


def test_a_fourth_sample_is_transparency_only_if_the_file_says_so(tmp_path: Path) -> None:
    pixels, path = np.dstack([FIELD, np.zeros((300, 300), np.uint8)]), tmp_path / "four.tif"
    for extra, tagged in (("unspecified", True), ("unspecified", False), ("unassalpha", True)):
        written(path, pixels, extrasamples=[extra])
        if not tagged:
            with tifffile.TiffFile(path) as tiff:
                where = tiff.pages.first.tags["ExtraSamples"].offset
            content = bytearray(path.read_bytes())
            content[where : where + 2] = (337).to_bytes(2, "little")  # another tag, which nobody reads
            path.write_bytes(content)
        with open_slide(record(path, mpp=0.25)) as slide:
            assert (slide.thumbnail(300) == (255 if extra == "unassalpha" else FIELD)).all()
    for extras in (["unspecified"], ["unassalpha", "unspecified"]):
        many = np.dstack([pixels] + [pixels[..., :1]] * (len(extras) - 1))
        written(path, many, extrasamples=extras, **TILES)
        with pytest.raises(SlideError, match=f"{3 + len(extras)} samples a pixel.*save it as RGB"):
            peek(record(path, mpp=0.25))


def test_grey_tiles_with_transparency_are_refused(tmp_path: Path) -> None:
    """OpenSlide's libtiff shifts the rows of tiles that cross the right edge."""
    path, pixels = tmp_path / "grey.tif", np.dstack([FIELD[..., 0], np.full((300, 300), 255, np.uint8)])
    for photometric in ("minisblack", "miniswhite"):
        tifffile.imwrite(
            path, pixels, photometric=photometric, planarconfig="contig", extrasamples=["unassalpha"], **TILES
        )
        with pytest.raises(SlideError, match="grey with 2 samples a pixel; save it as RGB"):
            peek(record(path, mpp=0.25))


@pytest.mark.parametrize("layout", [TILES, {"rowsperstrip": 64}], ids=["tiles", "strips"])
@pytest.mark.parametrize("compression", ["jpeg2000", "webp", "lerc"])
def test_other_compressions_are_named_without_a_word_of_libtiff(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], layout: dict[str, Any], compression: str
) -> None:
    path = written(tmp_path / "slide.tif", compression=compression, **layout)
    with pytest.raises(SlideError, match=f"compression {compression.upper()}, .*; save it with JPEG"):
        peek(record(path, mpp=0.25))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("layout", [TILES, {"rowsperstrip": 64}], ids=["tiles", "strips"])
def test_truncated_and_empty_files_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], layout: dict[str, Any]
) -> None:
    path = written(tmp_path / "slide.tif", compression="jpeg", **layout)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SlideError, match="is truncated: it has .* bytes.*; copy it again"):
        peek(record(path, mpp=0.25))
    Image.fromarray(FIELD).save(path, compression="jpeg")  # Pillow writes the directory to the end
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(SlideError, match="is truncated: the part .* is missing; copy it again"):
        peek(record(path, mpp=0.25))
    path.write_bytes(b"")
    with pytest.raises(SlideError, match="is empty; copy it again"):
        peek(record(path, mpp=0.25))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["strips", "tiles"])
@pytest.mark.parametrize(("unit", "density"), [("CENTIMETER", 40_000), ("INCH", 101_600)])
def test_resolution_tags_are_read(tmp_path: Path, tiles: dict[str, Any], unit: str, density: int) -> None:
    path = written(tmp_path / "slide.tif", **tiles, resolution=(density, density / 2), resolutionunit=unit)
    info = peek(record(path))
    assert (info.mpp.x, info.mpp.y) == pytest.approx((0.25, 0.5)) and info.mpp_source == "file"
    with open_slide(record(path)) as slide:
        assert slide.info == info


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["strips", "tiles"])
def test_imagej_writes_its_unit_in_the_description(tmp_path: Path, tiles: dict[str, Any]) -> None:
    path = tmp_path / "imagej.tif"
    description = "ImageJ=1.53t\nunit=micron\n"
    written(path, **tiles, resolution=(4, 4), resolutionunit="NONE", description=description, metadata=None)
    assert peek(record(path)).mpp == Mpp(0.25, 0.25)


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["strips", "tiles"])
@pytest.mark.parametrize(
    ("resolution", "unit", "said"),
    [
        (72, "INCH", "resolution of 72 per inch says 352.8 µm a pixel"),
        (40, "CENTIMETER", r"250 µm a pixel.*\(0.25 µm if it is in nm\)"),
        (4, "NONE", "resolution of 4 has no unit"),
    ],
)
def test_refused_tags_are_quoted(tmp_path: Path, tiles: dict[str, Any], resolution: int, unit: str, said: str) -> None:
    path = written(tmp_path / "slide.tif", **tiles, resolution=(resolution, resolution), resolutionunit=unit)
    with pytest.raises(InputError, match=f"slide.tif: .*{said}.*column mpp.*row 7"):
        peek(record(path))
    assert peek(record(path, mpp=0.25)).mpp == Mpp(0.25, 0.25)


@pytest.mark.parametrize(
    ("mpp", "said"),
    [
        ("250", r"250 µm.*\(0.25 µm if it is in nm\)"),
        ("0.00025", r"0.25 µm if it is in mm"),
        ("a quarter", "a quarter"),
    ],
)
def test_refused_values_of_aperio_are_quoted(tmp_path: Path, mpp: str, said: str) -> None:
    text = f"Aperio Image Library v1\n300x300 [0,0 300x300] (128x128)|AppMag = 40|MPP = {mpp}"
    path = written(tmp_path / "slide.svs", **TILES, description=text, metadata=None)
    with pytest.raises(InputError, match=f"{said}.*column mpp"):
        peek(record(path))


def test_a_size_of_0_was_not_recorded(tmp_path: Path) -> None:
    """Some Philips exports have it."""

    def objects(name: str, kind: str, content: str) -> str:
        array = f'<Array><DataObject ObjectType="{kind}">{content}</DataObject></Array>'
        return f'<Attribute Name="{name}">{array}</Attribute>'

    spacing = '<Attribute Name="DICOM_PIXEL_SPACING">&quot;0&quot; &quot;0&quot;</Attribute>'
    level = objects("PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", "PixelDataRepresentation", spacing)
    scan = f'{spacing}<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>{level}'
    scans = objects("PIM_DP_SCANNED_IMAGES", "DPScannedImage", scan)
    text = f'<?xml version="1.0"?><DataObject ObjectType="DPUfsImport">{spacing}{scans}</DataObject>'
    path = written(tmp_path / "slide.tiff", **TILES, software="Philips DP v1.0", description=text, metadata=None)
    with pytest.raises(
        InputError, match="header says 0 µm a pixel; the true pixel size was not recorded; give it in µm"
    ):
        peek(record(path))


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["strips", "tiles"])
def test_palettes_of_8_bits_are_refused(
    tmp_path: Path, tiles: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Pillow would make them black; libtiff guesses right, and warns on stderr for each tile."""
    colours = np.stack([np.arange(256, dtype=np.uint16)] * 3)
    paths = [tmp_path / "16.tif", tmp_path / "8.tif"]
    for path, colourmap in zip(paths, (colours * 257, colours), strict=True):
        tifffile.imwrite(path, FIELD[..., 0], photometric="palette", colormap=colourmap, **tiles)
    with open_slide(record(paths[0], mpp=0.25)) as reader:
        assert np.array_equal(
            reader.read(Size(300, 300).box, Grid.over(Size(300, 300), Mpp(0.25, 0.25), 0.25))[..., 0], FIELD[..., 0]
        )
    with pytest.raises(SlideError, match=r"palette .* 16.*; save it as RGB"):
        peek(record(paths[1], mpp=0.25))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("described", "warned"), [("300x300", False), ("600x600", True), ("600x900", False)])
def test_a_reduced_slide_with_the_header_of_the_scan_is_warned_of(tmp_path: Path, described: str, warned: bool) -> None:
    text = f"Aperio Image Library v1\n{described} [0,0 {described}] (128x128)|AppMag = 40|MPP = 0.25"
    info = peek(record(written(tmp_path / "slide.svs", **TILES, description=text, metadata=None)))
    assert ["300 × 300 pixels, but its header describes" in w for w in info.warnings] == [True] * warned


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"PhysicalSizeX": 250.0, "PhysicalSizeY": 250.0}, "250 µm.*in nm"),
        ({"PhysicalSizeX": 1.0, "PhysicalSizeXUnit": "pixel", "PhysicalSizeY": 1.0}, "1.0 pixel a pixel, an unknown"),
    ],
)
def test_refused_values_of_ome_are_quoted(tmp_path: Path, sizes: dict[str, Any], said: str) -> None:
    path = written(tmp_path / "slide.ome.tif", **TILES, metadata={"axes": "YXS", **sizes})
    with pytest.raises(InputError, match=f"{said}.*column mpp"):
        peek(record(path))


def test_the_objective_of_an_ome_tiff_is_that_of_its_image(tmp_path: Path) -> None:
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    path = written(tmp_path / "slide.ome.tif", **TILES, metadata={"axes": "YXS", **sizes})
    objectives = "".join(
        f'<Objective ID="Objective:{i}" NominalMagnification="{power}"/>' for i, power in enumerate((4, 40))
    )
    xml = str(tifffile.tiffcomment(path)).replace(
        "<Image ", f'<Instrument ID="Instrument:0">{objectives}</Instrument><Image '
    )
    xml = xml.replace("<Pixels ", '<ObjectiveSettings ID="Objective:1"/><Pixels ')
    tifffile.tiffcomment(path, xml.encode())
    assert peek(record(path)).magnification == 40


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_the_resolution_of_png_and_jpeg_is_quoted_but_not_taken(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tile.{suffix}"
    Image.fromarray(FIELD).save(path, dpi=(50800, 50800))
    with pytest.raises(InputError, match="0.5 µm a pixel, which is ignored.*column mpp"):
        peek(record(path))


def test_a_large_picture_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (400, 300)).save(path)
    assert peek(record(path, mpp=0.25)).warnings == ()
    monkeypatch.setattr(headers, "LARGE_PICTURE_PIXELS", 100_000)
    (warning,) = peek(record(path, mpp=0.25)).warnings
    assert warning.startswith("a plain picture is held in memory as a whole")


def test_the_memory_of_a_picture_is_as_told(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("RGB", (6000, 5000), (200, 100, 180)).save(path, compress_level=1)
    code = f"""
import resource
from pathlib import Path
from hover_batch.slide.formats import PICTURE_BYTES
from hover_batch.slide.sources import PictureSource
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak()
source = PictureSource(Path({str(path)!r}))
assert (source._pixels[::1000, ::1000] == (200, 100, 180)).all()
print((peak() - before) / 30e6 <= PICTURE_BYTES[1] + 0.7, (peak() - before) / 30e6)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True"), done.stdout


def test_formats_that_no_library_reads_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "slide.czi").write_bytes(b"ZISRAWFILE".ljust(600, b"\0"))
    with pytest.raises(SlideError, match=r"slide\.czi: cannot be read: .*; convert it to an OME-TIFF") as caught:
        peek(SlideRecord("s", tmp_path / "slide.czi", 2))
    assert "\n" not in str(caught.value)
