"""What adapter_bank's kernel is checked on; `kernel_cases.py` has the checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import generator_of, make

from benchmarks.machine_code.calls import shape_of
from mosa_fast.ops.arguments import AdapterBankCall

OF_ADAPTERS = ("norm_weight", "norm_bias", "down_bias", "up_bias")  # low-rank pairs have none of them


@dataclass(frozen=True)
class BankCase:
    """Shapes and options of one check."""

    name: str
    width: int = 96
    out_width: int | None = None  # None: as x
    columns: tuple[tuple[int, int], ...] | None = None  # None: all
    bottleneck: int = 16
    tokens: int = 5
    tasks: tuple[int, ...] = (2, 0, 0, 1)  # of the samples
    number: int = 3  # of tasks in the bank
    absent: tuple[str, ...] = ()
    skip_dtype: torch.dtype | None = None  # None: x's
    activation: str = "gelu"
    add_input: bool = True
    offset: float = 0.0  # mean of x, in standard deviations
    shape: tuple[int, ...] = ()  # of a sample's tokens, instead of (tokens,)
    gradients: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def make(self, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
        """Arguments of the operator: activations in `dtype`, weights in float32."""
        sizes = {"...": (len(self.tasks), *(self.shape or (self.tokens,))), "D": self.width, "N": self.number}
        out_width = self.out_width or self.width
        columns = self.columns or ((0, out_width),)
        sizes |= {"O": out_width, "r": self.bottleneck, "R": len(columns) * self.bottleneck}
        sizes |= {"W": sum(stop - start for start, stop in columns)}
        arguments: dict[str, Any] = {
            "tasks": torch.tensor(self.tasks, dtype=torch.int32, device=device),
            "columns": self.columns,
            "activation": self.activation,
            "add_input": self.add_input,
            "eps": 1e-5,
        }
        for name, facts in AdapterBankCall.TENSORS.items():
            if name in arguments:
                continue
            made = torch.randn(shape_of(facts, sizes), generator=generator_of(name, seed))
            if name == "x":
                made = (made + self.offset).to(dtype)
            elif name == "skip":
                made = made.to(self.skip_dtype or dtype)
            else:  # weights keep a row's size; vectors are small, around one for the norm's weight
                made *= made.shape[-1] ** -0.5 if made.ndim == 3 else 0.2
                made += name == "norm_weight"
            arguments[name] = None if name in self.absent else made.to(device)
        return arguments


PAIRS: dict[str, Any] = {"absent": OF_ADAPTERS, "activation": "identity", "add_input": False}
CASES = [
    BankCase("adapters"),
    BankCase("one_task", tasks=(0,) * 3, number=1),
    BankCase("sorted", tasks=(0, 0, 1, 2)),
    BankCase("a_task_for_every_sample", tasks=(4, 1, 0, 3, 2), number=5),
    BankCase("tasks_that_nobody_asks_for", tasks=(9, 2), number=11),
    BankCase("no_norm", absent=("norm_weight", "norm_bias")),
    BankCase("no_biases", absent=("down_bias", "up_bias")),
    BankCase("no_skip", absent=("skip",)),
    BankCase("input_not_added", add_input=False),
    BankCase("update_alone", absent=("skip",), add_input=False),
    BankCase("skip_of_another_dtype", skip_dtype=torch.float32),
    BankCase("relu", activation="relu"),
    BankCase("silu", activation="silu", absent=("norm_weight", "norm_bias", "skip")),
    BankCase("low_rank_pairs", out_width=192, columns=((0, 64), (128, 192)), bottleneck=4, **PAIRS),
    BankCase("low_rank_pairs_of_a_whole_linear", out_width=160, bottleneck=8, **PAIRS),
    BankCase(
        "low_rank_pairs_of_odd_widths", width=33, out_width=103, columns=((7, 30), (41, 100)), bottleneck=5, **PAIRS
    ),
    BankCase("adapters_of_some_columns", columns=((10, 40), (64, 96))),
    BankCase("tokens_that_fill_no_block", tokens=37),
    BankCase("one_token", tokens=1),
    BankCase("empty_batch", tasks=()),
    BankCase("odd_widths", width=101, bottleneck=7, tokens=9),
    BankCase("bottleneck_of_one", bottleneck=1),
    BankCase("feature_maps", shape=(2, 3)),
    BankCase("far_from_zero", offset=30.0),
]


def operator_arguments(case: BankCase) -> list[Any]:
    """What the public function hands to torch.ops.mosa_fast.adapter_bank, but for the backend."""
    values = make(case, torch.float32, "cpu")
    values["columns"] = [column for columns in case.columns or ((0, 96),) for column in columns]
    values["product_dtype"] = torch.float32
    return [values[key] for key in (*AdapterBankCall.TENSORS, *AdapterBankCall.OPTIONS)]
