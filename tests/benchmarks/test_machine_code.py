"""The model of what kernels cost: reading machine code, the arithmetic of bytes and waves, its file."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.machine_code import results as files
from benchmarks.machine_code import step
from benchmarks.machine_code.ahead_of_time import Compiled, Launch, launches, preparing
from benchmarks.machine_code.cases import Case, rows_of
from benchmarks.machine_code.chips import CHIPS
from benchmarks.machine_code.model import estimate, find_trips, programs_at_once
from benchmarks.machine_code.sass import Code
from benchmarks.machine_code.schedule import duration
from benchmarks.machine_code.traffic import Traffic, traffic
from mosa_fast.ops.triton_tiles import Tile

H100 = CHIPS["H100"]
M, D, R = 50_432, 768, 64


def sass(*lines):
    """Instructions as the disassembler prints them, 16 bytes each; the code ends in a branch to itself."""
    end = len(lines) * 16
    lines = [*lines, f"BRA {end:#x}"]
    return "".join(f"        /*{16 * n:04x}*/   {line} ;   /* 0x0 */\n" for n, line in enumerate(lines))


LOOPS = sass(
    "MOV R1, R2",
    "FFMA R3, R3, R4, R5",  # 0x10: the outer loop
    "LDS.128 R8, [R1]",  # 0x20: the inner one
    "HMMA.16816.F32.BF16 R12, R8, R10, R12",
    "@P0 BRA 0x20",
    "MUFU.EX2 R6, R7",
    "@!P1 BRA 0x10",
    "EXIT",
)


class TestMachineCode:
    def test_loops_and_what_is_in_them(self):
        code = Code.parse(LOOPS)
        assert len(code.instructions) == 8
        assert [(code.depth(loop), code.inside(loop)) for loop in code.loops] == [(0, 6), (1, 3)]

    def test_instructions_by_pipe_times_the_trips_of_their_loops(self):
        found = Code.parse(LOOPS).by_pipe((2, 5))
        assert found == {
            "alu": 1,
            "fma": 2,
            "memory": 10,
            "tensor": 10,
            "mufu": 2,
            "control": 10 + 2 + 1,
            "multiplications": 10 * 16 * 8 * 16,
            "wavefronts": 10 * 4,
        }

    def test_a_warpgroups_product_is_shared_out_among_its_warps(self):
        (product,) = Code.parse(sass("HGMMA.64x32x16.F32.BF16 R24, R72, gdesc[UR8], R24, gsb0")).instructions
        assert product.multiplications * 4 == 64 * 32 * 16

    @pytest.mark.parametrize(("loops", "trips"), [(((2, ((5, ()),)),), (2, 5)), (((2, ((5, ()),)), (3, ())), (2, 5))])
    def test_trips_are_those_declared_but_for_loops_that_were_unrolled(self, loops, trips):
        once = 16 * 8 * 16 * 4  # of one instruction by four warps
        moved = Traffic(0, 0, loops=loops, products=(6 * once, once))  # of the ten, four are the second, repeated
        assert find_trips(Code.parse(LOOPS), moved, 4, "kernel") == trips

    @pytest.mark.parametrize(
        ("loops", "products"),
        [(((2, ()),), (1,)), (((2, ((5, ()),)),), (7,)), (((2, ()), (5, ())), (10 * 16 * 8 * 16 * 4,))],
    )
    def test_other_loops_than_those_declared_are_an_error(self, loops, products):
        with pytest.raises(ValueError, match="kernel has loops"):
            find_trips(Code.parse(LOOPS), Traffic(0, 0, loops=loops, products=products), 4, "kernel")


class TestSchedule:
    def test_a_load_that_is_used_at_once_is_waited_for_in_every_iteration(self):
        code = Code.parse(sass("LDG.E R4, [R2]", "FADD R5, R4, R5", "@P0 BRA 0x0", "EXIT"))
        found = duration(code, (10,), issue=2.0, load=500.0, copy=0.0)
        iteration = 2 + 500 + 2  # issue the load, have its data, branch
        assert found.cycles == 10 * iteration + 2
        assert found.exposed == 500 - 2 + 2  # what the first iteration waits, and the exit

    def test_what_surrounds_an_inner_loop_is_exposed(self):
        code = Code.parse(sass("FADD R1, R1, R2", "FADD R1, R1, R2", "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT"))
        found = duration(code, (3, 10), issue=2.0, load=0.0, copy=0.0)
        assert (found.cycles, found.exposed) == (3 * (2 + 10 * 4 + 2) + 2, 3 * (2 + 2) + 2)

    def test_of_nested_loops_the_longest_one_streams(self):
        code = Code.parse(sass("FADD R1, R1, R2", "FADD R1, R1, R2", "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT"))
        found = duration(code, (10, 3), issue=2.0, load=0.0, copy=0.0)
        assert (found.exposed, found.exposed_instructions) == (2, 1)  # the exit

    def test_a_loop_that_was_unrolled_streams(self):
        copy = ["LDGSTS.E.128 [R1], [R2]", "LDGDEPBAR"]
        work = ["DEPBAR.LE SB0, 0x1", *["FADD R6, R6, R7"] * 300]
        code = Code.parse(sass(*copy, *copy, *work, *copy, *work, "DEPBAR.LE SB0, 0x0", "EXIT"))
        found = duration(code, (), issue=2.0, load=0.0, copy=500.0)
        # what comes before the first copies are there, and after the last ones
        assert found.exposed == (3 * 2 + 500 - 2 * 2 + 2) - 2 + 2
        assert found.exposed_instructions == 4 + 1 + 1

    def test_what_a_loop_would_copy_for_iterations_that_do_not_come_is_not_waited_for(self):
        body = ["DEPBAR.LE SB0, 0x0", "FADD R6, R6, R7", "LDGSTS.E.128 [R1], [R2]", "LDGDEPBAR", "@P0 BRA 0x0"]
        code = Code.parse(sass(*body, "DEPBAR.LE SB0, 0x0", "EXIT"))
        found = duration(code, (3,), issue=2.0, load=0.0, copy=500.0)
        assert found.cycles == 3 * 5 * 2 + 2 * (500 - 3 * 2) + 2 * 2

    def test_a_load_that_is_used_an_iteration_later_is_hidden(self):
        code = Code.parse(sass("FADD R5, R4, R5", "LDG.E R4, [R2]", *["FADD R6, R6, R7"] * 300, "@P0 BRA 0x0", "EXIT"))
        assert duration(code, (10,), issue=2.0, load=500.0, copy=0.0).cycles == 10 * 303 * 2 + 2

    @pytest.mark.parametrize(("ahead", "waits"), [(0, True), (1, False)])
    def test_copies_are_waited_for_when_their_group_is_needed(self, ahead, waits):
        body = ["LDGSTS.E.128 [R1], [R2]", "LDGDEPBAR", f"DEPBAR.LE SB0, {ahead:#x}", *["FADD R6, R6, R7"] * 300]
        code = Code.parse(sass(*body, "@P0 BRA 0x0", "EXIT"))
        cycles = duration(code, (10,), issue=2.0, load=0.0, copy=500.0).cycles
        assert cycles == 10 * 304 * 2 + 2 + (10 * (500 - 4) if waits else 0)


def of_adapter(kind, chip=H100, images=128):
    """A call at M = 50,432, and its launches by the kernels' names."""
    call = Case(kind, D, R, images).call()
    return call, {launch.name: launch for launch in launches(call, chip.architecture, chip.multiprocessors)}


class TestTraffic:
    @pytest.mark.parametrize(("kind", "stream", "skip"), [("plain", 2, 2), ("autocast", 4, 2)])
    def test_the_plan_is_that_of_the_design(self, kind, stream, skip):
        """Forward reads x and skip and writes the output; backward reads its gradient and x twice and writes x's."""
        call, launched = of_adapter(kind)
        assert call.out_rows == M
        planned = sum(traffic(call, launch).planned for launch in launched.values())
        assert planned == M * D * (7 * stream + skip)

    def test_every_program_reads_the_weights_again(self):
        call, launched = of_adapter("plain")
        forward = traffic(call, launched["sparse_adapter_fwd_kernel"])
        # both projections as they were prepared, in bfloat16; two vectors of r and one of D
        assert forward.shared == 2 * D * R * 2 + 4 * (2 * R + D)
        # x for the second pass, whose 64 rows a program must stay in the cache
        assert (forward.again, forward.span) == (M * D * 2, 64 * D * 2)

    def test_weights_are_prepared_once_for_all_layers(self):
        call, layers = Case("plain", D, R).call(), 12
        (launch,) = preparing(call, layers, H100.architecture)
        moved = traffic(call, launch)
        assert moved.streamed == layers * D * R * (4 + 4 + 1)
        assert moved.again == layers * D * R * (4 + 1)  # for the other view: the dense projection has one slot
        assert moved.written == layers * (3 * D * R * 2 + 4 * (2 * R + 2 * D))

    def test_a_fork_reads_x_once_from_memory(self):
        call, launched = of_adapter("fork")
        forward = traffic(call, launched["sparse_adapter_fwd_kernel"])
        assert forward.streamed == 2 * (M // 2) * D * 2
        assert forward.planned == forward.streamed + M * D * 2

    def test_a_kernel_that_nothing_is_said_of_is_an_error(self):
        def new_kernel():
            pass

        launch = Launch(SimpleNamespace(fn=new_kernel), 1, Tile(16, 16), {})
        with pytest.raises(ValueError, match="new_kernel: what it moves is to be declared in"):
            traffic(Case("plain", D, R).call(), launch)


STRAIGHT = Compiled("kernel", Tile(128, 64, 8), shared=100 * 1024, registers=200, sass=sass(*["FADD R1, R2, R3"] * 700))


def modelled(programs, chip=H100, compiled=STRAIGHT, **moved):
    def kernel():
        pass

    launch = Launch(SimpleNamespace(fn=kernel), programs, compiled.tile, {})
    return estimate(launch, compiled, Traffic(**{"streamed": 0, "written": 0} | moved), chip)


class TestModel:
    @pytest.mark.parametrize(
        ("registers", "shared", "warps", "programs"),
        [
            (255, 1024, 8, 1),
            (128, 1024, 8, 2),
            (96, 1024, 8, 2),
            (96, 1024, 4, 5),
            (32, 113 * 1024, 4, 2),
            (16, 0, 1, 32),
        ],
    )
    def test_programs_at_once_on_a_multiprocessor(self, registers, shared, warps, programs):
        assert programs_at_once(Compiled("kernel", Tile(64, 64), shared, registers), warps, H100) == programs

    def test_half_a_wave_takes_as_long_as_a_whole_one(self):
        launch = H100.launch * 1e6
        one, half_more, two = (modelled(programs).us - launch for programs in (132, 198, 264))
        assert half_more == pytest.approx(two)
        assert two == pytest.approx(2 * one, abs=0.1)

    def test_memory_takes_its_bytes_at_its_bandwidth(self):
        found = modelled(132, streamed=3_000_000_000, planned=3_000_000_000)
        assert (found.dram_us, found.copy_us, found.bound) == (1000.0, 1000.0, "DRAM")
        assert found.us == pytest.approx(1000 + found.exposed_us + 2, abs=0.2)

    def test_rows_that_do_not_stay_in_the_cache_are_read_again(self):
        plain = modelled(396, streamed=M * D * 2, again=M * D * 2, span=128 * D * 2)
        stream = modelled(396, streamed=M * D * 4, again=M * D * 4, span=128 * D * 4)
        assert plain.kept_in_l2 == 1
        # 132 programs x 128 rows x 768 x 4 bytes are 52 MB, of which 60 % of 50 MiB stay
        assert stream.kept_in_l2 == pytest.approx(0.6 * 50 * 2**20 / (132 * 128 * D * 4), abs=0.01)
        assert stream.dram_megabytes == pytest.approx(M * D * 4 * (2 - stream.kept_in_l2) / 1e6, rel=0.01)

    def test_assumptions_matter(self):
        slow = modelled(132, replace(H100, dram=H100.dram / 2), streamed=10**9)
        assert slow.dram_us == pytest.approx(2 * modelled(132, streamed=10**9).dram_us, abs=0.2)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here")
def test_a_call_is_compiled_and_counted():
    rows = rows_of(Case("autocast", 384, 16, images=2), H100)
    assert [(row["kernel"], row["layers"]) for row in rows[:4]] == [
        ("prepare_weights_kernel", 12),
        *((kernel, 1) for kernel in files.PARTS.values()),
    ]
    for row in rows:
        assert sum(row["by_pipe"].values()) == row["instructions"] > row["outside_loops"]
        assert row["registers"] > 0 == row["spill_bytes"]
        assert row["us"] > 0
    assert rows[0]["layer_us"] == pytest.approx(sum(row["us"] / row["layers"] for row in rows), abs=0.1)


class TestStep:
    def test_products_take_their_operations_and_the_rest_its_bytes(self):
        a, b = torch.empty(64, 32, device="meta"), torch.empty(32, 16, device="meta")
        with step.Count(H100, step.Utilisation()) as counted:
            c = a @ b
            torch.ops.aten._unsafe_view(c, [-1]).view(16, 64).relu()
        assert counted.operations == 2 * 64 * 32 * 16
        moved = 4 * (64 * 32 + 32 * 16 + 64 * 16) + 2 * 4 * 64 * 16  # too small for the product's operations to matter
        assert counted.seconds == pytest.approx(moved / H100.dram)

    def test_an_autocast_step_moves_more(self):
        plain, autocast = (step.count_step(H100, step.PRECISION[kind], 2, 2) for kind in ("plain", "autocast"))
        assert autocast.seconds > plain.seconds
        assert autocast.operations == plain.operations
        # forward of the frozen weights for both views (the first block once), and backward without weight gradients
        blocks, tokens = 12 * 12 * D**2, 2 * 197
        assert 3.5 * blocks * 2 * tokens < plain.operations < 4.5 * blocks * 2 * tokens
