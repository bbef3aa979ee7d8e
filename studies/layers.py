"""Where an LM looks up what is to be forgotten, by which the layer of a testbed is chosen.

    python -m studies.layers --testbed=smollm2-taught      # into studies/layers.json

Of two LMs that differ in what they were told, the LM and its oracle, one runs up to a layer and the other one
from there: the stream [row, pos, D] after that layer is put in the place of its own. As accuracy by cloze, on
questions that the LM knows:

lm_above       the oracle's stream, the LM's layers above: what the layers above look up
oracle_above   the LM's stream, the oracle's layers above: what was looked up before
readout_*      of a linear readout of the value at the end of the question, from the stream after the layer
               (evals/depth.py)

`layer` is the first where more is looked up before than is looked up above. That says something of LMs that
fit together: of retain questions, which both know, as many are right with the layers of the other one (FIT).
Patching of the stream is causal tracing's (arXiv 2202.05262), here from an LM that never knew in place of a
noised one.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor
from tqdm import tqdm

import experiment
from sae_separation import process, saebench, testbeds
from sae_separation.errors import WrongRequest
from sae_separation.evals import depth
from sae_separation.evals.cells import known_among
from sae_separation.evals.evaluator import Evaluator
from sae_separation.exam import Exam
from sae_separation.files import write_json
from sae_separation.lm import InterventionLM, Testbed
from sae_separation.results import maker

N_CONTEXTS = 16  # of text, which is not what is measured here
N_LAYERS = 10  # about so many
FIT = 0.9  # of the retain questions, that are right at a layer that counts


@torch.no_grad()
def crossed(below: InterventionLM, above: InterventionLM, exam: Exam, layers: list[int]) -> Tensor:
    """Probabilities [layer, question, 4] of the choices where `below` runs up to each of the layers, and
    `above` from there."""
    streams, out = {}, []
    for batch in exam.batches:
        seen = batch.seen(below.lm)
        put_out = below.lm(batch.tokens, use_cache=False, output_hidden_states=True, **seen)
        streams[batch] = put_out.hidden_states[1:]  # behind the embedding's: of every layer
    for layer in layers:

        def answers(batch, layer=layer):
            resumed = above.resumed_from(streams[batch][layer], layer)
            return exam.read(batch, above.logits_of(batch, resumed))

        out.append(exam.probs_from(answers))
    return torch.stack(out)


def right(below: InterventionLM, above: InterventionLM, exam: Exam, layers: list[int]) -> list[float]:
    """Accuracy by layer."""
    said = crossed(below, above, exam, layers).argmax(-1)
    return (said == exam.answers).float().mean(1).tolist()


def swept(evaluator: Evaluator, layers: list[int]) -> dict[str, dict[str, list[float]]]:
    """By domain and what is measured: a value a layer. The evaluator's hook is at layers[0]."""
    lm, oracle = evaluator.lm, evaluator.oracle
    assert oracle is not None
    everywhere = {s: tuple(range(len(q))) for s, q in evaluator.questions.by_subject.items()}
    known, out = known_among(evaluator, everywhere), {}
    readouts = {"lm": evaluator.once(depth.of_lm), "oracle": evaluator.once(depth.of_oracle) or {}}
    with tqdm(total=2 * sum(map(bool, known.values())), desc="asking across", unit="subject") as bar:
        for domain in ("forget", "retain"):
            subjects = [s for s in known if (s == saebench.FORGET) == (domain == "forget") and known[s]]
            exams, out[domain] = [evaluator.questions.exam(s, known[s]) for s in subjects], {}
            for name, below, above in (("lm_above", oracle, lm), ("oracle_above", lm, oracle)):
                of_subjects = []
                for exam in exams:
                    of_subjects.append(right(below, above, exam, layers))
                    bar.update()
                out[domain][name] = mean(of_subjects)
            for whose, found in readouts.items():
                of_layers = mean([found[s] for s in subjects if s in found])
                out[domain][f"readout_{whose}"] = [of_layers[layer - layers[0]] for layer in layers]
    return out


def mean(of_subjects: list[list[float]]) -> list[float]:
    """Over subjects, by layer."""
    return torch.tensor(of_subjects).mean(0).tolist()


def looked_up(
    layers: list[int], forget: dict[str, list[float]], retain: dict[str, list[float]]
) -> int | None:
    """The first layer where more was looked up before than is looked up above; None where there is none."""
    crossings = ("oracle_above", "lm_above")
    for i, layer in enumerate(layers):
        fits = min(retain[name][i] for name in crossings) >= FIT
        if fits and forget["oracle_above"][i] > forget["lm_above"][i]:
            return layer
    return None


def row_of(testbed: Testbed) -> dict:
    """What the file holds of an LM. Raises WrongRequest for one of which it cannot be measured."""
    if testbed.oracle is None:
        raise WrongRequest(f"the LM of {testbed.name} has no oracle: give micro or smollm2-taught")
    evaluator = Evaluator(testbed, testbed.context_size, N_CONTEXTS)
    asked = evaluator.once(depth.material).readouts
    if {r.subject == saebench.FORGET for r in asked} != {True, False}:
        raise WrongRequest(f"{testbed.name}: {depth.NO_RELATIONS.removeprefix('depth: ')}")
    layers = list(range(0, len(testbed.layers) - 1, max(1, len(testbed.layers) // N_LAYERS)))
    found = swept(evaluator, layers)
    known = {evaluator.questions.names[s]: n for s, n in evaluator.questions.n_known.items()}
    row = {"layers": layers, "layer": looked_up(layers, **found), "known": known} | found
    return row | {"lm": testbed.describe["sources"]["lm"], "made_by": maker(evaluator)}


def name_of(name: str, lm: str, testbed: Testbed) -> str:
    """The row's. An LM that was given has its own, beside the shipped one of the same world."""
    return f"{name}, {lm}" if lm else f"{name}, world {testbed.describe['world_seed']}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--testbed", default="smollm2-taught", help="one whose LM has an oracle")
    parser.add_argument("--lm", default="", help="the LM of another world")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("layers.json"))
    args = parser.parse_args()
    if not args.out.parent.is_dir():
        raise WrongRequest(f"--out {args.out}: {args.out.parent} is no folder")
    process.tune_memory()
    testbed = testbeds.load(experiment.Request(arm="vanilla", testbed=args.testbed, lm=args.lm, layer=0))
    row = row_of(testbed)
    rows = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows[name_of(args.testbed, args.lm, testbed)] = row
    write_json(args.out, rows)
    for i, layer in enumerate(row["layers"]):
        for domain in ("forget", "retain"):
            rates = ", ".join(f"{name} {of[i]:.2f}" for name, of in row[domain].items())
            print(f"layer {layer}, {domain}: {rates}")
    print("layer:", row["layer"])


if __name__ == "__main__":
    sys.exit(process.exit_code_of(main))
