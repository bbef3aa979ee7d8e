"""The hub's faults, through the real clients and a stand-in hub: what passes is cured, what stays ends in
one line."""

import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from loopback_hub import TOKEN, Hub

NAME, DATA, GATED = "owner/model", "owner/data", "owner/gated"
SMALL = {"config.json": b'{"a": 1}' * 1000}


CLIENT = """
import json, sys, time
from sae_separation import hub
from sae_separation.errors import RunFailed, WrongRequest
try:
    CODE
except (RunFailed, WrongRequest) as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2 if isinstance(e, WrongRequest) else 1)
"""


def client(hub: Hub, home: Path, code: str, **environment) -> subprocess.CompletedProcess:
    """Python code in a process of its own, ended as experiment.py ends."""
    whole = CLIENT.replace("CODE", "\n    ".join(code.strip().splitlines()))
    return subprocess.run(
        [sys.executable, "-c", whole],
        cwd=ROOT,
        env=hub.environment(home, **environment),
        capture_output=True,
        text=True,
        timeout=900,
    )


def large(seed: int, size: int = 300_000) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub
        assert hub.leaks == [], "a token went to the storage host"


def fetching(files, repo=NAME, kind="model") -> str:
    return (
        f"commit = hub.revision({repo!r}, {kind!r})\nfor path in hub.fetch({repo!r}, {list(files)!r}, commit,"
        f" {kind!r}):\n    print(path)"
    )


PIECES = (
    "hub.constants.DOWNLOAD_CHUNK_SIZE = 2**16  # small enough for a download of these files to have come"
    " some way\n"
)
PASSING = {  # file -> (fault, how often, extra, what its line on stderr says)
    "busy.json": ("503", 2, {}, "the hub answers 503"),
    "busy.safetensors": ("503", 2, {"methods": ("GET",)}, "the hub answers 503"),
    "limited.json": ("429", 1, {"retry_after": 1}, "the hub answers 429"),
    "silent.json": ("hang", 1, {}, "no answer within 2 s"),
    "silent.safetensors": ("hang", 1, {"methods": ("GET",)}, "no answer within 2 s"),
    "cut.json": ("cut", 1, {}, "broken off; going on at byte 131,072"),
    "cut.safetensors": ("cut", 3, {}, "broken off; going on at byte 131,072"),
    "deaf.safetensors": ("cut", 2, {"deaf": True}, "broken off; going on at byte 131,072"),
    "reset.safetensors": ("reset", 1, {}, "broken off; going on at byte 0"),
}


def test_faults_that_pass_are_cured_and_told(hub, tmp_path):
    files = {name: large(i) for i, name in enumerate(PASSING)}
    hub.add(NAME, files)
    hub.fail("503", f"/api/models/{NAME}")
    for name, (kind, times, extra, _) in PASSING.items():
        hub.fail(kind, name, times, **extra)
    done = client(hub, tmp_path, PIECES + fetching(files))
    assert done.returncode == 0, done.stderr
    assert all(fault.times == 0 for fault in hub.faults), hub.faults  # each did happen
    for path, content in zip(done.stdout.split(), files.values(), strict=True):
        assert open(path, "rb").read() == content
    lines = done.stderr.splitlines()
    assert all(line.startswith("hub: owner/model") for line in lines), done.stderr
    assert "hub: owner/model: the hub answers 503 (Service Unavailable); attempt 2 of 5 in 1 s" in lines
    for name, (_, times, _, told) in PASSING.items():
        mine = [line for line in lines if f"file {name}:" in line]
        assert len(mine) == times and told in mine[0], (name, mine)


CASES = {  # what is asked for -> (exit code, what its line says)
    "busy.json": (1, "the hub answers 503 (Service Unavailable), 3 times; run the same command again later"),
    "limited.json": (
        1,
        (
            "the hub answers 429 (Too Many Requests), 1 time; run the same command again in 3600 s, as the"
            " hub asks"
        ),
    ),
    "silent.json": (1, "no answer within 2 s, 3 times; run the same command again later"),
    "deaf.safetensors": (1, "broken off 4 times; run the same command again later"),
    "corrupt.safetensors": (1, "its SHA-256 is not the one that the hub names"),
    "missing.json": (2, "there is no such file; take one that https://huggingface.co/owner/model lists"),
}


@pytest.fixture(scope="module")
def lasting(tmp_path_factory):
    """Each lasting fault met once in one process with three attempts and three resumptions: the error
    lines, and the requests."""
    with Hub() as hub:
        files: dict[str, bytes | Path] = {
            name: large(i) for i, name in enumerate(CASES) if name != "missing.json"
        }
        hub.add(NAME, files)
        hub.fail("503", "busy.json", 99)
        hub.fail("429", "limited.json", 99, retry_after=3600)
        hub.fail("hang", "silent.json", 99)
        hub.fail("cut", "deaf.safetensors", 99, deaf=True)
        hub.fail("corrupt", "corrupt.safetensors", 1)
        code = f"""
{PIECES}hub.ATTEMPTS, hub.RESUMES = 3, 3
told, commit = {{}}, hub.revision("{NAME}")
def ask(name, *args):
    started = time.monotonic()
    try:
        told[name] = [0, str(hub.fetch(*args)[0])]
    except (RunFailed, WrongRequest) as e:
        told[name] = [2 if isinstance(e, WrongRequest) else 1, str(e)]
    told[name].append(time.monotonic() - started)
for name in {list(CASES)!r} + ["corrupt.safetensors again"]:
    ask(name, "{NAME}", [name.split()[0]], commit, "model")
ask("no repo", "owner/nothing", ["a"], "main", "model")
ask("no revision", "{NAME}", ["a"], "0" * 40, "model")
ask("no name", "not/a/name", ["a"], "main", "model")
print(json.dumps(told))
"""
        done = client(hub, tmp_path_factory.mktemp("home"), code)
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout), hub.asked, files


@pytest.mark.parametrize("name", CASES)
def test_a_fault_that_stays_ends_in_one_line(lasting, name):
    code, line, seconds = lasting[0][name]
    assert (code, "\n" in line) == (CASES[name][0], False)
    assert line.startswith(f"owner/model, file {name}: ") and CASES[name][1] in line, line
    assert seconds < 15


def test_faults_that_no_retry_cures_are_asked_for_once(lasting):
    told, asked, files = lasting
    assert sum(a.startswith("HEAD") and "missing.json" in a for a in asked) == 1
    assert sum("limited.json" in a for a in asked) == 1  # an hour is not waited for
    # damaged on the way: refused once, then, being out of the cache, taken anew by the next request
    assert sum(a.startswith("GET") and "corrupt.safetensors" in a for a in asked) == 2
    assert open(told["corrupt.safetensors again"][1], "rb").read() == files["corrupt.safetensors"]


def test_what_is_not_on_the_hub_is_a_wrong_request(lasting):
    told = lasting[0]
    assert told["no repo"][:2] == [
        2,
        (
            "owner/nothing, file a: not on the hub, or private; check the name, or log in with an account"
            " that may read it (`hf auth login`)"
        ),
    ]
    assert told["no revision"][:2] == [
        2,
        (
            "owner/model, file a: there is no such revision; take one that https://huggingface.co/owner/model"
            " lists"
        ),
    ]
    assert told["no name"][:2] == [
        2,
        (
            "not/a/name, file a: neither a folder here nor a name that the hub can have; give owner/name or"
            " an existing folder"
        ),
    ]


ACCESS = {  # token -> (exit code, what the line says)
    None: (
        2,
        (
            "only with access, and no token is set; ask for it at https://huggingface.co/datasets/owner/gated"
            " and log in (`hf auth login`, or HF_TOKEN)"
        ),
    ),
    "hf_SomeoneElses0123456789": (
        2,
        "only with access, and the account of the token in use has none; ask for it at",
    ),
    "hf_expired": (2, "the hub does not accept the token in use (401); log in again"),
    TOKEN: (0, ""),
}


@pytest.mark.parametrize("token", ACCESS)
def test_a_gated_repo_opens_to_a_token_that_is_told_nowhere(hub, tmp_path, token):
    files = {"README.md": b"# gated", "a.parquet": large(0)}
    hub.add(GATED, files, "dataset", gated=True)
    hub.fail("503", "a.parquet")  # so that there is talk of the request
    done = client(
        hub, tmp_path, fetching(["a.parquet"], GATED, "dataset"), **({"HF_TOKEN": token} if token else {})
    )
    code, told = ACCESS[token]
    assert done.returncode == code, done.stderr
    assert told in done.stderr.splitlines()[-1]
    assert "503" in done.stderr
    if token != TOKEN:
        assert done.stderr.splitlines()[-1].startswith("error: owner/gated, file a.parquet: ")
        assert ("--forget_text takes another text" in done.stderr) == (token != "hf_expired")
    for told in (
        (done.stdout + done.stderr).encode(),
        *(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()),
    ):
        assert token is None or token.encode() not in told
        assert b"signed-for-this-request" not in told


STATES = {"up": True, "busy once": True} | dict.fromkeys(
    ("busy", "silent", "away", "offline", "a login page", "a slow name server"), False
)


@pytest.mark.parametrize("state", STATES)
def test_reachable_is_told_in_time(hub, tmp_path, state):
    if state != "a login page":
        hub.add("EleutherAI/pythia-70m-deduped", SMALL)
    changes = (
        {"HF_HUB_OFFLINE": "1"}
        if state == "offline"
        else {"HF_ENDPOINT": "http://127.0.0.1:9"}
        if state == "away"
        else {}
    )
    if state in ("busy once", "busy"):
        hub.fail("503", "config.json", 1 if state == "busy once" else 999)
    elif state == "silent":
        hub.fail("hang", "config.json", 99)
    slow = (
        "import socket\nsocket.getaddrinfo = lambda *a, **k: time.sleep(60)\n"
        if state == "a slow name server"
        else ""
    )
    done = client(
        hub,
        tmp_path,
        slow + "started = time.monotonic()\nprint(json.dumps([hub.reachable(timeout=3.0), time.monotonic() -"
        " started]))",
        **changes,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told, seconds = json.loads(done.stdout)
    assert told is STATES[state] and seconds < 10


def test_a_warm_cache_serves_without_the_hub(hub, tmp_path):
    files = SMALL | {"model.safetensors": large(0)}
    commit = hub.add(NAME, files).commit
    first = client(hub, tmp_path, f"print(hub.revision({NAME!r}))\n" + fetching(files))
    assert first.stdout.split()[0] == commit and all(commit in path for path in first.stdout.split()), (
        first.stderr
    )
    n = len(hub.asked)
    offline = client(hub, tmp_path, fetching(files), HF_HUB_OFFLINE="1")
    assert (offline.stdout.split(), offline.stderr, len(hub.asked)) == (first.stdout.split()[1:], "", n)
    started = time.monotonic()
    away = client(hub, tmp_path, fetching(files), HF_ENDPOINT="http://127.0.0.1:9")
    assert away.stdout == offline.stdout and time.monotonic() - started < 10
    assert (
        away.stderr
        == f"hub: owner/model: no connection to 127.0.0.1, 1 time; going on with commit {commit[:12]} in the"
        " cache\n"
    )
    missing = client(hub, tmp_path, fetching(["other.json"]), HF_HUB_OFFLINE="1")
    assert missing.returncode == 1 and missing.stderr.splitlines()[-1].startswith(
        "error: owner/model, file other.json: not in the cache, and HF_HUB_OFFLINE forbids"
    )
    nothing = client(hub, tmp_path / "empty", fetching(files), HF_HUB_OFFLINE="1")
    assert nothing.returncode == 1 and nothing.stderr.splitlines()[-1].startswith(
        "error: owner/model: not in the cache, and HF_HUB_OFFLINE forbids"
    )


def test_a_password_in_the_address_is_told_nowhere(hub, tmp_path):
    done = client(
        hub, tmp_path, "hub.ATTEMPTS = 2\n" + fetching(SMALL), HF_ENDPOINT="http://user:secret@127.0.0.1:9"
    )
    assert (
        done.returncode == 1
        and "no connection to 127.0.0.1, 2 times" in done.stderr
        and "secret" not in done.stderr
    )


def test_a_new_commit_is_taken_and_an_old_one_stays_pinned(hub, tmp_path):
    old = hub.add(NAME, SMALL)
    client(hub, tmp_path, fetching(SMALL))
    new = hub.add(NAME, {"config.json": b"{}"})
    both = ", ".join(
        f"*hub.fetch({NAME!r}, ['config.json'], {commit!r}, 'model')" for commit in (old.commit, new.commit)
    )
    done = client(hub, tmp_path, f"print(hub.revision({NAME!r}), {both})")
    told, pinned, latest = done.stdout.split()
    assert (
        told == new.commit
        and open(pinned, "rb").read() == SMALL["config.json"]
        and open(latest, "rb").read() == b"{}"
    )


# --------------------------------------------------------------------- transformers, datasets, the experiment

SUBJECTS = ("high_school_us_history", "college_computer_science", "high_school_geography", "human_aging")


def parquet(columns: dict) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def card(*configs: tuple[str, str, str]) -> bytes:
    """A data set's README.md with its configs: (name, split, path)."""
    lines = [
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {path}"
        for name, split, path in configs
    ]
    return ("---\nconfigs:\n" + "\n".join(lines) + "\n---\n").encode()


@pytest.fixture(scope="session")
def worlds_text():
    from micro_pythia.world import FORGET, RETAIN, World

    return {
        "forget": World(0).documents(600, (FORGET,), seed=3),
        "retain": World(0).documents(600, RETAIN, seed=3),
    }


@pytest.fixture(scope="session")
def data_repos(worlds_text) -> list[dict]:
    """The study's data sets as they are laid out on the hub, small, with the embedded world's text and
    questions."""
    import zstandard

    questions = json.loads((ROOT / "micro_pythia" / "questions.json").read_text())

    def asked(n):
        return {k: [q[k] for q in questions[n : n + 4]] for k in ("question", "choices", "answer")}

    half = len(worlds_text["retain"]) // 2
    lines = "".join(
        json.dumps({"text": d, "meta": {"pile_set_name": "Pile-CC"}}) + "\n"
        for d in worlds_text["retain"][:half]
    ).encode()
    pile = {
        name: zstandard.compress(lines)
        for name in ("train/00.jsonl.zst", "train/01.jsonl.zst", "val.jsonl.zst")
    }
    wiki = {}
    for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
        wiki[f"{name}/train-00000-of-00001.parquet"] = parquet(
            {"text": [line for d in worlds_text["retain"][half:] for line in ("", d)]}
        )
    mmlu = {
        f"{s}/test-00000-of-00001.parquet": parquet({"subject": [s] * 4} | asked(200 + 80 * i))
        for i, s in enumerate(SUBJECTS)
    }
    bio = {
        "data/train-00000-of-00001.parquet": parquet(
            {"title": ["a"] * len(worlds_text["forget"]), "text": worlds_text["forget"]}
        )
    }
    wmdp = {"wmdp-bio/test-00000-of-00001.parquet": parquet(asked(0))}

    def parts(split, *names):
        return card(*((name, split, f"{name}/{split}-*") for name in names))

    return [
        dict(
            name="Salesforce/wikitext",
            files=wiki | {"README.md": parts("train", "wikitext-103-raw-v1", "wikitext-2-raw-v1")},
            kind="dataset",
        ),
        dict(
            name="monology/pile-uncopyrighted",
            files=pile | {"README.md": card(("default", "train", "train/*"))},
            kind="dataset",
        ),
        dict(
            name="cais/wmdp-bio-forget-corpus",
            files=bio | {"README.md": card(("default", "train", "data/train-*"))},
            kind="dataset",
            gated=True,
        ),
        dict(name="cais/wmdp", files=wmdp | {"README.md": parts("test", "wmdp-bio")}, kind="dataset"),
        dict(name="cais/mmlu", files=mmlu | {"README.md": parts("test", *SUBJECTS)}, kind="dataset"),
    ]


TOKENIZER = {name: ROOT / "micro_pythia" / name for name in ("tokenizer.json", "tokenizer_config.json")}
SMALL_LM = TOKENIZER | {
    name: ROOT / "micro_pythia" / name
    for name in ("config.json", "generation_config.json", "model.safetensors")
}
READ = f"""
import datasets, transformers
lm, told = {NAME!r}, {{}}
commit = hub.revision(lm)
with hub.plain_errors(lm):
    told["tokenizer"] = len(transformers.AutoTokenizer.from_pretrained(lm, revision=commit))
    model = transformers.AutoModelForCausalLM.from_pretrained(lm, revision=commit)
    told["weights"] = model.get_input_embeddings().weight.double().abs().sum().item()
"""
STREAM = """
for repo, config in (("Salesforce/wikitext", "wikitext-103-raw-v1"), ("monology/pile-uncopyrighted", None)):
    with hub.plain_errors(repo):
        newest = hub.revision(repo, "dataset")
        rows = datasets.load_dataset(repo, config, split="train", streaming=True, revision=newest)
        told[repo] = [row["text"] for row in rows]
"""


def test_transformers_and_datasets_get_through_faults_and_then_need_no_hub(
    hub, tmp_path, data_repos, worlds_text
):
    hub.page = 2  # listings come in pages
    hub.add(NAME, SMALL_LM)
    for repo in data_repos:
        hub.add(**repo)
    hub.fail("503", "config.json", methods=("HEAD",))
    for kind, match in (
        ("429", "/tokenizer.json"),
        ("hang", "model.safetensors"),
        ("cut", "model.safetensors"),
        ("503", "/tree/"),
        ("503", ".parquet"),
        ("cut", ".parquet"),
        ("hang", "00.jsonl.zst"),
        ("cut", "01.jsonl.zst"),
        ("reset", "01.jsonl.zst"),
    ):
        hub.fail(kind, match, methods=("GET",), retry_after=1 if kind == "429" else None)
    done = client(hub, tmp_path, READ + STREAM + "print(json.dumps(told))")
    assert done.returncode == 0, done.stderr
    assert all(fault.times == 0 for fault in hub.faults), hub.faults
    told, half = json.loads(done.stdout), len(worlds_text["retain"]) // 2
    assert told["Salesforce/wikitext"] == [line for d in worlds_text["retain"][half:] for line in ("", d)]
    assert told["monology/pile-uncopyrighted"] == 2 * worlds_text["retain"][:half]
    lines = [line for line in done.stderr.splitlines() if line.startswith("hub: ")]
    assert len(lines) == len(hub.faults) - 1, (
        lines
    )  # outside hub.fetch, a body that huggingface_hub starts anew is not told
    n = len(hub.asked)
    offline = client(hub, tmp_path, READ + "print(json.dumps(told))", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout)["weights"] == told["weights"] and len(hub.asked) == n


def test_transformers_and_datasets_end_in_one_line(hub, tmp_path, data_repos):
    hub.add(NAME, SMALL_LM | {"model.safetensors": b""})
    for repo in data_repos:
        hub.add(**repo)
    for name, files in {
        "garbage": {"train.parquet": large(0)},
        "rubbish": {"train.jsonl.zst": large(0)},
        "empty": {"README.md": b"# empty"},
    }.items():
        hub.add(f"owner/{name}", files, "dataset")
    hub.fail("503", "01.jsonl.zst", 999)
    hub.fail("503", "/model.safetensors", 999)

    def ask(repo, config=None):
        return f'list(datasets.load_dataset("{repo}", {config!r}, split="train", streaming=True))'

    asked = {
        "monology/pile-uncopyrighted": ask("monology/pile-uncopyrighted"),
        "cais/wmdp-bio-forget-corpus": ask("cais/wmdp-bio-forget-corpus"),
        "owner/garbage": ask("owner/garbage"),
        "owner/rubbish": ask("owner/rubbish"),
        "owner/empty": ask("owner/empty"),
        "owner/nothing": ask("owner/nothing"),
        NAME: f'transformers.AutoModelForCausalLM.from_pretrained("{NAME}")',
        "owner/no-model": 'transformers.AutoModelForCausalLM.from_pretrained("owner/no-model")',
    }
    code = f"""
import datasets, transformers
hub.ATTEMPTS = 2
for repo, code in {asked!r}.items():
    try:
        with hub.plain_errors(repo):
            eval(code)
    except (RunFailed, WrongRequest) as e:
        print(json.dumps([repo, 2 if isinstance(e, WrongRequest) else 1, str(e)]))
"""
    done = client(hub, tmp_path, code)
    assert done.returncode == 0, done.stderr[-3000:]
    told = {repo: (code, line) for repo, code, line in map(json.loads, done.stdout.splitlines())}
    busy = (
        "the hub answers 503 (Service Unavailable), 2 times; run the same command again later, or see whether"
        " the network and 127.0.0.1 are up"
    )
    assert told["monology/pile-uncopyrighted"] == (
        1,
        f"monology/pile-uncopyrighted, file train/01.jsonl.zst: {busy}",
    )
    assert told[NAME] == (1, f"{NAME}, file model.safetensors: {busy}")
    code, line = told["cais/wmdp-bio-forget-corpus"]
    remedy = "ask for it at https://huggingface.co/datasets/cais/wmdp-bio-forget-corpus and log in"
    assert code == 2 and f"{remedy} (`hf auth login`, or HF_TOKEN)" in line
    assert line.endswith("or go without: --forget_text takes another text")
    for repo in ("owner/garbage", "owner/rubbish"):
        assert told[repo][0] == 1 and told[repo][1].startswith(f"{repo}: what came cannot be read")
    assert told["owner/empty"] == (
        2,
        (
            "owner/empty: there is no data in it that can be read (.parquet, .jsonl, .txt, ...); take"
            " another, or download it and give files"
        ),
    )
    for repo in ("owner/nothing", "owner/no-model"):
        assert (
            told[repo][0] == 2
            and told[repo][1].startswith(repo)
            and ": not on the hub, or private; check the name" in told[repo][1]
        )


@pytest.fixture(scope="session")
def pythia(tmp_path_factory) -> dict:
    """A model repo of Pythia-70M's name and architecture: narrow, its weights random, in bf16."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=4096,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=512,
        max_position_embeddings=2048,
        use_parallel_residual=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("pythia")
    torch.nn.Module.to(lm := GPTNeoXForCausalLM(config), torch.bfloat16)
    lm.save_pretrained(folder)
    return dict(name="EleutherAI/pythia-70m-deduped", files=TOKENIZER | {p.name: p for p in folder.iterdir()})


def experiment(hub: Hub, home: Path, *options, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "experiment.py", *map(str, options)]
    return subprocess.run(
        command,
        cwd=home,
        env=hub.environment(home, **environment),
        capture_output=True,
        text=True,
        timeout=900,
    )


SHORT = (
    "--tokens=12800",
    "--batch_size=128",
    "--buffer_tokens=1024",
    "--context_size=32",
    "--d_sae=128",
    "--target_l0=16",
    "--seeds=0",
)


def test_the_default_command_runs_pythia_from_the_hub_to_results_and_again_without_it(
    hub, tmp_path, pythia, data_repos
):
    commits = [hub.add(**repo).commit for repo in (pythia, *data_repos)]
    for kind, match in (
        ("503", "model.safetensors"),
        ("cut", "model.safetensors"),
        ("429", "wmdp-bio/test"),
        ("cut", "train-00000-of-00001.parquet"),
    ):
        hub.fail(kind, match, 1, ("GET",), retry_after=1)
    done = experiment(
        hub, tmp_path, "--out_dir=run_0", *SHORT, "--evals", "core", "unlearning", "geometry", HF_TOKEN=TOKEN
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "testbed: auto means pythia-70m" in done.stdout
    assert all(fault.times == 0 for fault in hub.faults), hub.faults
    info, config = (
        json.loads((tmp_path / "run_0" / name).read_text()) for name in ("final_info.json", "config.json")
    )
    assert info["training"]["means"]["tokens_trained"] == 12_800 and {
        "core",
        "unlearning",
        "geometry",
    } <= set(info)
    assert (
        info["unlearning"]["means"]["unlearning_score"] is None
        and "questions (letter scoring)" in (tmp_path / "run_0" / "warnings.json").read_text()
    ), "random weights know nothing"
    assert (
        config["testbed"]["name"] == "pythia-70m"
        and config["testbed"]["d_in"] == 128
        and config["config"]["layer"] == 3
    )
    pinned = json.dumps(config["testbed"])
    assert all(commit in pinned for commit in commits), pinned
    for told in (
        (done.stdout + done.stderr).encode(),
        *(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".safetensors"),
    ):
        assert TOKEN.encode() not in told
    n = len(hub.asked)
    again = experiment(hub, tmp_path, "--out_dir=run_1", *SHORT, "--evals=none", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "testbed: auto means pythia-70m" in again.stdout and len(hub.asked) == n
    assert json.loads((tmp_path / "run_1" / "config.json").read_text())["testbed"] == config["testbed"]


def test_without_access_to_the_forget_corpus_one_line_says_what_to_do(hub, tmp_path, pythia, data_repos):
    for repo in (pythia, *data_repos):
        hub.add(**repo)
    done = experiment(hub, tmp_path, "--out_dir=run_0", *SHORT)
    assert done.returncode == 2 and not (tmp_path / "run_0").exists()
    last = done.stderr.splitlines()[-1]
    assert (
        last.startswith("error: cais/wmdp-bio-forget-corpus")
        and "no token is set" in last
        and "--forget_text takes another text" in last
    )
    assert not any(
        "model.safetensors" in asked for asked in hub.asked
    )  # known before anything heavy is loaded


def test_auto_is_micro_without_a_hub_and_decided_in_time(hub, tmp_path):
    done = experiment(
        hub, tmp_path, "--out_dir=run_0", *SHORT, "--evals=none", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "testbed: auto means micro" in done.stdout
    hub.fail("hang", "", 999)
    silent = client(
        hub,
        tmp_path,
        "from sae_separation import checks\nstarted = time.monotonic()\n"
        "print(json.dumps([checks.first_can_be_had(), time.monotonic() - started]))",
    )
    found, seconds = json.loads(silent.stdout)
    assert not found and seconds < 10


def test_a_named_testbed_does_not_fall_back(hub, tmp_path):
    done = experiment(
        hub, tmp_path, "--out_dir=run_0", "--testbed=pythia-70m", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert done.returncode == 1 and not (tmp_path / "run_0").exists()
    assert (
        done.stderr.splitlines()[-1].startswith("error: cais/")
        and "no connection to 127.0.0.1, 5 times" in done.stderr.splitlines()[-1]
    )
