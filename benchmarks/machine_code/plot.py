"""The model's plot: what each kernel takes, and what binds it, beside the copy of its planned bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.machine_code.results import PARTS, WORDS, layers

DPI = 120
BOUNDS = {"DRAM": ("dram_us", "#0072b2"), "L2": ("l2_us", "#56b4e9"), "issue": ("issue_us", "#e69f00")}


def kernels(results: dict[str, Any], path: Path) -> None:
    """ViT-B at r = 64 and M = 50,432 on an H100: a panel for each kind of call."""
    import matplotlib.pyplot as plt

    found = layers(results["rows"])
    figure, axes = plt.subplots(1, len(WORDS), figsize=(4.2 * len(WORDS), 3.6), sharey=True, layout="constrained")
    for axis, (kind, words) in zip(axes, WORDS.items(), strict=True):
        rows = {row["kernel"]: row for row in found[kind, "H100", 768, 64, 50_432]}
        for place, kernel in enumerate(PARTS.values()):
            row = rows[kernel]
            axis.bar(place, row["us"], 0.8, color="#dddddd", label="expected")
            for index, (name, (field, color)) in enumerate(BOUNDS.items()):
                axis.bar(place + 0.25 * (index - 1), row[field], 0.22, color=color, label=name)
            axis.hlines(row["copy_us"], place - 0.4, place + 0.4, color="black", label="copy of the planned bytes")
        axis.set_xticks(range(len(PARTS)), [part.replace("backward ", "backward\n") for part in PARTS])
        axis.set_title(f"{words}: {next(iter(rows.values()))['ratio_to_copy']:.2f} times the copy", fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("µs, by the model")
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes[0].legend(unique.values(), unique.keys(), fontsize="small", frameon=False)
    figure.suptitle("What a layer's kernels cost on an H100: a model, nothing timed", fontsize="medium")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


PLOTS = {"kernels": kernels}
