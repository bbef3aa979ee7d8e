"""A run on the hub (a stand-in): what is pushed, what is refused, and that SAELens reads it back."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from loopback_hub import TOKEN, Hub
from sae_lens import SAE

import experiment
from sae_separation import card, push, results, run_folder
from sae_separation.errors import WrongRequest
from sae_separation.export import export
from sae_separation.files import seal, write_json

NAME = "owner/saes"
READ_ONLY = "hf_AnotherTokenThatMayNotWrite0123456"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The committed run_6 with small SAEs, which are not committed, in the place of its own."""
    folder = tmp_path_factory.mktemp("runs") / "run_6"
    shutil.copytree(ROOT / "run_6", folder)
    for seed in (0, 1, 2):
        export(
            experiment.OrthogonalSAE(128, 16, seed),
            run_folder.sae_folder(folder, seed),
            {"model_name": "micro"},
        )
        path = run_folder.record_of(folder, seed)
        record = results.read_record(path)
        assert record
        write_json(path, seal(record | {"files": run_folder.files_of(run_folder.sae_folder(folder, seed))}))
    return folder


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub
        assert hub.leaks == [], "a token went to the storage host"


def pushed(hub: Hub, home: Path, *args) -> subprocess.CompletedProcess:
    """The real command; the token is not in what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "sae_separation.push", *map(str, args)],
        cwd=ROOT,
        env=hub.environment(home, HF_TOKEN=TOKEN),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert TOKEN not in done.stdout + done.stderr
    return done


def there(hub: Hub) -> dict[str, bytes]:
    return {path: file.read(0, file.size) for path, file in hub.repos["model", NAME].files.items()}


def read_back(hub: Hub, home: Path, monkeypatch, sae_id: str) -> SAE:
    """As the model card says, in this process: huggingface_hub takes where the hub is as it is imported."""
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_CACHE", str(home / "read")),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return SAE.from_pretrained(NAME, sae_id)


@pytest.mark.slow
def test_a_run_is_pushed_privately_read_back_by_saelens_and_renewed(run, hub, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    hub.fail("503", "/", times=1, methods=("PUT",))  # its first upload to storage
    done = pushed(hub, tmp_path, run, NAME)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["model", NAME]
    assert done.stdout == (f"{run}: 3 SAEs pushed to {hub.url}/{NAME} (private), commit {repo.commit[:12]}\n")
    files = there(hub)
    details = {f"eval/{p.name}" for p in (ROOT / "run_6/eval").iterdir() if "metrics" not in p.name}
    saes = {f"sae_seed{seed}/{name}" for seed in (0, 1, 2) for name in run_folder.SAE_FILES}
    assert repo.private and set(files) == {"README.md", "final_info.json", *details, *saes}
    for path in (*details, *saes):
        assert files[path] == (run / path).read_bytes()
    assert json.loads(files["final_info.json"]) == json.loads((run / "final_info.json").read_bytes())
    assert files["README.md"].decode() == card.model_card(NAME, run, [0, 1, 2])
    assert not [path for path, content in files.items() if TOKEN.encode() in content]
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    with monkeypatch.context() as m:
        sae, written = read_back(hub, tmp_path, m, "sae_seed1"), SAE.load_from_disk(run / "sae_seed1")
    x = torch.randn(5, 128)
    assert sae.W_dec.shape == (16, 128) and torch.equal(sae.encode(x), written.encode(x))
    assert sae.state_dict().keys() == written.state_dict().keys()
    assert all(torch.equal(t, written.state_dict()[name]) for name, t in sae.state_dict().items())

    assert pushed(hub, tmp_path, run, NAME).returncode == 0  # again: nothing is new
    assert there(hub) == files and hub.repos["model", NAME].commit == repo.commit
    done = pushed(hub, tmp_path, run, NAME, "--seed", 1, "--public")
    assert done.returncode == 0 and "1 SAE pushed" in done.stdout and "for everyone to read" in done.stdout
    assert not hub.repos["model", NAME].private
    assert {path.partition("/")[0] for path in there(hub)} == {
        "README.md",
        "final_info.json",
        "eval",
        "sae_seed1",
    }
    done = pushed(hub, tmp_path, run, NAME)
    assert done.returncode == 2 and f"error: {NAME} is public: give --public to push there" in done.stderr


SEVERAL = """
import os, sys
from sae_separation import push
for token, name in (pair.split("=") for pair in sys.argv[2:]):
    os.environ["HF_TOKEN"] = token
    print(push.main([sys.argv[1], name, "--public"]), file=sys.stderr)
"""


@pytest.mark.slow
def test_what_may_not_be_written_is_refused_in_a_line_and_left_alone(run, hub, tmp_path):
    hub.add(NAME, {"model.safetensors": b"of others", "README.md": b"theirs"})
    asked = [f"{TOKEN}={NAME}", f"={NAME}", f"{READ_ONLY}=others/new"]
    argv = [sys.executable, "-c", SEVERAL, str(run), *asked]
    env = hub.environment(tmp_path)
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    lines = done.stderr.splitlines()
    assert len(lines) == 6 and lines[1::2] == ["2"] * 3
    assert lines[0].startswith(
        f"error: {NAME} holds model.safetensors, which this program did not push: noth"
    )
    assert lines[2].startswith(f"error: {NAME}: no token of the hub is set; log in with one that may write")
    assert lines[4].startswith("error: others/new: the token in use may not write there (403); log in with")
    assert TOKEN not in done.stderr + done.stdout and READ_ONLY not in done.stderr + done.stdout
    assert [name for _, name in hub.repos] == [NAME]
    assert there(hub) == {"model.safetensors": b"of others", "README.md": b"theirs"}


def test_a_folder_that_is_no_complete_run_with_saes_is_refused(run, tmp_path, capsys):
    def refused(says: str, folder: Path, *seeds: int):
        with pytest.raises(WrongRequest, match=says):
            push.seeds_to_push(folder, seeds)

    assert push.seeds_to_push(run, []) == [0, 1, 2] and push.seeds_to_push(run, [2, 0]) == [0, 2]
    refused("holds no run of this program: give a folder", tmp_path)
    refused("run_15 holds no SAE that was trained here: --arm mlp_gate trains none", ROOT / "run_15")
    refused("run_6 is complete, and its SAEs are not there: .*sae_seed0/cfg.json is missing", ROOT / "run_6")
    refused("--seed 3: the seeds of .*run_6 are 0 1 2", run, 0, 3)
    shutil.copytree(run, tmp_path / "run_6")
    (tmp_path / "run_6/warnings.json").write_text("[]\n")
    refused("warnings.json is not as it was written: .*a run is pushed as it was written", tmp_path / "run_6")
    (tmp_path / "run_6/final_info.json").unlink()
    refused("run_6 is not complete: .*final_info.json is not there; the command", tmp_path / "run_6")
    assert push.main(["run_6", "no_owner"]) == 2
    assert capsys.readouterr().err == "error: no_owner cannot be a repository: give owner/name\n"


COMMITTED = [path.parent for path in ROOT.glob("run_*/final_info.json")]
WITH_SAES = [
    path
    for path in COMMITTED
    if "final_l0" in json.loads((path / "final_info.json").read_text())["training"]["means"]
]


@pytest.mark.parametrize("folder", WITH_SAES, ids=[path.name for path in WITH_SAES])
def test_the_card_has_the_numbers_and_the_command_that_asks_for_the_same_run(folder, tmp_path, monkeypatch):
    text = card.model_card(NAME, folder, [0, 1, 2])
    made, info = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "final_info"))
    means, stderrs = (info["core"][kind]["explained_variance"] for kind in ("means", "stderrs"))
    quoted = re.search(r"`explained_variance` \| (\S+) ± (\S+) \|", text)
    assert quoted and float(quoted[1]) == pytest.approx(means, abs=stderrs)
    assert float(quoted[2]) == pytest.approx(stderrs, rel=0.06)
    command = next(line.strip() for line in text.splitlines() if line.startswith("    python experiment.py"))
    monkeypatch.chdir(tmp_path)
    asked, (request,) = experiment.parse_command(shlex.split(command)[2:])
    wanted = json.loads(json.dumps(vars(request)))
    known = {name: value for name, value in made["requested"].items() if name in wanted}
    assert {name: wanted[name] for name in known} == known
    assert r"largest \|cosine\| with" in text  # in a table
    assert set(asked.evals) == {row.name for row in push.run_folder.evals.ROWS if row.section in info}


def test_the_card_reads_well_without_seeds_evaluations_or_a_hub(run, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(run, folder)
    made, info = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "final_info"))
    revision = {"source": "EleutherAI/pythia-70m-deduped", "revision": "0" * 40}
    made["testbed"]["sources"]["lm"], made["config"]["lm"] = revision, revision["source"]
    made["config"] |= {"arm": "a new one", "testbed": "custom", "forget_text": ["/home/me/bio/*.jsonl"]}
    made["requested"] |= {
        "forget_text": ["/home/me/bio/*.jsonl"],
        "layer_norm": True,
        "lm": revision["source"],
        "layer": 3,
        "seeds": [4],
        "alpha": 0.3,
    }
    (folder / "config.json").write_text(json.dumps(made))
    (folder / "final_info.json").write_text(json.dumps({"training": info["training"]}))
    (folder / "warnings.json").write_text("[]")
    text = card.model_card(NAME, folder, [4])
    assert "base_model: EleutherAI/pythia-70m-deduped" in text.split("---")[1]
    assert "One sparse autoencoder (SAE) of the residual stream" in text and "Nothing was evaluated." in text
    assert "the domain to forget (`*.jsonl`)" in text and "/home" not in text and "No warning came" in text
    assert "    python experiment.py --out_dir=mine --lm=EleutherAI/pythia-70m-deduped --layer=3 " in text
    assert " --forget_text '*.jsonl' " in text
    assert "--seeds 4" in text and "--alpha=0.3" in text and "--layer_norm" in text


def test_the_card_knows_what_every_option_of_an_arm_is_where_nothing_is_asked_for():
    for name, arm in experiment.ARMS.items():
        assert arm.options.keys() <= card.defaults().keys(), f"{name}: arms.OPTIONS lacks an option of it"


def test_where_a_person_keeps_files_is_cut_and_names_are_not():
    cut = {
        "/home/me/a/b.jsonl": "b.jsonl",
        "biology=~/q/asked.json#text": "biology=asked.json#text",
        "--forget_text /home/me/*.txt: 3 of 10/20": "--forget_text *.txt: 3 of 10/20",
    }
    kept = [
        "EleutherAI/pythia-70m",
        "cais/wmdp:wmdp-bio@test",
        "https://huggingface.co/a/b",
        "a/b/c.txt",
        3,
        None,
    ]
    assert card.without_folders({"all": [*cut, *kept]}) == {"all": [*cut.values(), *kept]}
    assert card.quoted(None, None) == "n/a" and card.quoted(180.0, 0.0) == "180"
    assert card.quoted(0.0722, 0.01786) == "0.072 ± 0.018" and card.quoted(10.56, 1.1) == "10.6 ± 1.1"
