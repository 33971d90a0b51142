"""Files with bytes changed at random are refused in one line, or are what they were; nothing in them is executed."""

import copy
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from tally import campaign
from tiny_runs import stopped_by_signal, tiny_run
from tiny_vit import make_tiny_vit

from mosa_fast import MoSAConfig, adapt, load_adapter, save_adapter
from mosa_fast.adapters.adapter_file import trained_state
from mosa_fast.run_folder import RunFolder
from mosa_fast.training import loop
from mosa_fast.training.checkpoint import Checkpoints

SEED = 15
MANY = [60, pytest.param(1000, marks=pytest.mark.slow)]


def mutated(dice, content):
    """Some bytes changed, cut off, doubled or put in."""
    content = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        place = dice.randrange(len(content))
        way = dice.choice(("flip", "flip", "byte", "byte", "cut", "insert", "double", "zero"))
        if way == "flip":
            content[place] ^= 1 << dice.randrange(8)
        elif way == "byte":
            content[place] = dice.randrange(256)
        elif way == "cut":
            del content[max(1, place) :]
        elif way == "insert":
            content[place:place] = dice.randbytes(dice.randint(1, 9))
        elif way == "double":
            content[place:place] = content[place : place + 64]
        else:
            content[place : place + 16] = bytes(len(content[place : place + 16]))
    return bytes(content)


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[k].nan_to_num(), second[k].nan_to_num()) for k in first
    )


@pytest.mark.parametrize("files", MANY)
def test_adapter_files(tmp_path, files):
    plain, path = make_tiny_vit(), tmp_path / "a.safetensors"
    model = adapt(copy.deepcopy(plain), MoSAConfig(bottleneck=2))
    save_adapter(model, path)
    content, expected, dice = path.read_bytes(), trained_state(model), random.Random(SEED)
    with campaign("adapter files, mutated", SEED, record=files > 100) as tally:
        for index in range(files):
            path.write_bytes(mutated(dice, content))
            try:
                found = trained_state(load_adapter(copy.deepcopy(plain), path))
            except ValueError as error:
                tally.add(None if "\n" not in str(error) else f"file {index}: several lines", refused=1)
            except Exception as error:
                tally.add(f"file {index}: {type(error).__name__}: {error}")
            else:
                tally.add(None if equal(found, expected) else f"file {index}: other values", equal=1)


@pytest.mark.parametrize("files", MANY)
def test_checkpoint_files(tmp_path, monkeypatch, files):
    """Either file of a checkpoint: it is refused, or the run goes on from the very same weights and state."""
    stopped_by_signal(tmp_path, monkeypatch, signal.SIGTERM, 4)
    folder, loaded = RunFolder(tmp_path), []

    class Looked(Exception):
        """The checkpoint is loaded, and that is enough."""

    original = Checkpoints.load

    def load(checkpoints, step):
        original(checkpoints, step)
        state = {name: part.state_dict() for name, part in checkpoints.parts.items() if name != "position"}
        loaded.append((trained_state(checkpoints.model), repr(state)))
        raise Looked

    monkeypatch.setattr(Checkpoints, "load", load)
    monkeypatch.setattr(loop, "load_run_data", cached(loop.load_run_data))

    def resume():
        with pytest.raises(Looked):
            loop.train(tiny_run(tmp_path), progress=False, resume=True)
        return loaded.pop()

    weights, state = resume()
    dice = random.Random(SEED)
    with campaign("checkpoint files, mutated", SEED, record=files > 100) as tally:
        for index in range(files):
            path = dice.choice((folder.checkpoint(4), folder.checkpoint_weights(4)))
            content = path.read_bytes()
            path.write_bytes(mutated(dice, content))
            try:
                found, found_state = resume()
            except ValueError as error:
                tally.add(None if "\n" not in str(error) else f"file {index}: several lines", refused=1)
            except BaseException as error:
                tally.add(f"file {index}: {type(error).__name__}: {error}")
            else:
                same = equal(found, weights) and found_state == state
                tally.add(None if same else f"file {index}, {path.name}: other values", equal=1)
            path.write_bytes(content)


def cached(load):
    kept = []

    def again(*arguments):
        if not kept:
            kept.append(load(*arguments))
        return kept[0]

    return again


class Executed:
    """What a file must not get to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_a_checkpoint_would_execute_is_refused(tmp_path, monkeypatch):
    checkpoint = stopped_by_signal(tmp_path / "run", monkeypatch, signal.SIGTERM, 4)
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"state": Executed(tmp_path / "executed")}, checkpoint)
    with pytest.raises(ValueError, match="cannot be read"):
        loop.train(tiny_run(tmp_path / "run"), progress=False, resume=True)
    assert not (tmp_path / "executed").exists()
