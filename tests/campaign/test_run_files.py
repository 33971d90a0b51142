"""The text files of a finished run, with bytes changed: every command ends well or with one line, and never hangs."""

import random

import numpy as np
import pytest
from finished_runs import short_run
from PIL import Image
from tally import campaign
from test_configurations import outcome
from test_files import mutated

from mosa_fast import predict, train
from mosa_fast.sweeps.records import Records

SEED = 15
FIELDS = (
    b'{"recipe": "a/b", "options": ["--optim.lr=1"], "seed": 1, "search": false, "commit": "abc", "test_accuracy": 5}\n'
)


@pytest.mark.parametrize("files", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_files_of_a_run(tmp_path, capsys, files):
    folder, image = short_run(tmp_path / "run"), tmp_path / "a.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image)
    again = ["--config", str(folder.config), "--resume", f"--out={folder}"]
    kinds = {
        folder.config: (predict.main, [f"--run={folder}", "--workers=0", str(image)]),
        folder.classes: (predict.main, [f"--run={folder}", "--workers=0", str(image)]),
        folder.summary: (train.main, again),
    }
    contents, dice = {path: path.read_bytes() for path in kinds}, random.Random(SEED)
    with campaign("files of a run, mutated", SEED, record=files > 100) as tally:
        for index in range(files):
            path = list(kinds)[index % len(kinds)]
            command, words = kinds[path]
            path.write_bytes(mutated(dice, contents[path]))
            before = path.read_bytes()
            trouble, code = outcome(words, capsys, command)
            tally.add(None if trouble is None else f"{path.name}, {index}: {trouble}", ended_well=int(code == 0))
            assert path.read_bytes() == before
            path.write_bytes(contents[path])


@pytest.mark.parametrize("files", [1000, pytest.param(5000, marks=pytest.mark.slow)])
def test_records_of_a_sweep(tmp_path, files):
    path, dice = tmp_path / "records.jsonl", random.Random(SEED)
    with campaign("records of a sweep, mutated", SEED, record=files > 1000) as tally:
        for index in range(files):
            path.write_bytes(mutated(dice, FIELDS * 2))
            try:
                Records(path)
                trouble = None
            except ValueError as error:
                trouble = None if "records.jsonl, line " in str(error) else f"{index}: {error}"
            except Exception as error:
                trouble = f"{index}: {type(error).__name__}: {error}"
            tally.add(trouble)
