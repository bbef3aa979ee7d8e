"""The activation stream: packing, labels, special tokens, and agreement with a plain forward pass."""

import contextlib
import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

from experiment import ActivationStream
from sae_separation import ranks
from sae_separation.errors import RunFailed
from sae_separation.lm import SplitLM, massive
from sae_separation.stream import works_ahead
from sae_separation.testbeds import packed_contexts


class Letters:
    """A tokenizer of single letters; BOS is 0 and EOS is 1."""

    bos_token_id, eos_token_id = 0, 1

    most = 0  # texts at once

    def __call__(self, texts, add_special_tokens):
        self.most = max(self.most, len(texts))
        return {"input_ids": [[ord(c) - 95 for c in t] for t in texts]}


def corpus(*texts):
    return datasets.Dataset.from_dict({"text": list(texts)})


def test_documents_are_packed_after_bos_and_closed_by_eos():
    contexts = list(packed_contexts(corpus("abc"), Letters(), 5, seed=0, repeat=False))
    assert contexts == [[0, 2, 3, 4, 1]]
    everything = list(packed_contexts(corpus("ab", "", "c", "defghijkl"), Letters(), 4, seed=0, repeat=False))
    assert all(len(c) == 4 and c[0] == 0 for c in everything)
    body = [t for c in everything for t in c[1:]]
    assert len(body) == 15 and body.count(1) == 3, (
        "an empty document leaves no trace; 12 letters + 3 EOS, cut into contexts"
    )


def test_short_text_repeats_in_a_new_order_and_text_under_one_context_is_refused():
    from itertools import islice

    contexts = list(islice(packed_contexts(corpus(*"abcdefgh"), Letters(), 17, seed=0), 5))
    assert (
        all(sorted(c[1::2]) == list(range(2, 10)) for c in contexts) and len({tuple(c) for c in contexts}) > 1
    )
    with pytest.raises(RunFailed, match="3 tokens, fewer than one context of 128"):
        next(packed_contexts(corpus("ab"), Letters(), 128, seed=0))


def test_few_documents_are_tokenised_at_once_for_they_may_be_books():
    tokenizer = Letters()
    contexts = list(packed_contexts(corpus(*("abc" for _ in range(100))), tokenizer, 5, seed=0, repeat=False))
    assert len(contexts) == 100 and tokenizer.most == 16


def test_rows_are_resid_post_of_the_hook_layer_without_special_tokens(micro):
    stream = ActivationStream(micro, context_size=128, buffer_tokens=16_384)
    tokens = torch.tensor([next(stream.texts[0])[0] for _ in range(4)])
    states = micro.lm(tokens, output_hidden_states=True).hidden_states
    plain = states[micro.layer + 1]  # hidden_states[0] is the embedding
    got = stream.activations(tokens)
    assert (got - plain).norm() / plain.norm() < 0.01, "bfloat16 against float32"
    assert (got - states[micro.layer]).norm() / plain.norm() > 0.1


def test_the_lm_is_given_back_in_its_own_precision_also_after_an_error(micro):
    stream = ActivationStream(micro, context_size=128, buffer_tokens=16_384)
    before = [p.data_ptr() for p in micro.lm.parameters()]
    stream.next_block()
    with pytest.raises(Exception):  # noqa: B017  (nnsight's own kind)
        stream.activations(torch.tensor([[10**9]]))
    assert [p.data_ptr() for p in micro.lm.parameters()] == before and all(
        p.dtype == torch.float32 for p in micro.lm.parameters()
    )


def test_a_stopped_lm_keeps_neither_tokens_nor_activations_alive(micro):
    """Without waiting for Python's collector, which would come by when some hundred MB have gathered."""
    lm = SplitLM(micro)

    def stop() -> list[weakref.ref]:
        tokens = torch.zeros(2, 16, dtype=torch.long)
        resid = lm.resid(tokens)
        assert resid.shape == (2, 16, micro.d_in)
        return [weakref.ref(tokens), weakref.ref(resid)]

    gc.disable()
    try:
        assert [ref() for ref in stop()] == [None, None]
    finally:
        gc.enable()


def test_rows_stand_where_the_shuffle_puts_them_with_their_own_label(micro):
    """Against the plain way: all rows one after the other, then one permutation."""
    stream, again = (ActivationStream(micro, 128, 40_000, seed=3, lm_tokens=8192) for _ in range(2))
    block = stream.next_block()
    rows, labels = [], []
    for _ in range(again.n_lm_batches):
        contexts = [[next(text)[0] for _ in range(again.n_contexts // 2)] for text in again.texts]
        tokens = torch.tensor(sum(contexts, []))
        keep = ~torch.isin(tokens, again.special)
        rows.append(again.activations(tokens)[keep].float())
        labels.append((torch.arange(again.n_contexts) < again.n_contexts // 2)[:, None].expand_as(keep)[keep])
    order = torch.randperm(len(block.x), generator=torch.Generator().manual_seed(3_000_009))
    assert (
        again.n_lm_batches > 1
        and torch.equal(block.x, torch.cat(rows)[order])
        and torch.equal(block.forget, torch.cat(labels)[order])
    )


def test_a_block_is_half_forget_half_retain_shuffled_and_repeatable(micro):
    first, again = (ActivationStream(micro, 128, 16_384, seed=1).next_block() for _ in range(2))
    assert torch.equal(first.x, again.x) and torch.equal(first.forget, again.forget)
    assert first.forget.float().mean().item() == pytest.approx(0.5, abs=0.03)
    halves = first.forget.float().view(-1).split(len(first.forget) // 2)
    assert halves[0].mean().item() == pytest.approx(halves[1].mean().item(), abs=0.05), (
        "domains are mixed within a block"
    )
    other = ActivationStream(micro, 128, 16_384, seed=2).next_block()
    assert other.x.shape != first.x.shape or not torch.equal(other.x, first.x)


def with_sinks(stream: ActivationStream) -> ActivationStream:
    """Every other context's second row is massive."""
    activations = stream.activations

    def changed(tokens):
        resid = activations(tokens)
        resid[:, 1] = torch.where(tokens[:, 1, None] % 2 == 0, 100 * resid[:, 1], resid[:, 1])
        return resid

    stream.activations = changed  # pyright: ignore
    return stream


def test_massive_rows_are_left_out_and_the_last_rows_take_their_places(micro):
    plain = ActivationStream(micro, 128, 16_384, seed=1).next_block()
    stream = with_sinks(ActivationStream(micro, 128, 16_384, seed=1))
    block = stream.next_block()
    left = len(plain.x) - len(block.x)
    assert 0 < left < 128 and block.x.norm(dim=1).max() < 10 * block.x.norm(dim=1).median()
    stays = (block.x == plain.x[: len(block.x)]).all(1)
    assert stays.sum() >= len(block.x) - left, "only the last rows move"
    place_of = {row.numpy().tobytes(): i for i, row in enumerate(plain.x)}
    assert all(
        plain.forget[place_of[row.numpy().tobytes()]] == label
        for row, label in zip(block.x[~stays], block.forget[~stays])
    )


def test_no_activation_of_the_embedded_lm_is_massive(activations):
    assert not massive(activations.x, torch.ones(len(activations.x), dtype=torch.bool)).any()


def test_batches_are_whole_and_cover_a_block_once(activations):
    batches = list(activations.batches(2048))
    assert all(len(x) == 2048 == len(forget) for x, forget in batches)
    assert len(batches) == len(activations.x) // 2048
    assert torch.equal(torch.cat([x for x, _ in batches]), activations.x[: 2048 * len(batches)])


def test_train_and_held_out_text_share_no_document(micro):
    for text in (micro.forget, micro.retain):
        assert not set(text.train["text"]) & set(text.held_out["text"])


# ---- working ahead

FOREVER = 10**9  # activations


def of_four_batches(micro, documents: int = 27_000) -> ActivationStream:
    """A stream whose blocks are of four LM batches, on so many documents of each domain."""
    short = {
        domain: replace(text, train=text.train.select(range(min(documents, len(text.train)))))
        for domain, text in (("forget", micro.forget), ("retain", micro.retain))
    }
    stream = ActivationStream(replace(micro, **short), 128, 8192, seed=3, lm_tokens=2048)
    assert stream.n_lm_batches == 4
    return stream


@pytest.mark.parametrize("changed", [lambda stream: stream, with_sinks])
def test_blocks_that_are_made_ahead_have_the_same_bits(changed, micro, ahead):
    """Of text that is read several times; what was drawn ahead counts for no block before its own."""
    plain, stream = (changed(of_four_batches(micro, 90)) for _ in range(2))
    passes, made = [], []
    for shares in ((0.1, 0.3, 0.3, 1.0), (0.6,), (), (0.2, 0.9), ()):
        one, other = plain.next_block(), stream.next_block()
        assert torch.equal(one.x, other.x) and torch.equal(one.forget, other.forget)
        assert one.document is not None and other.document is not None
        assert torch.equal(one.document, other.document)
        assert (plain.passes, plain.with_massive) == (stream.passes, stream.with_massive)
        for share in shares:
            stream.work_ahead(share, FOREVER)
        assert stream.passes == plain.passes
        passes.append(dict(stream.passes))
        made.append(stream.begun != stream.passes)
    assert passes[-1]["forget"] > 2 and passes[-1]["retain"] > 2 and any(made)
    assert (plain.with_massive > 0) == (changed is with_sinks)


def test_the_lm_and_behind_it_the_text_keep_pace_with_training(micro, ahead):
    stream, done = of_four_batches(micro), []
    activations = stream.activations
    stream.activations = lambda tokens: done.append(tokens) or activations(tokens)  # pyright: ignore
    stream.next_block()
    seen = []
    for i in range(16):
        stream.work_ahead((i + 1) / 16, FOREVER)
        seen.append((len(done) - 4, len(stream.makings[1].batches)))
    assert seen == [(n, n) for n in (1, 2, 3, 4) for _ in range(4)]
    stream.next_block()
    assert len(done) == 8, "all was made"
    stream.work_ahead(0.25, FOREVER)
    assert len(done) == 9 and torch.equal(done[-1], stream.makings[0].batches[0])


def test_only_what_is_needed_is_made_ahead(micro, ahead):
    stream = of_four_batches(micro)
    n = len(stream.next_block().x)
    stream.work_ahead(1.0, 0)
    assert stream.makings == [] and stream.drawn == 1
    stream.work_ahead(1.0, n // 2)
    assert len(stream.makings) == 1 and stream.drawn == 2
    stream.work_ahead(1.0, n + n // 2)
    assert [len(making.sinks) for making in stream.makings] == [4, 0] and stream.drawn == 3


def test_where_blocks_are_made_ahead(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert works_ahead(gpu, None) and not works_ahead(cpu, None) and not works_ahead(gpu, "cache/")
    monkeypatch.setattr(ranks.here, "size", 2)
    assert not works_ahead(gpu, None)


def test_elsewhere_nothing_is_made_ahead(micro):
    stream = of_four_batches(micro)
    stream.next_block()
    stream.work_ahead(1.0, FOREVER)
    assert stream.makings == [] and stream.drawn == 1


def test_the_streams_of_a_gpu_wait_for_each_other_and_memory_is_kept_for_both(micro, ahead, monkeypatch):
    """In which order, told by stand-ins for CUDA's streams."""
    told, inside, lm = [], [], of_four_batches(micro)

    class Stream:
        def __init__(self, name: str):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def stream(used):
        inside.append(used)
        yield
        inside.pop()

    def record_stream(t, used):
        assert not inside
        told.append(f"{used.name} uses {str(t.dtype).removeprefix('torch.')}")

    activations, training = lm.activations, Stream("training")

    def told_activations(tokens):
        told.append(f"LM on {inside[0].name}")
        return activations(tokens)

    monkeypatch.setattr(lm, "activations", told_activations)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: training)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), kept=None)
    lm.side = ActivationStream.side.func(gpu)
    assert told == ["side waits for training"]
    told.clear()
    lm.next_block()
    of_block = [f"training uses {name}" for name in ("float32", "bool", "float32")]
    handed_over = ["training waits for side", *of_block]
    assert told == ["LM on side"] * 4 + handed_over
    told.clear()
    lm.work_ahead(1.0, FOREVER)
    assert told == ["LM on side"] * 4, "training's stream waits when the block is handed over"
    told.clear()
    lm.next_block()
    assert told == handed_over
