"""Runs small enough to be killed many times: a ViT of 5 tokens on 20 digits."""

import json
import os
import signal
import socket
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file

from mosa_fast.command_line import one_line_errors
from mosa_fast.config import DataConfig, ModelConfig, MoSAConfig, OptimConfig, TrainConfig
from mosa_fast.training.evaluation import Scores
from mosa_fast.training.loop import train
from mosa_fast.training.signals import Interrupted
from mosa_fast.training.step import TrainStep


def tiny_run(out, **changes) -> TrainConfig:
    """3 epochs of 3 steps (the last of them smaller), in about a second."""
    settings = {
        "data": DataConfig(shots=2, image_size=32),
        "model": ModelConfig(name="test_vit", pretrained=False),
        "adapter": MoSAConfig(bottleneck=4),
        "optim": OptimConfig(lr=5e-3, epochs=3, warmup_epochs=0, batch_size=8),
        "tensorboard": False,
        "out": str(out),
    }
    return TrainConfig(**settings | changes)


def stub_evaluate(accuracies):
    """Stands in for the evaluation: the next of these accuracies each time."""

    def evaluate(*_, confusion=False):
        return Scores(next(accuracies), loss=1.0)

    return evaluate


def in_child(function) -> int:
    """Start a process that runs the function; its id. It ends with 0, with SystemExit's code, or with 1."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # a forked process cannot use its parent's threads
        function()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for(child: int) -> int:
    """Exit code of a child; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(out: Path):
    """Everything that a run found out, without the times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    summary = json.loads((out / "summary.json").read_text())
    numbers = {key: summary[key] for key in ("test_accuracy", "last_test_accuracy", "selected_epoch", "steps")}
    weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(out / "adapter.safetensors").items()}
    return rows, numbers, weights


def die_at(event: int):
    """SIGKILL this process before its event-th step, sync, rename or removal, or halfway through its event-th write."""
    count = 0

    def watch(owner, name, halfway=None):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            nonlocal count
            count += 1
            if count == event:
                if halfway:
                    halfway(original, *args)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    watch(TrainStep, "advance")
    watch(os, "fsync")
    watch(Path, "replace")
    watch(Path, "unlink")
    watch(Path, "write_bytes", lambda original, path, data: original(path, bytes(data)[: len(data) // 2]))


def free_port() -> int:
    with socket.socket() as handle:
        handle.bind(("localhost", 0))
        return handle.getsockname()[1]


def start_ranks(world: int, config, *, main: bool = False, resume: bool = False) -> list[int]:
    """The processes of one run; main: as the command line's, a ValueError being exit code 2 and a signal 128 + it."""
    port = free_port()

    def start(rank):
        def work():
            address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            with one_line_errors() if main else nullcontext():
                try:
                    train(config, progress=False, resume=resume)
                except Interrupted as stopped:
                    raise SystemExit(128 + stopped.signal) from None

        return in_child(work)

    return [start(rank) for rank in range(world)]


def run_ranks(world: int, config, **options: bool) -> list[int]:
    """Exit codes of the ranks of one run."""
    return [wait_for(child) for child in start_ranks(world, config, **options)]
