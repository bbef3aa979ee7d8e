"""SAEs that were trained elsewhere: found, understood, and read as SAELens holds them.

    sources = find(("downloads/trainer_0", "owner/name/layers.3"))   # folders here or of the hub
    request = asked_for(sources, request)                            # with the layer and LM that they name
    sae = read(sources[0])                                           # a sae_lens SAE, float32, on the CPU

Formats: SAELens (cfg.json, sae_weights.safetensors), dictionary_learning (config.json, ae.pt) and sparsify
(cfg.json, sae.safetensors; the folder is named after the hook). torch and SAELens are imported where they are
used.
"""

import contextlib
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sae_separation.errors import WrongRequest
from sae_separation.files import content_of, sha256_of
from sae_separation.run_folder import read_run_json
from sae_separation.specs import CUSTOM, SPECS, DataConfig
from sae_separation.text import HUB_NAME, one_line

ARM = "loaded"  # of a run whose SAEs were trained elsewhere
FORMATS = {  # its two files: settings and weights
    "SAELens": ("cfg.json", "sae_weights.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "sparsify": ("cfg.json", "sae.safetensors"),
}
OF_TRAINING = (  # what a run's section `training` says
    "tokens_trained",
    "final_loss",
    "final_fvu",
    "final_l0",
    "l1_coefficient",
    "alpha",
    "tokens_per_second",
    "train_seconds",
)
R = TypeVar("R", bound=Any)


@dataclass(frozen=True)
class Source:
    """One SAE as its settings describe it. `given`: on the command line; `lm`, `hook`: which LM it was
    trained on and where, in its library's words ("" where they do not say); `known`: metrics of
    OF_TRAINING; `settings`: the file itself."""

    given: str
    format: str
    settings_file: Path
    weights_file: Path
    revision: str | None
    lm: str
    hook: str
    d_in: int
    d_sae: int
    known: dict[str, float]
    settings: dict[str, Any] = field(repr=False)

    @property
    def layer(self) -> int | None:
        return layer_of(self.hook)

    def described(self) -> dict:
        """For config.json."""
        names = ("given", "format", "revision", "lm", "hook", "d_in", "d_sae")
        files = (self.settings_file, self.weights_file)
        return {k: v for k, v in asdict(self).items() if k in names} | {
            "sha256": {path.name: sha256_of(path) for path in files}
        }

    def refuse(self, why: str) -> WrongRequest:
        return WrongRequest(f"--evaluate {self.given}: {why}")


# ---- where an SAE is


def find(given: Sequence[str]) -> tuple[Source, ...]:
    """The SAEs in these folders. Raises WrongRequest, RunFailed."""
    return tuple(map(describe, given))


def describe(given: str) -> Source:
    """The SAE in a folder here or of the hub, as its settings describe it. Raises WrongRequest, RunFailed."""
    folder, revision = locate(given)
    kinds = [kind for kind, names in FORMATS.items() if all((folder / name).is_file() for name in names)]
    if not kinds:
        raise WrongRequest(f"--evaluate {given} holds no SAE: {what_is_one()}{hint(folder)}")
    settings_file, weights_file = (folder / name for name in FORMATS[kinds[0]])
    settings = read_json(given, settings_file)
    try:
        said = SAID[kinds[0]](settings, folder)
        return Source(given, kinds[0], settings_file, weights_file, revision, **said, settings=settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{settings_file} is not a {kinds[0]} SAE's ({one_line(error)})"
        raise WrongRequest(f"--evaluate {given}: {why}") from error


def what_is_one() -> str:
    kinds = ", ".join(f"{a} with {b} ({kind})" for kind, (a, b) in FORMATS.items())
    return f"give the folder that holds {kinds}"


def hint(folder: Path) -> str:
    """Which of a folder's own folders hold an SAE."""
    weights = [weights for _, weights in FORMATS.values()]
    inside = sorted({p.parent.name for name in weights for p in folder.glob(f"*/{name}")})
    return f"; in it, {', '.join(inside[:5])} hold one" if inside else ""


def read_json(given: str, path: Path) -> dict:
    try:
        value = json.loads(content_of(path))
    except (OSError, ValueError, RecursionError) as error:
        raise WrongRequest(f"--evaluate {given}: {path} cannot be read ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise WrongRequest(f"--evaluate {given}: {path} holds no object")
    return value


def locate(given: str) -> tuple[Path, str | None]:
    """The folder of an SAE; of one on the hub (owner/name, or owner/name/folder/in/it), which is fetched, its
    commit too. Raises WrongRequest, RunFailed."""
    path = Path(given).expanduser()
    if path.is_dir():
        return path, None
    on_hub = re.fullmatch(rf"(?P<repo>{HUB_NAME.pattern})(?:/(?P<folder>.+?))?/?", given)
    looks_local = given.startswith((".", "/", "~")) or path.parts and Path(path.parts[0]).is_dir()
    if path.exists() or on_hub is None or looks_local:
        what = "a file" if path.exists() else "neither a folder here nor on the hub (owner/name/folder)"
        raise WrongRequest(f"--evaluate {given} is {what}: {what_is_one()}")
    return fetched(given, on_hub["repo"], on_hub["folder"] or ".")


def fetched(given: str, repo: str, folder: str) -> tuple[Path, str]:
    """The files of an SAE in a folder of a hub repository, in the cache; and the commit."""
    from sae_separation import hub

    revision = hub.revision(repo)
    there = set(hub.files(repo, revision))
    for names in FORMATS.values():
        wanted = [(Path(folder) / name).as_posix() for name in names]
        if there.issuperset(wanted):
            beside = (Path(folder).parent / "config.json").as_posix()  # sparsify's: which LM, which text
            more = [beside] if folder != "." and beside in there else []
            return hub.fetch(repo, [*wanted, *more], revision, "model")[0].parent, revision
    weights = tuple(weights for _, weights in FORMATS.values())
    inside = sorted(str(Path(name).parent) for name in there if name.endswith(weights))
    some = f"; {', '.join(f'{repo}/{name}' for name in inside[:5])} hold one" if inside else ""
    raise WrongRequest(f"--evaluate {given} holds no SAE: {what_is_one()}{some}")


# ---- what its settings say


def layer_of(hook: str) -> int | None:
    """The layer (from 0) whose output a hook is, in the words of TransformerLens, transformers or
    dictionary_learning; None for any other place."""
    forms = (
        r"blocks\.(?P<n>\d+)\.hook_resid_(?P<where>post|pre)",
        r"resid_(?P<where>post|pre)_layer_(?P<n>\d+)",
        r"(?:\w+\.)*(?:layers|h|blocks)[._](?P<n>\d+)(?P<where>)",
    )
    found = next((m for form in forms if (m := re.fullmatch(form, hook))), None)
    if found is None:
        return None
    layer = int(found["n"]) - (found["where"] == "pre")
    return layer if layer >= 0 else None


def said_by_sae_lens(settings: dict, folder: Path) -> dict:
    """cfg.json of SAELens: since 6.0 what concerns the LM is in `metadata`."""
    about = settings | (settings.get("metadata") or {})
    facts = {"tokens_trained": "training_tokens", "l1_coefficient": "l1_coefficient"}
    return {
        "lm": about.get("model_name") or "",
        "hook": about.get("hook_name") or about.get("hook_point") or "",
        "d_in": int(settings["d_in"]),
        "d_sae": int(settings["d_sae"]),
        "known": {ours: about[theirs] for ours, theirs in facts.items() if about.get(theirs) is not None},
    }


def said_by_dictionary_learning(settings: dict, folder: Path) -> dict:
    """config.json of dictionary_learning's trainSAE: the trainer's settings, and the buffer's if it has
    any."""
    trainer, buffer = settings["trainer"], settings.get("buffer") or {}
    hook = trainer.get("submodule_name") or f"resid_post_layer_{trainer['layer']}"
    known = (
        {"tokens_trained": trainer["steps"] * buffer["out_batch_size"]} if "out_batch_size" in buffer else {}
    )
    known |= {"l1_coefficient": trainer["l1_penalty"]} if "l1_penalty" in trainer else {}
    return {
        "lm": trainer.get("lm_name") or "",
        "hook": hook if buffer.get("io", "out") == "out" else f"the input of {hook}",
        "d_in": int(trainer["activation_dim"]),
        "d_sae": int(trainer["dict_size"]),
        "known": known,
    }


def said_by_sparsify(settings: dict, folder: Path) -> dict:
    """cfg.json of sparsify; the folder is named after the hook, and the LM stands in the run's config.json
    beside it."""
    beside = folder.parent / "config.json"
    run = read_json(str(folder), beside) if beside.is_file() else {}
    d_in = int(settings["d_in"])
    return {
        "lm": run.get("model") or "",
        "hook": folder.resolve().name if re.search(r"\d", folder.resolve().name) else "",
        "d_in": d_in,
        "d_sae": int(settings.get("num_latents") or d_in * settings["expansion_factor"]),
        "known": {},
    }


SAID = {
    "SAELens": said_by_sae_lens,
    "dictionary_learning": said_by_dictionary_learning,
    "sparsify": said_by_sparsify,
}


# ---- what is asked of the run


def command(asked, request: R, given: Iterable[str], several: Iterable[str], plan: Iterable[str]) -> R:
    """The request of a command (config.Command, whose `saes` are found here) that evaluates SAEs in place of
    training; `given`: its options, `several`: those with several values. Raises WrongRequest, RunFailed."""
    if "arm" in given:
        raise WrongRequest(
            f"--arm {request.arm} is for training, and --evaluate trains nothing: leave it out"
        )
    if several := " ".join(f"--{name}" for name in several):
        raise WrongRequest(f"--evaluate makes one run, and {several} has several values: give one")
    if len(asked.out_dir) != 1 or not asked.out_dir[0] or Path(asked.out_dir[0]).name in plan:
        said = " ".join(asked.out_dir) or "nothing"
        what = "--evaluate takes one --out_dir, which is no run of the plan"
        raise WrongRequest(f"{what}, and it is {said}: give for example --out_dir=mine/theirs")
    seeds = request.seeds if "seeds" in given else tuple(range(len(asked.evaluate)))
    if len(seeds) != len(asked.evaluate):
        numbers = f"{len(asked.evaluate)} SAEs, and --seeds {len(seeds)} numbers for them"
        raise WrongRequest(f"--evaluate gives {numbers}: give as many, or leave --seeds out")
    asked.saes = find(asked.evaluate)
    return asked_for(asked.saes, replace(request, arm=ARM, seeds=seeds))


def asked_for(sources: Sequence[Source], request: R) -> R:
    """The request of a run that evaluates these SAEs: the layer and, where none is given, the LM that they
    name; nothing is asked of training. Raises WrongRequest for what does not fit."""
    first = sources[0]
    for source in sources:
        refuse_other_streams(source)
        for name in ("layer", "lm", "d_in", "d_sae"):
            if getattr(source, name) != getattr(first, name):
                differs = f"{name} {getattr(source, name)}, of {first.given} {getattr(first, name)}"
                raise source.refuse(f"{differs}: SAEs of one run are alike; give each a run of its own")
    layer = first.layer if first.hook else request.layer
    if layer is None:
        raise first.refuse("nothing says which layer it reads: give --layer, counted from 0")
    if request.layer not in (None, layer):
        why = f"it reads {first.hook}, the output of layer {layer}"
        raise first.refuse(f"{why}, and --layer is {request.layer}: leave --layer out")
    return replace(request, layer=layer, d_sae=first.d_sae, target_l0=0.0, **lm_of(first, request))


def refuse_other_streams(source: Source):
    """Raises WrongRequest for an SAE that does not read the residual stream behind a layer, as it is, token
    by token."""
    settings, about = source.settings, source.settings.get("metadata") or {}
    loads = (settings | about).get("model_from_pretrained_kwargs") or {}
    architecture = str(settings.get("architecture", ""))
    remedy = "give an SAE of the residual stream behind a layer"
    if source.hook and source.layer is None:
        raise source.refuse(f"it reads {source.hook}, which is no layer's output: {remedy}")
    if (settings | about).get("hook_head_index") is not None:
        raise source.refuse(f"it reads one attention head: {remedy}")
    if "transcoder" in architecture or settings.get("transcode"):
        raise source.refuse(f"it is a transcoder, whose output is not its input: {remedy}")
    if architecture == "temporal":
        raise source.refuse("it reads whole sequences, and interventions act on tokens: give another SAE")
    if loads.get("center_writing_weights"):
        why = "it reads the stream of an LM whose weights TransformerLens centred (center_writing_weights)"
        raise source.refuse(f"{why}, which transformers' LM is not: give another SAE")
    if settings.get("normalize_activations") not in (None, False, "none", "layer_norm"):
        why = f"its input is normalised ({settings['normalize_activations']}) by what its files do not hold"
        raise source.refuse(f"{why}: fold it into the weights with SAELens, and save it anew")


def lm_of(source: Source, request: DataConfig) -> dict[str, str]:
    """The testbed or LM that an SAE names, where the command names none. Raises WrongRequest."""
    if request.lm or request.testbed != "auto":
        return {}
    of_lm = {Path(spec.lm).name: name for name, spec in SPECS.items() if spec.lm}
    name = source.lm if source.lm in SPECS else of_lm.get(Path(source.lm).name)
    if name and name != CUSTOM:
        return {"testbed": name}
    if "/" in source.lm:
        return {"lm": source.lm}
    what = f"the LM that it names ({source.lm}) is no hub name" if source.lm else "it names no LM"
    raise source.refuse(f"{what}: give --lm (a folder or a hub name), or --testbed")


def refuse_others(folder: Path, sources: Sequence[Source]):
    """Raises WrongRequest where a run folder holds other SAEs than these."""
    made = read_run_json(folder / "config.json", {"requested", "config"}).get("saes", [])
    if made and [sae["sha256"] for sae in made] != [source.described()["sha256"] for source in sources]:
        said = ", ".join(sae["given"] for sae in made)
        remedy = "name another folder, or --overwrite it"
        raise WrongRequest(f"--out_dir {folder} holds a run of other SAEs ({said}, by checksum); {remedy}")


# ---- its weights


def read(source: Source) -> Any:
    """The SAE as SAELens holds it (float32, on the CPU), with unit decoder rows where that changes nothing,
    as SAEBench reads any. Raises WrongRequest for files that are not what its settings say."""
    from safetensors import SafetensorError

    try:
        sae = READ[source.format](source)
        shape, said = tuple(sae.W_dec.shape), (source.d_sae, source.d_in)
        if shape != said:
            raise ValueError(f"W_dec is {list(shape)}, and by {source.settings_file.name} {list(said)}")
    except pickle.UnpicklingError as error:
        why = f"{source.weights_file} holds more than tensors, and no code of others is run"
        raise source.refuse(f"{why}: save its state_dict alone") from error
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, OSError, SafetensorError) as error:
        raise source.refuse(f"{source.weights_file} cannot be read as such ({one_line(error)})") from error
    if wrong := [name for name, t in sae.state_dict().items() if not t.isfinite().all()]:
        raise source.refuse(f"{source.weights_file}: {wrong[0]} holds numbers that are not finite")
    with_unit_rows(sae)
    return sae.requires_grad_(False)


def read_for(testbed, source: Source) -> Any:
    """`read`, of an SAE that is as wide as the LM's stream. Raises WrongRequest."""
    if source.d_in != testbed.d_in:
        why = f"its d_in is {source.d_in}, and the stream of {testbed.defaults['lm']} is {testbed.d_in} wide"
        raise source.refuse(f"{why}: give --lm or --testbed that it was trained on")
    return read(source)


def doubts(source: Source, sae, testbed) -> list[str]:
    """Warnings that come with an SAE of others."""
    messages = []
    unknown = [name for name in OF_TRAINING if name not in source.known]
    messages.append(f"training: {', '.join(unknown)} are null: the SAE's files do not say them")
    said, there = Path(source.lm).name, {testbed.name, Path(testbed.describe.get("lm", "")).name}
    if said not in ("", CUSTOM, *there):
        messages.append(f"the SAE was trained on {source.lm}, and is evaluated on {testbed.defaults['lm']}")
    if not rows_are_unit(sae.W_dec):
        messages.append("the SAE's decoder rows are not unit, so its features differ in scale")
    return messages


def rows_are_unit(W_dec) -> bool:
    """As SAEBench checks it."""
    return bool(((W_dec.norm(dim=1) - 1).abs() <= 2e-5).all())


def with_unit_rows(sae):
    """Fold the norms of the decoder's rows into the features, unless rows are unit (then every bit stays), or
    features compete by their size."""
    if not rows_are_unit(sae.W_dec):
        with contextlib.suppress(NotImplementedError):
            sae.fold_W_dec_norm()


def by_sae_lens(source: Source):
    from sae_lens import SAE

    known = source.settings.get("architecture", "standard")
    try:
        return SAE.load_from_disk(source.settings_file.parent, device="cpu", dtype="float32")
    except KeyError as error:
        if error.args != (known,):
            raise
        why = f"SAELens loads no architecture {known!r}"
        raise source.refuse(f"{why}: save it with its save_inference_model") from error


def by_dictionary_learning(source: Source):
    """By the classes of dictionary_learning/dictionary.py and trainers/*top_k.py."""
    import torch

    from sae_separation.export import build

    with warnings.catch_warnings():  # torch's, on a pickle that it then refuses
        warnings.simplefilter("ignore")
        state = torch.load(source.weights_file, map_location="cpu", weights_only=True)
    kind = source.settings["trainer"]["dict_class"]
    linear = "encoder.weight" in state
    weights = {
        "W_enc": state["encoder.weight"].T if linear else state["W_enc"],
        "W_dec": state["decoder.weight"].T if linear else state["W_dec"],
    }
    if kind == "AutoEncoder":
        weights |= {"b_enc": state["encoder.bias"], "b_dec": state["bias"]}
        return build("standard", weights)
    if kind == "AutoEncoderNew":
        weights |= {"b_enc": state["encoder.bias"], "b_dec": state["decoder.bias"]}
        return build("standard", weights, apply_b_dec_to_input=False)
    if kind == "GatedAutoEncoder":
        biases = {"b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
        return build("gated", weights | {ours: state[theirs] for ours, theirs in biases.items()})
    if kind not in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        raise ValueError(f"its dict_class is {kind}")
    weights |= {"b_enc": state["encoder.bias" if linear else "b_enc"], "b_dec": state["b_dec"]}
    if kind == "AutoEncoderTopK":
        return build("topk", weights, k=int(state["k"] if "k" in state else source.settings["trainer"]["k"]))
    weights["threshold"] = state["threshold"].expand(source.d_sae)
    return build("jumprelu", weights, apply_b_dec_to_input=kind != "JumpReluAutoEncoder")


def by_sparsify(source: Source):
    """By sparsify/sparse_coder.py. (SAELens' own loader takes W_dec for its transpose and b_dec for left out
    where rows are normalised.)"""
    from safetensors.torch import load_file

    from sae_separation.export import build

    settings, state = source.settings, load_file(source.weights_file)
    if settings.get("activation", "topk") != "topk" or settings.get("signed") or "W_skip" in state:
        raise ValueError("only top-k without a skip connection has a form in SAELens")
    weights = {"W_enc": state["encoder.weight"].T, "b_enc": state["encoder.bias"]}
    weights |= {name: state[name] for name in ("W_dec", "b_dec")}
    return build("topk", weights, k=settings["k"])


READ = {"SAELens": by_sae_lens, "dictionary_learning": by_dictionary_learning, "sparsify": by_sparsify}
