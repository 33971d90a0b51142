"""What `benchmarks.mixture` found, as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

DPI = 120
COLORS = {1: "#0072b2", 2: "#e69f00", 4: "#d55e00", 8: "#009e73"}  # told apart by people who see no red or green, too
STYLES = ("-", "--", ":")  # of the scales of one number of experts, from the smallest


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Over the steps, how far the merged model has moved and how far draws are from it; accuracy by merges' factors."""
    import matplotlib.pyplot as plt

    figure, (moved, apart, factors) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    rows = [row for row in results["runs"] if row["seed"] == results["runs"][0]["seed"]]
    for row in sorted(rows, key=lambda row: (row["experts"], row["scale"])):
        scales = sorted(other["scale"] for other in rows if other["experts"] == row["experts"])
        name = "dense" if row["experts"] == 1 else f"E = {row['experts']}"
        look = {
            "color": COLORS[row["experts"]],
            "linestyle": STYLES[scales.index(row["scale"]) % len(STYLES)],
            "marker": ".",
            "label": f"{name}, scale {row['scale']:g}",
        }
        steps = [found["step"] for found in row["distances"]]
        moved.plot(steps, [found["l2_merged_frozen"] for found in row["distances"]], **look)
        if row["experts"] > 1:
            apart.plot(steps, [found["kl_sampled_merged"] for found in row["distances"]], **look)
        factors.plot([float(factor) for factor in row["merged"]], [*row["merged"].values()], **look)
    moved.set(xlabel="step", ylabel="L2 of logits, merged from frozen", xscale="log", yscale="log")
    apart.set(xlabel="step", ylabel="KL of a draw from the merged model", xscale="log", yscale="log")
    factors.set(xlabel="factor on the merged update", ylabel="validation accuracy, %", xscale="log")
    factors.axvline(1, color="black", linewidth=0.8)
    factors.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
