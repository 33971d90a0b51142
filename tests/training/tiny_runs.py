"""Runs small enough to be killed many times: a ViT of 5 tokens on 20 digits."""

import os
import traceback

import torch

from mosa_fast.config import DataConfig, ModelConfig, MoSAConfig, OptimConfig, TrainConfig
from mosa_fast.training.evaluation import Scores


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
