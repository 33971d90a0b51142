"""What `benchmarks.mixture` found, as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

DPI = 120
COLORS = {1: "#0072b2", 2: "#e69f00", 4: "#d55e00", 8: "#009e73"}  # told apart by people who see no red or green, too


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Left: how far draws are from the merged model, over the steps; right: accuracy by factor on the merged update."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    seed = results["runs"][0]["seed"]
    for row in (row for row in results["runs"] if row["seed"] == seed):
        name = "dense" if row["experts"] == 1 else f"E = {row['experts']}"
        style = {"color": COLORS[row["experts"]], "linestyle": "-" if row["scale"] == 1 else "--", "marker": "."}
        label = f"{name}, scale {row['scale']:g}"
        if row["experts"] > 1:
            steps = [found["step"] for found in row["distances"]]
            left.plot(steps, [found["kl_sampled_merged"] for found in row["distances"]], label=label, **style)
        factors = [float(factor) for factor in row["merged"]]
        right.plot(factors, [*row["merged"].values()], label=label, **style)
    left.set(xlabel="step", ylabel="KL of a draw from the merged model", yscale="log")
    right.set(xlabel="factor on the merged update", ylabel="validation accuracy, %", xscale="log")
    right.axvline(1, color="black", linewidth=0.8)
    right.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
