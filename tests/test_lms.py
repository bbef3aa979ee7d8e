"""LMs of many kinds: read and resumed at a layer, asked as in one plain pass a choice, or refused."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import tiny
import torch
from tiny import there

import experiment
from sae_separation import testbeds
from sae_separation.errors import WrongRequest
from sae_separation.exam import Exam, letter_tokens, most_positions, special_ids
from sae_separation.lm import InterventionLM, fast_lm_tokens, load_tokenizer
from sae_separation.questions import Question
from sae_separation.saebench import letter_prompt, shared_proxy
from sae_separation.specs import DataConfig


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's files, as settings; the questions are of many lengths, longer than WINDOWED_KINDS' windows."""
    folder = tmp_path_factory.mktemp("own")
    asked = tiny.questions("biology", 6) + tiny.questions("history", 6)
    files = {
        "forget_text": tiny.save_jsonl(folder / "forget.jsonl", tiny.documents(40, 1, "abcdefgh")),
        "retain_text": tiny.save_jsonl(folder / "retain.jsonl", tiny.documents(40, 2, "mnopqrst")),
        "questions": tiny.save_jsonl(folder / "asked.jsonl", asked),
    }
    return {k: (str(v),) for k, v in files.items()} | {"forget_subject": "biology", "layer": 1}


def load(lm, own, **settings):
    return testbeds.load(DataConfig(lm=str(lm), **own | settings))


def every_question(testbed):
    return [q for questions in testbed.questions.values() for q in questions]


@torch.no_grad()
def plain_answers(testbed, questions):
    """Softmax [question, 4] of the mean log-likelihoods of the tokens behind "Answer:", a pass a choice."""
    encode, bos = testbed.tokenizer, testbed.tokenizer.bos_token_id
    bos, told = [] if bos is None else [bos], []
    for question in questions:
        stem = f"Question: {question.question}\nAnswer:"
        n = len(bos + encode(stem, add_special_tokens=False)["input_ids"])
        for choice in question.choices:
            ids = torch.tensor(bos + encode(f"{stem} {choice}", add_special_tokens=False)["input_ids"])
            logits = testbed.lm(ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
            told.append(logits[n - 1 :].gather(1, ids[n:, None]).mean())
    return torch.stack(told).view(-1, 4).softmax(1)


def exam_answers(testbed, questions, shared_stems):
    """The same by an exam, as the evaluation asks it."""
    how = dict(shared_stems=shared_stems, mixed_lengths=testbed.mixed_lengths)
    exam = Exam(testbed.tokenizer, questions, "cloze", **how)
    lm = InterventionLM(testbed)
    return exam.probs_from(lambda batch: lm.ask(batch, exam.read))


@pytest.mark.parametrize("kind", [*tiny.WINDOWED_KINDS, *tiny.FURTHER_KINDS])
def test_no_answer_depends_on_how_rows_are_laid_out(kind, own, tmp_path):
    testbed = load(tiny.save_lm(tmp_path / "lm", kind), own)
    questions = every_question(testbed)
    plain = plain_answers(testbed, questions)
    assert plain.std(1).min() > 1e-3, "the comparison would be empty"
    assert testbed.mixed_lengths == (kind != "phi3_long")
    assert testbed.shared_stems == (kind in ("gpt_neo", "stablelm")), (
        "the others take no mask of the exam's own"
    )
    assert (testbed.alone_up_to > 0) == (kind in ("gpt_neo", "mpt", "stablelm")), (
        "of the others rows are longer than a window, or the last layer does not run alone"
    )
    for shared in {False, testbed.shared_stems}:
        torch.testing.assert_close(exam_answers(testbed, questions, shared), plain, atol=1e-5, rtol=1e-4)


def test_a_window_is_no_hindrance_to_rows_within_it(own, tmp_path):
    for width, shared in ((128, True), (64, False)):
        folder = tiny.save_lm(tmp_path / str(width), "mistral")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"sliding_window": width}))
        testbed = load(folder, own)
        questions = every_question(testbed)
        longest = Exam(testbed.tokenizer, questions, "cloze").batches[-1].tokens.shape[1]
        assert 64 < longest < 128 and testbed.shared_stems is shared
        wanted = plain_answers(testbed, questions)
        torch.testing.assert_close(exam_answers(testbed, questions, shared), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", tiny.FURTHER_KINDS)
def test_layers_that_put_out_tuples_or_lists_are_read_and_resumed(kind, own, tmp_path):
    testbed = load(tiny.save_lm(tmp_path / "lm", kind), own)
    assert testbed.d_in == tiny.D_IN and fast_lm_tokens(testbed) >= 2**14
    stream = experiment.ActivationStream(testbed, 32, 2048, lm_tokens=1024)
    block = stream.next_block()
    assert block.x.shape[1] == tiny.D_IN and torch.isfinite(block.x).all()
    lm, contexts = InterventionLM(testbed), islice(stream.texts[0], 3)
    tokens = torch.tensor([tokens for tokens, _ in contexts])
    with torch.no_grad():
        plain = testbed.lm(tokens, output_hidden_states=True, use_cache=False)
        resid = lm.resid(tokens)
        torch.testing.assert_close(resid, plain.hidden_states[testbed.layer + 1])
        streamed = stream.activations(tokens).float()
        assert (streamed - resid).norm() < 0.02 * resid.norm(), "perhaps in bfloat16"
        with lm.resumed_from(resid):
            assert torch.equal(testbed.lm(tokens, use_cache=False).logits, plain.logits)
        with lm.resumed_from(0 * resid):
            assert (testbed.lm(tokens, use_cache=False).logits - plain.logits).abs().max() > 0.1
        proxy = shared_proxy(lm, testbed.tokenizer)
        for proxied, change in ((resid, False), (0 * resid, True)):
            told = proxy.run_with_hooks(tokens, fwd_hooks=[(testbed.hook_name, lambda x, hook: proxied)])
            assert ((told - plain.logits).abs().max() > 0.1) == change, (
                "SAEBench core puts the SAE's output in"
            )


def test_contexts_and_questions_are_held_against_the_positions_that_the_config_names(own, tmp_path):
    for kind, told in (("mpt", 1024), ("openai", 1024), ("stablelm", 1024), ("bloom", float("inf"))):
        testbed = load(tiny.save_lm(tmp_path / kind, kind), own)
        assert most_positions(testbed.lm.config.to_dict()) == told
        config = experiment.Request(context_size=1025, tokens=10**6)
        if kind == "mpt":
            with pytest.raises(WrongRequest, match="--context_size 1025 is more than the 1024 positions"):
                testbeds.resolve(config, experiment.Config, testbed)
    long = tiny.questions("biology", 6) + tiny.questions("history", 6)
    long[3]["question"] = "why? " * 300
    asked = str(tiny.save_jsonl(tmp_path / "q.jsonl", long))
    with pytest.raises(WrongRequest, match="and the LM has 1024 positions"):
        load(tmp_path / "mpt", own, questions=(asked,))


# ---- tokenizers


@pytest.fixture(scope="module")
def prefix_space(own, tmp_path_factory):
    folder = tiny.save_lm(tmp_path_factory.mktemp("prefix_space") / "lm")
    tiny.save_prefix_space_tokenizer(folder)
    return load(folder, own)


def test_choices_are_scored_as_they_stand_behind_the_question(prefix_space):
    """A tokenizer that puts a space before every text makes "▁", "▁the" of " the" alone."""
    questions = [Question("x", "Which?", ("the", "a", "the the", "D"), 0)] + every_question(prefix_space)
    exam = Exam(prefix_space.tokenizer, questions, "cloze", shared_stems=False)
    pieces = prefix_space.tokenizer.convert_ids_to_tokens
    rows = {}
    for batch in exam.batches:
        for i, row in enumerate(there(batch.rows)):
            rows[row] = pieces(there(batch.targets)[i][there(batch.weights)[i] > 0])
    assert [rows[i] for i in range(4)] == [["▁the"], ["▁", "a"], ["▁the", "▁the"], ["▁D"]]
    assert prefix_space.tokenizer.tokenize(" the") == ["▁", "▁the"]
    wanted = plain_answers(prefix_space, questions)
    for shared in (True, False):
        torch.testing.assert_close(
            exam_answers(prefix_space, questions, shared), wanted, atol=1e-5, rtol=1e-4
        )


def test_letters_are_the_tokens_behind_answer(prefix_space, own):
    letters = letter_tokens(prefix_space.tokenizer)
    assert prefix_space.tokenizer.convert_ids_to_tokens(letters[0]) == ["▁A", "▁B", "▁C", "▁D"]
    testbed, question = replace(prefix_space, scoring="letter"), prefix_space.questions["biology"][0]
    exam, lm = Exam(testbed.tokenizer, [question]), InterventionLM(testbed)
    got = exam.probs_from(lambda batch: lm.ask(batch, exam.read))
    prompt = letter_prompt(question, (0, 1, 2, 3))
    ids = testbed.tokenizer([f"{prompt} {letter}" for letter in "ABCD"], add_special_tokens=False)[
        "input_ids"
    ]
    tokens = torch.tensor([[testbed.tokenizer.bos_token_id, *ids[0][:-1]]])
    with torch.no_grad():
        told = testbed.lm(tokens).logits[0, -1].softmax(-1)
    torch.testing.assert_close(got[0], told[[i[-1] for i in ids]], atol=1e-5, rtol=1e-4)


def test_choices_that_change_the_questions_last_token_are_scored_from_where_they_part(prefix_space, tmp_path):
    """Where ":" and a choice's first letters are one token, all four are scored from "Answer" on."""
    from transformers import AutoTokenizer

    folder = tiny.save_lm(tmp_path / "lm")
    tiny.save_merging_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = [Question("x", "Which?", ("xyz", "the", "D", "q"), 0)]
    for shared in (True, False):
        exam = Exam(tokenizer, questions, "cloze", shared_stems=shared)
        rows = []
        for batch in exam.batches:
            for i, row in enumerate(there(batch.rows)):
                for end in range(exam.width):
                    scored = (there(batch.weights)[i] > 0) & (there(batch.ends)[i] == end)
                    rows.append(
                        (
                            4 * row if shared else row,
                            tokenizer.convert_ids_to_tokens(there(batch.targets)[i][scored]),
                        )
                    )
        told = [pieces for _, pieces in sorted(rows, key=lambda row: row[0])]
        assert told == [[":▁x", "y", "z"], [":", "▁the"], [":", "▁D"], [":▁", "q"]]


def test_byte_level_tokens_of_an_exam_are_those_of_question_and_choice_alone(micro):
    def encode(text):
        return micro.tokenizer(text, add_special_tokens=False)["input_ids"]

    questions = [q for some in micro.questions.values() for q in some[:10]]
    letters = letter_tokens(micro.tokenizer).tolist()
    assert letters == [[encode(f" {letter}")[0] for letter in "ABCD"]]
    exam = Exam(micro.tokenizer, questions, "cloze", shared_stems=True)
    for batch in exam.batches:
        ends, scored = there(batch.ends), there(batch.weights) > 0
        for r, (tokens, i) in enumerate(zip(batch.tokens.tolist(), there(batch.rows))):
            stem = [micro.tokenizer.bos_token_id] + encode(f"Question: {questions[i].question}\nAnswer:")
            choices = [encode(f" {choice}") for choice in questions[i].choices]
            row = sum([ids[:-1] for ids in choices], stem)
            assert tokens == row + [0] * (len(tokens) - len(row)), "an end's last token is only predicted"
            for end, ids in enumerate(choices):
                assert there(batch.targets)[r][scored[r] & (ends[r] == end)].tolist() == ids


def test_chat_prompts_take_both_spellings_of_a_letter(tmp_path):
    tiny.save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    letters = letter_tokens(tokenizer, "GEMMA_INST_FORMAT")
    assert tokenizer.convert_ids_to_tokens(letters[0]) == ["A", "B", "C", "D"]
    assert tokenizer.convert_ids_to_tokens(letters[1]) == ["ĠA", "ĠB", "ĠC", "ĠD"]


def test_a_choice_without_a_token_is_refused(prefix_space, tmp_path):
    saved = json.loads(prefix_space.tokenizer.backend_tokenizer.to_str())
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    saved["normalizer"]["normalizers"].insert(0, strip)
    tiny.save_prefix_space_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(WrongRequest, match="Which.* has a choice without a token"):
        Exam(tokenizer, [Question("x", "Which?", ("a", "b", " ", "d"), 0)], "cloze")


def test_an_lm_without_bos_answers_as_it_would_alone_and_its_first_token_is_left_alone(own, tmp_path):
    folder = tiny.save_lm(tmp_path / "lm")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    testbed = load(folder, own)
    assert testbed.tokenizer.bos_token_id is None
    questions = every_question(testbed)
    wanted = plain_answers(testbed, questions)
    torch.testing.assert_close(exam_answers(testbed, questions, True), wanted, atol=1e-5, rtol=1e-4)
    lm, special = InterventionLM(testbed), special_ids(testbed.tokenizer)
    for scoring in ("cloze", "letter"):
        exam = Exam(testbed.tokenizer, questions, scoring)
        for batch in exam.batches:
            assert not torch.isin(batch.tokens[:, 0], special).any(), "no BOS, a word"
            lm.hook = lambda resid, hook: torch.where(hook.trained[..., None], 2 * resid, resid)
            lm.ask(batch, exam.read)
            residuals = lm.asked[batch].residuals
            changed = lm.hook(residuals.resid, residuals) != residuals.resid
            assert not changed[:, 0].any() and changed[:, 1:].any(-1).sum() == batch.trained.sum() > 0


# ---- embeddings


def renumber(folder, gap):
    """The tokenizer's last token gets an id that many places on, as where others were taken out."""
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocab = saved["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab[last] += gap
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    return vocab[last], last


def test_a_token_id_beyond_the_embedding_is_refused(own, tmp_path):
    """The tokenizer has as many tokens as the weights have rows, and one of them a larger id."""
    folder = tiny.save_lm(tmp_path / "lm")
    most, token = renumber(folder, 40)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    told = rf"gives ids up to {most} \('{token}'\), its weights have {rows} rows"
    with pytest.raises(WrongRequest, match=told):
        load(folder, own)


@pytest.mark.parametrize("role", ["eos_token", "pad_token"])
def test_of_special_tokens_beyond_the_embedding_only_a_pad_token_that_no_text_holds_is_taken(
    role, own, tmp_path
):
    from transformers import AutoTokenizer

    folder = tiny.save_lm(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({role: "<new>"})
    tokenizer.save_pretrained(folder)
    if role == "pad_token":
        assert load(folder, own).tokenizer.pad_token == "<new>", "as many fine-tuned Llamas have it"
        with_pad = tiny.save_jsonl(tmp_path / "t.jsonl", [*tiny.documents(40, 3), "and <new>"])
        own = own | {"retain_text": (str(with_pad),)}
    with pytest.raises(WrongRequest, match="<new>.* they belong to different LMs"):
        load(folder, own)


# ---- massive activations


def with_a_long_embedding(folder, token_id, factor):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token_id] *= factor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_an_lm_with_massive_activations_in_most_contexts_is_refused_before_training(own, tmp_path, capsys):
    folder = tiny.save_lm(tmp_path / "lm")
    tokenizer = load_tokenizer(folder)
    with_a_long_embedding(
        folder, tokenizer.convert_tokens_to_ids("a"), 300
    )  # in every context of forget text
    sizes = dict(tokens=25_600, batch_size=256, buffer_tokens=4096, context_size=32, d_sae=64, target_l0=8.0)
    how = own | sizes | dict(lm=str(folder), seeds=(0,))
    run = experiment.Command(out_dir=(str(tmp_path / "run"),), evals=("core",))
    request = experiment.Request(**how)
    assert experiment.main(run, [request]) == 2
    said = capsys.readouterr().err
    told = "contexts hold activations of over 10 times the median norm at layer 1: choose another --layer"
    assert told in said
    assert not (tmp_path / "run").exists()
    testbed = load(folder, own)
    stream = experiment.ActivationStream(testbed, 32, 4096)
    stream.next_block()
    assert 0.4 < stream.with_massive <= 0.6, "all contexts of forget text"
