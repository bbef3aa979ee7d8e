"""Make micro-pythia: a GPT-NeoX of about 1.2 M parameters that knows one invented world.

    python -m micro_pythia.make                                       # rebuild the shipped LM, in place
    python -m micro_pythia.make --world_seed 1                        # another world, kept in the cache

Writes config.json, model.safetensors (bf16), the tokenizer, questions.json and report.json (how well it knows
its facts) into the folder, and into oracle/ the same LM trained on the world without the forget facts: as
many tokens on the same schedule, and what perfect unlearning looks like. Exits with 1 when one of them falls
short of what the testbed needs. The same command again goes on where it was stopped, from the last probe.

Small LMs do not learn to answer with a letter from questions alone: they stay at "any of A-D". What teaches
it: option markers and names as whole tokens; two heads that start by looking one and two tokens back; a first
stage of option look-ups that state no fact; then a ramp to facts and questions, with extra loss weight on the
answer letter.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import math
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from sae_separation.errors import Interrupted, RunFailed, WrongRequest, begin, finish

if __name__ == "__main__":  # before what takes long to import
    begin()

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from micro_pythia.world import FORGET, SUBJECTS, Fact, World, lookup_drill, lookup_list, lookup_question
from sae_separation import checkpoint, process
from sae_separation.exam import Completions, Exam, logits_at
from sae_separation.files import Unusable
from sae_separation.losses import has_bf16
from sae_separation.parser import Parser
from sae_separation.questions import Question
from sae_separation.testbeds import ORACLE
from sae_separation.text import cache_folder

BOS = "<|endoftext|>"
HIDDEN, LAYERS, HEADS, CONTEXT = 128, 4, 4, 128
PROBED = 200  # steps
HALF_MADE = {"checkpoints", "config.json", "generation_config.json", "model.safetensors", "questions.json"}
HALF_MADE |= {"tokenizer.json", "tokenizer_config.json", ORACLE}  # until report.json is there
ALL_24 = list(itertools.permutations(range(4)))
# what is read, in shares of documents: first the look-up stage, then the stage of facts and questions
KINDS = ("prose", "open", "list", "drill", "lookup", "quiz")
LOOKUP_STAGE = np.array([0.20, 0.05, 0.20, 0.45, 0.05, 0.05])
FACT_STAGE = np.array([0.35, 0.05, 0.02, 0.05, 0.05, 0.48])


def make_pools(world: World, rng: random.Random, without: str = "") -> dict[str, list[str]]:
    """Documents of each kind, enough that few are seen twice; none about the subject `without`."""
    names = [s.name for s in SUBJECTS if s.name != without]
    by_facts = [
        s for s in names for _ in world.entities[s] for _ in world.subjects[s].relations
    ]  # subjects by their share of facts
    return {
        "prose": [world.prose(rng, rng.choice(by_facts)) for _ in range(20_000)],
        "open": [world.open_questions(rng, rng.choice(by_facts)) for _ in range(8_000)],
        "list": [lookup_list(rng, rng.choice((2, 3, 4))) for _ in range(15_000)],
        "drill": [lookup_drill(rng, rng.choice((3, 6, 11))) for _ in range(15_000)],
        "lookup": [lookup_question(rng) for _ in range(15_000)],
        "quiz": [world.quiz(rng, rng.choice(by_facts), rng.choice((1, 1, 2, 3, 4))) for _ in range(40_000)],
    }


def make_tokenizer(world: World, pools) -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges, plus every frequent word, name and option marker as one token."""
    sample = [d for docs in pools.values() for d in docs[:8_000]]
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = collections.Counter(w for doc in sample for w, _ in splitter.pre_tokenize_str(doc))
    names = [e for known in world.entities.values() for e in known]
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = splitter
    base.train_from_iterator(
        names * 3 + sample[:300],
        trainers.BpeTrainer(
            vocab_size=257 + 150,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(base.to_str())["model"]
    vocab = dict(model["vocab"])
    for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0])):
        if count >= 5:
            vocab.setdefault(word, len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS])
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t in ("\nA.", "\nB.", "\nC.", "\nD.", "\nAnswer:")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token=BOS, pad_token=BOS
    )


def make_model(vocab_size: int) -> GPTNeoXForCausalLM:
    """A GPT-NeoX with residual outputs scaled down by depth and two heads that start as look-back heads."""
    lm = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab_size,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * HIDDEN,
            max_position_embeddings=256,
            initializer_range=0.05,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
            # PreTrainedConfig takes it among its other arguments, which the stubs do not show
            attn_implementation="eager",  # type: ignore[reportCallIssue]
        )
    )
    with torch.no_grad():
        for layer in lm.gpt_neox.layers:
            layer.get_parameter("attention.dense.weight").mul_((2 * LAYERS) ** -0.5)
            layer.get_parameter("mlp.dense_4h_to_h.weight").mul_(0.5 * (2 * LAYERS) ** -0.5)
        look_back(lm.gpt_neox.layers[0].attention, distances=(1, 2))
    return lm


def look_back(attention, distances, strength=6.0):
    """Start head h as "attend distances[h] tokens back": rotary phases in the query and key biases, little
    content.

    With rotary frequencies w_j, a query bias of strength (cos d w_j, -sin d w_j) and a key bias of strength
    (1, 0) score strength² sum_j cos((d - distance) w_j), which is largest at distance d.
    """
    size = HIDDEN // HEADS
    rotary = size // 2
    frequencies = 10_000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    weight, bias = (
        attention.query_key_value.weight.view(HEADS, 3, size, -1),
        attention.query_key_value.bias.view(HEADS, 3, size),
    )
    for head, d in enumerate(distances):
        weight[head, :2, :rotary] *= 0.1
        bias[head, 0, : rotary // 2] = strength * torch.cos(d * frequencies)
        bias[head, 0, rotary // 2 : rotary] = -strength * torch.sin(d * frequencies)
        bias[head, 1, : rotary // 2] = strength


class Reader:
    """Packs documents of the mixed kinds into rows of CONTEXT + 1 tokens, each token with its loss weight."""

    def __init__(self, tokenizer, pools, seed: int, rows: int = 32):
        self.rng, self.rows = np.random.default_rng(seed), rows
        self.docs = {
            k: [
                np.array(i) for i in tokenizer([BOS + d for d in docs], add_special_tokens=False)["input_ids"]
            ]
            for k, docs in pools.items()
        }
        self.letters = [
            tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][0] for letter in "ABCD"
        ]
        self.answer = tokenizer("\nAnswer:", add_special_tokens=False)["input_ids"][-1]

    def batch(self, shares: np.ndarray):
        """tokens [row, CONTEXT + 1] (int64), weights (float32), and drill_answer (bool): letters that close a
        drill."""
        shape = (self.rows, CONTEXT + 1)
        tokens, weights, drill_answer = (
            np.zeros(shape, np.int64),
            np.ones(shape, np.float32),
            np.zeros(shape, bool),
        )
        for row in range(self.rows):
            at = 0
            while at < CONTEXT + 1:
                kind, room = self.rng.choice(len(KINDS), p=shares), CONTEXT + 1 - at
                doc = self._pick(KINDS[kind])
                if (
                    KINDS[kind] in ("lookup", "quiz") and len(doc) > room
                ):  # a question cut before its answer teaches nothing
                    kind, doc = 0, self._pick("prose")
                doc = doc[:room]
                here = slice(at, at + len(doc))
                tokens[row, here] = doc
                if KINDS[kind] not in ("prose", "open"):
                    is_answer = np.isin(doc, self.letters) & (np.roll(doc, 1) == self.answer)
                    weights[row, here] = np.where(
                        is_answer, 5.0, 0.2 if KINDS[kind] in ("lookup", "quiz") else 0.02
                    )
                    drill_answer[row, here] = is_answer & (KINDS[kind] == "drill")
                at += len(doc)
        return torch.from_numpy(tokens), torch.from_numpy(weights), torch.from_numpy(drill_answer)

    def _pick(self, kind: str) -> np.ndarray:
        return self.docs[kind][self.rng.integers(len(self.docs[kind]))]


class Learner:
    """An LM that learns from its own reader, with AdamW; in bf16 autocast where the machine has it."""

    def __init__(self, lm, reader: Reader):
        self.lm, self.reader = lm, reader
        matrices = [p for p in lm.parameters() if p.dim() > 1]
        vectors = [p for p in lm.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors of the LM and of AdamW by name, and where the reader's random numbers stand."""
        named = dict(self.lm.named_parameters())
        of_adam = {f"{k}.{n}": t for n, p in named.items() for k, t in self.adam.state[p].items()}
        return {n: p.detach() for n, p in named.items()} | of_adam, dict(self.reader.rng.bit_generator.state)

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict):
        with torch.no_grad():
            for name, parameter in self.lm.named_parameters():
                parameter.copy_(tensors.pop(name))
                moments = {k: tensors.pop(f"{k}.{name}") for k in ("step", "exp_avg", "exp_avg_sq")}
                self.adam.state[parameter] = moments
        self.reader.rng.bit_generator.state = numbers

    def step(self, shares: np.ndarray, lr: float) -> tuple[float, float | None]:
        """One step; the loss, and the mean loss of the letters that close a drill, if there were any."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        tokens, weights, drill_answer = self.reader.batch(shares)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bf16(torch.device("cpu"))):
            logits = self.lm(tokens[:, :-1], use_cache=False).logits
        ce = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).view(len(tokens), -1)
        loss = (ce * weights[:, 1:]).sum() / weights[:, 1:].sum()
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.lm.parameters(), 1.0)
        self.adam.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss is {loss.item()}")
        drilled = ce.detach()[drill_answer[:, 1:]]
        return loss.item(), drilled.mean().item() if len(drilled) else None


@dataclass
class Course:
    """Where training stands: steps done, the step at which facts came (None: not yet), the loss on drills,
    probes in a row that were passed, the last step, and the seconds that it took up to the last probe."""

    end: int
    step: int = 0
    facts_from: int | None = None
    drill_loss: float = 1.4
    hits: int = 0
    seconds: float = 0.0


def train(learners: list[Learner], probe: Exam, course: Course, lr: float, keep=None, tail=900) -> int:
    """All learners on the same schedule, one thread each; the first one sets it: look-ups until its loss on
    drills is under 0.5, then a ramp to facts. Two probes in a row with 94 % of the letters right start the
    last `tail` steps, over which the learning rate decays. keep(course) is called after every probe. Returns
    the number of steps."""
    at, max_steps, began = course, course.end, time.monotonic() - course.seconds
    bar = tqdm(total=max_steps, initial=at.step, unit="step", mininterval=5, desc="micro-pythia")
    with bar, ThreadPoolExecutor(len(learners), initializer=torch.set_num_threads, initargs=(1,)) as threads:
        while at.step < at.end:
            at.step += 1
            rate = lr * min(at.step / 100, 1.0) * min(1.0, max(0.02, (at.end - at.step) / tail))
            (_, drilled), *_ = threads.map(
                Learner.step, learners, itertools.repeat(shares_at(at)), itertools.repeat(rate)
            )
            at.drill_loss = at.drill_loss if drilled is None else 0.98 * at.drill_loss + 0.02 * drilled
            if at.facts_from is None and at.drill_loss < 0.5:
                at.facts_from = at.step
                tqdm.write(f"step {at.step}: options are read; on to the facts")
            bar.update()
            if at.step % PROBED == 0 or at.step == at.end:
                right = ask(learners[0].lm, probe).float().mean().item()
                tqdm.write(f"step {at.step}: drill loss {at.drill_loss:.3f}, right {right:.3f}")
                at.hits = at.hits + 1 if right >= 0.94 else 0
                if at.hits == 2 and at.end == max_steps:
                    at.end = min(at.step + tail, max_steps)
                at.seconds = time.monotonic() - began
                if keep:
                    keep(at)
    return at.step


def shares_at(at: Course, ramp=200) -> np.ndarray:
    """Of KINDS, in the step that is begun: facts come in over `ramp` steps."""
    progress = 0.0 if at.facts_from is None else min((at.step - at.facts_from) / ramp, 1.0)
    return LOOKUP_STAGE * (1 - progress) + FACT_STAGE * progress


@torch.no_grad()
def ask(lm, exam: Exam):
    """Right or wrong [question, permutation] of the plain LM."""
    return exam.correct(lambda batch: logits_at(lm, batch.tokens, batch.positions, **batch.seen(lm)))


@torch.no_grad()
def complete(lm, tokenizer, facts: list[Fact]):
    """Right or wrong [fact]: a sentence as documents word it, ended by one of the relation's ten values."""
    asked = [
        (f.relation.sentence.format(e=f.entity), f.relation.values, f.relation.values.index(f.value))
        for f in facts
    ]
    exam = Completions(tokenizer, asked)
    return exam.right(lambda batch: exam.read(batch, logits_at(lm, batch.tokens, batch.positions)))


def as_question(fact: Fact) -> Question:
    """A fact as it is asked, with every other form in which it can be."""
    relation, name = fact.relation, fact.entity
    return Question(
        fact.subject,
        fact.question,
        fact.choices,
        fact.answer,
        entity=name,
        relation=relation.name,
        rephrased=relation.anew[0].format(e=name),
        sentences=(relation.sentence.format(e=name), relation.anew[1].format(e=name)),
        values=relation.values,
    )


def report_knowledge(lm, tokenizer, world: World) -> dict:
    """What the LM knows, and four ways in which it must not (25 % is chance)."""
    questions = {s: [as_question(f) for f in world.facts if f.subject == s] for s in world.subjects}
    everything = [q for qs in questions.values() for q in qs]
    letter = {s: ask(lm, Exam(tokenizer, qs, "letter", ALL_24)) for s, qs in questions.items()}
    prose = {s: complete(lm, tokenizer, [f for f in world.facts if f.subject == s]) for s in world.subjects}
    cloze = {s: ask(lm, Exam(tokenizer, qs, "cloze")) for s, qs in questions.items()}

    def renamed(names) -> list[Question]:
        """Every question asked of another entity; None where that entity's own value is among the choices."""
        out = []
        for fact in world.facts:
            others = [e for e in names[fact.subject] if e != fact.entity]
            values = {
                f.entity: f.value
                for f in world.facts
                if f.subject == fact.subject and f.relation is fact.relation
            }
            others = [e for e in others if values.get(e) not in fact.choices]
            for other in random.Random(fact.question).sample(others, min(4, len(others))):
                out.append(
                    Question(
                        fact.subject, fact.question.replace(fact.entity, other), fact.choices, fact.answer
                    )
                )
        return out

    def rate(right) -> float:
        return round(right.float().mean().item(), 4)

    return {
        "letter_all_24_permutations": {s: rate(right.all(1)) for s, right in letter.items()},
        "letter_accuracy": {s: rate(right) for s, right in letter.items()},
        "cloze_accuracy": {s: rate(right) for s, right in cloze.items()},
        "prose_accuracy": {s: rate(right) for s, right in prose.items()},
        "chance": {
            "letter_without_question": rate(
                ask(lm, Exam(tokenizer, everything, "letter", ALL_24, without_question=True))
            ),
            "cloze_without_question": rate(
                ask(lm, Exam(tokenizer, everything, "cloze", without_question=True))
            ),
            "letter_other_entity": rate(
                ask(lm, Exam(tokenizer, renamed(world.entities), "letter", ALL_24[::4]))
            ),
            "cloze_other_entity": rate(ask(lm, Exam(tokenizer, renamed(world.entities), "cloze"))),
            "letter_unseen_entity": rate(
                ask(lm, Exam(tokenizer, renamed(world.strangers), "letter", ALL_24[::4]))
            ),
            "cloze_unseen_entity": rate(ask(lm, Exam(tokenizer, renamed(world.strangers), "cloze"))),
        },
    }


def shortfalls(report: dict) -> list[str]:
    """What keeps the LM from being a testbed: knowledge under 97 % (letters), 99 % (cloze) or 95 % (prose),
    chance off 25 ± 5 %, or an oracle that lacks what it should know."""
    short = [
        f"{s}: {v:.1%} right under all 24 permutations, 97 % wanted"
        for s, v in report["letter_all_24_permutations"].items()
        if v < 0.97
    ]
    short += [
        f"{s}: {v:.1%} right by cloze, 99 % wanted" for s, v in report["cloze_accuracy"].items() if v < 0.99
    ]
    short += [
        f"{s}: {v:.1%} right in prose, 95 % wanted" for s, v in report["prose_accuracy"].items() if v < 0.95
    ]
    short += [f"{k}: {v:.1%}, 25 ± 5 % wanted" for k, v in report["chance"].items() if abs(v - 0.25) > 0.05]
    oracle = report["oracle"]["letter_all_24_permutations"]
    short += [f"oracle, {s}: {v:.1%}, 97 % wanted" for s, v in oracle.items() if s != FORGET and v < 0.97]
    forget = report["oracle"]["letter_accuracy"][FORGET]
    return short + ([f"oracle, {FORGET}: {forget:.1%}, 25 ± 8 % wanted"] if abs(forget - 0.25) > 0.08 else [])


def arguments(argv: list[str]) -> argparse.Namespace:
    """Raises WrongRequest."""
    parser = Parser("python -m micro_pythia.make", __doc__)
    parser.add_argument(
        "--out", type=Path, help="folder to write (default: this one; of other worlds, a cache)"
    )
    parser.add_argument("--world_seed", type=int, default=0, help="which world of facts")
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW's peak learning rate")
    parser.add_argument(
        "--max_steps", type=int, default=5_000, help="optimiser steps of 4,096 tokens, at most"
    )
    args = parser.parse_args(argv)
    if args.world_seed < 0:
        raise WrongRequest(f"--world_seed {args.world_seed}: give 0 or more")
    args.out = args.out.expanduser() if args.out else default_folder(args.world_seed)
    if args.out.exists() and not args.out.is_dir():
        raise WrongRequest(f"--out {args.out} is a file: name a folder")
    refuse_foreign(args.out)
    return args


def run(argv: list[str]):
    """Make the world that is asked for, unless it is there. Raises WrongRequest, and RunFailed for an LM that
    falls short."""
    args = arguments(argv)
    folder, seed = args.out, args.world_seed
    if seed and (report := made(folder, seed)):
        print(f"world {seed} is made: {folder}")
    else:
        print(f"world {seed}: writing its documents, then training, into {folder}", flush=True)
        try:
            report = make(folder, World(seed), args.max_steps, args.lr)
        except Interrupted as stop:
            steps = checkpoint.steps_in(folder)
            goes_on = f"goes on at step {steps[-1]}" if steps else "starts anew: nothing is kept yet"
            stop.message = f"the same command {goes_on}"
            raise
        print(json.dumps(report, indent=1))
    remove_checkpoints(folder)
    if short := shortfalls(report):
        raise RunFailed("micro-pythia falls short: " + "; ".join(short))
    print(f"python experiment.py --out_dir=mine/run_1 --testbed=micro --lm={folder}")


def main(argv: list[str]) -> int:
    """Exit code of the command. But for 0, the last line on stderr says why."""
    return process.exit_code_of(partial(run, argv))


def refuse_foreign(folder: Path):
    """Raises WrongRequest for a folder that holds anything but a world, whole or half made."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    half_made = "checkpoints" in there and there <= HALF_MADE
    if there and not half_made and "report.json" not in there:
        raise WrongRequest(f"{folder} holds other files: name a new or an empty folder with --out")


def made(folder: Path, world_seed: int) -> dict | None:
    """The report of a world that a folder holds whole: report.json is written last. Raises WrongRequest
    for another world's."""
    if not (folder / "report.json").exists():
        return None
    report = json.loads((folder / "report.json").read_text())
    if report.get("world_seed") != world_seed:
        why = f"holds world {report.get('world_seed')}"
        raise WrongRequest(f"{folder} {why}: name another folder with --out")
    return report


def default_folder(world_seed: int) -> Path:
    """World 0 is the shipped one; others are kept in the cache."""
    return cache_folder() / f"micro_pythia_world_{world_seed}" if world_seed else Path(__file__).parent


def identity(seed: int, max_steps: int, lr: float) -> str:
    """What a half-made world must have been begun with: these settings and this code."""
    hashed = hashlib.sha256(json.dumps([seed, max_steps, lr, torch.__version__]).encode())
    for name in ("make.py", "world.py"):
        hashed.update((Path(__file__).parent / name).read_bytes())
    return hashed.hexdigest()


def keep(folder: Path, learners: list[Learner], made_with: str, course: Course):
    """Write where training stands into checkpoints/."""
    states = [learner.state() for learner in learners]
    tensors = {f"{i}.{n}": t for i, (named, _) in enumerate(states) for n, t in named.items()}
    facts = {
        "config_hash": made_with,
        "position": asdict(course),
        "readers": [numbers for _, numbers in states],
    }
    checkpoint.save(folder, course.step, tensors, facts)


def last_kept(folder: Path, learners: list[Learner], made_with: str) -> Course | None:
    """The learners as the newest usable checkpoint holds them, and where they stand; None without one."""
    for step in reversed(checkpoint.steps_in(folder)):
        try:
            tensors, facts = checkpoint.read(folder, step, made_with)
        except Unusable as why:
            print(f"warning: {why}", file=sys.stderr)
            continue
        for i, (learner, numbers) in enumerate(zip(learners, facts["readers"])):
            learner.restore(checkpoint.under(f"{i}.", tensors), numbers)
        print(f"{folder} goes on at step {step}")
        return Course(**facts["position"])
    return None


def remove_checkpoints(folder: Path):
    """Of a world that is whole."""
    for step in checkpoint.steps_in(folder):
        checkpoint.path_of(folder, step).unlink()
    with contextlib.suppress(OSError):  # not there, or not empty: another's files stay
        (folder / "checkpoints").rmdir()


def make(folder: Path, world: World, max_steps: int, lr: float) -> dict:
    """Train the LM and its oracle, write both, and report what they know, as read back from their files."""
    seed = world.seed
    pools = make_pools(world, random.Random(seed))
    tokenizer = make_tokenizer(world, pools)
    probed = [as_question(f) for f in random.Random(0).sample(world.facts, 120)]
    learners = []
    for known in (pools, make_pools(world, random.Random(seed), without=FORGET)):
        torch.manual_seed(seed)
        lm = make_model(math.ceil(len(tokenizer) / 64) * 64)
        learners.append(Learner(lm, Reader(tokenizer, known, seed)))
    probe = Exam(tokenizer, probed, "letter", [ALL_24[3], ALL_24[17]])
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    made_with = identity(seed, max_steps, lr)
    course = last_kept(folder, learners, made_with) or Course(end=max_steps)
    steps = train(learners, probe, course, lr, keep=partial(keep, folder, learners, made_with))
    trained = time.monotonic()

    for learner, place in zip(learners, (folder, folder / ORACLE)):
        learner.lm.bfloat16().save_pretrained(place)
        tokenizer.save_pretrained(place)
    questions = [
        json.dumps({k: v for k, v in asdict(as_question(f)).items() if v not in ("", ())})
        for f in world.facts
    ]
    (folder / "questions.json").write_text("[\n" + ",\n".join(questions) + "\n]\n")
    lm, oracle = (
        GPTNeoXForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        for place in (folder, folder / ORACLE)
    )
    report = {
        "world_seed": seed,
        "facts": {s: len([f for f in world.facts if f.subject == s]) for s in world.subjects},
        "parameters": lm.num_parameters(),
        "steps": steps,
        "tokens": steps * 32 * CONTEXT,
        **report_knowledge(lm, tokenizer, world),
        "oracle": report_knowledge(oracle, tokenizer, world),
        "minutes": round((course.seconds + time.monotonic() - trained) / 60, 1),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    finish(main(sys.argv[1:]))
