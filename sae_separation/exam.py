"""Asking an LM multiple-choice questions, by letter or by cloze."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sae_separation.errors import WrongRequest
from sae_separation.questions import Question
from sae_separation.saebench import AS_LISTED, letter_prompt
from sae_separation.text import LONGEST


def most_positions(config: dict) -> float:
    """How many tokens a row of an LM can hold by its config; infinite where it names no bound."""
    named = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return next((config[k] for k in named if config.get(k)), math.inf)


def special_ids(tokenizer) -> Tensor:
    """Ids [n] of the tokens that SAEs are not trained on: BOS, EOS and whatever else the tokenizer marks as
    special.

    A pad token with no other role is none of them: text is packed and never padded, so that where it stands
    in a text it is a word of it.
    """
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    return torch.tensor(sorted(marked - pad_alone(tokenizer)), dtype=torch.long)


def pad_alone(tokenizer) -> set[int]:
    """The id of the pad token, if there is one and it has no other role."""
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    return {tokenizer.pad_token_id} - roles - {None}


def trained_on(tokens: Tensor, special: Tensor) -> Tensor:
    """Which tokens [row, pos] are of the kind that SAEs are trained on, and interventions may touch: not
    special, and not the first of a row, which in training is a BOS (or EOS); an LM without a BOS keeps its
    attention sink there. (bool)"""
    trained = ~torch.isin(tokens, special.to(tokens.device))
    trained[:, 0] = False
    return trained


@dataclass(eq=False)  # it is itself: caches hold it weakly
class Residuals:
    """The residual stream at the hook layer, as interventions are given it: resid [row, pos, D] (fp32),
    `trained` [row, pos] (bool), the tokens that they may touch, the tokens [row, pos] themselves, and what
    the LM was given beside them (Batch.seen)."""

    resid: Tensor
    trained: Tensor
    tokens: Tensor
    seen: dict = field(default_factory=dict)

    @property
    def judged(self) -> Tensor:
        """The tokens [row, pos] (bool) by which a row is judged as a whole: those that may be touched; where
        a row holds several ends of one beginning, those of the beginning, which alone stand in a place that
        no other token has."""
        if not self.seen:
            return self.trained
        places = self.seen["position_ids"]
        return self.trained & ((places[:, :, None] == places[:, None, :]).sum(-1) == 1)


@dataclass(eq=False)  # it is itself: caches hold it weakly
class Batch:
    """Right-padded token rows of similar length, and where to read the LM's answer.

    tokens [row, pos]; trained [row, pos] (bool): tokens of the kind that SAEs are trained on (`trained_on`),
    which alone an intervention may touch; positions [row, n] are read (None: all). Of ends, targets [row, m]
    are the tokens that are predicted, read_at [row, m] where among the n, ends [row, m] whose they are, and
    weights [row, m] their share of its mean; places [row, pos] and mask [row, 1, pos, pos] (added to
    attention scores) are the tokens' places and what they see, where a row holds several ends of one stem
    (None: as they stand); `rows` are the rows' places in the exam; `residuals` are given where they are known
    already.
    """

    tokens: Tensor
    trained: Tensor
    positions: Tensor | None = None
    targets: Tensor | None = None
    read_at: Tensor | None = None
    weights: Tensor | None = None
    ends: Tensor | None = None
    places: Tensor | None = None
    mask: Tensor | None = None
    rows: list[int] | None = None
    residuals: Residuals | None = None

    def take(self, rows: list[int]) -> "Batch":
        """Some of the rows, to be run and read."""
        some = {name: t[rows] for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, residuals=None, **some)

    def to(self, device) -> "Batch":
        return replace(
            self, **{name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        )

    def seen(self, lm) -> dict:
        """What an LM is given beside the tokens."""
        return (
            {}
            if self.mask is None
            else {"position_ids": self.places, "attention_mask": self.mask.to(lm.dtype)}
        )


def logits_at(lm, tokens: Tensor, positions: Tensor | None, **seen) -> Tensor:
    """Logits [row, n, vocab] of `lm` on tokens [row, pos] at `positions` [row, n] (None: all); no other is
    unembedded."""
    if positions is None:
        return lm(tokens, use_cache=False, **seen).logits

    def gather(head, hidden):
        at = positions.to(hidden[0].device)[..., None]  # an LM's last layers may lie elsewhere
        return (hidden[0].gather(1, at.expand(-1, -1, hidden[0].shape[-1])),)

    handle = lm.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        return lm(tokens, use_cache=False, **seen).logits
    finally:
        handle.remove()


class Exam:
    """Questions turned into tokens once, so that an LM can be asked again and again, plain or under an
    intervention.

    letter: SAEBench's prompt, answered by the likeliest of the four letters, for every permutation of the
    choices.
    cloze: `Question: ... Answer:` continued by each choice, answered by the highest mean log-likelihood of
    the choice's tokens; permuting the choices permutes the answer, so one pass serves all permutations. With
    `shared_stems` a row holds the question once and its four choices, none of which sees another; without, a
    row holds the question and one choice. Question and choice are tokenised together: the choice's tokens are
    those behind what all four have in common with the question alone. Without `mixed_lengths` the rows of a
    batch are of one length, unpadded.

    Raises WrongRequest when letters are asked for and one of them is more than one token, and for a choice
    without a token.
    """

    def __init__(
        self,
        tokenizer,
        questions: list[Question],
        scoring="letter",
        permutations=AS_LISTED,
        prompt_format=None,
        without_question=False,
        device="cpu",
        shared_stems=True,
        mixed_lengths=True,
        tokens_per_batch=8192,
    ):
        self.scoring, self.permutations = scoring, torch.tensor([list(p) for p in permutations])
        self.answers = torch.tensor([list(p).index(q.answer) for q in questions for p in permutations])
        in_chat = scoring == "letter" and prompt_format is not None  # where the prompt spells its BOS out
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and not in_chat else []

        def encode(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False)["input_ids"]

        if scoring == "letter":
            self.letters = letter_tokens(tokenizer, prompt_format).to(device)
            prompts = [
                letter_prompt(q, p, prompt_format, without_question) for q in questions for p in permutations
            ]
            rows = [(bos + ids, []) for ids in encode(prompts)]
        else:
            asked = ["Answer:" if without_question else f"Question: {q.question}\nAnswer:" for q in questions]
            whole = encode([f"{stem} {choice}" for stem, q in zip(asked, questions) for choice in q.choices])
            rows = []
            for i, (question, stem) in enumerate(zip(questions, encode(asked))):
                four = whole[4 * i : 4 * i + 4]
                n = len(os.path.commonprefix([stem, *four]))
                rows.append((bos + stem[:n], [ids[n:] for ids in four]))
                if [] in rows[-1][1]:
                    asked = f"{question.question[:LONGEST]!r} ({question.subject})"
                    raise WrongRequest(f"--questions: {asked} has a choice without a token: take it out")
            if not shared_stems:
                rows = [(stem, [end]) for stem, ends in rows for end in ends]
        self.n_rows = len(rows)
        self.width = 4 if scoring == "letter" or shared_stems else 1  # numbers a row
        self.batches = list(_batches(rows, tokens_per_batch, device, special_ids(tokenizer), mixed_lengths))

    def read(self, batch: Batch, logits: Tensor) -> Tensor:
        """What the exam takes from logits [row, n, vocab]: the letters' probabilities [row, 4], or the ends'
        mean log-likelihoods [row, ends]."""
        if self.scoring == "letter":
            return letters_read(logits, self.letters)
        return ends_read(batch, logits, self.width)

    def probs(self, forward: Callable[[Batch], Tensor]) -> Tensor:
        """Probabilities of the four choices as listed, [n_questions * n_permutations, 4], permutations
        innermost.

        `forward` gives logits [row, n, vocab] for a batch.
        """
        return self.probs_from(lambda batch: self.read(batch, forward(batch)))

    def probs_from(self, answers: Callable[[Batch], Tensor]) -> Tensor:
        """`probs` where `answers` gives for a batch what `read` takes from its logits."""
        rows = torch.empty(self.n_rows, self.width)
        for batch in self.batches:
            rows[batch.rows] = answers(batch).cpu()
        if self.scoring == "letter":
            return rows
        return rows.view(-1, 4).softmax(-1)[:, self.permutations].flatten(0, 1)

    def correct(self, forward: Callable[[Batch], Tensor]) -> Tensor:
        """Right or wrong, [n_questions, n_permutations] (bool)."""
        return (self.probs(forward).argmax(-1) == self.answers).view(-1, len(self.permutations))


class Completions:
    """Beginnings of a text, each with the ends that it may have, so that an LM can be asked again and again
    which end is the likeliest: the one with the highest mean log-likelihood of its tokens.

    asked: (beginning, ends, the right one). Ends of one token are all read behind one row; else each has a
    row of its own, so that no row holds what another end says, or with `shared_stems` a row holds the
    beginning once and all its ends, none of which sees another. With `letters` [spelling, 4] (letter_tokens)
    the ends are those, and `spelled_out` says that the beginning spells its own BOS out. Raises WrongRequest
    for an end without a token.
    """

    def __init__(
        self,
        tokenizer,
        asked: list[tuple[str, tuple[str, ...], int]],
        letters: Tensor | None = None,
        spelled_out=False,
        device="cpu",
        shared_stems=False,
        mixed_lengths=True,
        tokens_per_batch=8192,
    ):
        self.letters, self.answers = letters, torch.tensor([answer for *_, answer in asked])
        self.n_ends = torch.tensor([4 if letters is not None else len(ends) for _, ends, _ in asked])
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and not spelled_out else []

        def encode(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False)["input_ids"]

        stems, ends = encode([text for text, *_ in asked]), [[] for _ in asked]
        if letters is None:
            whole = iter(encode([f"{text} {end}" for text, some, _ in asked for end in some]))
            for i, (text, some, _) in enumerate(asked):
                these = [next(whole) for _ in some]
                n = len(os.path.commonprefix([stems[i], *these]))
                stems[i], ends[i] = stems[i][:n], [ids[n:] for ids in these]
                if [] in ends[i]:
                    raise WrongRequest(f"--questions: an end of {text[-LONGEST:]!r} is no token: take it out")
        self.width = 1
        if shared_stems or all(len(end) == 1 for some in ends for end in some):
            self.width = max(map(len, ends), default=4) or 4
            rows = [(bos + stem, some) for stem, some in zip(stems, ends)]
        else:
            rows = [(bos + stem, [end]) for stem, some in zip(stems, ends) for end in some]
        self.n_rows = len(rows)
        self.batches = list(_batches(rows, tokens_per_batch, device, special_ids(tokenizer), mixed_lengths))

    @property
    def longest(self) -> int:
        """Tokens of its longest row."""
        return max(batch.tokens.shape[1] for batch in self.batches)

    def read(self, batch: Batch, logits: Tensor) -> Tensor:
        """Of logits [row, n, vocab]: the letters' probabilities [row, 4], or the ends' mean log-likelihoods
        [row, ends]."""
        return (
            letters_read(logits, self.letters)
            if self.letters is not None
            else ends_read(batch, logits, self.width)
        )

    def said(self, answers: Callable[[Batch], Tensor]) -> Tensor:
        """The place of the likeliest end [n], where `answers` gives for a batch what `read` takes from its
        logits."""
        rows = torch.empty(self.n_rows, self.width)
        for batch in self.batches:
            rows[batch.rows] = answers(batch).cpu()
        said = torch.full((len(self.answers), int(self.n_ends.max())), -math.inf)
        there = torch.arange(said.shape[1]) < self.n_ends[:, None]
        said[there] = rows[there] if self.width > 1 else rows[:, 0]
        return said.argmax(-1)

    def right(self, answers: Callable[[Batch], Tensor]) -> Tensor:
        """Right or wrong [n] (bool), with `answers` as in `said`."""
        return self.said(answers) == self.answers


def letters_read(logits: Tensor, letters: Tensor) -> Tensor:
    """Probabilities [row, 4] of the letters [spelling, 4], the likelier spelling, from logits [row, n, vocab]
    at the first place."""
    return logits[:, 0].float().softmax(-1)[:, letters].amax(1)


def ends_read(batch: Batch, logits: Tensor, width: int) -> Tensor:
    """Mean log-likelihoods [row, width] of a batch's ends from logits [row, n, vocab]."""
    assert batch.targets is not None and batch.ends is not None and batch.weights is not None
    assert batch.read_at is not None
    logits, at = logits.float(), batch.read_at
    there = logits[torch.arange(len(at), device=at.device)[:, None], at, batch.targets]
    log_probs = there - logits.logsumexp(-1).gather(1, at)
    return torch.zeros(len(log_probs), width, device=log_probs.device).scatter_add_(
        1, batch.ends, log_probs * batch.weights
    )


def prompt_batches(
    tokenizer, prompts: list[str], device="cpu", mixed_lengths=True, tokens_per_batch=8192
) -> list[Batch]:
    """Prompts as rows that are read at their last token."""
    ids: list[list[int]] = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return id_batches(tokenizer, ids, device, mixed_lengths, tokens_per_batch)


def id_batches(
    tokenizer, prompts: list[list[int]], device="cpu", mixed_lengths=True, tokens_per_batch=8192
) -> list[Batch]:
    """The same of prompts as token ids, without their BOS."""
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    rows: list[tuple[list[int], list[list[int]]]] = [(bos + prompt, []) for prompt in prompts]
    return list(_batches(rows, tokens_per_batch, device, special_ids(tokenizer), mixed_lengths))


def _batches(
    rows: list[tuple[list[int], list[list[int]]]],
    tokens_per_batch: int,
    device,
    special: Tensor,
    mixed_lengths: bool,
) -> Iterator[Batch]:
    """Batches of rows (stem, ends) of like length, or without `mixed_lengths` of the same: read where the
    ends' tokens, or without an end the next, are predicted. No end is empty; its last token is only
    predicted, and not in the row. `special` ids are as in `special_ids`."""
    length = [len(stem) + sum(len(end) - 1 for end in ends) for stem, ends in rows]
    order = sorted(range(len(rows)), key=length.__getitem__)
    while order:
        n = 1
        longest = math.inf if mixed_lengths else length[order[0]]
        while n < len(order) and length[order[n]] <= min(longest, tokens_per_batch // (n + 1)):
            n += 1
        some, order = order[:n], order[n:]
        shape, targeted = (
            (n, max(length[i] for i in some)),
            (n, max(1, *(sum(map(len, rows[i][1])) for i in some))),
        )
        n_read = [1 + length[i] - len(rows[i][0]) for i in some]  # the stem's last token, and the ends'
        tokens, places, part = (
            torch.zeros(shape, dtype=torch.long),
            torch.zeros(shape, dtype=torch.long),
            torch.full(shape, -1),
        )  # part: 0 stem, 1.. ends, -1 padding
        positions = torch.zeros(n, max(n_read), dtype=torch.long)
        targets, read_at, owner = (torch.zeros(targeted, dtype=torch.long) for _ in range(3))
        weights = torch.zeros(targeted)
        for r, i in enumerate(some):
            stem, ends = rows[i]
            at, read = len(stem), 0
            tokens[r, :at], places[r, :at], part[r, :at] = torch.tensor(stem), torch.arange(at), 0
            positions[r, : n_read[r]] = torch.arange(at - 1, at - 1 + n_read[r])
            for e, end in enumerate(ends):
                here, now = slice(at, at + len(end) - 1), slice(read, read + len(end))
                tokens[r, here], places[r, here], part[r, here] = (
                    torch.tensor(end[:-1], dtype=torch.long),
                    len(stem) + torch.arange(len(end) - 1),
                    e + 1,
                )
                own = at - len(stem) + 1  # the place of its first token among those that are read
                read_at[r, now] = torch.tensor([0, *range(own, own + len(end) - 1)])
                targets[r, now], owner[r, now], weights[r, now] = torch.tensor(end), e, 1 / len(end)
                at, read = here.stop, now.stop
        trained = trained_on(tokens, special) & (part >= 0)
        batch = Batch(tokens, trained, positions, targets, read_at, weights, owner)
        if part.max() > 1:
            seen = ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])).tril()
            batch.places, batch.mask = (
                places,
                torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None],
            )
        yield replace(batch.to(device), rows=some)


def letter_tokens(tokenizer, prompt_format=None) -> Tensor:
    """`single_letters`. Raises WrongRequest for a letter of more than one token."""
    letters = single_letters(tokenizer, prompt_format)
    if letters is None:
        why = "an answer letter is more than one token of this LM's tokenizer"
        raise WrongRequest(f"--scoring letter: {why}; give --scoring cloze")
    return letters


def single_letters(tokenizer, prompt_format=None) -> Tensor | None:
    """Token ids [spelling, 4] of the letters: after a space, as they stand behind a prompt's "Answer:"; in
    chat formats by themselves, with and without the space (as SAEBench). None where a letter is more than one
    token."""
    before, spellings = ("", ["", " "]) if prompt_format else ("Answer:", [" "])

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = [[encode(before + space + letter) for letter in "ABCD"] for space in spellings]
    stem = encode(before)
    if any(i[:-1] != stem for row in ids for i in row):
        return None
    return torch.tensor([[i[-1] for i in row] for row in ids])
