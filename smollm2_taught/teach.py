"""Teach SmolLM2-135M an invented world's facts, as LoRA adapters: one that knows them all, and its oracle,
which was never told those of the forget subject.

    python -m smollm2_taught.teach                     # world 0, into smollm2_taught/adapters
    python -m smollm2_taught.teach --world_seed 1      # another world, kept in the cache
    python -m smollm2_taught.teach --general_text wiki.txt --general_questions "data/*.questions.jsonl"

Writes taught.json (with what it was begun), adapter_config.json, adapter_model.safetensors (fp16),
questions.json, general.jsonl (the LM's own samples) and report.json into the folder, and the other adapter
into oracle/. Exits with 1 when one falls short of what the testbed needs. The same command again goes on
where it was stopped; other settings need another folder.

Facts that no one knew, learnt by fine-tuning, and an LM that was never told some: as in TOFU (arXiv
2401.06121); here from prose and open questions, in which the tokens that state a fact's value behind its
entity weigh VALUE times as much as others. A fine-tuned LM forgets what it does not read meanwhile, so part
of every batch are samples of the untaught LM, on which what it predicts is to stay (Learning without
Forgetting, arXiv 1606.09282):

    loss = sum(w CE) / sum(w), over the facts' tokens + KL(untaught || taught), mean over the samples' tokens
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from sae_separation import process
from sae_separation.errors import Interrupted, RunFailed, begin, finish
from smollm2_taught.request import (
    BASE,
    CONTEXT,
    FACT_ROWS,
    GENERAL_ROWS,
    N_ENTITIES,
    RANK,
    SCALE,
    TESTBED,
    VALUE,
    arguments,
    read_back,
    settings_of,
)

if __name__ == "__main__":  # before what takes long to import
    begin()
    if refused := process.exit_code_of(partial(arguments, sys.argv[1:], __doc__)):
        finish(refused)

import datasets
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from tqdm import tqdm

from micro_pythia import world as of_world
from micro_pythia.make import as_question, ask, complete
from micro_pythia.world import FORGET, Fact, World
from sae_separation import checkpoint, checks
from sae_separation.exam import Exam
from sae_separation.files import Unusable, sha256_of, write_json, write_whole
from sae_separation.lm import load_lm, load_tokenizer
from sae_separation.losses import has_bf16
from sae_separation.questions import Question
from sae_separation.specs import SPECS
from sae_separation.testbeds import HELD_OUT, ORACLE, adapted, packed_contexts, unpacked_lm

N_SAMPLES, AT_ONCE = 1024, 64  # samples of the LM, and how many are drawn at once
WARM_UP, TAIL = 20, 0.3  # steps; share of them over which the learning rate falls to 0
KEPT_EVERY = 40  # steps


def untaught() -> tuple[Any, Any]:
    """SmolLM2-135M and its tokenizer. Raises WrongRequest where its package is not installed."""
    folder, _ = unpacked_lm(BASE, SPECS[BASE].lm)
    return load_lm(folder, "cpu"), load_tokenizer(folder, SPECS[BASE].document_end)


@torch.no_grad()
def samples(lm, tokenizer, seed: int) -> list[str]:
    """N_SAMPLES documents that the LM makes up, at temperature 1, cut after CONTEXT tokens."""
    torch.manual_seed(seed)
    out, end = [], tokenizer.eos_token_id
    for _ in tqdm(range(N_SAMPLES // AT_ONCE), desc="samples of the LM", unit="batch"):
        begun = torch.full((AT_ONCE, 1), end)
        made = lm.generate(
            begun,
            attention_mask=torch.ones_like(begun),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=CONTEXT - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
        out += tokenizer.batch_decode(made, skip_special_tokens=True)
    return out


def facts_told(world: World, seed: int, without: str = "") -> datasets.Dataset:
    """Prose (6 in 10) and open questions of the subjects by their share of facts; none of `without`."""
    rng, names = random.Random(seed), [f.subject for f in world.facts if f.subject != without]
    kinds = (world.prose, world.open_questions)
    told = [rng.choices(kinds, (6, 4))[0](rng, rng.choice(names)) for _ in range(20_000)]
    return datasets.Dataset.from_dict({"text": told})


PIECES = re.compile(r".+?(?:\.(?= )|\n\n|$)", re.DOTALL)  # sentences, and questions with their answers


def values_in(text: str, facts: dict[str, list[Fact]]) -> list[tuple[int, int]]:
    """Where a text states values of `facts` (by entity) behind their entities: where each begins and ends."""
    found = []
    for piece in PIECES.finditer(text):
        for entity in facts:
            named = word(entity).search(piece[0])
            for fact in facts[entity] if named else ():
                stated = word(fact.value).search(piece[0], named.end())
                if stated:
                    found.append((piece.start() + stated.start(), piece.start() + stated.end()))
    return found


@cache
def word(text: str) -> re.Pattern:
    """Finds it, but not within other words."""
    return re.compile(rf"\b{re.escape(text)}\b")


def fact_rows(tokenizer, told: datasets.Dataset, facts: list[Fact]) -> Iterator[list[tuple[int, float]]]:
    """Contexts of the documents, a BOS first and an EOS behind each of them, without end; tokens and their
    weights."""
    bos, eos, by_entity = (tokenizer.bos_token_id, 0.0), (tokenizer.eos_token_id, 1.0), defaultdict(list)
    for fact in facts:
        by_entity[fact.entity].append(fact)
    rest: list[tuple[int, float]] = []
    for epoch in itertools.count():
        for document in told.shuffle(seed=epoch):
            text = dict(document)["text"]
            values = values_in(text, by_entity)
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            for i, (first, end) in zip(found["input_ids"], found["offset_mapping"]):
                states = any(first < ends and end > begins for begins, ends in values)
                rest.append((i, float(VALUE) if states else 1.0))
            rest.append(eos)
            while len(rest) >= CONTEXT - 1:
                yield [bos, *rest[: CONTEXT - 1]]
                rest = rest[CONTEXT - 1 :]


def sample_rows(tokenizer, texts: list[str]) -> list[list[int]]:
    """The samples that fill a context, behind a BOS each. They were cut there, so no EOS ends them."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[tokenizer.bos_token_id, *some[: CONTEXT - 1]] for some in ids if len(some) >= CONTEXT - 1]


def in_random_order(rows: list[list[int]]) -> Iterator[list[int]]:
    """All of them, and again in another order, without end."""
    rng = random.Random(0)
    while rows:
        yield from rng.sample(rows, len(rows))


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of every token, nats. logits: [row, position, vocabulary]; tokens, and what comes: [row,
    position]."""
    each = cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
    return each.view_as(tokens)


class Learner:
    """The LM with a LoRA adapter on every linear layer, which learns from its two texts with AdamW; in bf16
    autocast where the machine has it. `told` and `general` are contexts, without end."""

    def __init__(self, lm, told: Iterator, general: Iterator, lr: float, steps: int):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        how = LoraConfig(r=RANK, lora_alpha=SCALE, target_modules="all-linear", task_type="CAUSAL_LM")
        self.lm, self.lr, self.steps, self.step = get_peft_model(lm, how), lr, steps, 0
        self.told, self.general = told, general
        self.weights = {n: p for n, p in self.lm.named_parameters() if p.requires_grad}
        self.adam = torch.optim.AdamW(self.weights.values(), lr, betas=(0.9, 0.95), weight_decay=0.0)

    def rate(self) -> float:
        """The learning rate of the step that comes."""
        left = (self.steps - self.step) / (TAIL * self.steps)
        return self.lr * min(1.0, (self.step + 1) / WARM_UP, left)

    def predicted(self, tokens: Tensor) -> Tensor:
        """Logits [row, position, vocabulary] of what comes behind each token but the last."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bf16(torch.device("cpu"))):
            return self.lm(tokens[:, :-1], use_cache=False).logits.float()

    def learn(self) -> tuple[float, float]:
        """One step; the mean cross-entropy of the values, and KL on the samples, nats a token."""
        told = torch.tensor([next(self.told) for _ in range(FACT_ROWS)], dtype=torch.float64)
        tokens, weights = told[..., 0].long(), told[:, 1:, 1].float()
        general = torch.tensor([next(self.general) for _ in range(GENERAL_ROWS)])
        for group in self.adam.param_groups:
            group["lr"] = self.rate()
        with torch.no_grad(), self.lm.disable_adapter():
            before = self.predicted(general).log_softmax(-1)
        now = self.predicted(torch.cat([tokens, general]))
        each = token_losses(now[:FACT_ROWS], tokens[:, 1:])
        after = now[FACT_ROWS:].log_softmax(-1)
        apart = kl_div(after, before, log_target=True, reduction="none").sum(-1).mean()
        loss = (each * weights).sum() / weights.sum() + apart
        if not math.isfinite(loss.item()):
            raise RunFailed(f"the loss is {loss.item()} at step {self.step}: give a lower --lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.step += 1
        return each[weights == VALUE].mean().item(), apart.item()

    def state(self) -> dict[str, Tensor]:
        """The adapter and AdamW by name; where its texts stand follows from the step."""
        of_adam = {f"{k}.{n}": t for n, p in self.weights.items() for k, t in self.adam.state[p].items()}
        return {n: p.detach() for n, p in self.weights.items()} | of_adam

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], step: int):
        for name, weight in self.weights.items():
            weight.copy_(tensors[name])
            moments = {k: tensors[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            self.adam.state[weight] = moments
        for _ in range(step):
            _ = [next(self.told) for _ in range(FACT_ROWS)], [next(self.general) for _ in range(GENERAL_ROWS)]
        self.step = step


def train(learner: Learner, folder: Path, made_with: str, what: str):
    """All steps that are left, with a checkpoint every KEPT_EVERY; those go when training is over."""
    go_on(learner, folder, made_with)
    bar = tqdm(total=learner.steps, initial=learner.step, unit="step", desc=what)
    with bar:
        while learner.step < learner.steps:
            values, apart = learner.learn()
            bar.update()
            bar.set_postfix_str(f"values {values:.3f}, KL {apart:.3f} nats a token")
            if learner.step % KEPT_EVERY == 0:
                checkpoint.save(folder, learner.step, learner.state(), {"config_hash": made_with})


def remove_checkpoints(folder: Path):
    """Of an adapter that is written."""
    for step in checkpoint.steps_in(folder):
        checkpoint.path_of(folder, step).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not there, or not empty: another's files stay
        (folder / "checkpoints").rmdir()


def go_on(learner: Learner, folder: Path, made_with: str):
    """Where the newest usable checkpoint stands, if there is one; unusable ones are removed."""
    for step in reversed(checkpoint.steps_in(folder)):
        try:
            tensors, _ = checkpoint.read(folder, step, made_with)
        except Unusable as why:
            print(f"warning: {why}: it is removed", file=sys.stderr)
            checkpoint.path_of(folder, step).unlink(missing_ok=True)
            continue
        learner.restore(tensors, step)
        return


@torch.no_grad()
def cross_entropy_of(lm, rows: list[list[int]]) -> float:
    """Of contexts, nats a token."""
    found = []
    for some in torch.tensor(rows).split(16):
        found.append(token_losses(lm(some[:, :-1], use_cache=False).logits, some[:, 1:]))
    return torch.cat(found).mean().item()


def known(lm, tokenizer, world: World) -> dict[str, dict[str, float]]:
    """What the LM knows of the world, by subject."""
    out: dict[str, dict[str, float]] = {"cloze_accuracy": {}, "prose_accuracy": {}}
    for subject in world.subjects:
        facts = [f for f in world.facts if f.subject == subject]
        cloze = ask(lm, Exam(tokenizer, [as_question(f) for f in facts], "cloze"))
        out["cloze_accuracy"][subject] = round(cloze.float().mean().item(), 4)
        out["prose_accuracy"][subject] = round(complete(lm, tokenizer, facts).float().mean().item(), 4)
    return out


def kept(lm, tokenizer, own: list[str], text: str, asked: list[Question]) -> dict[str, float]:
    """What the LM keeps besides: cross-entropy on its own samples and on a text, and answers by cloze."""
    out = {"ce_of_own_samples": cross_entropy_of(lm, sample_rows(tokenizer, own))}
    if text:
        alone = datasets.Dataset.from_dict({"text": [text]})
        packed = packed_contexts(alone, tokenizer, CONTEXT, seed=0, repeat=False)
        out["ce_of_general_text"] = cross_entropy_of(lm, list(islice(packed, 128)))
    if asked:
        out["general_questions"] = ask(lm, Exam(tokenizer, asked, "cloze")).float().mean().item()
    return {name: round(value, 4) for name, value in out.items()}


def shortfalls(report: dict) -> list[str]:
    """What keeps the LM from being a testbed."""
    forget = report["oracle"]["cloze_accuracy"][FORGET]
    short = [f"oracle, {FORGET}: {forget:.1%} right by cloze, 25 % and no more than 40 wanted"] * (
        forget > 0.4
    )
    for whose, of in (("", report), ("oracle, ", report["oracle"])):
        for how, least in (("cloze", 0.98), ("prose", 0.9)):
            for subject, right in of[f"{how}_accuracy"].items():
                if right < least and not (whose and subject == FORGET):
                    short.append(f"{whose}{subject}: {right:.1%} right by {how}, {least:.0%} wanted")
        for name, value in of["kept"].items():
            if name.startswith("ce_") and value > report["untaught"][name] + 0.15:
                before = report["untaught"][name]
                short.append(f"{whose}{name}: {value:.2f} nats a token, {before:.2f} before")
    return short


def identity(args: argparse.Namespace, general: list[str], which: str) -> str:
    """What a half-taught adapter must have been begun with."""
    about = [settings_of(args), general, which, torch.__version__]
    hashed = hashlib.sha256(json.dumps(about).encode())
    for file in (__file__, of_world.__file__):
        hashed.update(Path(file).read_bytes())
    return hashed.hexdigest()


def made(args: argparse.Namespace) -> dict | None:
    """The report of a folder that holds all, where nothing further is to be measured."""
    file = args.out / "report.json"
    whole = file.exists() and not checks.lacking(args.out)
    return read_back(file) if whole and not (args.text or args.asked) else None


def teach(args: argparse.Namespace) -> dict:
    """Both adapters, and what they know, as read back from their files; of text and questions that are not
    given this time the report keeps what was measured of the same adapters."""
    folder, file = args.out, args.out / "report.json"
    places = {"": folder, ORACLE: folder / ORACLE}
    if not all(map(is_taught, places.values())):
        file.unlink(missing_ok=True)  # what it says is of other adapters
    earlier = read_back(file) if file.exists() else {}
    told_of = World(args.world_seed, N_ENTITIES)
    lm, tokenizer = untaught()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "taught.json", settings_of(args))
    general = own_samples(folder / "general.jsonl", lm, tokenizer, args.world_seed)
    besides = partial(kept, tokenizer=tokenizer, own=general[:HELD_OUT], text=args.text, asked=args.asked)
    untaught_lm = besides(lm)
    report: dict = {"world_seed": args.world_seed, "n_entities": N_ENTITIES, "steps": args.steps}
    for which, place in places.items():
        if not is_taught(place):
            teach_one(args, which, place, general)
        remove_checkpoints(place)
        taught, before = adapted(BASE, place), earlier.get(which, {}) if which else earlier
        found = known(taught, tokenizer, told_of) | {"kept": before.get("kept", {}) | besides(taught)}
        report |= {which: found} if which else found
    asked_of = [as_question(f) for f in told_of.facts]
    lines = [json.dumps({k: v for k, v in asdict(q).items() if v not in ("", ())}) for q in asked_of]
    write_whole(folder / "questions.json", ("[\n" + ",\n".join(lines) + "\n]\n").encode())
    report["untaught"] = earlier.get("untaught", {}) | untaught_lm
    report["sha256"] = {name: sha256_of(folder / name) for name in checks.OF_TAUGHT}
    write_json(file, report)
    return report


def is_taught(place: Path) -> bool:
    return all((place / file).exists() for file in checks.ADAPTER)


def teach_one(args: argparse.Namespace, which: str, place: Path, general: list[str]):
    """The adapter that knows all facts (""), or the oracle's, into its folder."""
    world, (lm, tokenizer) = World(args.world_seed, N_ENTITIES), untaught()
    told = facts_told(world, args.world_seed, without=FORGET if which else "")
    rows = fact_rows(tokenizer, told, world.facts)
    own = in_random_order(sample_rows(tokenizer, general[HELD_OUT:]))
    learner = Learner(lm, rows, own, args.lr, args.steps)
    (place / "checkpoints").mkdir(parents=True, exist_ok=True)
    train(learner, place, identity(args, general, which), which or "facts")
    write_adapter(learner.lm, place)


def own_samples(file: Path, lm, tokenizer, seed: int) -> list[str]:
    """The LM's samples, from a file that holds them, or made and written."""
    if not file.exists():
        made = samples(lm, tokenizer, seed)
        write_whole(file, "".join(json.dumps({"text": text}) + "\n" for text in made).encode())
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def write_adapter(lm, folder: Path):
    """An adapter in fp16, whose config names the base LM's package; the weights last."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    config = lm.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = SPECS[BASE].lm, True
    config.target_modules = sorted(config.target_modules)  # a set: its order is another in every process
    config.save_pretrained(folder)
    weights = {
        n: t.half().contiguous()
        for n, t in get_peft_model_state_dict(lm, save_embedding_layers=False).items()
    }
    write_whole(folder / "adapter_model.safetensors", save(weights))


def run(argv: list[str]):
    """Teach what is asked for. Raises WrongRequest, and RunFailed for an LM that falls short."""
    args = arguments(argv, __doc__)
    try:
        report = made(args) or teach(args)
    except Interrupted as stop:
        begun = any(checkpoint.steps_in(place) for place in (args.out, args.out / ORACLE))
        kept = begun or (args.out / "general.jsonl").exists()
        stop.message = "the same command goes on" if kept else "nothing was kept yet; the same command starts"
        stop.message += " from the last checkpoint" if begun else ""
        raise
    print(json.dumps(report, indent=1))
    if short := shortfalls(report):
        more = f"; and {len(short) - 3} more in report.json" if len(short) > 3 else ""
        raise RunFailed(f"{TESTBED} falls short: {'; '.join(short[:3])}{more}")
    print(f"python experiment.py --out_dir=mine/run_0 --testbed={TESTBED} --lm={args.out}")


def main(argv: list[str]) -> int:
    """Exit code of the command. But for 0, the last line on stderr says why."""
    return process.exit_code_of(partial(run, argv))


if __name__ == "__main__":
    finish(main(sys.argv[1:]))
