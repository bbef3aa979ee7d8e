"""SAEDashboard's page of a run's features: an interactive view of each with its activations, its logits and
the texts it fires on.

python -m sae_separation.dashboard run_6                      # writes run_6_seed0_dashboard.html here
python -m sae_separation.dashboard run_6 --seed 1 --features 12 29

The features are those that `--evals features` has told of, or those that are named; the text is the testbed's
held-out text. Needs SAEDashboard, which is no part of requirements.txt; its page loads d3 and plotly from the
web when it is opened.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sae_separation import run_folder
from sae_separation.errors import WrongRequest, begin, finish, tell
from sae_separation.parser import Parser
from sae_separation.plots import pages
from sae_separation.saved_run import SavedRun, load_run

# its own requirements would replace transformers and transformer-lens by older ones
NEEDED = (
    "sae-dashboard decode-clt dataclasses-json eindex-callum 'marshmallow<4' typing-inspect mypy-extensions"
)


def arguments(argv: list[str]) -> argparse.Namespace:
    """Raises WrongRequest."""
    parser = Parser("python -m sae_separation.dashboard", __doc__)
    parser.add_argument("run", type=Path, help="folder of a complete run, its SAEs in it")
    parser.add_argument("--seed", type=int, help="which of the run's seeds (default: the first)")
    parser.add_argument("--features", type=int, nargs="+", help="which features (default: those told of)")
    return parser.parse_args(argv)


def features_of(run: Path, seed: int, d_sae: int, wanted: list[int] | None) -> list[int]:
    """Raises WrongRequest where there are none, or a number that no feature has."""
    if wanted is None:
        try:
            wanted = [row["feature"] for row in pages.read(run, seed).get("features", [])]
        except ValueError as error:
            raise WrongRequest(f"{run}: {error}; make it anew with --evals features") from error
    if not wanted:
        first = f"python experiment.py --out_dir={run} --evals features"
        raise WrongRequest(f"{run} tells of no features: give --features, or first {first}")
    if wrong := [i for i in wanted if not 0 <= i < d_sae]:
        raise WrongRequest(f"--features {wrong[0]}: the SAE has features 0 to {d_sae - 1}")
    return wanted


class HookedLM:
    """An LM with what SAEDashboard asks of TransformerLens': the stream at the hook layer, the unembedding
    and the tokenizer."""

    def __init__(self, testbed):
        from sae_separation.lm import InterventionLM

        self.lm, self.tokenizer = InterventionLM(testbed), testbed.tokenizer
        self.point = f"blocks.{testbed.layer}.hook_resid_post"
        self.hook_dict = {self.point: SimpleNamespace(ctx={})}
        self.W_U = testbed.lm.get_output_embeddings().weight.detach().float().T  # [D, vocab]

    def run_with_hooks(self, tokens, stop_at_layer: int, fwd_hooks: list):
        resid = self.lm.resid(tokens.to(self.W_U.device))
        for name, hook in fwd_hooks:
            hook(resid, hook=self.hook_dict[name])


def testbed_of(run: SavedRun) -> Any:
    """LM and text that a run's SAEs were trained on. Raises WrongRequest where they are others now."""
    from dataclasses import fields

    from sae_separation import results, testbeds
    from sae_separation.specs import CUSTOM, DataConfig

    requested = run_folder.read_run_json(run.folder / "config.json", {"requested"})["requested"]
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in requested.items()}
    asked = {field.name: given[field.name] for field in fields(DataConfig) if field.name in given}
    if run.testbed["name"] != CUSTOM:  # auto may mean another one now
        asked["testbed"] = run.testbed["name"]
    testbed = testbeds.load(DataConfig(**asked), examined=False)
    results.Finished(run.folder, SimpleNamespace(**run.config), testbed)
    return testbed


def write_page(testbed: Any, context_size: int, sae_folder: Path, features: list[int], path: Path):
    """Have SAEDashboard write its page."""
    import torch
    from sae_dashboard import data_writing_fns as pages_of  # pyright: ignore[reportMissingImports]
    from sae_dashboard.sae_vis_data import SaeVisConfig  # pyright: ignore[reportMissingImports]
    from sae_dashboard.sae_vis_runner import SaeVisRunner  # pyright: ignore[reportMissingImports]
    from sae_lens import SAE

    from sae_separation.evals.evaluator import evaluation_contexts
    from sae_separation.exam import special_ids

    contexts = evaluation_contexts(testbed, context_size)
    tokens = torch.cat([contexts["held_out", domain] for domain in ("forget", "retain")]).cpu()
    lm: Any = HookedLM(testbed)
    device = str(testbed.lm.device)
    special = set(special_ids(testbed.tokenizer).tolist())
    config = SaeVisConfig(
        lm.point, features, device=device, ignore_tokens=special, ignore_positions=[0], verbose=True
    )
    sae = SAE.load_from_disk(sae_folder, device=device)
    pages_of.save_feature_centric_vis(SaeVisRunner(config).run(sae, lm, tokens), path)


def show(given: argparse.Namespace):
    """What the command asks for. Raises WrongRequest."""
    run = load_run(given.run)
    seed, sae_folder = run.the_seed(given.seed), run.sae_folder(given.seed)
    about = run_folder.read_run_json(sae_folder / "cfg.json", set())
    if "d_sae" not in about:
        raise WrongRequest(f"{run.folder} has no SAE: its arm is {run.config['arm']}")
    features = features_of(run.folder, seed, about["d_sae"], given.features)
    if find_spec("sae_dashboard") is None:
        raise WrongRequest(f"SAEDashboard is not installed: pip install --no-deps {NEEDED}")
    path = Path(f"{run.folder.resolve().name}_seed{seed}_dashboard.html")
    write_page(testbed_of(run), run.config["context_size"], sae_folder, features, path)
    print(f"wrote {path}")


def main(argv: list[str]) -> int:
    """Exit code of the command. But for 0, the last line on stderr says why."""
    try:
        show(arguments(argv))
        return 0
    except Exception as error:
        return tell(error, take_less="name fewer --features")


if __name__ == "__main__":
    begin()
    finish(main(sys.argv[1:]))
