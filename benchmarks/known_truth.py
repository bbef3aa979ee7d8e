"""Do orthogonality losses recover true features? Our SAEs on synthetic activations, judged by SAELens' code.

    python benchmarks/known_truth.py                # five seeds; those that known_truth.json holds stay
    python benchmarks/known_truth.py --shrink 1 --samples 200_000_000 --out full.json     # needs a GPU

Activations are drawn from SAELens' synthetic model with the published settings of SynthSAEBench-16k (arXiv
2602.14687): 16,384 true features in 768 dimensions, Zipfian firing, trees of features whose children fire
only with their parent and one at a time, low-rank correlations. It is built here and not downloaded: seed
42, as published, for seed 0 and 42 + n for seed n. --shrink 8 keeps every eighth feature of each kind in an
eighth of the dimensions: as many features a dimension, as many active ones a dimension.

Domains: a tenth of the features, whole trees drawn by the seed, are the forget domain's. A sample is a
forget sample where one of them fires; half of all samples are, in training and in measuring. Only
adaptive_directions is told. SAEs of one seed see the same batches, ours start from the same weights. An SAE
has a quarter as many features as there are true ones, and the target L0 is that of the true features that
fire most, as many of them as the SAE has. Beside the arms: our SAE with a decoder that is fixed to those
true features (the most that there is to reach) or to random directions (the floor), our BatchTopK without a
loss on directions, and SAELens' own BatchTopK.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import experiment  # noqa: E402
from sae_separation import process  # noqa: E402
from sae_separation.blocks import ActivationBlock  # noqa: E402
from sae_separation.config import complete, whole_number  # noqa: E402
from sae_separation.errors import WrongRequest  # noqa: E402
from sae_separation.export import export  # noqa: E402
from sae_separation.files import write_json  # noqa: E402
from sae_separation.losses import omega_all_pairs  # noqa: E402
from sae_separation.run_folder import provenance  # noqa: E402

PLANNED = {
    "fixed": experiment.PLAN["run_1"],
    "grouped": experiment.PLAN["run_2"],
    "ortsae": experiment.PLAN["run_9"],
    "adaptive_directions": experiment.PLAN["run_22"],
}
TRUE, BASELINE = "true features", "vanilla"
ROWS: dict[str, dict[str, Any]] = {  # settings of ours; of SAELens' its learning rate
    BASELINE: experiment.PLAN["run_0"],
    **PLANNED,
    **{f"{name}, α × 10": row | {"alpha": 10 * row["alpha"]} for name, row in PLANNED.items()},
    TRUE: {"arm": "frozen_decoder"},
    "random directions": {"arm": "frozen_decoder"},
    "vanilla, BatchTopK": {"arm": "vanilla", "activation": "batchtopk"},
    "SAELens BatchTopK": {"lr": 3e-4},  # the default of SAELens
    "SAELens BatchTopK, our lr": {"lr": 3e-3},
}
# α of adaptive_directions is steered to a target, which says how strong the loss is
ROWS["adaptive_directions, α × 10"]["target_overlap"] = 0.01
METRICS = (  # the first ones by SAELens' code
    *("mcc", "uniqueness", "precision", "recall", "f1_score", "accuracy"),
    *("explained_variance", "shrinkage", "sae_l0", "true_l0", "dead_latents"),
    *("mcc_forget", "mcc_others", "omega"),
)


DRAWN_AT_ONCE = 1024  # samples; more leave the caches


@dataclass(frozen=True)
class Settings:
    """Sizes: with other ones the results are others."""

    shrink: int = 8
    samples: int = 500_000  # an SAE is trained on
    eval_samples: int = 16_384
    batch_size: int = 512

    def __post_init__(self):
        if self.samples < 100 * self.batch_size:
            raise WrongRequest(f"--samples {self.samples}: give at least 100 batches of {self.batch_size}")

    @property
    def chunk(self) -> int:
        """Samples of a block."""
        return 4 * self.batch_size


def model_config(shrink: int, seed: int) -> Any:
    """Settings of SynthSAEBench-16k as SAELens' documentation has them, shrunk (SyntheticModelConfig).

    The Zipfian probability of every n-th feature is that of fewer features at a maximum smaller by √n.
    """
    from sae_lens import synthetic

    return synthetic.SyntheticModelConfig(
        num_features=16_384 // shrink,
        hidden_dim=768 // shrink,
        firing_probability=synthetic.ZipfianFiringProbabilityConfig(
            exponent=0.5, max_prob=0.4 / shrink**0.5, min_prob=5e-4
        ),
        hierarchy=synthetic.HierarchyConfig(
            total_root_nodes=128 // shrink,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            mutually_exclusive_min_depth=0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=synthetic.OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=synthetic.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=42 + seed,
    )


def trees(nodes: Sequence[Any]) -> Iterator[list[int]]:
    """Of each node of a hierarchy: its feature and those of all its descendants."""
    for node in nodes:
        yield [node.feature_index, *chain.from_iterable(trees(node.children))]


class World:
    """A synthetic model, its forget domain, and samples of it of which half are forget samples.

    `vectors` [N, D]: the true features' directions; `forget` [N] (bool): which are the forget domain's;
    `frequent` [d_sae]: indices of those that fire most; `target_l0`: how many of these fire in a sample.
    """

    def __init__(self, settings: Settings, seed: int):
        from sae_lens.synthetic import SyntheticModel

        self.settings, self.seed = settings, seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = SyntheticModel(model_config(settings.shrink, seed), device=str(self.device))
        self.model.requires_grad_(False)
        self.vectors = self.model.feature_dict.feature_vectors
        n, self.d_in = self.vectors.shape
        self.d_sae = n // 4
        self.forget = self._forget_domain(n)
        with seeded(seed, "rates"):
            rates = [(self.sample(settings.chunk) > 0).float().mean(0) for _ in range(4)]
        rate = torch.stack(rates).mean(0)
        self.frequent = rate.topk(self.d_sae).indices
        self.target_l0 = max(1, round(rate[self.frequent].sum().item()))

    def _forget_domain(self, n: int) -> Tensor:
        """Trees in an order drawn by the seed, until they hold a tenth of the n features."""
        assert self.model.hierarchy is not None
        found = list(trees(self.model.hierarchy.roots))
        forget = torch.zeros(n, dtype=torch.bool, device=self.device)
        for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(self.seed)):
            if forget.sum() < n / 10:
                forget[found[i]] = True
        return forget

    def half_forget(self, n: int, rows_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """n samples, half of them forget samples, shuffled: `rows_of` the true features' activations [n, N],
        and which are forget samples [n] (bool). What is drawn beyond the half of a domain is dropped."""
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        left = {True: n // 2, False: n - n // 2}
        columns = self.forget.nonzero()[:, 0]
        while any(left.values()):
            acts = self.model.activation_generator.sample(DRAWN_AT_ONCE)
            is_forget, rows = (acts[:, columns] > 0).any(1), rows_of(acts)
            for domain in parts:
                parts[domain].append(rows[is_forget == domain][: left[domain]])
                left[domain] -= len(parts[domain][-1])
        order = torch.randperm(n).to(self.device)
        labels = torch.arange(n, device=self.device) < n // 2
        return torch.cat(parts[True] + parts[False])[order], labels[order]

    def sample(self, n: int) -> Tensor:
        """The true features' activations [n, N] of n samples."""
        return self.half_forget(n, torch.Tensor.detach)[0]

    def blocks(self) -> Iterator[ActivationBlock]:
        """Activations to train on: a function of settings and seed."""
        for index in range(self.settings.samples // self.settings.chunk):
            with seeded(self.seed, f"block {index}"):
                x, forget = self.half_forget(self.settings.chunk, self.model.feature_dict)
            yield ActivationBlock(x, forget)


def seeded(seed: int, what: str):
    """Inside, torch's global generator is seeded for this purpose; outside it is as it was."""
    from sae_lens.util import temporary_seed

    return temporary_seed(zlib.crc32(f"{seed} {what}".encode()))


class Ours:
    """One of our SAEs in training: experiment.Trainer, as in the study."""

    def __init__(self, row: dict[str, Any], world: World, first: ActivationBlock, start: Tensor | None):
        s, d_sae = world.settings, world.d_sae
        asked = row | {"seeds": (world.seed,), "tokens": s.samples, "d_sae": d_sae}
        asked |= {"batch_size": s.batch_size, "buffer_tokens": s.chunk}
        asked["forget_features"] = max(1, 40 * d_sae // 1024)  # the study's 40 of 1,024
        of_world = {"target_l0": float(world.target_l0), "k": world.target_l0, "context_size": 8, "layer": 0}
        request = experiment.Request(**asked)
        config = complete(request, experiment.Config, "synthetic", of_world, world.d_in)
        self.n_steps = s.samples // s.chunk * (s.chunk // s.batch_size)
        self.trainer = experiment.Trainer(config, world.seed, world.d_in, self.n_steps, first)
        if start is not None:
            with torch.no_grad():
                self.trainer.sae.W_dec.copy_(start)
                self.trainer.sae.W_enc_FD.copy_(start)

    def step(self, x: Tensor, forget: Tensor):
        last = self.trainer.steps == self.n_steps - 1
        self.measured = self.trainer.step(x, forget, look=last or self.trainer.steps % 25 == 0)

    def save(self, folder: Path):
        export(self.trainer.sae, folder, {})

    def about(self) -> dict[str, Any]:
        """What training measured in its last batch, and warnings."""
        ends = {name: value.item() for name, value in self.measured.items()}
        return {"training": ends, "warnings": self.trainer.out_of_reach()}


class SAELensBatchTopK:
    """SAELens' own BatchTopK in training, by its trainer, with its defaults but for the learning rate."""

    def __init__(self, lr: float, world: World):
        from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, LoggingConfig
        from sae_lens.synthetic import SyntheticSAERunnerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        s, device = world.settings, str(world.device)
        sae = BatchTopKTrainingSAEConfig(d_in=world.d_in, d_sae=world.d_sae, k=world.target_l0, device=device)
        runner = SyntheticSAERunnerConfig(
            synthetic_model=world.model.cfg,
            sae=sae,
            training_samples=s.samples,
            batch_size=s.batch_size,
            lr=lr,
            device=device,
            logger=LoggingConfig(log_to_wandb=False),
        )
        with seeded(world.seed, "SAELens"):
            trained = BatchTopKTrainingSAE(sae)
        self.trainer = SAETrainer(runner.to_sae_trainer_config(), trained, data_provider=iter(()))

    def step(self, x: Tensor, forget: Tensor):
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def save(self, folder: Path):
        self.trainer.sae.save_inference_model(folder)

    def about(self) -> dict[str, Any]:
        return {}


def trained(world: World) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every row's SAE, trained side by side on the same batches, as SAELens reads it from disk, and what
    training says of it."""
    from sae_lens import SAE

    blocks = world.blocks()
    first = next(blocks)
    saes: dict[str, Ours | SAELensBatchTopK] = {}
    for name, row in ROWS.items():
        start = world.vectors[world.frequent] if name == TRUE else None
        saes[name] = Ours(row, world, first, start) if "arm" in row else SAELensBatchTopK(row["lr"], world)
    for block in chain([first], blocks):
        for x, forget in block.batches(world.settings.batch_size):
            for sae in saes.values():
                sae.step(x, forget)
    with TemporaryDirectory() as folder:
        for i, (name, sae) in enumerate(saes.items()):
            sae.save(Path(folder) / str(i))
            yield name, SAE.load_from_disk(Path(folder) / str(i), device=str(world.device)), sae.about()


class Replayed:
    """The same samples of true features' activations [n, N] for every SAE, in the place of a generator."""

    def __init__(self, acts: Tensor):
        self.acts, self.at = acts, 0

    def sample(self, n: int) -> Tensor:
        self.at += n
        return self.acts[self.at - n : self.at]


@torch.no_grad()
def measured(sae: Any, world: World, acts: Tensor) -> dict[str, float]:
    """METRICS of an SAE of SAELens' on samples of true features' activations [n, N], all by its code but the
    last: Ω as the study has it. MCC of the domains is over those of the true features that fire most, which
    the true dictionary holds."""
    from sae_lens.synthetic import eval_sae_on_synthetic_data, mean_correlation_coefficient

    generator = cast(Any, Replayed(acts))
    found = eval_sae_on_synthetic_data(sae, world.model.feature_dict, generator, len(acts), DRAWN_AT_ONCE)
    values = found.to_dict()
    values |= values.pop("classification")
    frequent, forget = world.vectors[world.frequent], world.forget[world.frequent]
    values["mcc_forget"] = mean_correlation_coefficient(sae.W_dec, frequent[forget])
    values["mcc_others"] = mean_correlation_coefficient(sae.W_dec, frequent[~forget])
    values["omega"] = omega_all_pairs(torch.nn.functional.normalize(sae.W_dec, dim=1)).item()
    return {name: values[name] for name in METRICS}


def of_seed(settings: Settings, seed: int, command: str) -> dict[str, Any]:
    """All rows of a seed: what made them, their world, and of each METRICS and what training says."""
    began = time.perf_counter()
    made_by = {"command": command, "date": time.strftime("%Y-%m-%d"), **provenance()}
    world = World(settings, seed)
    with seeded(seed, "evaluation"):
        acts = world.sample(settings.eval_samples)
    rows = {name: measured(sae, world, acts) | about for name, sae, about in trained(world)}
    forget = world.forget.sum().item(), world.forget[world.frequent].sum().item()
    of_world = {"seed": world.model.cfg.seed, "true_features": len(world.vectors), "d_in": world.d_in}
    of_world |= {"d_sae": world.d_sae, "target_l0": world.target_l0, "device": str(world.device)}
    of_world |= {"forget_features": forget[0], "forget_features_of_the_frequent": forget[1]}
    return {"made_by": made_by | {"seconds": time.perf_counter() - began}, "world": of_world, "rows": rows}


def summary(seeds: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each row and metric: mean over seeds, mean difference to the baseline of the same seed, and the 95 %
    interval of that (t; None of one seed)."""
    from scipy import stats

    def of(name: str, metric: str) -> dict[str, Any]:
        values = [seed["rows"][name][metric] for seed in seeds.values()]
        differences = [v - seed["rows"][BASELINE][metric] for v, seed in zip(values, seeds.values())]
        n, difference, half = len(values), statistics.fmean(differences), None
        if n > 1:
            half = stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n)
        interval = None if half is None else [difference - half, difference + half]
        return {"mean": statistics.fmean(values), "less_baseline": difference, "interval_95": interval}

    return {name: {metric: of(name, metric) for metric in METRICS} for name in ROWS}


def read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results so far. Raises WrongRequest where the file is damaged or made with other settings."""
    if not path.exists():
        return {"settings": settings, "seeds": {}}
    try:
        results = json.loads(path.read_text())
        same = results["settings"] == json.loads(json.dumps(settings))
    except (ValueError, KeyError, TypeError) as error:
        raise WrongRequest(f"{path} is damaged ({error}): remove it, or give another --out") from error
    if not same:
        raise WrongRequest(f"{path} was made with other settings: give another --out")
    return results


def run(settings: Settings, seeds: Sequence[int], out: Path, command: str):
    """Make the seeds that `out` does not hold; it is written after each."""
    results = read(out, asdict(settings) | {"rows": ROWS})
    for seed in seeds:
        if str(seed) in results["seeds"]:
            print(f"seed {seed}: in {out} already")
            continue
        results["seeds"][str(seed)] = made = of_seed(settings, seed, command)
        results["summary"] = summary(results["seeds"])
        write_json(out, results)
        mcc = ", ".join(f"{name} {row['mcc']:.3f}" for name, row in made["rows"].items())
        print(f"seed {seed}, {made['made_by']['seconds']:.0f} s: MCC of {mcc}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [2**i for i in range(6)]
    parser.add_argument("--shrink", type=int, default=Settings.shrink, choices=sizes, help="1: full size")
    parser.add_argument("--samples", type=whole_number, default=Settings.samples, help="to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=HERE / "known_truth.json", help="of one size each")
    args = parser.parse_args()
    process.tune_memory()
    command = shlex.join(["python", "benchmarks/known_truth.py", *sys.argv[1:]])
    try:
        settings = Settings(shrink=args.shrink, samples=args.samples)
        run(settings, args.seeds, args.out, command)
    except WrongRequest as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
