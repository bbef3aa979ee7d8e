"""What is imported is declared, runs install nothing that tests alone need, and some Pythons are refused."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDERS = (".", "sae_separation", "sae_separation/evals", "micro_pythia", "studies", "benchmarks", "docs")
FOLDERS += ("smollm2_taught",)
RUN = [file for folder in FOLDERS for file in (ROOT / folder).glob("*.py")]
TESTS = [*(ROOT / "tests").glob("*.py")]
OWN = {file.stem for file in RUN + TESTS} | {"sae_separation", "micro_pythia", "studies", "benchmarks"}
OWN |= {"smollm2_taught"}
REQUIREMENTS = ["requirements.txt", "requirements-no-deps.txt"]  # of a run
PEERS = {"dictionary_learning", "sparsify"}  # of benchmarks/requirements.txt, in an environment of their own
# an option asks for them, and says so where they are not
OPTIONAL = {"accelerate", "wandb", "sae_dashboard", "sae_probes"}


def imported(file: Path) -> set[str]:
    """Top-level names of the modules of others that a file imports, or asks pytest for."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            names |= {part.value for part in node.args if isinstance(part, ast.Constant)}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - OWN


def requirements(name: str) -> list[Requirement]:
    """Of a requirements file alone, without the files that it names."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def declared(*names: str) -> set[str]:
    return {canonicalize_name(r.name) for name in names for r in requirements(name)}


@cache
def installed_modules() -> Mapping[str, list[str]]:
    """Every module that is installed, and the distributions that hold it."""
    return packages_distributions()


def undeclared(files: list[Path], distributions: set[str]) -> dict[str, list[str]]:
    """Modules that none of the distributions holds, and who imports them."""
    installed = installed_modules()
    missing = {}
    for file in files:
        for module in imported(file) - PEERS - OPTIONAL:
            if not distributions & {canonicalize_name(name) for name in installed.get(module, ())}:
                missing.setdefault(module, []).append(file.name)
    return missing


def test_what_runs_import_is_declared():
    assert undeclared(RUN, declared("requirements.txt")) == {}


def test_what_tests_import_is_declared():
    assert undeclared(TESTS, declared("requirements.txt", "requirements-dev.txt")) == {}


def test_an_import_that_is_not_declared_is_found(tmp_path):
    file = tmp_path / "new.py"
    file.write_text(
        "import os, filelock._api\nfrom PIL import Image\nimport no_such_module, numpy.linalg\n"
        "stats = pytest.importorskip('packaging.version')\n"
    )  # one each of: the standard library's, brought by others, not installed, declared, for tests alone
    assert set(undeclared([file], declared("requirements.txt"))) == {
        "filelock",
        "PIL",
        "no_such_module",
        "packaging",
    }


def test_what_only_tests_need_is_not_installed_for_runs():
    for_tests = declared("requirements-dev.txt")
    assert {"pytest", "pytest-xdist", "pyside6-addons"} <= for_tests
    assert not for_tests & declared("requirements.txt")
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text().splitlines()


def test_every_requirement_has_bounds():
    files = [*REQUIREMENTS, "requirements-dev.txt"]
    bounded = set()
    for requirement in (r for file in files for r in requirements(file)):
        if {specifier.operator for specifier in requirement.specifier} & {">=", "=="}:
            bounded.add(canonicalize_name(requirement.name))
    assert bounded == declared(*files)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_python_gets_one_numpy_and_saebench_of_one_release(python):
    environment = {"python_version": python}
    asked = [r for r in requirements("requirements.txt") if not r.marker or r.marker.evaluate(environment)]
    numpy = [r.specifier for r in asked if r.name == "numpy"]
    assert len(numpy) == 1 and numpy[0].contains("1.26.4") == (python != "3.13")
    assert ("sae-bench" in {r.name for r in asked}) == (python != "3.13"), "it asks pip for numpy under 2"
    (alone,) = requirements("requirements-no-deps.txt")
    assert all(r.specifier == alone.specifier for r in asked if r.name == alone.name)


@pytest.mark.parametrize("version", [(3, 8), (3, 10), (3, 14)])
def test_a_python_that_does_not_work_is_refused_in_one_line(version, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "python_version.py"))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"error: this is Python {version[0]}.{version[1]};")


@pytest.mark.parametrize("version", [(3, 11), (3, 13)])
def test_a_python_that_works_is_not_refused(version, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    runpy.run_path(str(ROOT / "python_version.py"))


def test_python_is_looked_at_before_anything_is_imported():
    """And older ones can read as far as that."""
    tree = ast.parse((ROOT / "experiment.py").read_text(), feature_version=(3, 8))
    ast.parse((ROOT / "python_version.py").read_text(), feature_version=(3, 0))
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert [alias.name for alias in first.names] == ["python_version"]


@pytest.fixture
def project(tmp_path) -> Path:
    """The Makefile with a Python that only writes down what it is asked."""
    for name in ("Makefile", *REQUIREMENTS, "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        '[ "$2" != venv ] || { mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; }\n'
        '[ "$1" != python_version.py ] || exit $(cat refusal)\n'
    )
    python.chmod(0o755)
    (tmp_path / "refusal").write_text("0")
    (tmp_path / "reproduced").mkdir()
    return tmp_path


def make(project: Path, target: str) -> tuple[int, list[str]]:
    """Exit code, and what Python was asked by it."""
    asked = project / "asked"
    asked.write_text("")
    done = subprocess.run(["make", target, "PYTHON=./python"], cwd=project, capture_output=True, text=True)
    return done.returncode, asked.read_text().splitlines()


def installs(asked: list[str]) -> list[str]:
    """The requirements files that pip was given."""
    return [name for line in asked if "pip install" in line for name in re.findall(r"-r (\S+)", line)]


def test_runs_install_what_they_need_and_tests_add_theirs_once(project):
    code, asked = make(project, "run")
    assert code == 0 and asked[0] == "python_version.py" and installs(asked) == REQUIREMENTS
    assert [line for line in asked if "requirements-no-deps.txt" in line and "--no-deps" in line]
    assert asked[-2].startswith("experiment.py --out_dir reproduced/run_0")
    assert asked[-1] == "../plot.py run_0 run_1"
    code, asked = make(project, "test")
    assert code == 0 and installs(asked) == ["requirements-dev.txt"] and "-m pytest" in asked[-1]
    for target in ("run", "study", "test", "faults", "micro"):
        code, asked = make(project, target)
        assert code == 0 and installs(asked) == [], target


def test_tests_alone_install_all_and_a_new_requirement_of_theirs_leaves_runs_alone(project):
    assert installs(make(project, "test")[1]) == [*REQUIREMENTS, "requirements-dev.txt"]
    ready = (project / ".venv/ready").stat().st_mtime
    os.utime(project / "requirements-dev.txt", (ready + 10, ready + 10))
    assert installs(make(project, "run")[1]) == []
    assert installs(make(project, "test")[1]) == ["requirements-dev.txt"]
    os.utime(project / "requirements.txt", (ready + 20, ready + 20))
    assert installs(make(project, "test")[1]) == [*REQUIREMENTS, "requirements-dev.txt"]


def test_make_refuses_a_python_that_does_not_work_before_it_makes_an_environment(project):
    (project / "refusal").write_text("2")
    code, asked = make(project, "run")
    assert code == 2 and asked == ["python_version.py"] and not (project / ".venv").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """What `pip install .` installs, built from what git tracks."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    wanted = ["*.toml", "*.txt", "*.md", "*.py", "LICENSE", "CITATION.cff"]
    wanted += ["sae_separation", "micro_pythia", "smollm2_taught"]
    listed = subprocess.run(
        ["git", "ls-files", *wanted], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split("\n"):
        if name and not name.startswith(("tests", "docs", "run_")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, out], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = out.glob("sae_separation-*-py3-none-any.whl")
    return zipfile.ZipFile(made)


def test_what_is_installed_is_all_that_a_run_needs_with_the_embedded_lm(wheel):
    tracked = [
        "git",
        "ls-files",
        "sae_separation",
        "micro_pythia",
        "smollm2_taught",
        "experiment.py",
        "plot.py",
        "python_version.py",
    ]
    done = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True)
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert installed == set(done.stdout.split())
    about = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    assert about["CITATION.cff"].endswith(".dist-info/licenses/CITATION.cff")  # as card.py looks for it
    assert "sae-separation = sae_separation.command:main" in wheel.read(about["entry_points.txt"]).decode()
    said = re.findall(r"(?m)^Requires-Dist: (.*)$", wheel.read(about["METADATA"]).decode())
    assert set(map(Requirement, said)) == set(requirements("requirements.txt"))


def test_the_console_command_is_the_script():
    code = "from sae_separation.command import main; main()"
    for argv in (["--help"], ["--out_dir=nowhere"]):
        script, command = (
            subprocess.run([sys.executable, *how, *argv], cwd=ROOT, capture_output=True, text=True)
            for how in (["experiment.py"], ["-c", code])
        )
        assert (command.returncode, command.stdout) == (script.returncode, script.stdout)
        assert command.stderr == script.stderr and (script.stdout or script.stderr)
