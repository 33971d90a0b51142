"""Plots can be read: nothing runs out of the picture, a contender has one colour, ratios are those of the table."""

import matplotlib.pyplot as plt
import pytest

from benchmarks import plots
from benchmarks.cases import COPY
from benchmarks.contenders import CONTENDERS, split_variant
from benchmarks.results import KEY, MEASURED

NAMES = (
    *("no adapter", "no adapter, two views", "ours, reference", "ours, reference, two views", "paper"),
    "peft, fused qkv",
)
OPERATORS = (COPY, "no adapter", "ours, reference", "ours, reference, compiled", "paper")


def row(case, contender, ms, images=2, tokens=197):
    shape = dict(zip(KEY, (case, "vit_base_patch16_224", images, tokens, "bf16-mixed", "all", contender), strict=True))
    times = {"runs": 5, "ms": ms, "low": 0.9 * ms, "high": 1.2 * ms, "operations": 1e9, "planned_bytes": 10**8}
    return dict.fromkeys(MEASURED) | shape | times


@pytest.fixture
def results():
    steps = [row("step", name, 1234.0 + 100 * place) for place, name in enumerate(NAMES)]
    shapes = [{"images": 2}, {"images": 8}, {"images": 32}, {"images": 8, "tokens": 577}]
    operators = [row("operator", name, 1.0 + place, **s) for s in shapes for place, name in enumerate(OPERATORS)]
    return {
        "environment": {
            "device": "a chip of a long name, 80GB HBM3",
            "threads": 2,
            "torch": "2",
            "triton": "3",
            "commit": "a",
        },
        "machine": {"copy_gb_per_s": 75.2, "fp32_tflop_per_s": 0.21, "bf16_tflop_per_s": 0.9},
        "config": {"bottleneck": 64, "experts": 4},
        "rows": steps + operators,
    }


@pytest.fixture
def drawn(results, tmp_path, monkeypatch):
    """Draws a plot and gives its figure, which stays open."""
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def draw(name):
        plots.PLOTS[name](results, tmp_path / f"{name}.png")
        figure = plt.gcf()
        figure.canvas.draw()
        return figure

    yield draw
    monkeypatch.undo()
    plt.close("all")


def written(figure):
    """Titles, labels, legends, what is at bars, and contenders' names; the ticks' numbers matplotlib places itself."""
    found = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    for axis in figure.axes:
        found += [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        found += [] if axis.get_legend() is None else axis.get_legend().get_texts()
        found += [label for label in axis.get_yticklabels() if label.get_text() in (*CONTENDERS, COPY)]
    return [text for text in found if text is not None and text.get_text()]


@pytest.mark.parametrize("name", plots.PLOTS)
def test_all_that_is_written_lies_in_the_picture(drawn, name):
    figure = drawn(name)
    assert len(written(figure)) > 5
    for text in written(figure):
        box = text.get_window_extent()
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert inside, text.get_text()


def test_the_ratio_to_the_yardstick_is_written_at_the_bar(drawn):
    step, operator = drawn("bars").axes
    written = [text.get_text() for text in step.texts]
    # ours runs the views' beginning in common, and so does its yardstick; the paper's way has two whole views
    assert written[NAMES.index("ours, reference")] == "1,434 ms   1.16 x"
    assert written[NAMES.index("paper")] == "1,634 ms   1.22 x"
    assert [text.get_text() for text in operator.texts][OPERATORS.index("paper")] == "5.00 ms   5.00 x"


def test_a_contender_has_one_colour_in_all_plots_and_no_other_has_it(drawn):
    names = {split_variant(name)[0] for name in (*CONTENDERS, COPY)}
    assert len({plots.color(name) for name in names}) == len(names)
    assert plots.color("ours, triton, compiled") == plots.color("ours, triton")
    used = {}
    for axis in drawn("bars").axes:
        labels = [label.get_text() for label in axis.get_yticklabels()]
        for name, bar in zip(labels, axis.patches, strict=True):
            used.setdefault(name, set()).add(bar.get_facecolor())
    for axis in drawn("scaling").axes:
        for line in axis.lines:
            used[line.get_label()].add(plt.matplotlib.colors.to_rgba(line.get_color()))
    assert all(len(colors) == 1 for colors in used.values())
