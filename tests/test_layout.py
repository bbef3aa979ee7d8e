"""The layout: which file imports which. `python tests/test_layout.py` writes docs/layout.md, and the figure
in CONTRIBUTING.md."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE, GUIDE = ROOT / "docs/layout.md", ROOT / "CONTRIBUTING.md"
CODE = ["python_version.py", "experiment.py", "plot.py", "sae_separation/**/*.py", "micro_pythia/*.py"]
CODE += ["smollm2_taught/*.py"]
START, END = "<!-- layout -->\n", "\n<!-- /layout -->"
TITLE = """# Layout

Which file imports which, lowest layer first: a file imports only files of lower layers as it is loaded.
In brackets: what only a function of it imports. `python tests/test_layout.py` writes this page.
"""


@cache
def files() -> dict[str, Path]:
    """The project's own files, by their names as modules."""
    found = sorted(path for pattern in CODE for path in ROOT.glob(pattern))
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in found
    ]
    return dict(zip(names, found, strict=True))


def own(name: str) -> str | None:
    """The file of ours that `import name` runs; of `package.module.thing` it is package.module's."""
    while name and name not in files():
        name = name.rpartition(".")[0]
    return name or None


def names_in(node: ast.AST, module: str) -> list[str]:
    """Dotted names that an import statement may mean."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    start = node.module or ""
    if node.level:  # relative
        is_package = files()[module].name == "__init__.py"
        above = module.split(".")[: len(module.split(".")) - node.level + is_package]
        start = ".".join([*above, *([start] if start else [])])
    return [f"{start}.{alias.name}" for alias in node.names]


class WithoutTypes(ast.NodeTransformer):
    """Takes `if TYPE_CHECKING:` out, which never runs."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imports(module: str) -> tuple[set[str], set[str]]:
    """Our modules that it imports as it is imported, and those that only a function of it imports; not what
    only type checkers import."""
    tree = WithoutTypes().visit(ast.parse(files()[module].read_text()))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {id(node) for function in functions for node in ast.walk(function)}
    at_once, later = set(), set()
    for node in ast.walk(tree):
        for name in names_in(node, module):
            if (file := own(name)) and file != module:
                (later if id(node) in late else at_once).add(file)
    return at_once, later - at_once


def layers() -> list[list[str]]:
    """Modules by layer: each imports, at once, of lower layers alone. Fails where there is a circle."""
    left = {module: imports(module)[0] for module in files()}
    found: list[list[str]] = []
    while left:
        free = sorted(module for module, needed in left.items() if not needed & left.keys())
        assert free, f"these import each other in a circle: {', '.join(sorted(left))}"
        found.append(free)
        for module in free:
            del left[module]
    return found


def figure() -> str:
    """CONTRIBUTING.md with its figure: a line a layer, the highest first."""
    lines = []
    for layer in reversed(layers()):
        names = (module.removeprefix("sae_separation.") for module in layer if module != "sae_separation")
        lines.append("    " + "  ".join(names))
    before, _, rest = GUIDE.read_text().partition(START)
    return before + START + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2]


def page() -> str:
    """docs/layout.md: a line a file, without those that neither import nor are imported."""
    used = {name for module in files() for part in imports(module) for name in part}
    lines = [TITLE]
    for number, layer in enumerate(layers()):
        lines += [f"## Layer {number}", ""]
        for module in layer:
            at_once, later = imports(module)
            if module not in used and not at_once | later and files()[module].name == "__init__.py":
                continue
            path = files()[module].relative_to(ROOT)
            needed = [*sorted(at_once), *(f"[{name}]" for name in sorted(later))]
            names = ", ".join(
                name.removeprefix("sae_separation.").replace("[sae_separation.", "[") for name in needed
            )
            lines.append(f"- `{path}`" + (f" ← {names}" if names else ""))
        lines.append("")
    return "\n".join(lines)


def test_the_page_of_the_layout_is_what_the_imports_say():
    assert PAGE.read_text() == page(), "python tests/test_layout.py writes it anew"
    assert GUIDE.read_text() == figure(), "python tests/test_layout.py writes it anew"


def test_no_import_circle_not_even_through_functions():
    left = {module: set.union(*imports(module)) for module in files()}
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"these import each other in a circle: {sorted(left)}"


def test_the_package_never_imports_the_scripts():
    package = [module for module in files() if module.startswith("sae_separation")]
    assert len(package) > 10
    for module in package:
        assert not {"experiment", "plot"} & set.union(*imports(module)), module


def test_an_import_is_found_at_once_or_later_and_relative_or_not():
    assert own("sae_separation.errors.WrongRequest") == "sae_separation.errors" and own("torch.nn") is None
    node = ast.parse("from .files import seal").body[0]
    assert names_in(node, "sae_separation.run_folder") == ["sae_separation.files.seal"]
    assert "sae_separation.errors" in imports("experiment")[0]
    assert "sae_separation.hub" in imports("sae_separation.text")[1]


@pytest.mark.parametrize("command", ["plot.py --help", "experiment.py --help"])
def test_help_imports_no_torch(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "110"},
        timeout=120,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "usage" in done.stdout
    assert (
        "argparse" in imported and not {"torch", "transformers", "datasets", "nnsight", "beartype"} & imported
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    GUIDE.write_text(figure())
    print(f"wrote {PAGE.relative_to(ROOT)} and the figure in {GUIDE.relative_to(ROOT)}")
