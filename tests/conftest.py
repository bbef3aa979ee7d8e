"""Shared fixtures: the real command, the embedded testbed and a block of its activations."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run_script(*args, cwd=ROOT, timeout=1800) -> subprocess.CompletedProcess:
    """The real command, as a user gives it."""
    return subprocess.run(
        [sys.executable, str(ROOT / args[0]), *map(str, args[1:])],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


SLOW_FILES = {  # real commands, kills, whole runs and LMs of many kinds
    "test_command",
    "test_evaluation",
    "test_hub",
    "test_lms",
    "test_resume",
    "test_run",
    "test_run_folder",
    "test_saebench_parity",
    "test_testbeds",
    "test_trainer",
}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def micro():
    from sae_separation import testbeds

    return testbeds.load("micro")


@pytest.fixture(scope="session")
def activations(micro):
    """One block of real activations, forget and retain."""
    from experiment import ActivationStream

    return ActivationStream(micro, context_size=128, buffer_tokens=16_384, seed=5).next_block()
