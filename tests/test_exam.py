"""Completions: which end of a text an LM finds the likeliest, as in one plain forward pass an end."""

import json
from functools import partial
from typing import Any

import pytest
import tiny
import torch

from sae_separation.errors import WrongRequest
from sae_separation.exam import Batch, Completions, Residuals, letter_tokens, logits_at
from sae_separation.lm import load_lm, load_tokenizer

LONG = "For a long time nobody knew of it, and then "  # rows of unequal lengths, past windows of 16 tokens
SEVERAL = [
    ("The host of it is", ("otters", "a goat", "eel", "A"), 2),
    (LONG + "the host of it was", ("bison", "hares"), 1),
    ("It lives in", ("caves", "ponds", "a bog", "dunes", "reefs"), 0),
    (LONG + LONG + "it was found in", ("caves", "B", "old ponds"), 2),
]
SINGLE = [
    ("The letter of it is", ("A", "B", "C", "D"), 3),
    (LONG + "the letter of it was", ("C", "A"), 0),
    ("It is called", ("B", "D", "A"), 1),
    (LONG + LONG + "it was called", ("D",), 0),
]
KINDS = ("gpt_neox", "gpt2", "llama", "gemma", "mistral", "phi3_long", "mpt")


@pytest.fixture(scope="module", params=KINDS)
def lm_of_a_kind(request, tmp_path_factory):
    """An LM, its tokenizer, and whether rows of a batch may differ in length."""
    folder = tiny.save_lm(tmp_path_factory.mktemp("lm") / request.param, request.param)
    return load_lm(folder, "cpu"), load_tokenizer(folder), request.param != "phi3_long"


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def plain(lm, tokenizer, asked) -> list[list[float]]:
    """Of each beginning the mean log-likelihoods of its ends' tokens, behind what the beginning alone and
    with each end have in common."""
    out = []
    for text, ends, _ in asked:
        stem, rows = encode(tokenizer, text), [encode(tokenizer, f"{text} {end}") for end in ends]
        n = 0
        while n < len(stem) and all(row[n] == stem[n] for row in rows):
            n += 1
        out.append([])
        for row in rows:
            ids = torch.tensor([tokenizer.bos_token_id, *row])
            log_probs = lm(ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
            out[-1].append(log_probs[n:].gather(1, ids[n + 1 :, None]).mean().item())
    return out


def answered(lm, exam: Completions, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return exam.read(batch, logits_at(lm, batch.tokens, batch.positions, **batch.seen(lm)))


def values(lm, exam: Completions) -> torch.Tensor:
    """What an exam reads, row by row [row, width]."""
    rows = torch.full((exam.n_rows, exam.width), torch.nan)
    for batch in exam.batches:
        rows[batch.rows] = answered(lm, exam, batch)
    return rows


def same_ends(exam: Completions, rows: torch.Tensor, wanted: list[list[float]]):
    """Every end's value, and none besides."""
    if exam.width > 1:
        rows = torch.cat([row[: len(ends)] for row, ends in zip(rows, wanted, strict=True)])
    wanted_rows = torch.tensor([value for ends in wanted for value in ends])
    torch.testing.assert_close(rows.flatten(), wanted_rows, atol=1e-5, rtol=1e-4)


def answers_that_are_half_right(asked, wanted) -> tuple[list, list[bool]]:
    """The same with the likeliest end as the answer, and in every second one another."""
    changed = []
    for i, ((text, ends, _), told) in enumerate(zip(asked, wanted)):
        best = max(range(len(ends)), key=told.__getitem__)
        changed.append((text, ends, (best + i % 2) % len(ends)))
    return changed, [i % 2 == 0 or len(ends) == 1 for i, (_, ends, _) in enumerate(asked)]


@pytest.mark.parametrize("asked", [SEVERAL, SINGLE, SEVERAL + SINGLE], ids=["several", "single", "both"])
def test_completions_are_those_of_one_plain_pass_an_end(asked, lm_of_a_kind):
    lm, tokenizer, mixed = lm_of_a_kind
    wanted = plain(lm, tokenizer, asked)
    asked, right = answers_that_are_half_right(asked, wanted)
    exam = Completions(tokenizer, asked, mixed_lengths=mixed)
    assert exam.width == (4 if asked[0][1][0] == "A" else 1), "ends of one token share a row"
    assert exam.n_rows == (len(asked) if exam.width > 1 else sum(len(ends) for _, ends, _ in asked))
    same_ends(exam, values(lm, exam), wanted)
    assert exam.right(partial(answered, lm, exam)).tolist() == right
    widths = [batch.trained.any(0).sum() + 1 for batch in exam.batches]
    assert widths == [batch.tokens.shape[1] for batch in exam.batches]
    if not mixed:
        assert all(batch.trained[:, 1:].all() for batch in exam.batches), "no row is padded"


def test_ends_that_share_a_row_do_not_see_each_other(lm_of_a_kind):
    lm, tokenizer, _ = lm_of_a_kind
    if lm.config.model_type not in ("gpt_neox", "gpt2", "llama", "gemma"):
        pytest.skip("takes no such mask, has a window, or places by length: testbeds.lay_out finds that out")
    asked = SEVERAL + SINGLE
    wanted = plain(lm, tokenizer, asked)
    asked, right = answers_that_are_half_right(asked, wanted)
    exam = Completions(tokenizer, asked, shared_stems=True)
    assert (exam.width, exam.n_rows) == (5, len(asked))
    same_ends(exam, values(lm, exam), wanted)
    assert exam.right(partial(answered, lm, exam)).tolist() == right


def test_a_row_is_judged_by_its_beginning_whatever_its_ends_say(tmp_path):
    folder = tiny.save_lm(tmp_path / "lm")
    lm, tokenizer = load_lm(folder, "cpu"), load_tokenizer(folder)
    (batch,) = Completions(tokenizer, SEVERAL[:2], shared_stems=True).batches
    read = Residuals(torch.zeros(0), batch.trained, batch.tokens, batch.seen(lm))
    for row, nth in enumerate(tiny.there(batch.rows)):
        beginning = encode(tokenizer, SEVERAL[nth][0])
        assert batch.tokens[row][read.judged[row]].tolist() == beginning
        assert batch.trained[row].sum() > len(beginning), "ends may be touched"
    alone = Residuals(torch.zeros(0), batch.trained, batch.tokens)
    assert torch.equal(alone.judged, batch.trained)


def test_completions_by_letter_are_the_likelier_spelling_of_one_plain_pass(lm_of_a_kind):
    lm, tokenizer, mixed = lm_of_a_kind
    letters = letter_tokens(tokenizer, "GEMMA_INST_FORMAT")
    assert len(letters) == 2
    asked = [(f"{text}\nAnswer:", (), 0) for text, *_ in SEVERAL]
    for spelled_out in (False, True):
        bos = [] if spelled_out else [tokenizer.bos_token_id]
        wanted = []
        for text, *_ in asked:
            with torch.no_grad():
                logits = lm(torch.tensor([[*bos, *encode(tokenizer, text)]]), use_cache=False).logits
            wanted.append(logits[0, -1].softmax(-1)[letters].amax(0).tolist())
        told, right = answers_that_are_half_right([(text, "ABCD", 0) for text, *_ in asked], wanted)
        exam = Completions(tokenizer, told, letters=letters, spelled_out=spelled_out, mixed_lengths=mixed)
        assert (exam.width, exam.n_rows) == (4, 4)
        same_ends(exam, values(lm, exam), wanted)
        assert exam.right(partial(answered, lm, exam)).tolist() == right


def test_small_batches_read_what_large_ones_do(tmp_path):
    folder = tiny.save_lm(tmp_path / "lm")
    lm, tokenizer = load_lm(folder, "cpu"), load_tokenizer(folder)
    large, small = (Completions(tokenizer, SEVERAL, tokens_per_batch=n) for n in (8192, 1))
    assert len(large.batches) == 1 and len(small.batches) == small.n_rows == large.n_rows == 14
    torch.testing.assert_close(values(lm, small), values(lm, large), atol=1e-5, rtol=1e-4)


def test_ends_that_change_the_beginnings_last_token_are_scored_from_where_they_part(tmp_path):
    """Where ":" and an end's first letter are one token, every end is scored from ":" on."""
    folder = tiny.save_lm(tmp_path / "lm")
    tiny.save_merging_tokenizer(folder)
    lm, tokenizer = load_lm(folder, "cpu"), load_tokenizer(folder)
    asked = [("Its host:", ("xyz", "the", "D"), 0), ("Its host is", ("the", "D"), 1)]
    exam = Completions(tokenizer, asked)
    scored = {}
    for batch in exam.batches:
        for i, row in enumerate(tiny.there(batch.rows)):
            ids = tiny.there(batch.targets)[i][tiny.there(batch.weights)[i] > 0]
            scored[row] = tokenizer.convert_ids_to_tokens(ids)
    assert [scored[i] for i in range(5)] == [[":▁x", "y", "z"], [":", "▁the"], [":", "▁D"], ["▁the"], ["▁D"]]
    same_ends(exam, values(lm, exam), plain(lm, tokenizer, asked))


def test_an_end_without_a_token_is_refused(tmp_path):
    tiny.save_prefix_space_tokenizer(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    saved["normalizer"]["normalizers"].insert(0, strip)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(WrongRequest, match="--questions: an end of 'It lives in' is no token: take it out"):
        Completions(load_tokenizer(tmp_path), [("It lives in", ("caves", " "), 0)])


def test_the_place_where_all_ends_begin_is_read_once(lm_of_a_kind):
    _, tokenizer, mixed_lengths = lm_of_a_kind
    batch: Any
    exam = Completions(tokenizer, SEVERAL, shared_stems=True, mixed_lengths=mixed_lengths)
    for batch in exam.batches:
        for row in range(len(batch.tokens)):
            predicted = batch.weights[row] > 0
            places = batch.positions[row][batch.read_at[row][predicted]]
            n_ends = len(SEVERAL[batch.rows[row]][1])
            assert len(places.unique()) == predicted.sum() - (n_ends - 1)
        assert batch.positions.shape[1] < batch.targets.shape[1]
