"""How the form and the defaults of `adaptive` were chosen: variants on a world whose questions the report
never uses.

    python -m micro_pythia.make --out worlds/1 --world_seed 1     # once
    python -m studies.choose_adaptive                             # every variant, two seeds, one LM pass
    python -m studies.choose_adaptive --only vanilla group_40_gap_10       # some

One run folder a variant under tuning/; finished ones stay as they are. Prints a row a variant: mean ±
standard error.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import experiment

SMALL = dict(arm="adaptive", alpha=1.0, forget_features=10, gap_weight=3.0)
VARIANTS = {  # chosen: the largest unlearning score at explained variance within 0.01 of vanilla's
    "vanilla": dict(arm="vanilla"),
    "group_10_gap_3": SMALL,
    "group_10_gap_10": SMALL | dict(gap_weight=10.0),
    "group_20_gap_10": SMALL | dict(forget_features=20, gap_weight=10.0),
    "group_40_gap_10": SMALL | dict(forget_features=40, gap_weight=10.0),  # chosen
    "group_40_gap_30": SMALL | dict(forget_features=40, gap_weight=30.0),
    "group_80_gap_10": SMALL | dict(forget_features=80, gap_weight=10.0),
    "margin_2": SMALL | dict(margin=2.0),
    "curriculum": SMALL | dict(alpha_start=0.1, loss_warmup_steps=100),
    "curriculum_unlock_30": SMALL | dict(alpha_start=0.1, loss_warmup_steps=100, unlock_steps=30),
}
SHOWN = [
    ("core", "l0"),
    ("core", "explained_variance"),
    ("unlearning", "unlearning_score"),
    ("unlearning", "unlearning_score_guardrail"),
    ("corpus_unlearning", "forget_ce_gain_at_retain_ce_cost_0.05"),
    ("training", "alpha"),
]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--world", default="worlds/1", help="folder of the world to choose on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    args = parser.parse_args()
    configs = [
        experiment.Request(testbed="micro", lm=args.world, seeds=tuple(args.seeds), **VARIANTS[name])
        for name in args.only
    ]
    command = experiment.Command(out_dir=tuple(f"tuning/{name}" for name in args.only))
    command, configs = experiment.unfinished(command, configs)
    if configs and experiment.main(command, configs):
        sys.exit(1)
    print("| variant | " + " | ".join(name for _, name in SHOWN) + " |")
    for name in args.only:
        info = json.loads(Path(f"tuning/{name}/final_info.json").read_text())
        cells = [
            f"{info[section]['means'][metric]:.3f} ± {info[section]['stderrs'][metric]:.3f}"
            for section, metric in SHOWN
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
