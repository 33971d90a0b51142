"""A cluster of two workers on this machine, one of which dies in the middle of its run."""

import json
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from mosa_fast.sweep import main

LONG = ["--data.shots=2", "--optim.batch_size=10", "--optim.epochs=60", "--eval_every=60"]


def test_without_ray_the_engine_says_how_to_get_it(monkeypatch, command, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, error = command(main, "--configs", "digits", "--engine", "ray", "--out", tmp_path)
    assert code == 2
    assert 'needs the package ray: pip install "mosa_fast[ray]"' in error


@pytest.fixture
def cluster(monkeypatch):
    """A head that runs nothing, and two workers of one CPU each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # on a busy machine Ray's 15 would take forever
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, workers
    import ray

    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_run_of_a_worker_that_dies_is_resumed_and_none_is_lost_or_done_twice(cluster, tmp_path, command):
    nodes, workers = cluster
    folder = tmp_path / "digits" / "linear"
    before = {}

    def kill_one_when_both_are_in_the_middle():
        runs = [folder / f"seed{seed}" for seed in (1, 2)]
        while not all(list(run.glob("checkpoint/*.pt")) for run in runs):
            time.sleep(0.05)
        nodes.remove_node(workers[0], allow_graceful=False)
        before.update({run: (run / "metrics.jsonl").read_text().splitlines() for run in runs})

    killer = threading.Thread(target=kill_one_when_both_are_in_the_middle)
    killer.start()
    records = tmp_path / "records.jsonl"
    arguments = ["--configs", "digits/linear", "--seeds", "1,2,3", "--engine", "ray", "--out", tmp_path]
    code, out, error = command(main, *arguments, "--records", records, *LONG)
    killer.join()
    assert code == 0, error
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert sorted(line["seed"] for line in lines) == [1, 2, 3]
    for run, rows in before.items():
        after = (run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["epoch"] for row in after] == list(range(1, 61))
        assert rows, f"{run} had not begun"
        # What was saved then, times and all, is what is there now; the last row may be younger than the checkpoint.
        assert after[: len(rows) - 1] == rows[:-1]
        assert Path(run / "summary.json").is_file()
    # What is left of it is enough: nothing is asked of the cluster, and the table is the same.
    shutil.rmtree(tmp_path / "digits")
    again = command(main, *arguments, "--records", records, *LONG)
    assert again[:2] == (0, out)
    assert not (tmp_path / "digits").exists()
