"""The benchmark: its limits by hand, its table, and our worker, run for real on a tiny LM."""

import pytest
import torch
from conftest import run_script
from safetensors.torch import save_file

from benchmarks import bench


def test_the_dense_limit_is_six_products_of_the_sae_and_the_layers_up_to_the_hook(tmp_path):
    session = bench.Session(tmp_path, "none", quick=True)
    session.peaks = [{"fp32": 195.0, "bf16": 790.0}]
    limit = session.limits(4096)["bf16"]
    assert limit["step"] == pytest.approx(790e9 / (6 * 2 * 512 * 4096))
    assert limit["lm"] == pytest.approx(790e9 / (4 * (2 * 12 * 512**2 + 2 * 2 * 128 * 512)))
    assert 1 / limit["end_to_end"] == pytest.approx(1 / limit["step"] + 1 / limit["lm"])


def test_the_table_has_a_line_for_every_system_and_says_which_did_not_run():
    def rate(*values):
        return bench.spread(list(values)) | {
            "share_of_limit": {"fp32": 2.0, "bf16": 0.5},
            "ours_over_this": bench.spread([3.0, 4.0, 5.0]),
        }

    ran = {
        "about": {},
        "peak_rss_mb": 1234.0,
        **{what: rate(10.0, 20.0, 60.0) for what in ("lm", "step", "end_to_end")},
    }
    limit = {"lm": 1.0, "step": 2.0, "end_to_end": 3.0}
    text = bench.table(
        {
            "about": {
                "date": "d",
                "commit": "c",
                "machine": "m",
                "torch": "t",
                "peak": {"fp32": 1.0, "bf16": 2.0},
            },
            "peers": {
                "4096": {
                    "systems": {"ours default": ran, "sparsify best": {"failed": "no module"}},
                    "limits": {"bf16": limit},
                }
            },
            "quality": {
                "4096": {
                    "tokens": 1000,
                    "lr": 0.1,
                    "ours": {"explained_variance": 0.91, "l0": 31.0, "seconds": 5.0},
                }
            },
        }
    )
    assert (
        "| ours default | 20 [10, 60] | 20 [10, 60] | 20 [10, 60] | 4.00 [3.00, 5.00] | 50% | 1,234 |" in text
    )
    assert "sparsify best | did not run: no module" in text and "| ours | 0.9100 | 31.0 | 5 |" in text


class Canned:
    """Stands for a worker: 100 tokens/s of ours, 50 of a peer; "breaks" ends in its first turn."""

    about = {"torch": "t"}

    def __init__(self, system: str):
        self.system, self.asked = system, []

    def ask(self, do: str, **command) -> dict:
        self.asked.append((do, command["n"]))
        if self.system == "breaks" and do == "end_to_end":
            raise RuntimeError("breaks ended")
        return {"tokens_per_second": 100.0 if self.system == "ours" else 50.0, "l0": 32.0}

    def stop(self) -> dict:
        return {"peak_rss_mb": 9.0}


def test_systems_are_measured_in_turns_and_one_that_ends_leaves_the_others(tmp_path, monkeypatch):
    session, workers = bench.Session(tmp_path, "none", quick=True), {}
    monkeypatch.setattr(session, "matmul_peak", lambda: session.peaks.append({"fp32": 100.0}))

    def start(system: str, variant: str, **spec) -> Canned:
        if system == "absent":
            raise RuntimeError("no module")
        return workers.setdefault(system, Canned(system))

    monkeypatch.setattr(session, "start", start)
    systems = [(name, "default") for name in ("absent", "peer", "breaks", "ours")]
    found = bench.peers(session, 64, systems, repetitions=2)["systems"]
    assert found["absent default"] == {"failed": "no module"}
    assert found["breaks default"] == {"failed": "breaks ended"}
    assert found["peer default"]["step"]["values"] == [50.0, 50.0] and "l0" not in found["peer default"]
    assert found["peer default"]["lm"]["ours_over_this"]["values"] == [2.0, 2.0]
    assert found["ours default"]["l0"] == [32.0, 32.0] and found["ours default"]["peak_rss_mb"] == 9.0
    turn = [("step", 4), ("lm", 16_384), ("end_to_end", 20_480)]
    assert workers["peer"].asked == [("step", 2), ("step", 4), ("lm", 16_384), *turn, *turn]
    assert workers["ours"].asked[0] == ("settle", bench.SETTLE["n"]) and len(session.peaks) == 3


def test_results_are_not_overwritten_by_fewer_parts(tmp_path):
    (tmp_path / "results.json").write_text('{"about": {}, "peers": {}, "curves": {}}')
    for out, said in (
        (tmp_path / "results", "results.json holds peers, which would be lost: give another --out"),
        (tmp_path / "no" / "results", "there is no folder"),
    ):
        done = run_script("benchmarks/bench.py", "--only", "curves", "--out", out)
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1], done.stderr


@pytest.fixture
def session(tmp_path) -> bench.Session:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=200
        )
    ).save_pretrained(tmp_path)
    save_file({"tokens": torch.randint(0, 200, (64, 1024))}, tmp_path / "contexts.safetensors")
    return bench.Session(tmp_path, "none", quick=True)


@pytest.mark.slow
def test_our_worker_answers_every_command_and_a_worker_that_ends_is_an_error_with_its_last_line(
    session, tmp_path
):
    worker = session.start(
        "ours", d_sae=64, arms=["vanilla", "ortsae"], settings={"target_l0": 4.0}, buffer_tokens=16_384
    )
    for what, n in (("step", 2), ("lm", 10_000), ("end_to_end", 10_000)):
        answer = worker.ask(what, n=n)
        assert answer["tokens"] >= n and answer["tokens_per_second"] == pytest.approx(
            answer["tokens"] / answer["seconds"]
        )
    stored = tmp_path / "activations.safetensors"
    assert 0 < worker.ask("store", n=40 * 2048, path=str(stored))["variance"] <= 1.01
    assert worker.stop()["peak_rss_mb"] > worker.about["rss_mb"] / 2
    trained = session.once(
        "quality",
        system="ours",
        d_sae=64,
        activations=str(stored),
        steps=20,
        settings={"target_l0": 0.0, "l1": 0.0, "lr": 3e-3, "warmup_steps": 2},
    )
    assert trained["explained_variance"] > 0.5 and 0 < trained["l0"] <= 64
    with pytest.raises(RuntimeError, match="ours default ended: KeyError: 'd_sae'"):
        session.start("ours")  # before it imports anything heavy
