"""The documents: README is short, links lead somewhere, commands are taken, the citation is valid."""

import re
import shlex

import pytest
from conftest import ROOT

from experiment import parse_command

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"(?m)^#+ (.*)", text)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_has_at_most_1000_words():
    assert len(README.split()) <= 1000


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", page.read_text())
    for target, anchor in links:
        if "://" not in target:
            there = (page.parent / target).resolve() if target else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there.read_text()), f"{target}#{anchor}"


def test_the_commands_of_the_documents_and_the_makefile_are_taken(monkeypatch):
    monkeypatch.setattr("sae_separation.checks.missing", lambda *_: {})  # whether their files are here
    monkeypatch.setattr("sae_separation.loaded.command", lambda command, first, *_: first)  # and SAEs
    text = "\n".join(page.read_text() for page in (*PAGES, ROOT / "Makefile"))
    for name, value in re.findall(r"(?m)^([A-Z_]+) = (.*)$", text):  # the Makefile's
        text = text.replace(f"$({name})", value)
    text = re.sub(
        r"\$\(addprefix (\S+),([\d ]+)\)",
        lambda found: " ".join(found[1] + n for n in found[2].split()),
        text.replace("\\\n", " ").replace("$SLURM_ARRAY_TASK_ID", "6"),
    )
    said = re.findall(r"python experiment\.py (--[^`#\n]*)", text)
    argvs = [shlex.split(command) for command in said if "--help" not in command]
    assert len(argvs) >= 8
    for argv in argvs:
        command, configs = parse_command(argv)
        assert len(configs) == len(command.out_dir) > 0


def test_the_citation_is_of_cff_1_2_and_bears_the_readmes_title_and_the_licence():
    cff = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"(?m)^([a-z-]+): (.+)$", cff))
    assert fields["cff-version"] == "1.2.0" and fields["message"] and fields["type"] == "software"
    assert "authors:\n  - name: the orthogonal-sae authors\n" in cff, "an entity"
    assert README.startswith(f"# {fields['title']}\n")
    licence = (ROOT / "LICENSE").read_text()
    assert fields["license"] == "MIT"
    assert licence.startswith("MIT License\n\nCopyright (c) 2026 the orthogonal-sae authors")
