"""What helps a reader of forget text (sae_separation/reader.py), by text that is held out and no question.

    python experiment.py --out_dir=mine/it --arm vanilla --testbed=micro --layer 2 --seeds 0 --evals core
    python -m studies.readers mine/it      # into studies/readers.json

Rows that the file holds are not made again; those of commit 5e6cb95 are of one reader, later ones of three
(reader.MEMBERS). Each is a reader of the stream or of the features of the run's
first SAE, with so many hidden units, after so many steps. `caught`: the share of what counts in forget text
that scores above all but so much of what counts in retain text.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import experiment
from sae_separation import process, reader, testbeds
from sae_separation.evals.evaluator import Evaluator
from sae_separation.results import maker
from sae_separation.saved_run import SavedRun, load_run

READERS = {  # what it reads, hidden units, steps
    "stream, 40 units, 2000 steps": (False, 40, 2000),
    "stream, 400 units, 2000 steps": (False, 400, 2000),
    "stream, 400 units, 6000 steps": (False, 400, 6000),
    "features, 40 units, 1000 steps": (True, 40, 1000),
    "features, 40 units, 3000 steps": (True, 40, 3000),
}
RETAIN_SHARES = (3e-4, 1e-3, 3e-3)


def caught(scores: Tensor, marked: reader.Marked, share: float) -> float:
    """Of what counts in forget text, the share that scores above all but `share` of what counts in retain
    text."""
    retain = ~marked.forget & (marked.weight > 0)
    (threshold,) = reader.at_shares(scores[retain], marked.weight[retain], [share])
    of_forget = marked.weight * marked.forget
    return (of_forget[scores > threshold].sum() / of_forget.sum()).item()


def evaluator_of(run: SavedRun) -> Evaluator:
    """Of the LM and the layer that a run's SAEs are of."""
    asked = {name: run.config[name] for name in ("testbed", "layer", "lm")}
    return Evaluator(testbeds.load(experiment.Request(arm="vanilla", **asked)), run.config["context_size"])


def measured(held_out: reader.Marked, tensors: dict[str, Tensor]) -> dict:
    scores, weight = reader.scores_of(held_out, tensors), held_out.weight
    loss = binary_cross_entropy_with_logits(scores, held_out.forget.float(), weight, reduction="sum")
    rates = {f"{share:g}": caught(scores, held_out, share) for share in RETAIN_SHARES}
    return {"loss": (loss / weight.sum()).item(), "caught": rates}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder with an SAE")
    parser.add_argument("--only", nargs="+", default=list(READERS), choices=list(READERS))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("readers.json"))
    args = parser.parse_args()
    process.tune_memory()
    rows = json.loads(args.out.read_text()) if args.out.exists() else {}
    run = load_run(args.run)
    evaluator, features = evaluator_of(run), reader.of_features(run.sae())
    marked, held_out = reader.marked_text(evaluator), reader.marked_text(evaluator, held_out=True)
    for name in args.only:
        if name not in rows:
            began, (featured, hidden, steps) = time.monotonic(), READERS[name]
            generator = torch.Generator().manual_seed(0)
            tensors = reader.fitted(marked, hidden, steps, generator, features if featured else None)
            rows[name] = measured(held_out, tensors)
            rows[name] |= {"seconds": round(time.monotonic() - began), "made_by": maker(evaluator)}
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
        found = rows[name]
        print(
            name, f"{found['loss']:.4f}", *(f"{share}: {rate:.3f}" for share, rate in found["caught"].items())
        )


if __name__ == "__main__":
    main()
