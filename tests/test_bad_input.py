"""Wrong requests: one line that says what is wrong and what to do, exit code 2, nothing written, and soon.

Most are asked in this process through the script's own parsing; the ones under REAL, one of each kind, of
the real command.
"""

import json
import os
import time
from pathlib import Path

import pytest
import tiny
from conftest import run_script, seconds_of_children

import experiment
from sae_separation import config
from sae_separation.errors import WrongRequest
from sae_separation.questions import read_questions
from sae_separation.text import read_local

OWN = [
    "--out_dir=run_0",
    "--lm=lm",
    "--layer=1",
    "--retain_text=good.jsonl",
    "--questions=good_q.jsonl",
    "--forget_subject=biology",
]
OPTIONS: dict[str, tuple[list[str], str]] = {
    "no out_dir": ([], "--out_dir is missing"),
    "not in the plan, no arm": (["--out_dir=somewhere"], "give its --arm"),
    "unknown run": (["--out_dir=run_77"], "run_77 is not in the plan"),
    "unknown arm": (["--out_dir=x", "--arm=magic"], "magic"),
    "chunks of one feature": (
        ["--out_dir=x", "--arm=ortsae", "--chunk_size=1"],
        "--chunk_size is 1: give a finite number of at least 2",
    ),
    "groups of one feature": (
        ["--out_dir=x", "--arm=grouped", "--group_size=1"],
        "--group_size is 1: give a finite number of at least 2",
    ),
    "unknown option": (["--out_dir=run_0", "--learning_rate=1"], "--learning_rate"),
    "an option cut short": (["--out_dir=run_0", "--token=300000"], "--token"),
    "unknown testbed": (["--out_dir=run_0", "--testbed=gpt-5"], "gpt-5"),
    "unknown scoring": (["--out_dir=run_0", "--scoring=vibes"], "vibes"),
    "unknown evaluation": (["--out_dir=run_0", "--evals", "vibes"], "vibes"),
    "one evaluation twice": (["--out_dir=run_0", "--evals", "geometry", "geometry"], "each once"),
    "fewer tokens than steps": (["--out_dir=run_0", "--tokens=1000"], "0 steps of --batch_size 2048"),
    "fewer tokens than a batch": (["--out_dir=run_0", "--tokens=99"], "at least 100"),
    "nan": (["--out_dir=run_0", "--lr=nan"], "--lr is nan"),
    "infinite": (["--out_dir=run_0", "--alpha=inf"], "--alpha is inf"),
    "more than a float holds": (["--out_dir=run_0", "--alpha=1e400"], "--alpha is inf"),
    "huge": (["--out_dir=run_0", "--alpha=1e200"], "give a smaller number"),
    "huge count": (["--out_dir=run_0", "--dead_tokens=99999999999999999999"], "give a smaller number"),
    "negative": (["--out_dir=run_0", "--alpha=-1"], "--alpha is -1"),
    "zero": (["--out_dir=run_0", "--d_sae=0"], "--d_sae is 0"),
    "not a number": (["--out_dir=run_0", "--d_sae=many"], "many"),
    "half a feature": (["--out_dir=run_0", "--d_sae=1000.5"], "1000.5"),
    "more features than memory": (["--out_dir=run_0", "--d_sae=99999999999"], "--d_sae"),
    "more tokens than there are": (["--out_dir=run_0", "--tokens=99999999999999999999"], "--tokens"),
    "same seed twice": (["--out_dir=run_0", "--seeds", "1", "1"], "each once"),
    "negative seed": (
        ["--out_dir=run_0", "--seeds", "-1"],
        "--seeds is -1: give a finite number of at least 0",
    ),
    "no seed": (["--out_dir=run_0", "--seeds"], "--seeds"),
    "same folder twice": (["--out_dir", "run_0", "./run_0"], "two runs one name"),
    "two runs of one name": (["--out_dir", "a/run_0", "b/run_0"], "two runs one name"),
    "empty out_dir": (["--out_dir=", "--arm=fixed"], "--out_dir is missing"),
    "context of one": (
        ["--out_dir=run_0", "--context_size=1"],
        "--context_size is 1: give a finite number of at least 8",
    ),
    "batch of one": (
        ["--out_dir=run_0", "--batch_size=1"],
        "--batch_size is 1: give a finite number of at least 2",
    ),
    "buffer under a batch": (["--out_dir=run_0", "--buffer_tokens=100"], "--buffer_tokens 100"),
    "no way to steer": (["--out_dir=run_0", "--l1=0"], "--l1 0"),
    "sharing beyond all": (
        ["--out_dir=run_0", "--target_sharing=1.5"],
        "--target_sharing is 1.5: give a smaller number, of at most 1",
    ),
    "features fewer than k": (["--out_dir=run_8", "--d_sae=64", "--k=80"], "--k 80"),
    "layer below the first": (["--out_dir=run_0", "--layer=-1"], "--layer is -1"),
    "layer beyond micro's": (["--out_dir=run_0", "--testbed=micro", "--layer=4"], "4 layers; give 0 to 3"),
    "layer beyond pythia's": (
        ["--out_dir=run_0", "--testbed=pythia-70m", "--layer=6"],
        "6 layers; give 0 to 5",
    ),
    "layer beyond gemma's": (["--out_dir=run_0", "--testbed=gemma-2-2b", "--layer=26"], "26 layers"),
    "layer beyond the own LM's": (["--out_dir=run_0", "--lm=lm", "--layer=3"], "3 layers; give 0 to 2"),
    "an LM without a layer": (
        [*OWN, "--forget_text=good.jsonl", "--layer"],
        "--layer is missing: which layer of --lm lm (0",
    ),
    "an LM without text": (OWN, "--forget_text is missing"),
    "an LM without a tokenizer": (
        ["--out_dir=run_0", "--lm=mute", "--layer=1"],
        "--lm mute holds no tokenizer",
    ),
    "an LM that is not there": (
        ["--out_dir=run_0", "--lm=nowhere", "--layer=1"],
        "neither a folder here nor a hub name",
    ),
    "a path that is not there": (
        ["--out_dir=run_0", "--lm=./no/where", "--layer=1"],
        "neither a folder here nor a hub name",
    ),
    "an LM that is a file": (["--out_dir=run_0", "--lm=good.jsonl", "--layer=1"], "is a file"),
    "an LM for a named testbed": (
        ["--out_dir=run_0", "--testbed=pythia-70m", "--lm=lm"],
        "cannot stand in for the LM of --testbed pythia-70m",
    ),
    "a folder that is no LM": (["--out_dir=run_0", "--lm=empty_folder", "--layer=1"], "no config.json"),
    "an encoder-decoder": (["--out_dir=run_0", "--lm=t5", "--layer=1"], "not a causal decoder-only LM"),
    "an encoder": (["--out_dir=run_0", "--lm=bert", "--layer=1"], "not a causal decoder-only LM"),
    "an LM with code of its own": (["--out_dir=run_0", "--lm=remote", "--layer=1"], "needs code of its own"),
    "pickled weights": (["--out_dir=run_0", "--lm=pickled", "--layer=1"], "holds no .safetensors"),
    "a broken config": (["--out_dir=run_0", "--lm=cut", "--layer=1"], "its config.json cannot be read"),
    "a world that is none": (["--out_dir=run_0", "--testbed=micro", "--lm=lm"], "no embedded world"),
    "entities of no world": (
        ["--out_dir=run_0", "--testbed=pythia-70m", "--forget_entities=15"],
        "--forget_entities 15 is for the forget text of an invented world (--testbed micro, smollm2-taught)",
    ),
    "entities of the user's own text": (
        ["--out_dir=run_0", "--testbed=micro", "--forget_text=good.jsonl", "--forget_entities=15"],
        "leave it out and give --forget_text about some of them",
    ),
    "entities of the user's own LM": (
        [*OWN, "--forget_text=good.jsonl", "--forget_entities=15"],
        "leave it out and give --forget_text about some of them",
    ),
    "no entity": (["--out_dir=run_0", "--testbed=micro", "--forget_entities=0"], "has 30 of them; give 1 to"),
    "more entities than there are": (
        ["--out_dir=run_0", "--testbed=micro", "--forget_entities=31"],
        "--forget_entities 31: the world has 30 of them; give 1 to 30",
    ),
}
TEXTS = {
    "no such file": ("nothing.jsonl", "does not exist here"),
    "neither file nor data set": ("wikitext", "no hub data set (owner/name:config@split)"),
    "a glob without a match": (
        "*.parquet2",
        "holds no .txt, .md, .jsonl, .ndjson, .csv, .tsv or .parquet file",
    ),
    "a folder without text": (
        "empty_folder",
        "holds no .txt, .md, .jsonl, .ndjson, .csv, .tsv or .parquet file",
    ),
    "another kind of file": ("picture.png", "files of this kind are not read"),
    "an empty file": ("empty.jsonl", "holds no text"),
    "only empty documents": ("blank.jsonl", "(2 empty documents)"),
    "one document": ("one.txt", "holds one document"),
    "binary text": ("binary.txt", "is not UTF-8 text"),
    "binary with zeros": ("zeros.txt", "records cannot be read"),
    "binary lines": ("binary.jsonl", "is not UTF-8 text"),
    "no JSON": ("prose.jsonl", "2 of 2 records cannot be read, first prose.jsonl line 1: no JSON"),
    "no such column": ("good.jsonl#body", "no column body but columns text"),
    "no such parquet column": ("good.parquet#body", "has no column body but text"),
    "numbers for text": ("good.parquet#n", "column n holds int, not text"),
    "no parquet": ("not.parquet", "cannot be read"),
    "no zstandard": ("not.jsonl.zst", "cannot be read"),
    "cut-off gzip": ("cut.jsonl.gz", "cannot be read"),
    "cut-off zstandard": (
        "cut.txt.zst",
        "cut.txt.zst cannot be read (EOFError: the file ends before its last frame",
    ),
    "UTF-16": ("utf16.csv", "it is not UTF-8 text but UTF-16"),
    "no such column of a table": (
        "good.csv#body",
        "good.csv has no column body but text, n: name one with #column",
    ),
    "a quotation mark without end": (
        "quote.csv",
        "quote.csv cannot be read (ValueError: the row that begins in line 3: unexpected end of data)",
    ),
    "a packed parquet": ("good.parquet.gz", "files of this kind are not read"),
}
QUESTIONS = {
    "three choices": ({"choices": ["a", "b", "c"]}, "line 2: 3 choices instead of 4"),
    "five choices": ({"choices": list("abcde")}, "5 choices instead of 4"),
    "choices that are a text": ({"choices": "abcd"}, "no choices instead of 4"),
    "an empty choice": ({"choices": ["a", "b", "c", " "]}, "a choice is not a text"),
    "answer out of range": ({"answer": 4}, "the answer is '4'"),
    "negative answer": ({"answer": -1}, "the answer is '-1'"),
    "answer E": ({"answer": "E"}, "the answer is 'E'"),
    "answer true": ({"answer": True}, "the answer is 'True'"),
    "answer null": ({"answer": None}, "the answer is 'None'"),
    "no question": ({"question": " "}, "the question is not a text"),
    "subject that is a path": ({"subject": "../../x"}, "the subject is"),
    "a choice twice": ({"choices": ["a", "b", "b", "c"]}, "holds a choice twice"),
    "a question twice": (0, "stands at"),
    "no field choices": ("choices", "no field choices but"),
    "a list for a question": ([], "list instead of a question"),
    "no JSON": ("{", "no JSON"),
}
FILES = {
    "no questions": ([], "holds no question"),
    "one subject": (tiny.questions("biology", 20), "all about biology"),
    "another forget subject": (
        tiny.questions("physics", 20) + tiny.questions("history", 20),
        "--forget_subject biology is not among",
    ),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a user's files, good and bad, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read_local.cache_clear()  # names are relative, and the folder is another
    read_questions.cache_clear()
    tiny.save_jsonl(tmp_path / "good.jsonl", tiny.documents(20, 0))
    tiny.save_jsonl(tmp_path / "good_q.jsonl", tiny.questions("biology", 20) + tiny.questions("history", 20))
    (tmp_path / "empty_folder").mkdir()
    kinds = {
        "lm": ("LlamaForCausalLM", {}),
        "mute": ("LlamaForCausalLM", {}),
        "t5": ("T5ForConditionalGeneration", {"is_encoder_decoder": True}),
        "bert": ("BertForMaskedLM", {}),
        "pickled": ("GPT2LMHeadModel", {}),
        "remote": ("OwnForCausalLM", {"auto_map": {"AutoModelForCausalLM": "own.Own"}}),
    }
    for name, (architecture, more) in kinds.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(
            json.dumps({"architectures": [architecture], "num_hidden_layers": 3} | more)
        )
        (tmp_path / name / ("tokenizer_config.json" if name == "mute" else "tokenizer.json")).write_text("{}")
        (tmp_path / name / ("pytorch_model.bin" if name == "pickled" else "model.safetensors")).write_bytes(
            b""
        )
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text('{"architectures"')
    return tmp_path


def bad_texts(folder: Path):
    import datasets
    import zstandard

    whole = zstandard.compress("\n\n".join(tiny.documents(20, 0)).encode())
    (folder / "cut.txt.zst").write_bytes(whole[: len(whole) // 2])
    (folder / "utf16.csv").write_text("text\na\nb\n", encoding="utf-16")
    (folder / "good.csv").write_text("text,n\na,1\nb,2\n")
    (folder / "quote.csv").write_text('text\na\n"b\n')
    (folder / "good.parquet.gz").write_bytes(b"")
    contents = {
        "picture.png": b"\x89PNG",
        "empty.jsonl": b"",
        "blank.jsonl": b'{"text": ""}\n{"text": "  "}\n',
        "one.txt": b"one\ntwo\n",
        "prose.jsonl": b"Once upon\na time\n",
        "binary.txt": bytes(range(256)) * 9,
        "zeros.txt": b"a\0b\n\nc\0d",
        "binary.jsonl": b"\xff\xfe\x00",
        "not.parquet": b"PAR0" * 20,
        "not.jsonl.zst": b"no frame",
        "cut.jsonl.gz": b"\x1f\x8b\x08\x00",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}).to_parquet(folder / "good.parquet")


def request(argv: list[str]):
    """What the script does before it imports anything heavy."""
    command, configs = experiment.unfinished(*experiment.parse_command(argv))
    config.check(command, configs)


def refused(argv: list[str], said: str, folder: Path):
    before = sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))
    started = time.process_time()
    with pytest.raises(WrongRequest) as wrong:
        request(argv)
    assert time.process_time() - started < 5
    assert said in str(wrong.value) and "\n" not in str(wrong.value), str(wrong.value)
    assert sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*")) == before, "nothing was written"


def test_the_files_of_these_tests_are_good_where_they_are_not_made_bad(here):
    request([*OWN, "--forget_text=good.jsonl"])


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_options(case, here):
    argv, said = OPTIONS[case]
    refused(argv, said, here)


@pytest.mark.parametrize("case", TEXTS)
def test_wrong_text(case, here):
    bad_texts(here)
    refused([*OWN, f"--forget_text={TEXTS[case][0]}"], TEXTS[case][1], here)


@pytest.mark.parametrize("case", QUESTIONS)
def test_wrong_questions(case, here):
    change, said = QUESTIONS[case]
    rows = [json.loads(line) for line in (here / "good_q.jsonl").read_text().splitlines()]
    if isinstance(change, dict):
        rows[1] |= change
    elif isinstance(change, str) and change in rows[1]:
        del rows[1][change]
    elif change == 0:
        rows[1] = rows[0]
    lines = [json.dumps(r) for r in rows]
    if change == [] or change == "{":
        lines[1] = "{" if change == "{" else "[]"
    (here / "bad_q.jsonl").write_text("\n".join(lines))
    refused([*OWN, "--forget_text=good.jsonl", "--questions=bad_q.jsonl"], said, here)


@pytest.mark.parametrize("case", FILES)
def test_wrong_subjects(case, here):
    tiny.save_jsonl(here / "bad_q.jsonl", FILES[case][0])
    refused([*OWN, "--forget_text=good.jsonl", "--questions=bad_q.jsonl"], FILES[case][1], here)


@pytest.mark.parametrize(
    "left_out, said",
    [
        ("--questions", "--questions is missing"),
        ("--forget_subject", "--forget_subject is missing: which of biology, history"),
        ("--retain_text", "--retain_text is missing"),
    ],
)
def test_what_an_lm_of_ones_own_needs(left_out, said, here):
    refused([a for a in OWN if not a.startswith(left_out)] + ["--forget_text=good.jsonl"], said, here)


def test_evaluations_without_questions_need_none(here):
    request(
        [a for a in OWN if not a.startswith(("--questions", "--forget_subject"))]
        + ["--forget_text=good.jsonl", "--evals", "core", "corpus"]
    )


def test_an_out_dir_that_cannot_be_one(here):
    (here / "run_1").write_text("mine")
    refused(["--out_dir=run_1"], "is a file", here)
    refused(["--out_dir=run_1/run_0"], "is a file", here)
    (here / "run_0").mkdir()
    for content in ("{", "[]", '{"name": "npm"}', '{"requested": 1, "config": 2}'):
        (here / "run_0" / "config.json").write_text(content)
        refused(["--out_dir=run_0"], "--overwrite", here)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everywhere")
def test_folders_and_files_without_permission(here):
    (here / "shut").mkdir(mode=0o500)
    refused(["--out_dir=shut/run_0"], "is not writable", here)
    (here / "shut.jsonl").write_text("{}")
    (here / "shut.jsonl").chmod(0)
    refused([*OWN, "--forget_text=shut.jsonl"], "PermissionError", here)


REAL = [
    "no out_dir",
    "unknown arm",
    "unknown option",
    "unknown testbed",
    "fewer tokens than steps",
    "nan",
    "huge count",
    "not a number",
    "layer beyond micro's",
    "an encoder-decoder",
    "pickled weights",
    "same folder twice",
]


@pytest.mark.parametrize("case", [*REAL, "text", "questions"])
def test_the_real_command_ends_with_one_line_and_exit_code_2(case, here):
    bad_texts(here)
    tiny.save_jsonl(here / "bad_q.jsonl", [q | {"answer": 4} for q in tiny.questions("biology", 9)])
    asked, said = (
        OPTIONS.get(case)
        or {
            "text": ([*OWN, "--forget_text=prose.jsonl"], "no JSON"),
            "questions": ([*OWN, "--forget_text=good.jsonl", "--questions=bad_q.jsonl"], "the answer is '4'"),
        }[case]
    )
    before, started = sorted(here.rglob("*")), seconds_of_children()
    done = run_script("experiment.py", *asked, cwd=here)
    assert done.returncode == 2 and seconds_of_children() - started < 5
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and said in done.stderr
    assert sorted(here.rglob("*")) == before, "nothing was written"
