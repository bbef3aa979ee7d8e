"""The activation stream: packing, labels, special tokens, and agreement with a plain forward pass."""

import gc
import weakref

import datasets
import pytest
import torch

from experiment import ActivationStream
from sae_separation.errors import RunFailed
from sae_separation.lm import SplitLM, massive
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


def test_massive_rows_are_left_out_and_the_last_rows_take_their_places(micro, monkeypatch):
    plain = ActivationStream(micro, 128, 16_384, seed=1).next_block()
    stream = ActivationStream(micro, 128, 16_384, seed=1)
    activations = stream.activations

    def with_sinks(tokens):
        resid = activations(tokens)
        resid[:, 1] = torch.where(tokens[:, 1, None] % 2 == 0, 100 * resid[:, 1], resid[:, 1])
        return resid

    monkeypatch.setattr(stream, "activations", with_sinks)
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
