"""Text of both domains in pieces, one by one in random order, with a label for every token: what a reader
learns from (reader.py).

    tokens, labels = mixed_contexts(testbed, n=1000, size=128, seed=0)

Contexts of one domain each, as SAEs are trained on, never show forget text behind retain text, nor a question
without its header.
"""

import random
import re
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from sae_separation.exam import special_ids

HEADER = "The following are multiple choice questions"  # SAEBench's line in front of a question begins so
MOST_DOCUMENTS = 20_000  # of each domain
ADDED = 20  # counts by which bigrams are smoothed


def pieces(document: str) -> tuple[str, list[str]]:
    """The header of a document ("": none), and its questions or sentences."""
    header, rest = "", document
    if document.startswith(HEADER):
        header, _, rest = document.partition("\n")
    found: list[str] = []
    for block in rest.split("\n\n"):
        found += [block] if "\n" in block else re.split(r"(?<=\.) ", block)
    return header, [piece for piece in found if piece]


def mixed_pieces(documents: dict[bool, list[str]], rng: random.Random) -> Iterator[tuple[str, bool]]:
    """The pieces of documents of both domains (True: forget text) in random order without end, each domain as
    often. What has a header stands under its own (in half of the cases), none, or one of the other domain, if
    that has any."""
    taken = {domain: [pieces(document) for document in some] for domain, some in documents.items()}
    headers = {domain: sorted({head for head, _ in some} - {""}) for domain, some in taken.items()}
    drawn = {}
    for domain, some in taken.items():
        parts = [(head, part) for head, parts in some for part in parts]
        rng.shuffle(parts)
        drawn[domain] = cycle(parts)
    while True:
        domain = rng.random() < 0.5
        head, part = next(drawn[domain])
        others = rng.sample(headers[not domain], 1) if headers[not domain] else [""]
        head = head and rng.choice([head, head, "", *others])
        yield f"{head}\n{part}" if head else part, domain


def mixed_contexts(
    testbed: Any, n: int, size: int, seed: int, held_out: bool = False
) -> tuple[Tensor, Tensor]:
    """Contexts [n, size] of mixed pieces of a testbed's training text (or of what is `held_out` of it), and
    which tokens are of forget text [n, size] (-1: special ones)."""
    rng, tokenizer = random.Random(seed), testbed.tokenizer
    documents = {}
    for domain, text in ((True, testbed.forget), (False, testbed.retain)):
        part = text.held_out if held_out else text.train
        documents[domain] = part[:MOST_DOCUMENTS]["text"]
    every = mixed_pieces(documents, rng)
    ids: list[int] = []
    labels: list[int] = []
    while len(ids) < n * (size - 1):
        some = [next(every) for _ in range(4096)]
        joined = [(" " if "\n" not in text and rng.random() < 0.5 else "\n\n") + text for text, _ in some]
        for found, (_, forget) in zip(tokenizer(joined, add_special_tokens=False)["input_ids"], some):
            ids += found
            labels += [int(forget)] * len(found)
    rows, of_rows = (torch.tensor(some[: n * (size - 1)]).view(n, -1) for some in (ids, labels))
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    tokens = torch.cat([torch.full((n, 1), first), rows], 1)
    labels_of = torch.cat([torch.full((n, 1), -1), of_rows], 1)
    return tokens, labels_of.masked_fill(torch.isin(tokens, special_ids(tokenizer)), -1)


def with_others(tokens: Tensor, tokenizer: Any, share: float, generator: torch.Generator) -> Tensor:
    """Contexts [n, pos] with a share of their words replaced by others of their words; never what makes a
    question one: lines, letters, SAEBench's header."""
    fixed = set(tokenizer(f"{HEADER} (with answers) about\nQuestion:\nAnswer:")["input_ids"])
    texts = [tokenizer.decode([i]).strip() for i in range(len(tokenizer))]
    word = torch.tensor([i not in fixed and len(t) > 2 and t.isalpha() for i, t in enumerate(texts)])
    chosen = word[tokens] & (torch.rand(tokens.shape, generator=generator) < share)
    words = tokens[word[tokens]]
    drawn = torch.randint(max(len(words), 1), (int(chosen.sum()),), generator=generator)
    return tokens.masked_scatter(chosen, words[drawn])


def log_bigram(tokens: Tensor) -> Tensor:
    """log p(next | token) [n, pos - 1] of the tokens [n, pos] that do follow, as these contexts count pairs,
    smoothed towards the frequencies of tokens."""
    size = int(tokens.max()) + 1
    first, following = tokens[:, :-1], tokens[:, 1:]
    _, which, n_pairs = (first * size + following).unique(return_inverse=True, return_counts=True)
    frequency = following.flatten().bincount(minlength=size) / following.numel()
    n_first = first.flatten().bincount(minlength=size)
    return ((n_pairs[which] + ADDED * frequency[following]) / (n_first[first] + ADDED)).log()
