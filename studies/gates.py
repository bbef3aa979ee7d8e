"""What a gate must see, and learn from, to find what is to be forgotten however it is asked for.

    python -m studies.gates --world_seed 1                       # into studies/gates.json
    python -m studies.gates --world_seed 1 --only "token, documents" "context, layer 2"      # some of them

Rows that the file holds are not made again.

A gate writes the mean of retain text over the stream of every token that it takes for forget text (`ideal`
also zero). Each is a probe with one hidden layer, told the domain of documents and nothing else. They differ
in the hook layer, in what they read and in what they learn from (GATES):

reads     `token`: x_t. `context`: also two means of x over the tokens before, the nearest counting most.
text      `documents`: contexts of one domain, as SAEs are trained on. `mixed`: sentences and questions of
          both domains, one by one in random order, under their own header, none, or one of the other domain.
counts    `all`: tokens count alike. `known`: as many nats as the LM's prediction behind them is better than
          that of a bigram; not where it is better by less than half a nat.
group     the score is the sum of the hidden units, as it would be of an SAE's features.
regularised: weight decay; half as many contexts again in which a fifth of the words are replaced by others;
          `context` is left out of half of the examples.

`ideal` is no probe: a pattern that knows the sentences and questions of the world. It fires on all their
tokens, or on the last one: what is left where a gate of that layer fires as it should.

Thresholds are shares of what counts in retain text. The cell is chosen by SAEBench's rule on half of the
questions; it and every other one is measured on the other half in every form (evals/robustness.py). Choose on
a world that is not reported.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import experiment
from micro_pythia.make import default_folder
from micro_pythia.world import FORGET, SUBJECTS, World
from sae_separation import testbeds
from sae_separation.evals import cells, robustness
from sae_separation.evals.evaluator import Evaluator
from sae_separation.exam import Residuals
from sae_separation.interventions import WRITES, written_where
from sae_separation.methods import Method, mlp
from sae_separation.pieces import log_bigram, mixed_contexts, with_others
from sae_separation.reader import DECAYS, LEAST, LEFT_OUT, REPLACED, at_shares, mean_before
from sae_separation.results import maker

CONTEXT, BATCH = 128, 64
WEIGHT_DECAY = 0.1  # of regularised gates
N_CONTEXTS, STEPS = 12_000, 6_000  # to learn from, and of Adam
RETAIN_SHARES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Gate:
    layer: int
    reads: str
    text: str = "mixed"
    counts: str = "known"
    regularised: bool = True
    hidden: int = 400
    group: bool = False


GATES = {
    "token, documents": Gate(1, "token", "documents", "all", False),
    "token, mixed": Gate(1, "token", "mixed", "all", False),
    "token, known": Gate(1, "token", regularised=False),
    "token, layer 2": Gate(2, "token", regularised=False),
    "token, layer 2, regularised": Gate(2, "token"),
    "context, layer 2": Gate(2, "context", regularised=False),
    "context, layer 2, regularised": Gate(2, "context"),
    "context, layer 1, regularised": Gate(1, "context"),
    "context, layer 2, regularised, 40 units": Gate(2, "context", hidden=40),
    "context, layer 2, regularised, group of 40": Gate(2, "context", hidden=40, group=True),
    "context, layer 2, regularised, group of 400": Gate(2, "context", group=True),
    "context, layer 2, regularised, documents": Gate(2, "context", "documents"),
    "context, layer 2, regularised, all tokens": Gate(2, "context", counts="all"),
}
IDEAL = {f"ideal, layer {layer}, {which}": (layer, which) for layer in (1, 2) for which in ("all", "last")}


# ---- what gates learn from


def contexts_of_documents(testbed: Any, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same of contexts of one domain each."""
    rows = []
    for text in (testbed.forget, testbed.retain):
        every = testbeds.packed_contexts(text.train, testbed.tokenizer, CONTEXT, seed=seed, repeat=True)
        rows.append(torch.tensor(list(islice(every, n // 2))))
    tokens = torch.cat(rows)
    labels = (torch.arange(len(tokens)) < len(rows[0])).long()[:, None].expand_as(tokens)
    return tokens, labels.masked_fill(tokens == testbed.tokenizer.eos_token_id, -1)


def seen(x: Tensor, reads: str) -> Tensor:
    """What a gate reads [row, pos, D or 3 D] of the stream x [row, pos, D]."""
    return x if reads == "token" else torch.cat([x, *(mean_before(x, decay, {}) for decay in DECAYS)], -1)


class Examples(NamedTuple):
    """x [n, D or 3 D], whether it is of forget text, and how much it counts, each [n]."""

    x: Tensor
    forget: Tensor
    weight: Tensor


@torch.no_grad()
def examples(evaluator: Evaluator, gate: Gate, n_contexts: int, seed: int) -> Examples:
    """The tokens that a gate learns from, as its `text` and `counts` say. Of those that are not known two in
    a hundred stay in, or it would never have read any."""
    testbed, generator = evaluator.testbed, torch.Generator().manual_seed(seed)
    if gate.text == "mixed":
        tokens, labels = mixed_contexts(testbed, n_contexts, CONTEXT, seed)
    else:
        tokens, labels = contexts_of_documents(testbed, n_contexts, seed)
    lm, bigram, read = evaluator.lm.lm, log_bigram(tokens), tokens
    if gate.regularised:
        half = torch.randperm(len(tokens), generator=generator)[: len(tokens) // 2]
        read = torch.cat([tokens, with_others(tokens[half], testbed.tokenizer, REPLACED, generator)])
        tokens, labels, bigram = (torch.cat([part, part[half]]) for part in (tokens, labels, bigram))
    parts = []
    batches = (part.split(BATCH) for part in (read, tokens, labels, bigram))
    for of_lm, some, of, of_bigram in zip(*batches):
        gain = torch.ones(some.shape)
        counts = of >= 0
        if gate.counts == "known":
            log_p = lm(of_lm).logits.float().log_softmax(-1)[:, :-1].gather(2, some[:, 1:, None])[..., 0]
            gain[:, :-1] = (log_p - of_bigram).clamp(min=0)
            counts[:, :-1] &= of[:, 1:] == of[:, :-1]  # the next token says nothing where a piece ends
            counts[:, -1] = False
            counts &= (gain > LEAST) | (torch.rand(some.shape, generator=generator) < 0.02)
        else:
            counts &= torch.rand(some.shape, generator=generator) < 0.5
        x = seen(evaluator.lm.resid(of_lm), gate.reads)
        parts.append((x[counts], of[counts].float(), gain[counts]))
    return Examples(*(torch.cat(part) for part in zip(*parts)))


# ---- the gates


@torch.enable_grad()
def fit(data: Examples, gate: Gate, d_in: int, steps: int, seed: int, batch: int = 2048, lr: float = 3e-3):
    """The probe's tensors (methods.mlp), trained with Adam on examples drawn as often as they count."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = data.x.mean(0), data.x.std(0).clamp(min=1e-6)

    def uniform(*shape: int) -> Tensor:
        return ((2 * torch.rand(*shape, generator=generator) - 1) / shape[0] ** 0.5).requires_grad_()

    probe = {"W_in": uniform(data.x.shape[1], gate.hidden), "W_out": uniform(gate.hidden)}
    probe |= {
        "b_in": torch.zeros(gate.hidden, requires_grad=True),
        "b_out": torch.zeros(1, requires_grad=True),
    }
    if gate.group:
        probe["W_out"] = torch.ones(gate.hidden)
    trained = [t for t in probe.values() if t.requires_grad]
    adam = torch.optim.AdamW(trained, lr, weight_decay=WEIGHT_DECAY if gate.regularised else 0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda i: min(1.0, 2 * (steps - i) / steps))
    upto = data.weight.double().cumsum(0)
    for _ in range(steps):
        drawn = torch.rand(batch, generator=generator, dtype=torch.double) * upto[-1]
        some = torch.searchsorted(upto, drawn).clamp(max=len(upto) - 1)
        x = (data.x[some] - mean) / std
        if gate.regularised:
            x[:, d_in:] *= torch.rand(batch, 1, generator=generator) >= LEFT_OUT
        loss = binary_cross_entropy_with_logits(mlp(x, probe), data.forget[some])
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
    probe = {name: t.detach() for name, t in probe.items()}
    probe["W_in"] = probe["W_in"] / std[:, None]  # of x itself
    return probe | {"b_in": probe["b_in"] - mean @ probe["W_in"]}


def thresholds(data: Examples, probe: dict) -> list[dict]:
    """Cells that fire on RETAIN_SHARES of what counts in retain text."""
    x, weight = data.x[data.forget < 0.5], data.weight[data.forget < 0.5]
    found = at_shares(torch.cat([mlp(part, probe) for part in x.split(2**16)]), weight, RETAIN_SHARES)
    return [{"retain_share": share, "threshold": score} for share, score in zip(RETAIN_SHARES, found)]


class Gated(Method):
    """The intervention of a gate whose score [row, pos] is a function of Residuals."""

    def __init__(self, score: Callable[[Residuals], Tensor], grid: list[dict], retain_mean: Tensor):
        super().__init__("gate", {"retain_mean": retain_mean}, {"cells": grid})
        self.says = score

    def hook(self, cell: dict) -> cells.Hook:
        def written(resid: Tensor, hook: Residuals) -> Tensor:
            fires = hook.trained & (self.says(hook) >= cell["threshold"])
            write = cell.get("write", "retain_mean")
            return written_where(fires, resid, write, self.tensors["retain_mean"])

        return written


class Ideal:
    """Which tokens are of a sentence or a question that tells or asks a fact to be forgotten: all of them, or
    the `last` of each."""

    def __init__(self, testbed: Any, world: World, which: str):
        self.last, self.known = which == "last", dict[tuple, list[bool]]()
        ids = range(len(testbed.tokenizer))
        special = set(testbed.tokenizer.all_special_ids)
        self.texts = ["\0" if i in special else testbed.tokenizer.decode([i]) for i in ids]
        self.pattern = self._pattern(world)

    @staticmethod
    def _pattern(world: World) -> re.Pattern:
        (subject,) = (s for s in SUBJECTS if s.name == FORGET)
        entity = "(?:" + "|".join(map(re.escape, world.entities[subject.name])) + ")"
        found = []
        for relation in subject.relations:
            value = "(?:" + "|".join(re.escape(v) for v in relation.values) + ")"

            def pattern(text: str, entity=entity, value=value) -> str:
                one = re.escape(text).replace(r"\{e\}", entity).replace(r"\{v\}", f"(?i:{value})")
                return one if text.startswith("{") else f"(?i:{one[0]}){one[1:]}"

            options = r"(?:\n[A-D]\. [^\n]*)*(?:\nAnswer:(?: [A-D](?=\n|$)| \w+)?)?"
            found += [pattern(text) for text in relation.prose]
            found += [pattern(text) + options for text in (*relation.questions, relation.anew[0])]
            begun = (relation.sentence, relation.anew[1])
            found += [pattern(text) + rf"(?: {value}\.?)?" for text in begun]
        return re.compile("|".join(sorted(found, key=len, reverse=True)))

    def row(self, ids: tuple[int, ...]) -> list[bool]:
        if ids not in self.known:
            ends, at = [], 0
            for i in ids:
                at += len(self.texts[i])
                ends.append(at)
            spans = [m.span() for m in self.pattern.finditer("".join(self.texts[i] for i in ids))]
            fires = [any(first < end <= last for first, last in spans) for end in ends]
            if self.last:
                fires = [on and not after for on, after in zip(fires, [*fires[1:], False])]
            self.known[ids] = fires
        return self.known[ids]

    def __call__(self, read: Residuals) -> Tensor:
        return torch.tensor([self.row(tuple(ids)) for ids in read.tokens.tolist()]).float()


# ---- what they come to


def measured(evaluator: Evaluator, method: Method) -> dict:
    """Its cell by SAEBench's rule on the choosing half (None: no cell is allowed), and every cell, in all
    forms on the other half: metrics of `robustness`, numbers from 0 to 1."""
    switch, chosen, grid = cells.chosen_for(evaluator, method)
    exam = evaluator.once(robustness.examined)
    rows, best = [], None
    for cell in grid:
        metrics, table, _ = robustness.in_all_forms(evaluator, exam, switch, cell)
        names = ("worst_case_score", "mean_score", "knowledge_left_max", "kept_at_worst", "retain_kept_min")
        row = cell | {name: metrics[name] for name in names}
        for how in ("letter", "cloze", "prose"):
            of = [form for form in table if form["form"].startswith(how)]
            row[how] = {"left": max(f["left"] for f in of), "kept": min(f["kept"] for f in of)}
        rows.append(row)
        best = row if cell == chosen else best
    switch.lm.forget_answers()
    return {"chosen": best, "cells": rows}


class Study:
    """Of one world, kept in a file: a row a gate, each made once."""

    def __init__(self, out: Path, world_seed: int):
        self.out, self.world = out, World(world_seed)
        self.found = json.loads(out.read_text()) if out.exists() else {}
        self.rows = self.found.setdefault(f"world {world_seed}", {})
        self.evaluators: dict[int, Evaluator] = {}

    def evaluator(self, layer: int) -> Evaluator:
        if layer not in self.evaluators:
            folder = str(default_folder(self.world.seed))
            request = experiment.Request(arm="vanilla", testbed="micro", layer=layer, lm=folder)
            self.evaluators[layer] = Evaluator(testbeds.load(request), CONTEXT)
        return self.evaluators[layer]

    def make(self, name: str):
        began = time.monotonic()
        if name in IDEAL:
            layer, which = IDEAL[name]
            evaluator = self.evaluator(layer)
            score = Ideal(evaluator.testbed, self.world, which)
            about, grid = {"layer": layer}, [{"threshold": 0.5, "write": write} for write in WRITES]
        else:
            gate = GATES[name]
            evaluator, about = self.evaluator(gate.layer), asdict(gate)
            data = examples(evaluator, gate, N_CONTEXTS, seed=0)
            probe = fit(data, gate, evaluator.testbed.d_in, STEPS, seed=0)
            grid = thresholds(data, probe)
            about |= {"examples": len(data.forget)}

            def score(read: Residuals) -> Tensor:
                assert not read.seen, "a row that holds several ends: its means would mix them"
                return torch.cat([mlp(seen(part, gate.reads), probe) for part in read.resid.split(BATCH)])

        method = Gated(score, grid, evaluator.retain_mean)
        row = about | measured(evaluator, method)
        self.rows[name] = row | {"seconds": round(time.monotonic() - began), "made_by": maker(evaluator)}
        self.out.write_text(json.dumps(self.found, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*IDEAL, *GATES]
    parser.add_argument("--world_seed", type=int, default=1, help="a world that is made (micro_pythia.make)")
    parser.add_argument("--only", nargs="+", default=every, choices=every)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("gates.json"))
    args = parser.parse_args()
    study = Study(args.out, args.world_seed)
    print("| gate | chosen: worst case | left | kept | cells: left at most / kept at least |")
    for name in args.only:
        if name not in study.rows:
            study.make(name)
        row = study.rows[name]
        best = row["chosen"]
        names = ("worst_case_score", "knowledge_left_max", "kept_at_worst")
        said = [f"{best[name]:.2f}" if best else "n/a" for name in names]
        each = ", ".join(f"{c['knowledge_left_max']:.2f} / {c['kept_at_worst']:.3f}" for c in row["cells"])
        print(f"| {name} | {' | '.join(said)} | {each} |", flush=True)


if __name__ == "__main__":
    main()
