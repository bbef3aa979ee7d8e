"""How the form and the defaults of `adaptive` were chosen: variants on a world whose questions the report never uses.

    python -m micro_pythia.make --out worlds/1 --world_seed 1     # once, 15 minutes
    python -m studies.choose_adaptive                             # every variant, two seeds, one LM pass
    python -m studies.choose_adaptive --only default gap_10       # some

One run folder a variant under tuning/; finished ones stay as they are. Prints a row a variant: mean ± standard error.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import experiment  # noqa: E402

DEFAULT = dict(arm="adaptive", alpha=1.0)
VARIANTS = {
    "vanilla": dict(arm="vanilla"),
    "default": DEFAULT,
    "gap_1": DEFAULT | dict(gap_weight=1.0),
    "gap_10": DEFAULT | dict(gap_weight=10.0),
    "group_20": DEFAULT | dict(forget_features=20),
    "group_20_gap_10": DEFAULT | dict(forget_features=20, gap_weight=10.0),
    "group_40_gap_10": DEFAULT | dict(forget_features=40, gap_weight=10.0),
    "margin_0.5": DEFAULT | dict(margin=0.5),
    "margin_2": DEFAULT | dict(margin=2.0),
    "sharing_0.0001": DEFAULT | dict(target_sharing=0.0001),
    "sharing_0.002": DEFAULT | dict(target_sharing=0.002),
    "curriculum": DEFAULT | dict(alpha_start=0.1, loss_warmup_steps=100),
    "curriculum_unlock_30": DEFAULT | dict(alpha_start=0.1, loss_warmup_steps=100, unlock_steps=30),
    "curriculum_unlock_100": DEFAULT | dict(alpha_start=0.1, loss_warmup_steps=100, unlock_steps=100),
}
SHOWN = [("core", "l0"), ("core", "explained_variance"), ("unlearning", "unlearning_score"), ("unlearning", "unlearning_score_guardrail"),
         ("corpus_unlearning", "forget_ce_gain_at_retain_ce_cost_0.05"), ("training", "alpha")]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--world", default="worlds/1", help="folder of the world to choose on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    args = parser.parse_args()
    configs = [experiment.Config(testbed="micro", lm=args.world, seeds=tuple(args.seeds), **VARIANTS[name]) for name in args.only]
    command = experiment.Command(testbed="micro", lm=args.world, out_dir=tuple(f"tuning/{name}" for name in args.only))
    command, configs = experiment.unfinished(command, configs)
    if configs and experiment.main(command, configs):
        sys.exit(1)
    print("| variant | " + " | ".join(name for _, name in SHOWN) + " |")
    for name in args.only:
        info = json.loads(Path(f"tuning/{name}/final_info.json").read_text())
        cells = [f"{info[section]['means'][metric]:.3f} ± {info[section]['stderrs'][metric]:.3f}" for section, metric in SHOWN]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
