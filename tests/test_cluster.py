"""docs/array.slurm, with stand-ins for Slurm's commands: what a task runs, and after which ends it is
requeued. (docs/cluster.md says what was seen on Slurm itself.)"""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SRUN = 'echo "srun $OMP_NUM_THREADS: $*"\nexit $ENDS_WITH\n'
SQUEUE = '[[ "$*" == *--jobs=77_3* ]] || exit 1\n'  # another number may stand for several tasks


def task(tmp_path: Path, ends_with: int, state: str, **environment) -> tuple[int, list[str]]:
    """Exit code of one task of the array and what it has Slurm do, where the run ends with a code and squeue
    then tells the job's state and reason."""
    commands = {"srun": SRUN, "squeue": SQUEUE + f'echo "{state}"\n', "scontrol": 'echo "scontrol $*"\n'}
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    slurm = {"ARRAY_JOB_ID": "77", "ARRAY_TASK_ID": "3", "JOB_NAME": "study", "CPUS_PER_TASK": "2"}
    slurm = {f"SLURM_{name}": value for name, value in slurm.items()}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ENDS_WITH": str(ends_with)}
    argv = ["bash", str(ROOT / "docs/array.slurm"), "--seeds", "0", "1"]
    done = subprocess.run(argv, env=path | slurm | environment, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (0, "RUNNING None", False),
        (1, "RUNNING None", False),
        (2, "RUNNING None", False),
        (137, "RUNNING None", False),  # out of memory
        (138, "RUNNING None", True),  # the signal before the time limit
        (143, "RUNNING None", True),  # preempted, in its grace time
        (143, "COMPLETING TimeLimit", True),
        (143, "COMPLETING None", False),  # scancel, or preempted without a grace time: Slurm requeues it
        (138, "COMPLETING None", False),  # scancel after the signal
    ],
)
def test_a_task_is_requeued_where_it_would_go_on_and_slurm_does_not(code, state, requeued, tmp_path):
    ended, lines = task(tmp_path, code, state)
    assert ended == code and lines[1:] == ["scontrol requeue 77_3"] * requeued


def test_a_task_that_makes_no_progress_is_not_requeued_for_ever(tmp_path):
    assert len(task(tmp_path, 138, "RUNNING None", SLURM_RESTART_COUNT="49")[1]) == 2
    assert len(task(tmp_path, 138, "RUNNING None", SLURM_RESTART_COUNT="50")[1]) == 1


@pytest.mark.parametrize(("together", "folders"), [("1", "study/run_3"), ("2", "study/run_6 study/run_7")])
def test_a_task_trains_its_runs_with_the_options_given(together, folders, tmp_path):
    (line,) = task(tmp_path, 0, "RUNNING None", TOGETHER=together)[1]
    assert line == f"srun 2: --cpus-per-task=2 python experiment.py --out_dir {folders} --seeds 0 1"
