"""How long a round of the losses on W_dec may be (rounds.steps_of_round): what training loses when a row is
visited every n-th step only.

    python -m studies.rounds                                     # 15 minutes on 2 cores
    python -m studies.rounds --only fixed:0.1 grouped:0.1        # some

On the embedded LM: d_sae 512, batches of 1,024, 600 steps, L0 8, four seeds. Prints a row a variant: FVU
over the last 50 steps and Ω over all pairs at the end, each over that of the same seed with the shortest
rounds, less 1; mean ± standard error.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import experiment
from sae_separation import testbeds
from sae_separation.config import complete
from sae_separation.losses import omega_all_pairs
from sae_separation.specs import SPECS, defaults_of

VARIANTS = ("fixed:0.1", "fixed:1.0", "grouped:0.1", "grouped:0.5", "grouped:1.0", "ortsae:0.25")
STEPS = 600


def trained(arm: str, alpha: float, seed: int, block: experiment.ActivationBlock) -> tuple[float, float]:
    """FVU and Ω after training with rounds as long as steps_of_round says."""
    sizes: dict[str, Any] = dict(d_sae=512, batch_size=1024, tokens=STEPS * 1024, chunk_size=64)
    steps: dict[str, Any] = dict(target_l0=8.0, k=8, warmup_steps=20, resample_steps=0)
    request = experiment.Request(arm=arm, alpha=alpha, **sizes, **steps)
    defaults, d_in = defaults_of(SPECS["micro"]), block.x.shape[1]
    config = complete(request, experiment.Config, "micro", defaults, d_in)
    trainer, batches = experiment.Trainer(config, seed, d_in, STEPS, block), list(block.batches(1024))
    fvu = [trainer.step(*batches[i % len(batches)])["fvu"].item() for i in range(STEPS)]
    return statistics.mean(fvu[-50:]), omega_all_pairs(trainer.sae.W_dec.detach()).item()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=VARIANTS, help="arm:alpha")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    args = parser.parse_args()
    block = experiment.ActivationStream(testbeds.load("micro"), 128, 65_536, seed=5).next_block()
    print("| variant | steps a round | FVU | Ω |\n| --- | --- | --- | --- |")
    for variant in args.only:
        arm, alpha = variant.split(":")
        found = {}
        for steps in sorted(
            {experiment.ARMS[arm].every, 4, 8, 16} - ({4} if experiment.ARMS[arm].every > 4 else set())
        ):
            experiment.steps_of_round = lambda *_, steps=steps: steps
            found[steps] = [trained(arm, float(alpha), seed, block) for seed in args.seeds]
            shortest = found[experiment.ARMS[arm].every]
            cells = []
            for i in range(2):
                gained = [new[i] / old[i] - 1 for new, old in zip(found[steps], shortest)]
                cells.append(
                    f"{statistics.mean(gained):+.2%} ± {statistics.stdev(gained) / len(gained) ** 0.5:.2%}"
                )
            print(f"| {variant} | {steps} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
