"""Shared fixtures: the real command, the embedded testbed, whole or small, and a block of its activations."""

import copy
import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def seconds_of_children() -> float:
    """Processor time of the processes started here that have ended: what a command takes on any machine, busy
    or not."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_script(*args, cwd=ROOT, timeout=1800) -> subprocess.CompletedProcess:
    """The real command, as a user gives it."""
    return subprocess.run(
        [sys.executable, str(ROOT / args[0]), *map(str, args[1:])],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# whole runs, kills, a hub that does not answer: slow by file; elsewhere a slow test carries the mark itself
SLOW_FILES = {"test_hub", "test_resume", "test_run", "test_trainer"}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def micro():
    from sae_separation import testbeds

    return testbeds.load("micro")


SMALL_SWEEP = {"retain_thresholds": [0.01], "n_features_list": [10, 50], "multipliers": [10]}
SMALL_ROW = f"""
import dataclasses, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from sae_separation.specs import SPECS
SPECS["micro"] = dataclasses.replace(SPECS["micro"], n_held_out=16, sweep={SMALL_SWEEP!r})
sys.argv[0] = {str(ROOT / "experiment.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def small_command(*args) -> list[str]:
    """Argv of the real command, but for a small sweep and few contexts on the embedded testbed."""
    return [sys.executable, "-c", SMALL_ROW, *map(str, args)]


def run_here(*args) -> int:
    """The command in this process: its exit code."""
    import experiment
    from sae_separation.errors import WrongRequest, tell

    try:
        command, configs = experiment.unfinished(*experiment.parse_command([str(a) for a in args]))
    except WrongRequest as error:
        return tell(error, began=False)
    return experiment.main(command, configs) if configs else 0


@pytest.fixture(scope="session")
def small_micro(tmp_path_factory) -> dict[str, tuple[str, ...]]:
    """Settings of the embedded testbed with 1,000 documents of the 27,000 of each domain, and 40 of its 620
    questions."""
    from micro_pythia.world import FORGET, RETAIN, World

    folder = tmp_path_factory.mktemp("small_micro")
    for name, subjects in (("forget", (FORGET,)), ("retain", RETAIN)):
        documents = World(0).documents(1000, subjects, seed=1)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    questions = json.loads((ROOT / "micro_pythia/questions.json").read_text())
    (folder / "asked.json").write_text(json.dumps(questions[:20] + questions[-20:]))
    files = {"forget_text": "forget.jsonl", "retain_text": "retain.jsonl", "questions": "asked.json"}
    return {setting: (str(folder / name),) for setting, name in files.items()}


@pytest.fixture(scope="module")
def facts_testbed(tmp_path_factory):
    """A small LM that was taught facts about entities (tiny_facts.py)."""
    import tiny_facts

    return tiny_facts.testbed(tmp_path_factory.mktemp("facts"))


@pytest.fixture(scope="module")
def facts_evaluator(facts_testbed):
    import tiny_facts

    return tiny_facts.evaluator(facts_testbed)


@pytest.fixture(scope="session")
def activations(micro):
    """One block of real activations, forget and retain."""
    from experiment import ActivationStream

    return ActivationStream(micro, context_size=128, buffer_tokens=16_384, seed=5).next_block()


@pytest.fixture
def ahead(monkeypatch):
    """Blocks are made ahead on the CPU, too."""
    monkeypatch.setattr("sae_separation.stream.AHEAD_ON", ("cpu", "cuda"))


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request) -> torch.device:
    """The CPU, and a GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture
def block(activations, device):
    """The activations on a device."""
    from experiment import ActivationBlock

    return ActivationBlock(activations.x.to(device), activations.forget.to(device))


@pytest.fixture
def testbed(micro, device):
    """The embedded testbed with its LM on a device."""
    return replace(micro, lm=copy.deepcopy(micro.lm).to(device))
