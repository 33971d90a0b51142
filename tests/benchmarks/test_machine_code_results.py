"""The file of the kernels' counts, and the command line that makes and compares it."""

import json
from dataclasses import asdict
from itertools import product

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.machine_code import __main__ as command_line
from benchmarks.machine_code import results as files
from benchmarks.machine_code import step
from benchmarks.machine_code.cases import all_cases, checked_cases
from benchmarks.machine_code.chips import CHIPS
from benchmarks.machine_code.mlp_form import count_adapted, count_frozen, mlp_rows

M, D, R = 50_432, 768, 64
ROW = {
    **{"kind": "plain", "chip": "H100", "width": D, "bottleneck": R, "rows": M, "kernel": "forward"},
    **{"triton": "3.8.0", "issued_millions": 100.0},
}


class TestCompare:
    @pytest.mark.parametrize(("count", "grown"), [(90.0, False), (102.9, False), (103.1, True)])
    def test_three_percent_more_instructions_are_too_many(self, count, grown):
        assert files.compare([ROW | {"issued_millions": count}], [ROW])[1] is grown

    def test_another_triton_is_not_compared(self):
        lines, grown = files.compare([ROW | {"issued_millions": 200.0, "triton": "3.9.0"}], [ROW])
        assert not grown
        assert "not compared, Triton 3.8.0" in lines[0]

    def test_a_new_kernel_is_no_growth(self):
        lines, grown = files.compare([ROW | {"kernel": "prepare"}], [ROW])
        assert (lines, grown) == (["plain H100 768 64 50432 prepare: new"], False)


@pytest.fixture(scope="module")
def stored():
    return files.read(files.RESULTS)


class TestStoredResults:
    def test_every_call_on_every_chip_as_it_is_assumed(self, stored):
        assert stored["chips"] == json.loads(json.dumps([asdict(chip) for chip in CHIPS.values()]))
        calls = {
            (case.kind, chip.name, case.width, case.bottleneck, case.images * 2 * 197)
            for case in all_cases()
            for chip in CHIPS.values()
        }
        assert files.layers(stored["rows"]).keys() == calls
        assert {(tax["kind"], tax["chip"]) for tax in stored["taxes"]} == {
            (kind, chip.name) for kind in step.PRECISION for chip in CHIPS.values()
        }

    def test_adapters_inside_the_mlp_are_as_they_are_counted_now(self, stored):
        calls = {(row["kind"], row["chip"], row["rows"]) for row in stored["mlp_form"]}
        assert calls == set(product(step.PRECISION, CHIPS, (M // 2, M)))
        for row in stored["mlp_form"]:
            parts = (row[f"{name}_us"] for name in ("products", "passes", "dropout", "launches"))
            assert row["layer_us"] == pytest.approx(sum(parts), abs=0.3)
        now = next(mlp_rows([CHIPS["H100"]], step.Utilisation()))
        assert stored["mlp_form"][0]["layer_us"] == pytest.approx(now["layer_us"], rel=0.05)  # for every torch

    def test_ratios_follow_from_the_rows(self, stored):
        for rows in files.layers(stored["rows"]).values():
            layer, copy = sum(row["us"] / row["layers"] for row in rows), sum(row["copy_us"] for row in rows)
            assert {row["ratio_to_copy"] for row in rows} == {round(layer / copy, 3)}

    def test_the_tables_are_those_of_the_file(self, stored):
        assert files.RESULTS.with_suffix(".md").read_text(encoding="utf-8") == files.markdown(stored)
        assert files.RESULTS.with_name("machine_code_kernels.png").is_file()

    def test_what_ci_compares_is_there(self, stored):
        assert {case.kind for case in checked_cases()} <= {row["kind"] for row in stored["rows"]}


class TestInsideTheMLP:
    @pytest.mark.parametrize("kind", step.PRECISION)
    def test_it_does_the_products_of_the_mlp_and_six_skinny_ones(self, kind):
        chip, utilisation, images = CHIPS["H100"], step.Utilisation(), 2
        whole, frozen = (count(kind, images, chip, utilisation) for count in (count_adapted, count_frozen))
        tokens = 2 * images * 197
        assert frozen.operations == 4 * 2 * tokens * D * 4 * D
        skinny = (whole.operations - frozen.operations) / (2 * tokens * D * R)
        assert 6 <= skinny < 6.1  # and what is as small as the weights

    def test_an_operation_in_place_reads_and_writes(self):
        a, b, out = (torch.empty(64, 16, device="meta") for _ in range(3))
        for run, passes in ((lambda: a.add_(b), 3), (lambda: torch.add(a, b, out=out), 3), (lambda: a.view(16, 64), 0)):
            with step.Count(CHIPS["H100"], step.Utilisation()) as counted:
                run()
            assert counted.seconds == pytest.approx(passes * 4 * 64 * 16 / CHIPS["H100"].dram)
            assert counted.launches == bool(passes)


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _counted(self, monkeypatch, stored):
        """The stored rows stand for what this Triton would compile, with so many times the instructions."""
        self.times = 1.0
        rows = [row for row in stored["rows"] if row["kind"] == "plain" and row["width"] == D]

        def count(cases, chips, workers):
            for found in files.layers(rows).values():
                yield [row | {"issued_millions": row["issued_millions"] * self.times} for row in found]

        monkeypatch.setattr(command_line, "count", count)
        monkeypatch.setattr(command_line.triton, "__version__", rows[0]["triton"])

    @pytest.mark.parametrize(("times", "expected"), [(1.0, 0), (1.05, 1)])
    def test_compare_fails_where_instructions_grew(self, command, times, expected):
        self.times = times
        code, output, _ = command(command_line.main, "--checked", "--compare", files.RESULTS)
        assert code == expected
        assert "A model: nothing here was timed" in output
        assert ("GROWN" in output) is bool(expected)

    def test_another_triton_is_not_compared(self, command, monkeypatch):
        monkeypatch.setattr(command_line.triton, "__version__", "3.0.0")
        monkeypatch.setattr(command_line, "count", None)  # nothing is compiled
        code, output, _ = command(command_line.main, "--checked", "--compare", files.RESULTS)
        assert code == 0
        assert output.startswith("Not compared")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--compare", "no_such_file.json"), "is not a count of machine code"),
            (("--dram", "2.0"), "choose it with --chips"),
            (("--chips", "H100", "--dram", "0"), "must be positive"),
            (("--checked", "--write"), "--write stores all calls"),
        ],
    )
    def test_mistakes_are_one_line(self, command, arguments, message):
        code, _, errors = command(command_line.main, *arguments)
        assert code == 2
        assert message in errors.splitlines()[-1]

    def test_assumptions_are_arguments(self, command):
        code, output, _ = command(command_line.main, "--chips", "H100", "--dram", "2.5", "--clock", "1.6")
        assert code == 0
        assert "at 1.6 GHz, 2.5 TB/s from DRAM" in output
