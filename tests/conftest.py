"""Shared fixtures: the embedded testbed, and one short real run that many tests look at."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run_script(*args, cwd=ROOT, timeout=1800) -> subprocess.CompletedProcess:
    """The real command, as a user gives it."""
    return subprocess.run([sys.executable, str(ROOT / args[0]), *map(str, args[1:])], cwd=cwd, capture_output=True, text=True, timeout=timeout)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Under `pytest -n 2 --dist loadgroup` a file's tests go to one process, and all that look at the short runs to one."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("short_runs" if "short_runs" in item.fixturenames else item.path.name))


@pytest.fixture(scope="session")
def micro():
    import testbeds

    return testbeds.load("micro")


@pytest.fixture(scope="session")
def short_runs(tmp_path_factory) -> Path:
    """A folder with run_0 and run_1 of the plan, two seeds, trained for 300 steps on one LM pass."""
    folder = tmp_path_factory.mktemp("runs")
    done = run_script("experiment.py", "--out_dir", folder / "run_0", folder / "run_1", "--seeds", 0, 1, "--tokens", 300 * 2048, "--testbed=micro")
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def activations(micro):
    """One block of real activations, forget and retain."""
    from experiment import ActivationStream

    return ActivationStream(micro, context_size=128, buffer_tokens=16_384, seed=5).next_block()
