"""Runs that are killed with SIGKILL, at any moment and after any change to the disk, end as one in peace does.

`python benchmarks/chaos.py --kills 300 --every-write` does the same for longer.
"""

import sys
from pathlib import Path

import pytest
from chaos import killed_at_changes, trials
from killing import Processes, Runs, started

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform == "win32", reason="needs processes that start at once"),
    pytest.mark.timeout(400),  # on a machine that is busy
]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    return started(tmp_path_factory.mktemp("server") / "server.log")


def test_kills_at_any_moment(processes: Processes, tmp_path: Path) -> None:
    quick = {"steps": 6, "batch_size": 1, "training_dtype": "bf16", "data.resolution": 32, "sampling.prompts": "[]"}
    ended = trials(processes, tmp_path, kills=10, most=3, changed=quick)
    assert {trial.settings["adapter"] for trial in ended} == {"LoRA", "LoHa", "LoKr", "OFT"}
    assert sum(trial.kills.total() for trial in ended) >= 10
    assert not [problem for trial in ended for problem in trial.problems]


def test_kills_after_changes_to_the_disk(processes: Processes, tmp_path: Path) -> None:
    trial = killed_at_changes(Runs(processes, tmp_path), first=3, stride=16)
    assert trial.kills["while writing"] > 0
    assert not trial.problems
