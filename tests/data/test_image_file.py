import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mosa_fast.config import DataConfig
from mosa_fast.data import class_count, load_data
from mosa_fast.data.image_file import find_files, image_size, read_image
from mosa_fast.data.loading import UNREADABLE
from mosa_fast.data.memory import cache_decoded

DICE = np.random.default_rng(0)
GREY = DICE.integers(0, 256, (6, 4), dtype=np.uint8)
COLOURS = DICE.integers(0, 256, (6, 4, 3), dtype=np.uint8)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_keeps_its_range(tmp_path, suffix):
    wide = (GREY.astype(np.uint16) * 257)[..., None].repeat(3, -1)
    path = tmp_path / f"wide.{suffix}"
    Image.fromarray(wide[..., 0]).save(path)
    np.testing.assert_array_equal(pixels(read_image(path)), wide // 257)
    for step, more in ((128, 0), (129, 1)):  # rounded to the nearest of eight bits
        Image.fromarray(np.minimum(wide[..., 0].astype(np.int64) + step, 65535).astype(np.uint16)).save(path)
        np.testing.assert_array_equal(pixels(read_image(path)), np.minimum(wide // 257 + more, 255))


def test_numbers_of_unknown_range_are_refused(tmp_path):
    for name, values in (("float", GREY.astype(np.float32)), ("int", GREY.astype(np.int32) * 1000000)):
        path = tmp_path / f"{name}.tif"
        Image.fromarray(values).save(path)
        with pytest.raises(ValueError, match="no known range: convert them to 8 or 16 bits"):
            read_image(path)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_turns_an_image_and_its_size(tmp_path, orientation):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(pixels(read_image(path)), expected)
    assert image_size(path) == read_image(path).size == expected.shape[1::-1]
    if orientation == 6:  # the camera was held so that the picture must be turned right by 90 degrees
        np.testing.assert_array_equal(expected, np.rot90(COLOURS, -1))


def test_odd_exif_beside_the_orientation_is_passed_over(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    text = exif.tobytes()
    place = text.index(b"\x01\x0e\x00\x02") if b"MM\x00*" in text else text.index(b"\x0e\x01\x02\x00")
    kind = place + (3 if b"MM\x00*" in text else 2)
    count = slice(place + 4, place + 8)
    odd = bytearray(text)
    odd[kind] = 5  # text that says it is a fraction
    odd[count] = (1).to_bytes(4, "big" if b"MM\x00*" in text else "little")
    Image.fromarray(COLOURS).save(tmp_path / "odd.jpg", exif=bytes(odd))
    with Image.open(tmp_path / "odd.jpg") as image, pytest.raises((AttributeError, TypeError)):
        ImageOps.exif_transpose(image)
    assert read_image(tmp_path / "odd.jpg").size == (6, 4)


def test_damaged_exif_makes_no_image_unreadable(tmp_path):
    path = tmp_path / "damaged.png"
    Image.fromarray(COLOURS).save(path, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    np.testing.assert_array_equal(pixels(read_image(path)), COLOURS)


def test_alpha_is_left_out_and_palettes_are_looked_up(tmp_path):
    alpha = np.concatenate([COLOURS, DICE.integers(0, 256, (6, 4, 1), dtype=np.uint8)], -1)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(pixels(read_image(tmp_path / "alpha.png")), COLOURS)
    palette = Image.fromarray(COLOURS).quantize(24)
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    np.testing.assert_array_equal(pixels(read_image(tmp_path / "palette.png")), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_the_first_picture_of_an_animation_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    red, green, blue = pixels(read_image(tmp_path / f"moving.{suffix}")).reshape(-1, 3).mean(0)
    assert red > 250
    assert green < 5
    assert blue < 5


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = pixels(read_image(tmp_path / "print.jpg")).reshape(-1, 3).mean(0)
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UNREADABLE, match="not a regular file"):
        read_image(tmp_path / "pipe.jpg")
    assert list(find_files(tmp_path)) == [tmp_path / "pipe.jpg"]  # so that it is named, and not left out in silence


@pytest.mark.timeout(20)
def test_links_are_followed_but_not_in_circles(tmp_path):
    for name in ("b.png", "a.png", ".hidden.png", "inner/c.png", ".thumbnails/d.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLOURS).save(tmp_path / "images" / name)
    (tmp_path / "images" / "inner" / "back").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "inner" / "self").symlink_to(tmp_path / "images" / "inner")
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    names = [path.relative_to(tmp_path / "linked").as_posix() for path in find_files(tmp_path / "linked")]
    assert names == ["a.png", "b.png", "inner/c.png"]


def write_folder(root):
    """Two classes of 16-bit grey, sideways and animated images in train and test."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for part in ("train", "test"):
        for label in ("a", "b"):
            folder = root / part / label
            folder.mkdir(parents=True)
            Image.fromarray(DICE.integers(0, 65536, (24, 20), dtype=np.uint16)).save(folder / "wide.png")
            for name in ("one.png", "two.png"):
                turned = Image.fromarray(DICE.integers(0, 256, (24, 20, 3), dtype=np.uint8))
                turned.save(folder / name, exif=exif)
            Image.fromarray(DICE.integers(0, 256, (24, 20), dtype=np.uint8)).save(folder / "moving.gif")
    return root


def test_training_sees_what_read_image_gives_cached_or_not(tmp_path):
    config = DataConfig(name="folder", root=str(write_folder(tmp_path)), val_fraction=0.25)
    plain, cached = (load_data(config, 16, 0) for _ in range(2))
    assert len(plain.train) == 6
    assert len(plain.test) == 8
    cache_decoded(cached.val, cached.test)
    for name in ("val", "test"):
        one, other = getattr(plain, name), getattr(cached, name)
        for index, (path, _) in enumerate(one.samples):
            expected = one.transform(read_image(path))
            assert torch.equal(one[index][0], expected)
            assert torch.equal(other[index][0], expected)


def test_files_that_are_no_images_by_name_are_mentioned(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "a" / "notes.txt").write_text("hello")
    (tmp_path / "train" / "b" / "photo.heic").write_bytes(b"")
    (tmp_path / "train" / "b" / ".DS_Store").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out, .* not those of images: .*notes\.txt and 1 more"):
        load_data(DataConfig(name="folder", root=str(tmp_path), val_fraction=0.25), 16, 0)


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_folders_that_are_no_classes_are_not_counted(tmp_path, target):
    root = write_folder(tmp_path / "data")
    (root / "train" / ".thumbnails").mkdir()
    (root / "train" / "again").symlink_to(target)
    config = DataConfig(name="folder", root=str(root), val_fraction=0.25)
    assert load_data(config, 16, 0).classes == ["a", "b"]
    assert class_count(config) == 2
