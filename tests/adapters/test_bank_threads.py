"""One bank and several threads."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_bank import trained_vit
from tiny_vit import make_tiny_vit

from mosa_fast.adapters.bank import AdapterBank
from mosa_fast.adapters.gate import Gate

SECONDS = 30  # after which something is taken to wait for ever


@pytest.fixture
def bank():
    return AdapterBank(make_tiny_vit(), {"a": trained_vit(5, 1), "b": trained_vit(5, 2)})


def assert_same(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_passes_of_several_threads_run_at_once_each_with_its_own_tasks(bank, images):
    alone = {name: bank(images, tasks=name) for name in "ab"}
    barrier = threading.Barrier(2)

    def meet(*_):
        barrier.wait(SECONDS)

    bank.blocks[0].register_forward_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        together = {name: pool.submit(bank, images, tasks=name) for name in "ab"}
        for name, logits in together.items():
            assert_same(logits.result(SECONDS), alone[name])


@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_change_waits_for_the_passes_that_run(bank, images, change):
    alone = bank(images, tasks="b")
    inside, go_on = threading.Event(), threading.Event()

    def wait_inside(*_):
        inside.set()
        assert go_on.wait(SECONDS)

    hook = bank.blocks[0].register_forward_hook(wait_inside)
    arguments = ("c", trained_vit(9, 3, bottleneck=12)) if change == "add" else ("a",)
    with ThreadPoolExecutor(2) as pool:
        logits = pool.submit(bank, images, tasks="b")
        assert inside.wait(SECONDS)
        changed = pool.submit(getattr(bank, change), *arguments)
        with pytest.raises(TimeoutError):
            changed.result(0.2)
        assert bank.tasks == ("a", "b")
        go_on.set()
        assert_same(logits.result(SECONDS), alone)
        changed.result(SECONDS)
    hook.remove()
    assert bank.tasks == (("a", "b", "c") if change == "add" else ("b",))
    assert_same(bank(images, tasks="b")[:, :5], alone)


def test_a_pass_that_changes_its_own_tasks_is_refused(bank, images):
    hook = bank.blocks[0].register_forward_hook(lambda *_: bank.remove("a"))
    with pytest.raises(RuntimeError, match="in the middle of its own forward pass"):
        bank(images, tasks="b")
    hook.remove()
    bank.remove("a")


def test_a_change_that_waits_goes_before_new_passes_and_after_those_within_one_that_runs():
    gate, order = Gate(), []

    def go(name, way):
        with way():
            order.append(name)

    change = threading.Thread(target=go, args=("change", gate.changing))
    late = threading.Thread(target=go, args=("late", gate.passing))
    with gate.passing():
        for thread in (change, late):
            thread.start()
            thread.join(0.2)
            assert thread.is_alive()
        go("nested", gate.passing)
    for thread in (change, late):
        thread.join(SECONDS)
    assert order == ["nested", "change", "late"]


def test_a_change_that_fails_lets_passes_through(bank, images):
    with pytest.raises(ValueError, match="no task 'cat'"):
        bank.remove("cat")
    bank(images, tasks="a")


def test_banks_are_compiled_exported_copied_and_pickled(bank, images):
    names = ["a", "b", "b", "a"]
    logits = bank(images, tasks=names)
    compiled = torch.compile(bank, backend="eager", fullgraph=True)
    exported = torch.export.export(bank, (images,), {"tasks": names}).module()
    for other in (compiled, exported, copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert_same(other(images, tasks=names), logits)
