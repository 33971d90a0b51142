"""The suite counts, checks, compares and reports what it says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__, cases, contenders, measure, ours, plain, plain_lora, plots, report, results, suite
from benchmarks.cases import CASES, operator_work
from benchmarks.contenders import CONTENDERS
from benchmarks.groups import heading
from benchmarks.spec import BANKS, CLASSES, Spec
from benchmarks.timing import saved_memory
from benchmarks.workbench import Workbench
from mosa_fast.methods import METHODS

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent.parent
SMALL = "test_vit"  # timm's smallest
MODES = ("all", "forward", "backward")
ADAPTERS = ("no adapter", "paper", "dense", "ours, reference")
PAIRS = ("MoSL, reference", "paper, MoSL")
BACKBONE_TRAINED = ("bias", "partial", "full")
SERVED = ("no adapter", "bank, adapters", "swapped, adapters", "bank, pairs", "swapped, pairs")
TIMED = {
    "operator": ADAPTERS,
    **dict.fromkeys(("block", "evaluation"), (*ADAPTERS, "ours, mlp")),
    "lora": ("copy", *PAIRS),
    "step": (*ADAPTERS, *PAIRS, "ours, mlp"),
    "methods": (
        *("ours, reference", "MoSL, reference", "adapter", "lora", "random_mask", "linear"),
        *BACKBONE_TRAINED,
    ),
    **dict.fromkeys(BANKS, SERVED),
}


def spec(case, precision="fp32", **options):
    return Spec(case, SMALL, 2, precision, repeats=3, **({"tokens": 9} | options))


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("case", CASES)
def test_every_case_times_what_runs_here(case, precision):
    rows = {row["contender"]: row for row in measure.measure(spec(case, precision), CPU)}
    for name in TIMED[case]:
        if name in BACKBONE_TRAINED and precision == "bf16-true":
            assert name not in rows
            continue
        assert rows[name]["ms"] > 0, rows[name]["reason"]
        assert rows[name]["low"] <= rows[name]["ms"] <= rows[name]["high"]
    if not torch.cuda.is_available() and case not in ("methods", *BANKS):
        triton = rows["MoSL, triton" if case == "lora" else "ours, triton"]
        assert "no GPU" in triton["reason"]
        assert triton["ms"] is None
    state = {name: row["state_mib"] for name, row in rows.items()}
    if case == "step":
        assert state["no adapter"] < state["ours, reference"] < state["paper"]
        assert state["MoSL, reference"] < state["paper, MoSL"]
        assert rows["ours, mlp"]["saved_mib"] < rows["ours, reference"]["saved_mib"]  # of activations for backward
    if case == "methods" and precision != "bf16-true":
        assert state["linear"] < state["bias"] < state["partial"] < state["full"]
        assert state["adapter"] < state["ours, reference"]
        kept = {name: row["saved_mib"] for name, row in rows.items()}
        assert kept["linear"] < kept["partial"] < kept["adapter"] < kept["ours, reference"]


@pytest.mark.parametrize(
    ("case", "name"), [("operator", "ours, reference"), ("block", "ours, reference"), ("lora", "MoSL, reference")]
)
def test_forward_and_backward_can_be_timed_alone(case, name):
    rows = measure.measure(spec(case, modes=MODES), CPU, contenders=("copy", name))
    assert [row["mode"] for row in rows if row["contender"] == name] == list(MODES)
    assert all(row["ms"] > 0 for row in rows)
    if case != "block":
        work = [(row["operations"], row["planned_bytes"]) for row in rows if row["contender"] == "copy"]
        assert work[0] == tuple(map(sum, zip(*work[1:], strict=True)))
        of_copy = {row["contender"]: row["of_copy"] for row in rows}
        assert of_copy["copy"] == 1
        assert 0 < of_copy[name] < 1


def test_each_mode_runs_its_part_and_leaves_no_gradients_to_the_next():
    bench = Workbench(spec("operator"), CPU, "operator")
    learner = ours.ours(bench.setting, "reference")
    learner.module.train()
    ran = []
    for name in ("forward", "backward"):
        function = getattr(bench, name)
        setattr(bench, name, lambda *given, name=name, function=function: (ran.append(name), function(*given))[1])

    for mode, prepared, expected in [
        ("all", [], ["forward", "backward"]),
        ("forward", [], ["forward"]),
        ("backward", ["forward"], ["backward"]),
    ]:
        work = cases.layer_work(bench, learner)[mode]
        work.prepare()
        assert ran == prepared, mode
        ran.clear()
        work.run()
        assert ran == expected, mode
        ran.clear()
        assert not any(tensor.grad is not None for batch in bench.batches for tensor in batch.tensors()), mode


@pytest.mark.parametrize("level", ["operator", "block", "model"])
def test_the_papers_way_computes_the_same(level):
    bench = Workbench(spec("step" if level == "model" else level), CPU, level)
    learner = contenders.paper(bench.setting)
    expected = same_as_expected(bench, learner)
    assert {"output", "0.up.weight", "0.up.bias", "0.down.weight", "0.norm.weight"} <= expected.keys()


def same_as_expected(bench, learner):
    """What a learner without dropout should find, and finds."""
    learner.module.train()
    found, expected = bench.results(learner, dropout=False), bench.expected(learner, dropout=False)
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        assert truth.any(), name
        torch.testing.assert_close(found[name], truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())
    return expected


@pytest.mark.parametrize("make", ["paper_pairs", "peft_q_and_v"])
@pytest.mark.parametrize("level", ["lora", "model"])
def test_plain_pairs_and_pefts_compute_what_ours_do(level, make):
    if make.startswith("peft"):
        pytest.importorskip("peft")
    bench = Workbench(spec("step" if level == "model" else level), CPU, level)
    expected = same_as_expected(bench, getattr(contenders, make)(bench.setting))
    assert {"output", "0.up.weight", "0.down.weight"} <= expected.keys()


@pytest.mark.parametrize("name", ["bias", "partial", "linear", "full", "adapter", "lora", "random_mask"])
def test_methods_train_what_their_rows_say_and_are_compared_with_float32(name):
    """The gradients of all that is trained; one view."""
    bench = Workbench(spec("methods"), CPU, "model")
    learner = ours.method(bench.setting, METHODS[name])
    expected = same_as_expected(bench, learner)
    assert expected["output"].shape == (2, CLASSES)
    trained = sum(value.numel() for key, value in expected.items() if key != "output")
    assert trained == sum(p.numel() for p in learner.trained()) - (0 if "gradients" in expected else 65 * CLASSES)


def test_wrong_pairs_and_wrong_methods_have_no_time(monkeypatch):
    monkeypatch.setattr(plain.CopiedProjection, "mask_gradients", lambda self: None)
    monkeypatch.setattr(plain_lora, "rows_of", lambda compact: [slice(0, 64), slice(0, 64)])  # v's rows are q's
    rows = {row["contender"]: row for row in measure.measure(spec("lora"), CPU)}
    for name in ("paper, MoSL", "peft, q and v"):
        assert rows[name]["ms"] is None
        assert "wrong: output is off by" in rows[name]["reason"] or "not installed" in rows[name]["reason"]
    assert rows["MoSL, reference"]["ms"] > 0

    def half_trained(setting):
        learner = ours.method(setting, METHODS["linear"])
        learner.after_backward = lambda: learner.module.head.weight.grad.zero_()
        return learner

    monkeypatch.setitem(CONTENDERS, "linear", replace(CONTENDERS["linear"], make=half_trained))
    (row,) = measure.measure(spec("methods"), CPU, contenders=("linear",))
    assert "wrong: gradients is off by" in row["reason"]


def test_wrong_results_have_no_time(monkeypatch):
    monkeypatch.setattr(plain.CopiedProjection, "mask_gradients", lambda self: None)
    rows = {row["contender"]: row for row in measure.measure(spec("operator"), CPU)}
    assert rows["paper"]["ms"] is None
    assert "up.weight is off by" in rows["paper"]["reason"]
    assert rows["ours, reference"]["ms"] > 0


def test_a_contender_that_breaks_does_not_take_the_others_with_it(monkeypatch):
    def broken(*arguments):
        raise MemoryError("too large")

    monkeypatch.setitem(CONTENDERS, "dense", replace(CONTENDERS["dense"], make=broken))
    rows = {row["contender"]: row for row in measure.measure(spec("block"), CPU)}
    assert rows["dense"]["reason"] == "MemoryError: too large"
    assert rows["paper"]["ms"] > 0


def test_a_new_method_costs_one_function(monkeypatch):
    def two_experts(setting):
        return ours.ours(setting, "reference", config=replace(setting.mixture().mosa_config, experts=2))

    monkeypatch.setitem(CONTENDERS, "two experts", contenders.Entry(two_experts, contenders.ALL_CASES))
    monkeypatch.setitem(CONTENDERS, "elsewhere", contenders.Entry(two_experts, ("evaluation",)))
    for case in contenders.ALL_CASES:
        rows = {row["contender"]: row for row in measure.measure(spec(case), CPU)}
        assert rows["two experts"]["ms"] > 0, rows["two experts"]["reason"]
        assert ("elsewhere" in rows) is (case == "evaluation")


def test_the_profiled_run_says_what_it_plans_to_move(command, monkeypatch):
    monkeypatch.setitem(suite.SUITES, "quick", suite.Suite((spec("evaluation"), spec("operator")), 2))
    code, output, _ = command(__main__.main, "--quick", "--profile")
    elements = 2 * 2 * 9 * 64
    assert code == 0
    assert output.splitlines()[-3:] == [
        f"operator {SMALL} 2 x 9 fp32",
        f"planned bytes forward: {3 * 4 * elements}",
        f"planned bytes backward: {5 * 4 * elements}",
    ]


@pytest.mark.parametrize(
    ("case", "names"), [("step", ("peft, q and v", "peft, fused qkv")), ("lora", ("peft, q and v",))]
)
def test_lora_of_the_peft_library_learns_on_the_same_backbone(case, names):
    pytest.importorskip("peft")
    rows = {row["contender"]: row for row in measure.measure(spec(case), CPU)}
    for name in names:
        assert rows[name]["ms"] > 0, rows[name]["reason"]


def test_saved_counts_every_activation_once():
    x = torch.randn(256, 1024, requires_grad=True)  # 1 MiB
    weight = torch.nn.Parameter(torch.randn(1024))
    frozen = torch.nn.Parameter(torch.randn(8, 1024), requires_grad=False)

    def run():
        y = x.exp()  # keeps y
        ((y * weight) + y * y).sum().backward()  # keep y, which is there, and the parameter, which does not count

    def multiply():
        F.linear(x, frozen).sum().backward()  # keeps a view of the parameter, transposed

    assert saved_memory(run) == 1.0
    assert saved_memory(multiply) == 0.0


def test_work_of_the_operator():
    elements = 2 * 3 * 5 * 64  # two views of three images of five tokens, 64 wide
    work = {mode: operator_work(Spec("operator", SMALL, 3, "bf16-mixed", tokens=5), mode) for mode in MODES}
    # h, out, and five passes of float32 backward; the MLP's output in 16 bits
    assert work["all"] == (12 * elements * 64, elements * (7 * 4 + 2))
    assert work["forward"] == (4 * elements * 64, elements * (2 * 4 + 2))
    assert work["backward"] == (8 * elements * 64, elements * 5 * 4)


def test_work_of_the_low_rank_pairs():
    elements = 2 * 3 * 5 * 64
    work = {mode: operator_work(Spec("lora", SMALL, 3, "bf16-mixed", tokens=5), mode) for mode in MODES}
    # x in float32; the linear's output and what comes of it in 16 bits, three times as wide
    assert work["forward"] == (4 * elements * 2 * 16, elements * (4 + 2 * 3 * 2))
    # the gradient in the columns of q and v twice; x, and its gradient
    assert work["backward"] == (8 * elements * 2 * 16, elements * (2 * 2 * 2 + 2 * 4))
    assert work["all"] == tuple(map(sum, zip(work["forward"], work["backward"], strict=True)))


def row(contender, ms, low=None, high=None, **more):
    known = dict(zip(results.KEY, ("step", SMALL, 2, 9, "fp32", "all", contender), strict=True))
    quartiles = {"runs": 5, "ms": ms, "low": low or ms, "high": high or ms, "images_per_s": 1.0}
    return dict.fromkeys(results.MEASURED) | known | quartiles | more


def result(*rows, device="chip"):
    environment = {"device": device, "threads": 2, "torch": "2", "triton": "3", "commit": "abc"}
    return {
        "environment": environment,
        "machine": {"copy_gb_per_s": 10.0, "fp32_tflop_per_s": 1.0},
        "config": {"bottleneck": 64, "experts": 4},
        "rows": list(rows),
    }


@pytest.mark.parametrize(
    ("new", "slower"),
    [
        (row("dense", 12, 10.5, 13), True),  # above the old third quartile
        (row("dense", 12, 9.9, 13), False),
        (row("dense", 2, 1, 3), False),
        (row("dense", None, reason="wrong") | {"low": None, "high": None}, True),
        (row("dense", 12, 10.5, 13, runs=2), False),  # a spread of two runs says nothing
        (row("dense", None, reason=results.NO_TIME) | {"low": None, "high": None}, False),
        (row("another", 99), False),
    ],
)
def test_a_regression_is_what_lies_beyond_the_spread(new, slower):
    lines, regressed = results.compare(result(new), result(row("dense", 9, 8, 10)))
    assert regressed is slower
    assert ("SLOWER" in " ".join(lines) or "not timed (wrong)" in " ".join(lines)) is slower


def test_other_devices_are_not_compared():
    with pytest.raises(ValueError, match="different devices: chip and another"):
        results.compare(result(), result(device="another"))


def test_taxes():
    rows = [
        row("no adapter", 100, saved_mib=50),
        row("no adapter, two views", 110, saved_mib=60),
        row("paper", 220, saved_mib=90),
        row("ours, reference", 105, saved_mib=51),
        row("ours, reference, two views", 121, saved_mib=63),
    ]
    found = {name: (round(time, 6), round(space, 6)) for name, time, space in report.taxes(rows)}
    assert found == {
        "paper": (1.0, 0.5),
        "ours, reference": (0.05, 0.02),
        "ours, reference, two views": (0.1, 0.05),
    }
    text = report.markdown(result(*rows))
    assert "| paper | 220.00 (220.00 to 220.00) | 1.0 | 1.00 | 90 |  | +100.0% | +50.0% |" in text


def test_pairs_are_compared_with_the_papers_way_of_pairs_and_methods_with_none():
    rows = [row("paper, MoSL", 4, case="lora"), row("MoSL, triton", 2, case="lora")]
    rows += [row("linear", 1, case="methods", state_mib=0.5), row("full", 3, case="methods", state_mib=30.0)]
    text = report.markdown(result(*rows))
    assert "| MoSL, triton | 2.00 (2.00 to 2.00) | 1.0 | 2.00 |" in text
    assert "| full | 3.00 (3.00 to 3.00) | 1.0 |  | 30.0 |" in text
    assert "|  | ms (quartiles) | images/s | activations, MiB | state, MiB |" in text
    assert plots.ratio(("methods",), {"linear": rows[2], "full": rows[3]}, "full") == 3


def test_the_operator_is_compared_with_a_copy_and_few_runs_are_said():
    rows = [row("copy", 2, case="operator", of_copy=1.0), row("ours, cuda", 4, case="operator", of_copy=0.5, runs=1)]
    text = report.markdown(result(*rows))
    assert "| ours, cuda | 4.00 (4.00 to 4.00) | 1.0 |  | 0.50 |  |" in text
    assert "Few runs: 1," in text


def test_the_report_is_written(tmp_path, command):
    sizes = [{"images": 2}, {"images": 4}, {"tokens": 18}]
    work = {"operations": 1e9, "planned_bytes": 10**6}
    operators = [
        row(name, 3, case="operator", **size, **work) for size in sizes for name in ("ours, reference", "paper")
    ]
    path = tmp_path / "suite_chip.json"
    path.write_text(json.dumps(result(row("paper", 2), row("dense", 1), *operators)))
    assert command(report.main, path)[0] == 0
    assert {file.name for file in tmp_path.iterdir()} == {
        path.name,
        "suite_chip.md",
        *(f"suite_chip_{plot}.png" for plot in ("bars", "roofline", "scaling")),
    }


def test_a_run_writes_its_rows_and_compares_itself(tmp_path, command, monkeypatch):
    monkeypatch.setitem(suite.SUITES, "quick", suite.Suite((spec("operator"), spec("evaluation")), 2))
    monkeypatch.setattr(measure, "speeds", lambda device: {})
    path = tmp_path / "new.json"
    arguments = ("--quick", "--cases", "operator", "--out", path)
    assert command(__main__.main, *arguments)[0] == 0
    written = json.loads(path.read_text())
    assert {found["case"] for found in written["rows"]} == {"operator"}
    assert path.with_suffix(".csv").read_text().count("\n") == len(written["rows"]) + 1
    for found in written["rows"]:
        found |= {name: found[name] and found[name] / 1e3 for name in ("ms", "low", "high")}
    old = tmp_path / "old.json"
    old.write_text(json.dumps(written))
    code, output, _ = command(__main__.main, *arguments, "--compare", old)
    assert code == 1
    assert "SLOWER" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "nowhere.json"], "nowhere.json is not a result"),
        (["--cases", "nothing"], "invalid choice: 'nothing'"),
        (["--out", "a.csv"], "must end in .json"),
        (["--quick", "--suite", "gpu"], "not allowed with"),
    ],
)
def test_bad_input_is_one_line(arguments, message, command):
    code, _, error = command(__main__.main, *arguments)
    assert code == 2
    assert message in error.strip().splitlines()[-1]


def test_few_packages_are_needed():
    blocked = ["jsonargparse", "yaml", "tqdm", "peft", "tensorboard"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import benchmarks.__main__, benchmarks.report"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_report_of_serving_says_what_its_file_says():
    files = sorted(results.FOLDER.glob("bank_*.json"))
    assert files
    for path in files:
        assert path.with_suffix(".md").read_text(encoding="utf-8") == report.markdown(results.read(path))


def test_reports_and_readme_say_what_the_files_say():
    files = sorted(results.FOLDER.glob("suite_*.json"))
    assert files
    for path in files:
        assert path.with_suffix(".md").read_text(encoding="utf-8") == report.markdown(results.read(path))
    readme, stored = ROOT / "README.md", results.read(results.FOLDER / "suite_x86_64_cpu_vit_b.json")
    assert report.readme_table(stored) in readme.read_text(encoding="utf-8")
    assert heading(stored) in readme.read_text(encoding="utf-8")


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true"])
def test_an_int8_backbone_is_compared_with_its_own_weights_in_float32(precision):
    pytest.importorskip("torchao", reason="int8 needs a torchao for this torch", exc_type=ImportError)
    name = "ours, int8 backbone"
    for case in ("step", "evaluation"):
        (row,) = measure.measure(spec(case, precision), CPU, contenders=(name,))
        assert row["ms"] > 0, row["reason"]
    bench = Workbench(spec("step"), CPU, "model")
    learner = CONTENDERS[name].make(bench.setting)
    learner.module.train()
    found, original = bench.results(learner), bench.setting.mixture()
    learner.mixture = original
    truth = bench.expected(learner, dropout=True)["output"]
    assert 1e-3 < torch.linalg.vector_norm(found["output"] - truth) / torch.linalg.vector_norm(truth) < 0.05
