import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import free_port, in_child, run_ranks, tiny_run, wait_for

from mosa_fast.config import MoSAConfig, OptimConfig
from mosa_fast.data.step_sampler import rank_slice
from mosa_fast.run_folder import RunFolder
from mosa_fast.run_lock import lock_folder
from mosa_fast.training.distributed import join_ranks
from mosa_fast.training.folder_state import finished_summary
from mosa_fast.training.loop import train


def numbers(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("world", "batch", "accumulate", "form"), [(2, 4, 2, "mlp"), (3, 3, 1, "branch")])
def test_ranks_compute_what_one_process_with_the_whole_batch_would(tmp_path, world, batch, accumulate, form):
    """20 images: the last step has 4 in the first case, 2 in the second, where one of the three ranks has none."""
    adapter = MoSAConfig(bottleneck=4, form=form)

    def optim(size, parts=1):
        return OptimConfig(lr=1e-3, epochs=2, warmup_epochs=0, batch_size=size, accumulate=parts)

    train(tiny_run(tmp_path / "one", optim=optim(world * batch), adapter=adapter), progress=False)
    many = tiny_run(tmp_path / "many", optim=optim(batch, accumulate), adapter=adapter)
    assert run_ranks(world, many) == [0] * world

    for one, many in zip(numbers(tmp_path / "one"), numbers(tmp_path / "many"), strict=True):
        assert many["train_loss"] == pytest.approx(one["train_loss"], abs=1e-6)
        assert many["train_accuracy"] == one["train_accuracy"]
        assert many["val_accuracy"] == one["val_accuracy"]
    expected = load_file(tmp_path / "one" / "adapter.safetensors")
    found = load_file(tmp_path / "many" / "adapter.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


def test_one_rank_holds_the_folder_and_all_are_refused_in_one_line(tmp_path):
    """Nobody waits for a rank that has left."""
    optim = OptimConfig(lr=1e-3, epochs=1, warmup_epochs=0, batch_size=4)
    with lock_folder(RunFolder(tmp_path / "run")):
        assert run_ranks(2, tiny_run(tmp_path / "run", optim=optim), main=True) == [2, 2]
    assert run_ranks(2, tiny_run(tmp_path / "run", optim=optim)) == [0, 0]
    assert not RunFolder(tmp_path / "run").lock.exists()
    assert run_ranks(2, tiny_run(tmp_path / "run", optim=optim), main=True) == [2, 2]  # it is finished


def test_the_first_rank_says_for_all_what_is_in_the_folder(tmp_path, monkeypatch):
    """On a folder that machines share, another rank may not see yet what the first one sees."""
    config = tiny_run(tmp_path, optim=OptimConfig(lr=1e-3, epochs=1, warmup_epochs=0, batch_size=8), test=False)
    train(config, progress=False)
    summary = RunFolder(tmp_path).summary
    before = summary.stat().st_mtime_ns

    def seen(folder, config, *, resume):
        return None if os.environ["RANK"] == "1" else finished_summary(folder, config, resume=resume)

    monkeypatch.setattr("mosa_fast.training.loop.finished_summary", seen)
    assert run_ranks(2, config, resume=True) == [0, 0]
    assert summary.stat().st_mtime_ns == before


class Unsendable(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


@pytest.mark.parametrize(
    ("error", "in_others", "message"),
    [
        (FileNotFoundError(2, "No such file", "here"), OSError, r"\[Errno 2\] No such file: 'here'"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "no reason"), ValueError, "no reason"),
        (KeyError("lr"), RuntimeError, "the first process: KeyError: 'lr'"),
        (Unsendable(1, 2), RuntimeError, "the first process: Unsendable: 1 and 2"),
    ],
)
def test_whatever_the_first_process_raises_the_others_raise_too(error, in_others, message):
    """Nobody waits for a process that has left, and the first one's error is its own."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}

    def fail():
        raise error

    def work(rank):
        os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
        with join_ranks("cpu") as ranks, pytest.raises(Exception, match=message if rank else "") as raised:
            ranks.from_first(fail)
        assert raised.type is in_others if rank else raised.value is error

    children = [in_child(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [wait_for(child) for child in children] == [0, 0]


def test_slices_are_contiguous_and_complete():
    for samples in (0, 1, 5, 8):
        slices = [rank_slice(samples, rank, 3) for rank in range(3)]
        assert [i for first, last in slices for i in range(first, last)] == list(range(samples))
        sizes = [last - first for first, last in slices]
        assert max(sizes) - min(sizes) <= 1


DYING = """
import os, signal, sys
from mosa_fast.train import main
from mosa_fast.training.step import TrainStep
advance = TrainStep.advance
def die(step):
    advance(step)
    if step.ranks.rank == 1 and step.position.steps == 2:
        os.kill(os.getpid(), signal.SIGKILL)
TrainStep.advance = die
main(sys.argv[1:])
"""


def test_under_torchrun_a_rank_that_dies_ends_the_run_with_an_error(tmp_path):
    (tmp_path / "script.py").write_text(DYING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    command += ["--model.name=test_vit", "--model.pretrained=false", "--data.shots=2", "--data.image_size=32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--optim.batch_size=4", "--tensorboard=false", "--out=run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode not in (0, 2)
    assert not (tmp_path / "run" / "summary.json").exists()
