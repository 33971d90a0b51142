"""Options that somebody asks for and that change nothing, because of what else a run is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from mosa_fast.command_line import names_of
from mosa_fast.config import MoSAConfig, TrainConfig
from mosa_fast.methods import METHODS
from mosa_fast.options import flat, listed
from mosa_fast.recipes import own_options
from mosa_fast.run_options import parse_options

OF_ADAPTERS = ("bottleneck", "placement", "activation", "form", "dropout", "bias")
OF_PAIRS = ("rank", "targets")
OF_TWO_VIEWS = ("loss.add_weight", "loss.reg_weight", "loss.deep_reg")


def idle_options(config: TrainConfig, words: Sequence[str]) -> list[str]:
    """What words of a command line ask for in vain, in a line for each reason.

    Recipes are composed of bases that serve many runs, so that a base, or a default, asks for nothing. The words do.
    So does what a recipe that they name says itself, where it is not the default and changes nothing in that recipe's
    own run: what other words have made idle, as another method, nobody asked for.

    Args:
        config: the run that the words describe.
        words: of the command line.
    """
    values, defaults = flat(asdict(config)), flat(asdict(TrainConfig()))
    reasons = _reasons(config)
    asked = names_of(words)
    for place, word in enumerate(words):
        flag, _, name = word.partition("=")
        if flag == "--config":
            recipe = name or words[place + 1]
            own = [option for option, value in own_options(recipe).items() if value != defaults.get(option)]
            if not reasons.keys().isdisjoint(own):
                alone = _reasons(parse_options(["--config", recipe], "train", ""))
                asked += [option for option in own if option in alone]
    by_reason: dict[str, list[str]] = {}
    for option in dict.fromkeys(asked):
        if option in reasons and values[option]:  # what is switched off asks for nothing
            by_reason.setdefault(reasons[option], []).append(option)
    return [
        f"{listed(options, 'and')} {'has' if len(options) == 1 else 'have'} no effect: {reason}"
        for reason, options in by_reason.items()
    ]


def _reasons(config: TrainConfig) -> dict[str, str]:
    """Why an option changes nothing, whatever it is set to, by its full name; those that change something are left out.

    The first reason counts.
    """
    method, called = METHODS[config.method], f"method {config.method}"
    found: dict[str, str] = {}

    def idle(reason: str, *options: str) -> None:
        found.update({option: reason for option in options if option not in found})

    def of_adapter(*names: str) -> list[str]:
        return [f"adapter.{name}" for name in names]

    if method.adapters is None:
        # A seed is given to many runs alike, as by a sweep.
        names = [field.name for field in fields(MoSAConfig) if field.name != "seed"]
        idle(f"{called} has no adapters", *of_adapter(*names), *OF_TWO_VIEWS)
        if config.loss.views != 1:
            idle(f"{called} has one view of a batch", "loss.views")
    else:
        adapter = replace(config.adapter, **method.adapters)
        for name, value in method.adapters.items():
            if getattr(config.adapter, name) != value:
                idle(f"{called} has {name} {value}", f"adapter.{name}")
        if adapter.method == "lora":
            idle("low-rank pairs have no such thing", *of_adapter(*OF_ADAPTERS))
        else:
            idle("only low-rank pairs have it, with method lora or adapter.method lora", *of_adapter(*OF_PAIRS))
        if adapter.experts == 1:
            idle("there is one expert", *of_adapter("share", "bias", "merge", "routing"))
        if method.views_of(config.loss.views) == 1:
            idle("there is one view of a batch (loss.views)", *OF_TWO_VIEWS)
        elif not config.loss.reg_weight:
            idle("loss.reg_weight is 0", "loss.deep_reg")
    if config.method != "partial":
        idle("it is for method partial", "partial_blocks")
    if not (config.model.pretrained and method.pretrained):
        idle("the backbone begins with random weights", "model.checkpoint", "model.checkpoint_md5")
    elif config.model.checkpoint is None:
        idle("there is no model.checkpoint", "model.checkpoint_md5")
    if config.data.mode == "final":
        idle("with data.mode final nothing is validated", "patience", "eval_every")
    return found
