"""Testbeds: which LM, which text, which questions, and how an LM is asked.

    testbed = load("micro")          # or "auto"
    testbed.lm, testbed.tokenizer, testbed.hook_name, testbed.d_in
    testbed.forget.train, testbed.forget.held_out, testbed.questions["biology"]

A testbed is one object, so that the LM, the layer, the text and the questions of an experiment cannot come apart.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
NAMES = ("auto", "micro")  # what --testbed takes


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `choices[answer]` is right."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Text:
    """Documents of one domain; the two parts share no document."""

    train: datasets.Dataset
    held_out: datasets.Dataset


@dataclass
class Testbed:
    """Everything an experiment needs to know about the world outside the SAE.

    `hook_name` is the LM's own module name; its output, after `layer` (counted from 0), is resid_post of width `d_in`.
    `questions` maps a subject to its questions, `forget_subject` is one of its keys, all others are retain subjects.
    `scoring` is "letter" (SAEBench's) or "cloze"; `prompt_format` is SAEBench's name of a chat format, or None.
    `clamp_scale` is "feature" when SAEBench's multipliers count in units of a feature's own mean active value, or
    "absolute" when they are activation units as in SAEBench. `defaults` are config fields that depend on the LM.
    """

    name: str
    lm: torch.nn.Module
    tokenizer: object
    layer: int
    forget: Text
    retain: Text
    questions: dict[str, list[Question]]
    forget_subject: str
    scoring: str = "letter"
    prompt_format: str | None = None
    clamp_scale: str = "feature"
    defaults: dict = field(default_factory=dict)
    describe: dict = field(default_factory=dict)

    @property
    def layers(self) -> torch.nn.ModuleList:
        return decoder_layers(self.lm)

    @property
    def hook_name(self) -> str:
        target = self.layers[self.layer]
        return next(name for name, module in self.lm.named_modules() if module is target)

    @property
    def d_in(self) -> int:
        return self.lm.config.hidden_size

    @property
    def context_size(self) -> int:
        return self.defaults["context_size"]


def decoder_layers(lm: torch.nn.Module) -> torch.nn.ModuleList:
    """The LM's stack of decoder layers: the longest ModuleList whose length is its config's num_hidden_layers.

    Raises ValueError for a model without one (an encoder-decoder, say).
    """
    for module in lm.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == lm.config.num_hidden_layers:
            return module
    raise ValueError(f"{type(lm).__name__} has no stack of {lm.config.num_hidden_layers} decoder layers: give a decoder-only LM")


def load(name: str) -> Testbed:
    """Load the testbed `name`; `auto` means `micro`, the only one here so far."""
    return {"auto": micro, "micro": micro}[name]()


# ---------------------------------------------------------------------------------------------------- micro


def micro(folder: Path | str = HERE / "micro_pythia") -> Testbed:
    """The embedded LM and its invented world (see micro_pythia/): biology is to be forgotten, four subjects stay.

    Text is the LM's own kind of reading (prose, open questions, multiple-choice sheets with other option sets than the
    evaluated ones): 24,000 documents a domain to train on and 3,000 held out.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from micro_pythia.world import FORGET, RETAIN, World

    folder = Path(folder)
    seed = json.loads((folder / "report.json").read_text())["world_seed"]
    world = World(seed)
    questions: dict[str, list[Question]] = {}
    for item in json.loads((folder / "questions.json").read_text()):
        questions.setdefault(item["subject"], []).append(Question(item["subject"], item["question"], tuple(item["choices"]), item["answer"]))

    def text(subjects) -> Text:
        documents = datasets.Dataset.from_dict({"text": world.documents(27_000, subjects, seed=1)})
        return Text(documents.select(range(24_000)), documents.select(range(24_000, 27_000)))

    return Testbed(
        name="micro",
        lm=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        layer=1,
        forget=text((FORGET,)),
        retain=text(RETAIN),
        questions=questions,
        forget_subject=FORGET,
        defaults=dict(d_sae=1024, tokens=3_000_000, context_size=128, target_l0=16.0, k=16),
        describe={"lm": "micro_pythia", "world_seed": seed},
    )


# ---------------------------------------------------------------------------------------------------- asking an LM


@dataclass
class Batch:
    """Right-padded token rows of similar length, and where to read the LM's answer.

    tokens [row, pos]; positions [row, n] are read; targets [row, n] and weights [row, n] say how (cloze only);
    `rows` are the rows' places in the exam; `resid` is room for the hook's activations [row, pos, d_in].
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    rows: list[int]
    resid: Tensor | None = None


def logits_at(lm, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits [row, n, vocab] of `lm` on tokens [row, pos] at `positions` [row, n]; no other position is unembedded."""
    kept, where = torch.unique(positions, return_inverse=True)
    logits = lm(tokens, use_cache=False, logits_to_keep=kept).logits
    return logits.gather(1, where[..., None].expand(-1, -1, logits.shape[-1]))


class Exam:
    """Questions turned into tokens once, so that an LM can be asked again and again, plain or under an intervention.

    letter: SAEBench's prompt, answered by the likeliest of the four letters, for every permutation of the choices.
    cloze: `Question: ... Answer:` continued by each choice, answered by the highest mean log-likelihood of the choice's
    tokens; permuting the choices permutes the answer, so one pass serves all permutations.

    Raises ValueError when letters are asked for and one of them is more than one token.
    """

    def __init__(self, tokenizer, questions: list[Question], scoring="letter", permutations=((0, 1, 2, 3),), prompt_format=None,
                 without_question=False, device="cpu", tokens_per_batch=16_384):  # fmt: skip
        self.scoring, self.permutations = scoring, torch.tensor([list(p) for p in permutations])
        self.answers = torch.tensor([list(p).index(q.answer) for q in questions for p in permutations])
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and prompt_format is None else []
        encode = lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]  # noqa: E731
        if scoring == "letter":
            self.letters = letter_tokens(tokenizer, prompt_format).to(device)
            prompts = [letter_prompt(q, p, prompt_format, without_question) for q in questions for p in permutations]
            stems, ends = [bos + ids for ids in encode(prompts)], [[]] * len(prompts)
        else:
            asked = ["Answer:" if without_question else f"Question: {q.question}\nAnswer:" for q in questions]
            stems = [bos + ids for ids in encode(asked) for _ in range(4)]
            ends = encode([f" {choice}" for q in questions for choice in q.choices])
        self.n_rows = len(stems)
        self.batches = list(_batches(stems, ends, tokens_per_batch, device))

    def probs(self, forward: Callable[[Batch], Tensor]) -> Tensor:
        """Probabilities of the four choices as listed, [n_questions * n_permutations, 4], permutations innermost.

        `forward` gives logits [row, n, vocab] for a batch.
        """
        rows = torch.empty(self.n_rows, 4 if self.scoring == "letter" else 1)
        for batch in self.batches:
            logits = forward(batch).float()
            if self.scoring == "letter":
                rows[batch.rows] = logits[:, 0].softmax(-1)[:, self.letters].amax(1).cpu()
            else:
                told = logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
                rows[batch.rows] = ((told * batch.weights).sum(-1) / batch.weights.sum(-1)).cpu()[:, None]
        if self.scoring == "letter":
            return rows
        return rows.view(-1, 4).softmax(-1)[:, self.permutations].flatten(0, 1)

    def correct(self, forward: Callable[[Batch], Tensor]) -> Tensor:
        """Right or wrong, [n_questions, n_permutations] (bool)."""
        return (self.probs(forward).argmax(-1) == self.answers).view(-1, len(self.permutations))


def _batches(stems, ends, tokens_per_batch, device):
    """Batch stem + end token lists by length; read where the end's tokens (or, without an end, the next) are predicted."""
    width = max(1, max(map(len, ends)))
    order = sorted(range(len(stems)), key=lambda i: len(stems[i]) + len(ends[i]))
    while order:
        n = 1
        while n < len(order) and (n + 1) * (len(stems[order[n]]) + len(ends[order[n]])) <= tokens_per_batch:
            n += 1
        rows, order = order[:n], order[n:]
        tokens = torch.zeros(n, max(len(stems[i]) + len(ends[i]) for i in rows), dtype=torch.long)
        positions, targets = torch.zeros(n, width, dtype=torch.long), torch.zeros(n, width, dtype=torch.long)
        weights = torch.zeros(n, width)
        for r, i in enumerate(rows):
            stem, end = stems[i], ends[i]
            tokens[r, : len(stem) + len(end)] = torch.tensor(stem + end)
            positions[r] = (len(stem) - 1 + torch.arange(width)).clamp(max=len(stem) + max(len(end), 1) - 2)
            targets[r, : len(end)] = torch.tensor(end)
            weights[r, : len(end)] = 1
        yield Batch(tokens.to(device), positions.to(device), targets.to(device), weights.to(device), rows)


class InterventionLM:
    """What SAEBench's sweep needs of an LM (`cfg`, `add_hook`, `reset_hooks`), on any decoder-only LM.

    Interventions act on resid_post of the hook layer. The layers up to it do not depend on them: their output is kept
    with each batch and only the layers above run again.
    """

    def __init__(self, testbed: Testbed):
        self.lm, self.layers, self.layer = testbed.lm, testbed.layers, testbed.layer
        self.cfg = SimpleNamespace(model_name=testbed.name, device=testbed.lm.device)
        self.hook = None

    def add_hook(self, name: str, hook: Callable):
        self.hook = hook

    def reset_hooks(self):
        self.hook = None

    def _changed(self, resid: Tensor) -> Tensor:
        """resid under the hook; without one, or where SAEBench's hook has no feature to clamp (None), as it is."""
        changed = None if self.hook is None else self.hook(resid, hook=None)
        return resid if changed is None else changed

    @contextlib.contextmanager
    def resumed_from(self, resid: Tensor):
        """Inside, the layers below the hook pass their input on, and the hook layer puts out `resid`."""
        for layer in self.layers[: self.layer]:
            layer.forward = lambda hidden, *args, **kwargs: hidden
        self.layers[self.layer].forward = lambda hidden, *args, **kwargs: resid
        try:
            yield
        finally:
            for layer in self.layers[: self.layer + 1]:
                del layer.forward

    @torch.no_grad()
    def resid(self, tokens: Tensor) -> Tensor:
        """resid_post [row, pos, D] of the hook layer, the LM stopped there."""
        kept, stop = [], StopIteration()

        def keep(module, args, output):
            kept.append(output[0] if isinstance(output, tuple) else output)
            raise stop

        handle = self.layers[self.layer].register_forward_hook(keep)
        try:
            self.lm(tokens, use_cache=False)
        except StopIteration as reached:
            if reached is not stop:
                raise
        finally:
            handle.remove()
        return kept[0]

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Logits [row, n, vocab] at the batch's positions, under the hook if there is one."""
        if self.hook is None:
            return logits_at(self.lm, batch.tokens, batch.positions)
        if batch.resid is None:
            batch.resid = self.resid(batch.tokens)
        with self.resumed_from(self._changed(batch.resid)):
            return logits_at(self.lm, batch.tokens, batch.positions)

    @torch.no_grad()
    def ce(self, tokens: Tensor, resid: Tensor) -> float:
        """Mean next-token cross-entropy (nats) on contexts [n, pos] from cached resid, under the hook if there is one."""
        losses = []
        for t, r in zip(tokens.split(32), resid.split(32)):
            with self.resumed_from(self._changed(r)):
                logits = self.lm(t, use_cache=False).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), t[:, 1:].flatten(), reduction="none"))
        return torch.cat(losses).mean().item()


def letter_prompt(question: Question, permutation, prompt_format=None, without_question=False) -> str:
    """The prompt that SAEBench's unlearning evaluation gives an LM, made by SAEBench's own function."""
    from sae_bench.evals.unlearning.utils.metrics import convert_wmdp_data_to_prompt
    from sae_bench.evals.unlearning.utils.var import PRE_QUESTION_FORMAT

    subject = PRE_QUESTION_FORMAT.format(subject=question.subject.replace("_", " "))
    return convert_wmdp_data_to_prompt(question.question, question.choices, prompt_format, subject, permutation, without_question)


def letter_tokens(tokenizer, prompt_format=None) -> Tensor:
    """Token ids [spelling, 4] of the letters: with a leading space and, in chat formats, also without (as SAEBench)."""
    spellings = ["", " "] if prompt_format else [" "]
    ids = [[tokenizer(s + letter, add_special_tokens=False)["input_ids"] for letter in "ABCD"] for s in spellings]
    if any(len(i) != 1 for row in ids for i in row):
        raise ValueError("an answer letter is more than one token of this tokenizer: use --scoring cloze")
    return torch.tensor(ids).squeeze(-1)
