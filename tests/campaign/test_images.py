"""Folders of images, and image files, as they should not be: read, or refused in one line; nothing hangs."""

import io
import os
import random
import shutil

import numpy as np
import pytest
from PIL import Image
from tally import campaign
from test_configurations import outcome
from test_files import mutated

from mosa_fast.data.image_file import UNREADABLE, image_size, read_image

SEED = 15
FORMATS = {"png": {}, "jpg": {}, "gif": {}, "webp": {}, "tif": {}, "bmp": {}, "ppm": {}}
RUN = [
    *("--model.name=test_vit", "--model.pretrained=false", "--data.image_size=32", "--tensorboard=false"),
    *("--data.name=folder", "--data.root=data", "--data.workers=0", "--optim.epochs=1", "--optim.batch_size=8"),
    *("--adapter.bottleneck=4", "--out=run", "--overwrite"),
]


def picture(dice, size=(24, 20)):
    pixels = np.frombuffer(dice.randbytes(3 * size[0] * size[1]), np.uint8).reshape(size[1], size[0], 3)
    return Image.fromarray(pixels)


def write_folder(dice, root):
    for part, count in (("train", 4), ("val", 1), ("test", 1)):
        for label in ("a", "b", "c"):
            (root / part / label).mkdir(parents=True)
            for index in range(count):
                picture(dice).save(root / part / label / f"{index}.{dice.choice(list(FORMATS))}")


def damage(dice, root):
    """One thing that happens to folders."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    folders = sorted(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())
    if not files or not folders:
        return
    file, folder = dice.choice(files), dice.choice(folders)
    way = dice.choice(("bytes", "empty", "remove", "folder", "link", "circle", "pipe", "name", "text", "file", "moved"))
    if way == "bytes":
        file.write_bytes(mutated(dice, file.read_bytes() or b"?"))
    elif way == "empty":
        file.write_bytes(b"")
    elif way == "remove":
        file.unlink()
    elif way == "folder":
        shutil.rmtree(folder)
    elif way == "link":
        file.unlink()
        file.symlink_to(dice.choice(("nothing", file.name, str(root), dice.choice(files))))
    elif way == "circle":
        (folder / f"again{dice.random()}").symlink_to(dice.choice((".", "..", "../..", root.resolve())))
    elif way == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif way == "name":
        odd = dice.choice((b"\xff\xfe.png", b"new\nline.jpg", b" .gif", b".hidden.png", b"A.PNG", b"no suffix"))
        os.rename(file, os.path.join(os.fsencode(file.parent), odd))
    elif way == "text":
        (folder / "notes.txt").write_text("not an image")
    elif way == "file":
        (folder / "more").mkdir(exist_ok=True)
        (folder / "more" / "deep.png").write_bytes(file.read_bytes())
    else:
        os.rename(folder, folder.with_name(f"{folder.name} {dice.choice(('', chr(0x2028), chr(0xE4)))}x"))


@pytest.mark.parametrize("folders", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_on_a_damaged_folder_ends_well_or_with_one_line(tmp_path, monkeypatch, capsys, folders):
    monkeypatch.chdir(tmp_path)
    dice = random.Random(SEED)
    with campaign("data folders, mutated", SEED, record=folders > 100) as tally:
        for index in range(folders):
            shutil.rmtree("data", ignore_errors=True)
            write_folder(dice, tmp_path / "data")
            for _ in range(dice.choice((1, 1, 2, 4))):
                damage(dice, tmp_path / "data")
            trouble, code = outcome([*RUN, f"--loader.corrupt={dice.choice(('fatal', 'skip'))}"], capsys)
            tally.add(None if trouble is None else f"folder {index}: {trouble}", ended_well=int(code == 0))


@pytest.mark.parametrize("files", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_damaged_image_is_read_or_refused(tmp_path, files):
    dice = random.Random(SEED)
    with campaign("image files, mutated", SEED, record=files > 200) as tally:
        for index in range(files):
            suffix = dice.choice(list(FORMATS))
            stream = io.BytesIO()
            picture(dice).save(stream, Image.registered_extensions()[f".{suffix}"])
            path = tmp_path / f"a.{suffix}"
            path.write_bytes(mutated(dice, stream.getvalue()))
            trouble, refused = None, 0
            try:
                width, height = image_size(path)
                image = read_image(path)
                if image.mode != "RGB" or image.size != (width, height):
                    trouble = f"{image.mode} of {image.size}, the header says {(width, height)}"
            except UNREADABLE:
                refused = 1
            except BaseException as error:
                trouble = f"{type(error).__name__}: {error}"
            tally.add(trouble and f"file {index}, {suffix}: {trouble}", refused=refused)
