"""The data of a run, as its configuration describes it."""

from __future__ import annotations

from collections.abc import Sized

from mosa_fast.backbones.create import channel_statistics
from mosa_fast.config import TrainConfig
from mosa_fast.data import load_data, preprocessing_of
from mosa_fast.data.loading import drop_unreadable
from mosa_fast.data.memory import cache_decoded
from mosa_fast.data.parts import Splits
from mosa_fast.data.preprocessing import IMAGENET, Preprocessing, Statistics


def channel_statistics_of(config: TrainConfig) -> Statistics:
    """What a run's images are normalised with."""
    own = config.data.normalisation == "backbone"
    return Statistics(*channel_statistics(config.model)) if own else IMAGENET


def preprocessing_of_run(config: TrainConfig) -> Preprocessing:
    """What evaluation does to a run's images; `config.data.image_size` is set."""
    assert config.data.image_size is not None
    return preprocessing_of(config.data, config.data.image_size, channel_statistics_of(config))


def load_run_data(config: TrainConfig, preprocessing: Preprocessing) -> Splits:
    """The data of a run, with its loader options applied.

    Args:
        config: of the run.
        preprocessing: of the run: `preprocessing_of_run`, or what its adapter file says.
    """
    splits = load_data(config.data, preprocessing.image_size, config.seed, preprocessing)
    if config.loader.corrupt == "skip":
        splits = drop_unreadable(splits)
    if config.loader.cache:
        cache_decoded(*(part for part in (splits.train, splits.val) if part is not None))
    if len(splits.classes) < 2:
        raise ValueError(f"data: there must be two classes at least, there is {', '.join(splits.classes) or 'none'}")
    for name in splits.classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"data: the name of class {name!r} is not UTF-8: give its folder another one") from None
    for name, part in splits.parts():
        if isinstance(part, Sized) and len(part) == 0 and (name != "test" or config.test):
            raise ValueError(f"data: there is no {name} image; where val is cut from train, a class needs two")
    return splits
