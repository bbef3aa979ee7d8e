"""The model card of a run's SAEs, made from its results: README.md of a repository on the hub.

text = model_card("owner/name", folder, seeds=[0, 1, 2])

What names a folder on this machine (of an LM, text or questions) is named by its last part alone.
"""

import json
import math
import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from sae_separation import evals
from sae_separation.arms import OPTIONS
from sae_separation.config import Request
from sae_separation.run_folder import sae_folder
from sae_separation.specs import CUSTOM, HERE, SPECS

ARMS = {
    "vanilla": "a plain SAE, without a further loss",
    "vanilla_selected": "a plain SAE; the features that the evaluations clamp are chosen with labels",
    "frozen_decoder": "the control: decoder directions are random and were never trained",
    "fixed": "squared cosines of all pairs of decoder rows are part of the loss",
    "grouped": "squared cosines of decoder rows that fire together are part of the loss",
    "adaptive": "a few features are kept for the text to forget: a loss holds them silent on all other text,"
    " and asks that one of them fires on each token of it",
    "adaptive_directions": "decoder rows of a few features that are kept for the text to forget are held"
    " orthogonal to the features that carry the other text",
    "adaptive_both": "a few features are kept for the text to forget: losses hold their firing to it, and"
    " their decoder rows orthogonal to the features that carry the other text",
    "gsae": "G-SAE (arXiv 2506.19382): a few features learn to tell the text to forget, by cross-entropy",
    "routed": "gradient routing (arXiv 2410.04332): a few features alone learn to reconstruct the text to"
    " forget, the others the rest",
    "soft_frozen_decoder": "a control (arXiv 2602.14111): decoder rows stay near where they started",
    "frozen_encoder": "a control (arXiv 2602.14111): encoder weights are random and were never trained",
    "ortsae": "OrtSAE (arXiv 2509.22033): the largest cosine of each decoder row within random chunks is part"
    " of the loss",
}
ACTIVATIONS = {
    "relu": "ReLU",
    "batchtopk": "BatchTopK, stored as JumpReLU",
    "softk": "soft k-winners, stored as TopK",
}
FOLDERS = re.compile(r"""(?<![\w.:/-])(/|~[^\s/]*/)([^\s/'"`]+/)+""")  # no URL, no owner/name
INSTALLED = "licenses/CITATION.cff"
WORDS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")


def model_card(repo: str, folder: Path, seeds: list[int]) -> str:
    """Markdown with the hub's metadata, of the SAEs of some seeds of a complete run."""
    made, info = (json.loads((folder / name).read_bytes()) for name in ("config.json", "final_info.json"))
    warnings = json.loads((folder / "warnings.json").read_bytes())
    parts = [
        metadata(made),
        what_it_is(made, info, seeds),
        how_to_load(repo, made, seeds),
        numbers(made, info),
        limits(warnings),
        how_it_was_made(folder.name, made, info),
        licence_and_citation(),
    ]
    return "\n\n".join(parts) + "\n"


def metadata(made: dict) -> str:
    """YAML front matter."""
    import yaml

    tags = ["sae-lens", "sparse-autoencoder", "mechanistic-interpretability", "unlearning", "sae-separation"]
    about = {"library_name": "saelens", "license": str(citation()["license"]).lower(), "tags": tags}
    lm = made["testbed"]["sources"]["lm"]
    if "revision" in lm:  # of the hub
        about["base_model"] = lm["source"]
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---"


def what_it_is(made: dict, info: dict, seeds: list[int]) -> str:
    config, testbed = made["config"], made["testbed"]
    several = len(seeds) > 1
    n = WORDS[len(seeds)] if len(seeds) < len(WORDS) else str(len(seeds))
    tokens = info["training"]["means"]["tokens_trained"]
    arm = ARMS.get(config["arm"], "docs/method.md of the code says what it is")
    forget, retain = (", ".join(map(named, config[f"{domain}_text"])) for domain in ("forget", "retain"))
    lines = [
        f"# Sparse autoencoders of {without_folders(config['lm'])}, layer {config['layer']}: {config['arm']}",
        "",
        f"{n} sparse autoencoder{'s' * several} (SAE{'s' * several}) of the residual stream behind layer"
        f" {config['layer']} (counted from 0; `{testbed['hook_name']}`) of {lm_text(made)}."
        + (" They differ in their seed alone." if several else ""),
        "",
        f"{'They were' if several else 'It was'} trained for a question: can one domain of knowledge be"
        " switched off inside a language model while everything else stays?",
        f"Half of the training text is of the domain to forget ({forget}), half is not ({retain}).",
        "",
        "| | |",
        "| --- | --- |",
        f"| features | {config['d_sae']:,}, of {testbed['d_in']:,} dimensions |",
        f"| activation function | {ACTIVATIONS[config['activation']]} |",
        f"| training tokens | {tokens:,.0f}, in contexts of {config['context_size']}; no special tokens |",
        f"| arm | `{config['arm']}`: {arm} |",
    ]
    return "\n".join(lines)


def lm_text(made: dict) -> str:
    """The LM, with a link where the hub has it."""
    source, revision = made["config"]["lm"], made["testbed"]["sources"]["lm"].get("revision")
    if revision:
        return f"[{source}](https://huggingface.co/{source}) (commit `{revision[:12]}`)"
    testbed = SPECS.get(made["config"]["testbed"])
    invented = ""
    if testbed and testbed.has_world:
        invented = " (a small LM that comes with the code and knows invented facts alone)"
    if testbed and testbed.taught:
        invented = f" (the LM of the testbed {testbed.taught}, taught invented facts)"
    return f"`{without_folders(source)}`" + invented


def how_to_load(repo: str, made: dict, seeds: list[int]) -> str:
    ids = ", ".join(f"`{sae_folder(Path(), seed)}`" for seed in seeds)
    d_in, layer = made["testbed"]["d_in"], made["config"]["layer"]
    return f"""## Load

```python
from sae_lens import SAE
sae = SAE.from_pretrained("{repo}", "{sae_folder(Path(), seeds[0])}")
features = sae.encode(x)  # x [..., {d_in}] -> [..., {made["config"]["d_sae"]}]
```

`x` is the residual stream as the LM computes it, unscaled: `hidden_states[{layer + 1}]` of a model of
transformers that is called with `output_hidden_states=True`. `sae.decode(features)` is its
reconstruction. SAEs in this repository: {ids}."""


def numbers(made: dict, info: dict) -> str:
    """The main metrics; each is a mean over all seeds of the run."""
    seeds = made["config"]["seeds"]
    over = f"mean ± standard error over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    rows = [
        f"| {row.section} | `{metric}` | {quoted(*of_seeds(info, row.section, metric))} | {escaped(says)} |"
        for row in evals.ROWS
        for metric, says in row.says.items()
        if metric in info.get(row.section, {}).get("means", {})
    ]
    if not rows:
        return "## Results\n\nNothing was evaluated."
    lines = [
        "## Results",
        "",
        f"Measured on the exported SAEs, on text and questions that training did not see ({over}).",
        "",
        "| section | metric | value | what it says |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        "`final_info.json` has every metric, by seed; `eval/` the details (core's in SAEBench's own form).",
    ]
    if "robustness" in info:
        more = "A high `unlearning_score` beside a low `worst_case_score` means a topic that is recognised,"
        lines += ["", f"{more} not knowledge that is separated."]
    return "\n".join(lines)


def limits(warnings: list[str]) -> str:
    """What keeps numbers from being taken at face value: the run's own warnings, seeds together."""
    by_text: dict[str, list[str]] = {}
    for warning in warnings:
        seed, _, text = warning.partition(": ") if warning.startswith("seed ") else ("", "", warning)
        by_text.setdefault(text, []).append(seed.removeprefix("seed "))
    lines = []
    for text, of in by_text.items():
        which = f"seed{'s' * (len(of) > 1)} {', '.join(of)}: " if of[0] else ""
        lines.append(f"- {which}{without_folders(text)}")
    return "\n".join(["## Limits", "", *(lines or ["No warning came with the numbers."])])


def how_it_was_made(name: str, made: dict, info: dict) -> str:
    packages = ("python", "torch", "sae-lens", "sae-bench")
    versions = ", ".join(f"{p} {made['versions'][p]}" for p in packages if p in made["versions"])
    lines = [
        "## How it was made",
        "",
        f"    {command_of(name, made, info)}",
        "",
        f"With the code of *{citation()['title']}*: trained at commit `{made['git']}` ({versions}).",
    ]
    at: dict[str, list[str]] = {}
    for section, of in info.items():
        if "made_by" in of:
            at.setdefault(of["made_by"]["git"], []).append(section)
    lines += [f"Evaluated at commit `{commit}`: {', '.join(sections)}." for commit, sections in at.items()]
    return "\n".join(lines)


def command_of(name: str, made: dict, info: dict) -> str:
    """The command that makes a run: what was asked for and is no default, and the evaluations."""
    asked = made["requested"] | {"testbed": made["config"]["testbed"]}
    if asked["testbed"] == CUSTOM:
        asked["testbed"] = "auto"
    known = defaults()
    options = {k: v for k, v in asked.items() if k in known and v != known[k] or k == "arm"}
    options["evals"] = [row.name for row in evals.ROWS if row.section in info] or ["none"]
    parts = [part for name, value in options.items() for part in option(name, value)]
    return shlex.join(["python", "experiment.py", f"--out_dir={name}", *parts])


def option(name: str, value: Any) -> list[str]:
    """A setting as on a command line."""
    if isinstance(value, bool):
        return [f"--{name}"]  # all of them are off where nothing is asked for
    if isinstance(value, list):
        return [f"--{name}", *(str(without_folders(v)) for v in value)]
    return [f"--{name}={f'{value:g}' if isinstance(value, float) else without_folders(value)}"]


def defaults() -> dict[str, Any]:
    """What a request holds where nothing is asked for, as JSON: settings of all runs, and the arms' own."""
    own = {f.name: f.default for f in fields(Request) if f.default is not MISSING}
    own |= {name: made.default for name, made in OPTIONS.items()}
    return json.loads(json.dumps(own))


def licence_and_citation() -> str:
    return f"""## Licence and citation

{citation()["license"]}. {citation()["message"]}

```bibtex
{bibtex()}
```"""


def citation() -> dict:
    """CITATION.cff of the code: of the repository, or where pip has put it."""
    from importlib.metadata import distribution

    import yaml

    here = HERE / "CITATION.cff"
    text = here.read_text() if here.exists() else distribution("sae-separation").read_text(INSTALLED)
    return yaml.safe_load(text or "")


def bibtex() -> str:
    about = citation()
    authors = " and ".join(
        a.get("name") or f"{a['family-names']}, {a['given-names']}" for a in about["authors"]
    )
    entry = {"title": about["title"], "author": authors, "year": str(about["date-released"])[:4]}
    entry |= {k: about[v] for k, v in (("url", "repository-code"), ("version", "version")) if v in about}
    lines = [f"  {name} = {{{value}}}" for name, value in entry.items()]
    return "\n".join(["@software{sae_separation,", ",\n".join(lines), "}"])


def of_seeds(info: dict, section: str, metric: str) -> tuple[float | None, float | None]:
    return info[section]["means"][metric], info[section]["stderrs"][metric]


def quoted(mean: float | None, stderr: float | None) -> str:
    """Mean ± standard error, to two digits of the error."""
    if mean is None:
        return "n/a"
    if not stderr:
        return f"{mean:.4g}"
    digits = max(0, min(6, 1 - math.floor(math.log10(stderr))))
    return f"{mean:.{digits}f} ± {stderr:.{digits}f}"


def escaped(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return text.replace("|", r"\|")


def named(source: Any) -> str:
    return f"`{without_folders(source)}`"


def without_folders(value: Any) -> Any:
    """JSON in which paths from the root or a home folder are cut to their last part: where a person keeps
    files is nobody's business."""
    if isinstance(value, dict):
        return {k: without_folders(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_folders(v) for v in value]
    return FOLDERS.sub("", value) if isinstance(value, str) else value
