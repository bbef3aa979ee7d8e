"""Several ranks of one command (torchrun): the same bytes as one process, and an end when one of them ends.

Ranks are forked from this process here, which has imported everything: torchrun takes half a minute of two
cores to start two of them. One test has torchrun itself."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from conftest import ROOT, run_here
from safetensors import safe_open
from test_resume import at_step, interrupt, results

import experiment
from sae_separation import checkpoint, process, ranks, testbeds
from sae_separation.errors import Interrupted, WrongRequest
from sae_separation.specs import DataConfig

STEPS = 100
SECONDS = 400  # until a test gives up; it takes some 5


class Ended:
    """Exit code and stderr of every rank, and the seconds that it took."""

    def __init__(self, codes: dict[int, int], files: list[Path], seconds: float):
        self.codes, self.seconds = [codes.get(rank) for rank in range(len(files))], seconds
        self.said = [file.read_text() for file in files]

    @property
    def errors(self) -> list[str]:
        return [line for said in self.said for line in said.splitlines() if line.startswith("error: ")]


def wait_for(children: dict[int, int]) -> dict[int, int]:
    """Exit code by rank; those that do not end are killed."""
    codes, until = {}, time.monotonic() + SECONDS
    while len(codes) < len(children) and time.monotonic() < until:
        for rank in children.keys() - codes.keys():
            ended, status = os.waitpid(children[rank], os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for rank in children.keys() - codes.keys():
        os.kill(children[rank], signal.SIGKILL)
        os.waitpid(children[rank], 0)
    return codes


@pytest.fixture
def on_ranks(tmp_path):
    """on_ranks(n, work): work(rank), which returns an exit code, in n processes of one thread each, with what
    torchrun would tell them."""

    stores: Any = dist  # whose list of names lacks them

    def start(n: int, work: Callable[[int], int]) -> Ended:
        store = stores.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        about = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        about |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "TOKENIZERS_PARALLELISM": "false"}
        about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        files = [tmp_path / f"stderr_{rank}" for rank in range(n)]
        children, began = {}, time.monotonic()
        for rank, file in enumerate(files):
            children[rank] = os.fork()
            if not children[rank]:
                sys.stdout = sys.stderr = file.open("w", buffering=1)
                code = 99
                try:
                    torch.set_num_threads(1)
                    os.environ.update(about, RANK=str(rank), LOCAL_RANK=str(rank))
                    ranks.here = ranks.Place(os.environ if n > 1 else {})
                    code = work(rank)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
        return Ended(wait_for(children), files, time.monotonic() - began)

    return start


def inside(work: Callable[[int], object]) -> Callable[[int], int]:
    """work(rank) where all ranks are connected, ended as the command ends."""

    def ended(rank: int) -> int:
        try:
            with process.signals, ranks.met():
                work(rank)
            return 0
        except (Exception, Interrupted) as error:
            return ranks.tell(error)

    return ended


# ------------------------------------------------------------------------------------------- what they do


def test_ranks_share_work_and_tell_each_other(on_ranks):
    def work(rank):
        mine = []

        def full(n):
            mine.append(n)
            return torch.full((n,), float(n))

        sizes = [1, 2, 3, 4, 5]
        assert [t.tolist() for t in ranks.shared(sizes, full, sizes, torch.empty(0))] == [
            [float(n)] * n for n in sizes
        ]
        assert mine == sizes[rank::2]
        assert ranks.all_gather(["é"] * rank) == [[], ["é"]] and ranks.broadcast({"by": rank}) == {"by": 0}
        assert ranks.agree(rank == 1, False) == (True, False)
        state = {"w": torch.arange(3), "generator": torch.Generator().get_state(), "l": torch.tensor(2.0)}
        moved = ranks.at_first(state if rank else {}, 1)
        assert all(torch.equal(moved[name], t) for name, t in state.items())
        assert list(ranks.gathered("ab", lambda run: [run, rank])) == [
            ("a", ["a", 0, "a", 1]),
            ("b", ["b", 0, "b", 1]),
        ]
        assert [ranks.deal(3), ranks.deal(2)] == [[0, 1, 0], [1, 0]]

    assert on_ranks(2, inside(work)).codes == [0, 0]


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> dict[str, Any]:
    """A small random LM with text of its own, as settings."""
    folder = tmp_path_factory.mktemp("own")
    files = {name: (str(path),) for name, path in tiny.own_files(folder).items()}
    return files | {"lm": str(tiny.save_lm(folder / "lm")), "layer": 1, "forget_subject": "biology"}


@pytest.fixture(scope="module")
def testbed(own):
    return testbeds.load(DataConfig(**own))


@pytest.fixture
def small_lm_batches(monkeypatch):
    """Several in a block of 4,096 activations."""
    monkeypatch.setattr("sae_separation.stream.fast_lm_tokens", lambda lm: 1024)


def test_blocks_of_two_ranks_are_those_of_one_and_each_does_its_share(
    on_ranks, testbed, small_lm_batches, tmp_path
):
    def work(rank):
        stream = experiment.ActivationStream(testbed, 32, 4096)
        seen, make = [], stream.activations
        stream.activations = lambda tokens: seen.append(len(tokens)) or make(tokens)  # pyright: ignore
        blocks = [stream.next_block() for _ in range(2)]
        parts = [t for block in blocks for t in (block.x, block.forget, block.document)]
        torch.save(parts, tmp_path / f"blocks_{ranks.here.size}_{rank}.pt")
        assert stream.n_lm_batches == 4 and len(seen) == 2 * 4 / ranks.here.size

    assert on_ranks(1, inside(work)).codes == [0]
    assert on_ranks(2, inside(work)).codes == [0, 0]
    alone, *others = (torch.load(tmp_path / f"blocks_{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(alone, other))


def state_at(folder: Path, step: int) -> tuple[dict, dict]:
    """A checkpoint without what its folders and its time are: facts, and bytes of every tensor."""
    with safe_open(checkpoint.path_of(folder, step), framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}
    for time_of in ("train_seconds", "used_seconds"):
        del facts["position"][time_of]
    return facts, tensors


def small(own) -> list:
    """Options of a small training on one's own data, in blocks of 15 steps."""
    size = {"tokens": STEPS * 128, "batch_size": 128, "buffer_tokens": 2000, "context_size": 32}
    size |= {"d_sae": 64, "target_l0": 8, "dead_tokens": 4096, "seeds": 0, "checkpoint_seconds": 1000}
    given = {name: value[0] if isinstance(value, tuple) else value for name, value in own.items()} | size
    return [text for name, value in given.items() for text in (f"--{name}", value)]


def test_ranks_end_together_where_all_seeds_have_failed(
    on_ranks, own, testbed, small_lm_batches, tmp_path, monkeypatch
):
    """They agree at step 25 at the latest, in the second of three blocks: the third is not computed."""
    monkeypatch.setattr(testbeds, "load", lambda *_: testbed)
    block_from_lm = experiment.ActivationStream.block_from_lm

    def first_two(stream):
        assert stream.block_index < 2
        return block_from_lm(stream)

    monkeypatch.setattr(experiment.ActivationStream, "block_from_lm", first_two)
    folders = (tmp_path / "run_0", tmp_path / "run_1")
    argv = ("--out_dir", *folders, "--lr", 1e30, "--evals", "none", *small(own))
    ended = on_ranks(2, lambda rank: run_here(*argv))
    assert ended.codes[0] == 1 and len(ended.errors) == 1, ended
    for folder in folders:
        assert f"{folder} seed 0" in ended.errors[0]
        assert any("seed 0 failed" in text for text in json.loads((folder / "warnings.json").read_text()))


def test_two_ranks_make_what_one_makes_stopped_and_gone_on_with_other_numbers(
    on_ranks, own, testbed, small_lm_batches, tmp_path, monkeypatch
):
    """Two runs with an SAE each, on blocks of 15 steps."""
    monkeypatch.setattr(testbeds, "load", lambda *_: testbed)
    runs, argv = ("run_1", "run_6"), small(own)

    def command(where, step=None, evals="none"):
        def work(rank):
            with pytest.MonkeyPatch.context() as patch:
                if step is not None:
                    at_step(patch, step, interrupt(), seed=0)
                return run_here(
                    "--out_dir", *(tmp_path / where / run for run in runs), "--evals", evals, *argv
                )

        return work

    stopped = on_ranks(2, command("two", 17))
    assert stopped.codes == [143, 143]
    (step,) = checkpoint.steps_in(tmp_path / "two/run_1")
    where = f"at step {step} of {STEPS}; the same command (without --overwrite) goes on from there"
    assert step > 17 and stopped.errors == [f"error: interrupted by SIGTERM: {where}"]
    assert on_ranks(1, command("one", step - 1)).codes == [143]
    for run in runs:
        assert state_at(tmp_path / "one" / run, step) == state_at(tmp_path / "two" / run, step)
    assert on_ranks(1, command("one", evals="geometry")).codes == [0]
    assert on_ranks(1, command("two", step + 5)).codes == [143]
    assert on_ranks(3, command("two", evals="geometry")).codes == [0, 0, 0]  # the third has no SAE
    for run in runs:
        one, two = tmp_path / "one" / run, tmp_path / "two" / run
        assert results(one) == results(two) and not (two / "checkpoints").exists()
        details = [path.relative_to(one) for path in (one / "eval").iterdir() if "metrics" not in path.name]
        assert len(details) == 1
        assert all((two / name).read_bytes() == (one / name).read_bytes() for name in details)


# ------------------------------------------------------------------------------------------ how they end


def end_by_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_memory():
    raise MemoryError


@pytest.mark.parametrize("waits", [lambda: ranks.agree(True), ranks.barrier, lambda: time.sleep(SECONDS)])
@pytest.mark.parametrize("end, code", [(end_by_itself, -signal.SIGKILL), (run_out_of_memory, 1)])
def test_a_rank_that_ends_ends_all_with_one_line_that_names_it(end, code, waits, on_ranks, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE", 0.5)

    def work(rank):
        end() if rank else waits()

    ended = on_ranks(2, inside(work))
    assert ended.codes == [1, code] and ended.seconds < SECONDS / 2
    (line,) = ended.errors
    why = "out of memory" if code == 1 else "ended without a word: killed, as happens where memory is short"
    assert line.startswith("error: rank 1") and why in line


def test_what_is_wrong_everywhere_is_told_once(on_ranks):
    def work(rank):
        raise WrongRequest("the text is short")

    ended = on_ranks(2, inside(work))
    assert ended.codes[0] == 2 and ended.errors == ["error: the text is short"]


def test_a_signal_to_one_stops_all_at_the_same_point(on_ranks, tmp_path):
    def work(rank):
        for i in range(10):
            if (rank, i) == (1, 3):
                os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / f"at_{rank}").write_text(str(i))
            ranks.agree()

    def held(rank):
        with ranks.held():
            try:
                work(rank)
            except Interrupted:
                process.signals.taken()
                raise

    ended = on_ranks(2, inside(held))
    assert ended.codes == [143, 143] and len(ended.errors) == 1
    assert [(tmp_path / f"at_{rank}").read_text() for rank in range(2)] == ["3", "3"]


@pytest.mark.slow
def test_torchrun_has_a_wrong_request_told_once(tmp_path):
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv += [str(ROOT / "experiment.py"), "--out_dir", str(tmp_path / "it")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(told) == 1 and "give its --arm" in told[0]


def test_without_torchrun_a_process_is_alone_and_nothing_is_imported():
    code = "import sys; from sae_separation import ranks; print(ranks.here.many, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n"
    assert not ranks.Place({"RANK": "1", "WORLD_SIZE": "2"}).many  # a batch system's
