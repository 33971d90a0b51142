"""The results' file: written, compared, and shown as tables and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, markdown_table

RESULTS = FOLDER / "machine_code.json"
KEY = ("kind", "chip", "width", "bottleneck", "rows", "kernel")
MOST_GROWTH = 0.03  # of a kernel's instructions
PARTS = {  # of a layer, by the kernels that do it
    "forward": "sparse_adapter_fwd_kernel",
    "backward to x": "sparse_adapter_bwd_input_kernel",
    "backward to the weights": "sparse_adapter_bwd_weight_kernel",
}
WORDS = {
    "plain": "bf16",
    "autocast": "autocast, fp32 stream",
    "fork": "bf16, first layer (fork)",
    "autocast fork": "autocast, first layer (fork)",
}
Row = dict[str, Any]


def write(results: dict[str, Any], path: Path = RESULTS) -> None:
    """As JSON, a row a line."""
    rows = ",\n".join("  " + json.dumps(row) for row in results["rows"])
    head = json.dumps(results | {"rows": []}, indent=1)
    path.write_text(head.replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A file that `write` made.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for row in results["rows"]:
            row["triton"], row["issued_millions"], *map(row.__getitem__, KEY)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a count of machine code ({error})") from error
    return results


def compare(new: Iterable[Row], old: Iterable[Row]) -> tuple[list[str], bool]:
    """Lines on kernels that both have, and whether the instructions of one grew by more than `MOST_GROWTH`.

    Counted are those of all programs of a launch together. Another version of Triton makes other machine code: then
    there is a line that says so, and nothing has grown.
    """
    before = {tuple(row[field] for field in KEY): row for row in old}
    lines, grown = [], False
    for row in new:
        past = before.get(tuple(row[field] for field in KEY))
        name = " ".join(str(row[field]) for field in KEY)
        if past is None:
            lines.append(f"{name}: new")
        elif past["triton"] != row["triton"]:
            lines.append(f"{name}: not compared, Triton {past['triton']} made the old code and {row['triton']} the new")
        else:
            ratio = row["issued_millions"] / past["issued_millions"]
            over = ratio > 1 + MOST_GROWTH
            grown |= over
            lines.append(
                f"{name}: {past['issued_millions']:.2f} -> {row['issued_millions']:.2f} million instructions, "
                f"{ratio:.3f}{', GROWN' if over else ''}"
            )
    return lines, grown


def layers(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of each call: kind, chip, width, bottleneck and M."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[field] for field in KEY[:-1]), []).append(row)
    return found


def assumptions(results: dict[str, Any]) -> str:
    """What the model assumes, in words."""
    chips = [
        f"{chip['name']}: {chip['multiprocessors']} multiprocessors at {chip['clock'] / 1e9:g} GHz, "
        f"{chip['dram'] / 1e12:g} TB/s from DRAM, {chip['l2'] / 1e12:g} TB/s from {chip['l2_bytes'] / 2**20:g} MiB of "
        f"L2 cache, of which rows in flight may take {chip['kept']:.0%}; {chip['dram_latency'] * 1e6:g} µs from a load "
        f"to its data ({chip['l2_latency'] * 1e6:g} from L2), {chip['issue']:g} cycles from one instruction of a warp "
        f"to its next one, {chip['launch'] * 1e6:g} µs a launch"
        for chip in results["chips"]
    ]
    step = results["step"]
    return (
        f"A model: nothing here was timed. Assumed: {'; '.join(chips)}. The step without adapters: products at "
        f"{step['products']:.0%} of the tensor cores' peak, attention at {step['attention']:.0%}, all else as eager "
        "PyTorch moves its bytes."
    )


def readme_table(results: dict[str, Any]) -> str:
    """What the README shows: a layer of ViT-B/16 at M = 50,432 on an H100, and the tax of a step."""
    found = layers(results["rows"])
    taxes = {(tax["kind"], tax["chip"]): tax for tax in results["taxes"]}
    columns = ["µs a layer", *PARTS, "others", "together", "copy of the planned bytes", "ratio", "tax of a step"]
    lines = []
    for kind, words in WORDS.items():
        rows = found[kind, "H100", 768, 64, 50_432]
        by_kernel = {row["kernel"]: row["us"] / row["layers"] for row in rows}
        parts = [by_kernel[kernel] for kernel in PARTS.values()]
        others = sum(by_kernel.values()) - sum(parts)
        layer, copy = rows[0]["layer_us"], sum(row["copy_us"] for row in rows)
        tax = taxes.get((kind, "H100"))
        cells = [words, *(f"{us:.0f}" for us in (*parts, others, layer, copy)), f"{rows[0]['ratio_to_copy']:.2f}"]
        lines.append([*cells, "" if tax is None else f"{tax['tax']:.1%}"])
    return markdown_table(columns, lines)


def markdown(results: dict[str, Any]) -> str:
    """Everything."""
    parts = ["# What the kernels cost, by their machine code", assumptions(results)]
    columns = ["ViT-B/16", "ms without adapters", "ms of 12 adapters", "tax"]
    lines = [
        [
            f"{WORDS[tax['kind']]}, {tax['chip']}",
            *(f"{tax['step_ms']:.1f}", f"{tax['adapters_ms']:.2f}", f"{tax['tax']:.1%}"),
        ]
        for tax in results["taxes"]
    ]
    parts.append(markdown_table(columns, lines))
    parts.append(
        "The adapter inside the MLP's products (form mlp) is plain PyTorch, counted as the step is; µs that a layer of "
        "ViT-B at r = 64 adds to the frozen MLP's forward and backward, beside the kernels' below."
    )
    parts.append(_mlp_table(results))
    columns = ["kernel", "µs", "copy", "issue", "exposed", "L2", "DRAM", "bound by", "instructions", "registers"]
    columns += ["shared, KiB", "spilt", "programs", "at once", "waves"]
    for (kind, chip, width, bottleneck, m), rows in layers(results["rows"]).items():
        parts.append(
            f"**{WORDS[kind]}, {chip}**: D = {width}, r = {bottleneck}, M = {m:,}: "
            f"{rows[0]['layer_us']:.0f} µs, {rows[0]['ratio_to_copy']:.2f} times the copy of the planned bytes"
        )
        parts.append(markdown_table(columns, [_cells(row) for row in rows]))
    return "\n\n".join(parts) + "\n"


def _mlp_table(results: dict[str, Any]) -> str:
    kernels, lines = layers(results["rows"]), []
    for row in results["mlp_form"]:
        call = tuple(row[field] for field in KEY[:-1])
        times = [row[f"{name}_us"] for name in ("products", "passes", "dropout", "launches", "layer")]
        title = f"{WORDS[row['kind']]}, {row['chip']}, M = {row['rows']:,}"
        lines.append([title, *(f"{us:.0f}" for us in (*times, kernels[call][0]["layer_us"])), f"{row['tax']:.1%}"])
    columns = ["form mlp", "products", "passes", "dropout", "launches", "together", "kernels", "tax"]
    return markdown_table(columns, lines)


def _cells(row: Row) -> list[str]:
    times = [row[name] for name in ("us", "copy_us", "issue_us", "exposed_us", "l2_us", "dram_us")]
    kernel = row["kernel"] if row["layers"] == 1 else f"{row['kernel']}, for {row['layers']} layers"
    cells = [kernel, *(f"{time:.1f}" for time in times), row["bound"]]
    counts = [f"{row['instructions']:,}", str(row["registers"]), f"{row['shared_bytes'] / 1024:.0f}"]
    counts += [str(row["spill_bytes"]), f"{row['programs']:,}", str(row["programs_a_multiprocessor"])]
    return [*cells, *counts, f"{row['waves']:g}"]
