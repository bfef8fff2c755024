"""Images of all kinds of pixels: what Detectron2 reads well stays as it is, deep grey images keep their contrast."""

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import detection_utils as utils
from PIL import Image

from kd_det import add_kd_config
from kd_det.classification.image_mapper import ClassificationMapper
from kd_det.data import DetectionMapper, images
from kd_det.data.images import image_size, read_image
from kd_det.engine.pictures import draw_classifications
from kd_det.errors import InputError

# Values of 8 bits, in rows.
GREY = np.tile(np.arange(256, dtype=np.uint8), (20, 1))
WIDE = GREY.astype(np.uint16)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
ORIENTATION = 274


@pytest.fixture(autouse=True)
def _nothing_reported(monkeypatch):
    monkeypatch.setattr(images, "_warned", set())


def big_endian(path):
    Image.frombytes("I;16B", (256, 20), (WIDE * 257).astype(">u2").tobytes()).save(path)


def portable_grey_map(path):
    path.write_bytes(b"P5 256 20 4095\n" + (WIDE * 16).astype(">u2").tobytes())


def array(pixels):
    return lambda path: Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("name", "write"),
    {
        "16 bits.png": array(WIDE * 257),
        "16 bits.tif": array(WIDE * 257),
        "big endian.tif": big_endian,
        "14 bits.png": array(WIDE * 64),
        "12 bits.png": array(WIDE * 16),
        "12 bits.tiff": array(WIDE * 16),
        "12 bits.pgm": portable_grey_map,
        "10 bits.png": array(WIDE * 4),
        "8 bits in 16.png": array(WIDE),
        "32 bits.tif": array(WIDE.astype(np.int32) * 100_000),
        "with negative values.tif": array(WIDE.astype(np.int32) - 100),
        "floats up to 1.tif": array(GREY.astype(np.float32) / 255),
        "floats up to 255.tif": array(GREY.astype(np.float32)),
        "large floats.tif": array(GREY.astype(np.float32) * 1e6),
    }.items(),
)
@pytest.mark.parametrize("image_format", ["BGR", "L"])
def test_deep_grey_images_keep_their_contrast(tmp_path, name, write, image_format):
    write(tmp_path / name)
    found = read_image(str(tmp_path / name), image_format)
    assert (found.dtype, found.shape) == (np.uint8, (20, 256, 1 if image_format == "L" else 3))
    assert np.abs(found[..., 0].astype(int) - GREY).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_a_dark_image_stays_dark(tmp_path, bits):
    """The bit depth decides, not the largest value."""
    Image.fromarray(WIDE // 2 * 257 if bits == 16 else WIDE // 2).save(tmp_path / "dark.png")
    assert np.array_equal(read_image(str(tmp_path / "dark.png"), "L")[..., 0], GREY // 2)


def test_pixels_that_are_not_a_number(tmp_path):
    values = GREY.astype(np.float32)
    values[0, 9] = np.nan
    array(values)(tmp_path / "a.tif")
    assert read_image(str(tmp_path / "a.tif"), "L")[:2, 9, 0].tolist() == [0, 9]
    array(np.full_like(values, np.nan))(tmp_path / "b.tif")
    with pytest.raises(InputError, match=r"b.tif: not an image that can be read: no pixel has a finite value"):
        read_image(str(tmp_path / "b.tif"), "L")


def test_deep_images_are_turned(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(WIDE * 257).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(str(tmp_path / "a.png"), "L")[..., 0], np.rot90(GREY, -1))
    assert image_size(str(tmp_path / "a.png")) == (20, 256)


def test_scaling_is_reported_once_per_type_of_pixel(tmp_path, caplog):
    for name, pixels in {"a.png": WIDE, "b.png": WIDE, "c.tif": GREY.astype(np.float32)}.items():
        array(pixels)(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        for name in ("a.png", "b.png", "c.tif", "a.png"):
            read_image(str(tmp_path / name), "RGB")
    assert [record.args for record in caplog.records] == [
        (str(tmp_path / "a.png"), "I;16"),
        (str(tmp_path / "c.tif"), "F"),
    ]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp"])
def test_other_images_are_read_as_by_detectron2(tmp_path, mode, suffix):
    path = str(tmp_path / f"a.{suffix}")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    try:
        NOISE.convert(mode).save(path, **({} if suffix in ("gif", "bmp") else {"exif": exif}))
    except (OSError, ValueError):
        pytest.skip("no such files")
    for image_format in ("BGR", "RGB", "L", "YUV-BT.601"):
        found = read_image(path, image_format)
        assert np.array_equal(found, utils.read_image(path, image_format))
        assert image_size(path) == (found.shape[1], found.shape[0])


def test_sixteen_bits_per_colour(tmp_path):
    colours = np.asarray(NOISE).astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "a.png"), colours)
    assert np.array_equal(read_image(str(tmp_path / "a.png"), "BGR"), np.asarray(NOISE))


@pytest.mark.parametrize("function", [lambda path: read_image(path, "RGB"), image_size])
def test_files_that_are_no_images(tmp_path, function):
    (tmp_path / "a.png").write_text("<html>")
    for name, message in {"a.png": "cannot identify image file", "b.png": "No such file"}.items():
        with pytest.raises(
            InputError, match=f"^{tmp_path}/{name}: not an image that can be read: .*{message}"
        ) as error:
            function(str(tmp_path / name))
        assert images.EIGHT_BITS not in str(error.value)


# ---- Who reads images ----
@pytest.fixture
def cfg16(tmp_path):
    """A config whose images stay as they are, and the dict of an image of 16 bits."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.FORMAT = 0, "RGB"
    cfg.INPUT.CLASSIFICATION.SIZE = 256
    Image.fromarray(np.tile(WIDE[:1] * 257, (256, 1))).save(tmp_path / "a.png")
    return cfg, {"file_name": str(tmp_path / "a.png"), "label": 0, "annotations": []}


@pytest.mark.parametrize("mapper", [DetectionMapper, ClassificationMapper])
@pytest.mark.parametrize("path", [str, Path])
def test_mappers(cfg16, mapper, path):
    cfg, record = cfg16
    record["file_name"] = path(record["file_name"])
    found = mapper(cfg, is_train=False)(record)
    assert np.abs(found["image"][0].numpy().astype(int) - GREY[:1]).max() <= 1
    assert found["file_name"] == record["file_name"]


def test_pictures(cfg16):
    figure = draw_classifications([cfg16[1]], ["cat"], {})
    assert np.array_equal(figure.axes[0].images[0].get_array()[0, :, 0], GREY[0])


def test_errors_of_the_mapper_name_the_file(cfg16):
    cfg, record = cfg16
    with pytest.raises(InputError, match=r"image [^:]*/a.png, got \(256, 256\), expect \(9, 9\)"):
        DetectionMapper(cfg, is_train=True)(record | {"width": 9, "height": 9})
    cfg.MODEL.MASK_ON = True
    box = {"bbox": [0, 0, 9, 9], "bbox_mode": 0, "category_id": 0}
    with pytest.raises(InputError, match=r"^/.*/a.png: an annotation has no segmentation"):
        DetectionMapper(cfg, is_train=True)(record | {"annotations": [box]})
