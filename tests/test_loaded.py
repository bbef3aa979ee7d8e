"""SAEs that were trained elsewhere: tiny ones in the formats of SAELens, dictionary_learning and sparsify,
against the formulas of their libraries, and against the libraries themselves where they are installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from loopback_hub import Hub
from safetensors.torch import save_file

from experiment import Request
from sae_separation import loaded
from sae_separation.config import Command
from sae_separation.errors import WrongRequest

D, F, K = 8, 24, 4
LM = "EleutherAI/pythia-70m-deduped"


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def x() -> torch.Tensor:
    return 2 * numbers(2, 40, D, seed=9)  # [row, pos, D], as the LM's stream


# ---- dictionary_learning


LINEAR = {
    "encoder.weight": numbers(F, D, seed=1),
    "encoder.bias": numbers(F, seed=2) / 4,
    "decoder.weight": numbers(D, F, seed=3),  # rows of W_dec are not unit
}
PLAIN = {
    "W_enc": numbers(D, F, seed=1),
    "b_enc": numbers(F, seed=2) / 4,
    "W_dec": torch.nn.functional.normalize(numbers(F, D, seed=3), dim=1),
    "b_dec": numbers(D, seed=4),
}
UNIT = LINEAR | {"decoder.weight": torch.nn.functional.normalize(LINEAR["decoder.weight"], dim=0)}
TOP_K = {"b_dec": numbers(D, seed=4), "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(1.5)}
STATES = {
    "AutoEncoder": LINEAR | {"bias": numbers(D, seed=4)},
    "AutoEncoderNew": LINEAR | {"decoder.bias": numbers(D, seed=4)},
    "GatedAutoEncoder": {k: v for k, v in UNIT.items() if k != "encoder.bias"}
    | {
        "decoder_bias": numbers(D, seed=4),
        "r_mag": numbers(F, seed=5) / 4,
        "gate_bias": numbers(F, seed=6) / 4,
        "mag_bias": numbers(F, seed=7) / 4,
    },
    "AutoEncoderTopK": UNIT | TOP_K,
    "BatchTopKSAE": UNIT | TOP_K,
    "MatryoshkaBatchTopKSAE": PLAIN | TOP_K | {"group_sizes": torch.tensor([8, 16])},
    "JumpReluAutoEncoder": PLAIN | {"threshold": numbers(F, seed=8).abs()},
}


def dictionary(folder: Path, kind: str, **changes) -> Path:
    """As trainSAE saves it."""
    folder.mkdir(parents=True)
    torch.save(STATES[kind], folder / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "steps": 1000, "layer": 3, "k": K}
    trainer |= {"lm_name": LM, "submodule_name": "resid_post_layer_3", "l1_penalty": 0.05} | changes
    buffer = {"d_submodule": D, "io": "out", "ctx_len": 128, "out_batch_size": 2048, "device": "cuda:0"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}))
    return folder


def formula(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and reconstruction by dictionary_learning's definitions, written out."""
    s, at = STATES[kind], x()
    linear = "encoder.weight" in s
    W_enc, W_dec = (s["encoder.weight"].T, s["decoder.weight"].T) if linear else (s["W_enc"], s["W_dec"])
    bias = next(s[name] for name in ("bias", "decoder.bias", "decoder_bias", "b_dec") if name in s)
    centred = at if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else at - bias
    pre = centred @ W_enc
    if kind == "GatedAutoEncoder":
        opens = pre + s["gate_bias"] > 0
        f = opens * torch.relu(s["r_mag"].exp() * pre + s["mag_bias"])
    else:
        pre = pre + s["encoder.bias" if linear else "b_enc"]
        f = torch.relu(pre)
        if kind == "AutoEncoderTopK":
            f = f * (f >= f.topk(K, dim=-1).values[..., -1:])
        elif "threshold" in s:
            f = f * (pre > s["threshold"])
    return f, f @ W_dec + bias


def norms_of(kind: str) -> torch.Tensor:
    """Of the decoder's rows."""
    state = STATES[kind]
    return state["decoder.weight"].norm(dim=0) if "decoder.weight" in state else state["W_dec"].norm(dim=1)


def agree(sae, f: torch.Tensor, out: torch.Tensor, norms: torch.Tensor | None = None):
    """Both as they are; or features with the norms of the decoder's rows folded in."""
    ours = sae.encode(x())
    torch.testing.assert_close(ours, f if norms is None else f * norms, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.decode(ours), out, rtol=1e-4, atol=1e-4)
    assert 0 < (ours > 0).float().mean() < 1


@pytest.mark.parametrize("kind", STATES)
def test_dictionary_learnings_saes_are_read_as_it_defines_them(kind, tmp_path):
    source = loaded.describe(str(dictionary(tmp_path / "trainer_0", kind)))
    assert (source.format, source.lm, source.layer) == ("dictionary_learning", LM, 3)
    assert (source.d_in, source.d_sae) == (D, F)
    assert source.known == {"tokens_trained": 2_048_000, "l1_coefficient": 0.05}
    norms = (
        STATES[kind]["decoder.weight"].norm(dim=0) if STATES[kind].get("decoder.weight") is not None else None
    )
    sae = loaded.read(source)
    agree(sae, *formula(kind), norms)
    assert loaded.rows_are_unit(sae.W_dec)


@pytest.mark.parametrize("kind", STATES)
def test_dictionary_learning_itself_gives_the_same(kind, tmp_path):
    library = pytest.importorskip("dictionary_learning.utils")
    if kind == "AutoEncoder":  # which it normalises as it is read
        pytest.skip("its own normalisation is compared by the formula")
    folder = dictionary(tmp_path / "trainer_0", kind)
    theirs, _ = library.load_dictionary(str(folder), "cpu")
    f = theirs.encode(x().flatten(0, 1)).detach()
    out = theirs.decode(f).detach()
    norms = (
        STATES[kind]["decoder.weight"].norm(dim=0) if STATES[kind].get("decoder.weight") is not None else None
    )
    agree(loaded.read(loaded.describe(str(folder))), f.view(2, 40, F), out.view(2, 40, D), norms)


def test_a_pickle_that_holds_more_than_tensors_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = dictionary(tmp_path / "trainer_0", "AutoEncoder")
    torch.save({"encoder.weight": Bomb()}, folder / "ae.pt")
    with pytest.raises(WrongRequest, match="holds more than tensors"):
        loaded.read(loaded.describe(str(folder)))
    assert not (tmp_path / "ran").exists()


# ---- sparsify


def sparsify_folder(folder: Path, normalised: bool = True, **changes) -> Path:
    """As SparseCoder.save_to_disk saves it, in a run's folder."""
    folder.mkdir(parents=True)
    W_dec = numbers(F, D, seed=3)
    weights = {
        "encoder.weight": numbers(F, D, seed=1),
        "encoder.bias": numbers(F, seed=2) / 4,
        "W_dec": torch.nn.functional.normalize(W_dec, dim=1) if normalised else W_dec,
        "b_dec": numbers(D, seed=4),
    }
    save_file(weights, folder / "sae.safetensors")
    settings = {"activation": "topk", "expansion_factor": F // D, "normalize_decoder": normalised}
    settings |= {"num_latents": 0, "k": K, "multi_topk": False, "skip_connection": False, "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(settings | {"d_in": D} | changes))
    (folder.parent / "config.json").write_text(json.dumps({"model": LM, "ctx_len": 2048}))
    return folder


@pytest.mark.parametrize("normalised", [True, False])
def test_sparsifys_saes_are_read_as_it_defines_them(normalised, tmp_path):
    folder = sparsify_folder(tmp_path / "run/gpt_neox.layers.3", normalised)
    source = loaded.describe(str(folder))
    assert (source.format, source.lm, source.layer, source.d_sae) == ("sparsify", LM, 3, F)
    from safetensors.torch import load_file

    s = load_file(folder / "sae.safetensors")
    f = torch.relu((x() - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"])
    f = f * (f >= f.topk(K, dim=-1).values[..., -1:])
    sae = loaded.read(source)
    agree(sae, f, f @ s["W_dec"] + s["b_dec"])
    testbed = SimpleNamespace(name="x", describe={"lm": LM}, defaults={"lm": LM})
    messages = loaded.doubts(source, sae, testbed)
    assert any("rows are not unit" in text for text in messages) is not normalised


def test_sparsify_itself_gives_the_same(tmp_path):
    library = pytest.importorskip("sparsify")
    folder = sparsify_folder(tmp_path / "run/layers.3")
    theirs = library.SparseCoder.load_from_disk(folder)
    at = x().flatten(0, 1)
    values, places, _ = theirs.encode(at)
    f = torch.zeros(len(at), F).scatter_(1, places, values.detach())
    decode = pytest.importorskip("sparsify.utils").eager_decode  # theirs.decode, without a GPU's kernel
    out = (decode(places, values, theirs.W_dec.mT) + theirs.b_dec).detach()
    agree(loaded.read(loaded.describe(str(folder))), f.view(2, 40, F), out.view(2, 40, D))


# ---- SAELens


def sae_lens_folder(folder: Path, architecture: str, **metadata) -> Path:
    from sae_separation.export import build, save

    weights = dict(PLAIN)
    if architecture == "gated":
        weights.pop("b_enc")
        weights |= {name: STATES["GatedAutoEncoder"]["r_mag"] for name in ("r_mag", "b_gate", "b_mag")}
    if architecture == "jumprelu":
        weights["threshold"] = numbers(F, seed=8).abs()
    if architecture == "matching_pursuit":
        weights.pop("b_enc")
        weights.pop("W_enc")
    how = {"k": K} if "topk" in architecture else {}
    sae = build(architecture, weights, **how)
    save(sae, folder, {"model_name": LM, "hook_name": "blocks.3.hook_resid_post"} | metadata)
    return folder


@pytest.mark.parametrize(
    "architecture", ["standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit"]
)
def test_saelens_saes_of_every_architecture_are_read_bit_by_bit(architecture, tmp_path):
    from sae_lens import SAE

    source = loaded.describe(str(sae_lens_folder(tmp_path / "sae", architecture)))
    assert (source.format, source.lm, source.layer, source.d_sae) == ("SAELens", LM, 3, F)
    sae, theirs = loaded.read(source), SAE.load_from_disk(tmp_path / "sae")
    assert torch.equal(sae.encode(x()), theirs.encode(x()))
    assert torch.equal(sae(x()), theirs(x()))


def test_what_saelens_wrote_before_6_is_read(tmp_path):
    (tmp_path / "sae").mkdir()
    save_file(PLAIN, tmp_path / "sae/sae_weights.safetensors")
    settings = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "model_name": "gemma-2-2b"}
    settings |= {"hook_point": "blocks.6.hook_resid_pre", "activation_fn_str": "relu", "training_tokens": 7}
    (tmp_path / "sae/cfg.json").write_text(json.dumps(settings))
    source = loaded.describe(str(tmp_path / "sae"))
    assert (source.lm, source.layer, source.known) == ("gemma-2-2b", 5, {"tokens_trained": 7})
    pre = (x() - PLAIN["b_dec"]) @ PLAIN["W_enc"] + PLAIN["b_enc"]
    agree(loaded.read(source), torch.relu(pre), torch.relu(pre) @ PLAIN["W_dec"] + PLAIN["b_dec"])


# ---- what is asked for, and what is refused


@pytest.mark.parametrize(
    "hook, layer",
    [
        ("blocks.3.hook_resid_post", 3),
        ("blocks.3.hook_resid_pre", 2),
        ("blocks.0.hook_resid_pre", None),
        ("blocks.3.hook_mlp_out", None),
        ("blocks.3.attn.hook_z", None),
        ("gpt_neox.layers.3", 3),
        ("model.layers.11", 11),
        ("transformer.h.2", 2),
        ("layers.7", 7),
        ("layers.7.mlp", None),
        ("embed_tokens", None),
        ("resid_post_layer_8", 8),
        ("resid_pre_layer_8", 7),
        ("mlp_out_layer_8", None),
        ("the input of resid_post_layer_8", None),
    ],
)
def test_hooks_in_the_words_of_every_library_mean_a_layer(hook, layer):
    assert loaded.layer_of(hook) == layer


def asked(folder: Path | str, **request) -> Request:
    return loaded.asked_for(loaded.find([str(folder)]), Request(**request))


def test_the_lm_of_a_testbed_is_that_testbed(tmp_path):
    request = asked(dictionary(tmp_path / "a", "AutoEncoder"))
    assert (request.testbed, request.lm, request.layer) == ("pythia-70m", "", 3)
    request = asked(dictionary(tmp_path / "b", "AutoEncoder", lm_name="owner/other"))
    assert (request.testbed, request.lm) == ("auto", "owner/other")
    request = asked(dictionary(tmp_path / "c", "AutoEncoder", lm_name="alias"), lm="my/lm")
    assert (request.testbed, request.lm, request.layer) == ("auto", "my/lm", 3)


REFUSED = {
    "reads blocks.3.hook_mlp_out, which is no layer's output": {"hook_name": "blocks.3.hook_mlp_out"},
    "reads one attention head": {"hook_head_index": 2},
    "weights TransformerLens centred": {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
    r"the LM that it names \(alias\) is no hub name": {"model_name": "alias"},
    "it names no LM: give --lm": {"model_name": ""},
    "nothing says which layer it reads: give --layer": {"hook_name": ""},
}


@pytest.mark.parametrize("says", REFUSED)
def test_saes_that_do_not_fit_are_refused_in_one_line(says, tmp_path):
    folder = sae_lens_folder(tmp_path / "sae", "standard", **REFUSED[says])
    with pytest.raises(WrongRequest, match=says) as refused:
        asked(folder)
    assert "\n" not in str(refused.value)


def changed(folder: Path, **changes) -> Path:
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))
    return folder


def test_normalised_input_and_transcoders_are_refused(tmp_path):
    folder = changed(
        sae_lens_folder(tmp_path / "a", "topk"), normalize_activations="expected_average_only_in"
    )
    with pytest.raises(WrongRequest, match="is normalised .expected_average_only_in. by what its files"):
        asked(folder)
    for folder in (
        changed(sae_lens_folder(tmp_path / "b", "standard"), architecture="skip_transcoder"),
        sparsify_folder(tmp_path / "layers.2", transcode=True),
    ):
        with pytest.raises(WrongRequest, match="it is a transcoder"):
            asked(folder)


def test_a_layer_that_contradicts_the_sae_is_refused(tmp_path):
    folder = sae_lens_folder(tmp_path / "sae", "standard")
    assert asked(folder, layer=3).layer == 3
    with pytest.raises(WrongRequest, match="the output of layer 3, and --layer is 2: leave --layer out"):
        asked(folder, layer=2)


def test_an_sae_that_is_not_as_its_settings_say_is_refused(tmp_path):
    folder = changed(sae_lens_folder(tmp_path / "a", "standard"), d_sae=F + 1)
    with pytest.raises(WrongRequest, match="cannot be read as such"):
        loaded.read(loaded.describe(str(folder)))
    folder = sae_lens_folder(tmp_path / "b", "standard")
    save_file(PLAIN | {"b_enc": PLAIN["b_enc"] / 0}, folder / "sae_weights.safetensors")
    with pytest.raises(WrongRequest, match="b_enc holds numbers that are not finite"):
        loaded.read(loaded.describe(str(folder)))
    with pytest.raises(WrongRequest, match="SAELens loads no architecture 'batchtopk'"):
        loaded.read(loaded.describe(str(changed(folder, architecture="batchtopk"))))
    testbed = SimpleNamespace(d_in=16, defaults={"lm": "wide"})
    with pytest.raises(WrongRequest, match="its d_in is 8, and the stream of wide is 16 wide"):
        loaded.read_for(testbed, loaded.describe(str(sae_lens_folder(tmp_path / "c", "topk"))))


@pytest.mark.parametrize(
    "command, says",
    [
        (Command(evaluate=("a",), out_dir=("x", "y")), "--evaluate takes one --out_dir"),
        (Command(evaluate=("a",), out_dir=("run_3",)), "which is no run of the plan"),
        (Command(evaluate=("a", "b"), out_dir=("x",)), "2 SAEs, and --seeds 1 numbers"),
        (
            Command(evaluate=(str(ROOT / "docs"),), out_dir=("x",)),
            "docs holds no SAE: give the folder that holds",
        ),
        (Command(evaluate=("tests/none",), out_dir=("x",)), "is neither a folder here nor on the hub"),
        (Command(evaluate=("./none",), out_dir=("x",)), "is neither a folder here nor on the hub"),
    ],
)
def test_commands_that_make_no_sense_are_refused_in_one_line(command, says):
    request = Request(arm="loaded", seeds=(4,))
    given = {"seeds"} if len(command.evaluate) == 2 else set()
    with pytest.raises(WrongRequest, match=says):
        loaded.command(command, request, given, [], {"run_3": {}})


ON_HUB = """
from sae_separation import loaded
source, = loaded.find(["owner/saes/layers.3"])
print(source.lm, source.layer, source.revision, source.weights_file.stat().st_size)
loaded.find(["owner/saes"])
"""


@pytest.mark.slow
def test_an_sae_on_the_hub_is_fetched_and_others_there_are_named(tmp_path):
    folder = sparsify_folder(tmp_path / "saes/layers.3")
    files = {f"layers.3/{p.name}": p.read_bytes() for p in folder.iterdir()}
    with Hub() as hub:
        repo = hub.add("owner/saes", files | {"config.json": (tmp_path / "saes/config.json").read_bytes()})
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(
            [sys.executable, "-c", ON_HUB], cwd=ROOT, env=environment, capture_output=True, text=True
        )
    size = (folder / "sae.safetensors").stat().st_size
    assert done.stdout.strip() == f"{LM} 3 {repo.commit} {size}"
    assert "owner/saes holds no SAE" in done.stderr and "owner/saes/layers.3 hold one" in done.stderr
