"""Activations kept on disk: the same training with them as without, and nothing that is not so is used."""

import errno
import fcntl
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch

import experiment
from experiment import ActivationStream
from sae_separation import files, kept, process, testbeds
from sae_separation.blocks import ActivationBlock
from sae_separation.errors import Interrupted, WrongRequest, tell

OF = {"lm": "a", "rounded": False}


class Blocks:
    """A stream whose LM is a generator of random numbers."""

    device = torch.device("cpu")

    def __init__(self, cache: kept.Kept):
        self.kept, self.block_index, self.by_lm = cache, 0, []
        self.with_massive, self.passes = 0.0, {"forget": 0, "retain": 0}

    def block_from_lm(self) -> ActivationBlock:
        self.by_lm.append(self.block_index)
        self.with_massive, self.passes["forget"] = 0.1 * self.block_index, 1 + self.block_index
        draw = torch.Generator().manual_seed(self.block_index)
        x, document = torch.randn(50, 8, generator=draw), torch.rand(50, generator=draw)
        return ActivationBlock(x, document > 0.5, document)

    def take(self, n: int) -> list[tuple]:
        taken = []
        for _ in range(n):
            block = self.kept.next_block(self)
            tensors = [t.tolist() for t in (block.x, block.forget, block.document) if t is not None]
            taken.append((tensors, self.with_massive, dict(self.passes)))
            self.block_index += 1
        return taken


def opened(place: Path, **of) -> kept.Kept:
    cache = kept.Kept(place, OF | of, {"lm": "a"})
    cache.open()
    return cache


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_kept_is_read_to_the_bit_with_all_that_the_stream_knew(tmp_path):
    first, again = Blocks(opened(tmp_path)), Blocks(opened(tmp_path))
    assert first.take(3) == again.take(3)
    assert (first.by_lm, again.by_lm) == ([0, 1, 2], [])
    assert again.take(1) == first.take(1) and again.by_lm == [3], "the LM goes on where the cache ends"
    folder = first.kept.folder
    assert names(folder) == {"about.json", ".lock", *(f"block_{i:06d}.safetensors" for i in range(4))}
    assert (folder / "block_000000.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()
    assert first.kept.steps(8) == [6, 6, 6, 6]


def test_a_signal_after_the_first_block_says_that_something_is_kept(tmp_path):
    stream = Blocks(opened(tmp_path))
    with process.signals, pytest.raises(Interrupted, match="nothing was done yet"):
        os.kill(os.getpid(), signal.SIGTERM)
    with process.signals, pytest.raises(Interrupted, match="what is done is kept"):
        stream.take(1)
        os.kill(os.getpid(), signal.SIGTERM)


def umask() -> int:
    os.umask(now := os.umask(0))
    return now


def test_blocks_of_something_else_lie_apart(tmp_path):
    one, other = opened(tmp_path), opened(tmp_path, lm="b")
    Blocks(one).take(1)
    (stream := Blocks(other)).take(1)
    assert stream.by_lm == [0] and one.folder != other.folder
    for path in (one.folder / "about.json", one.path(0)):  # put there by hand
        path.replace(other.folder / path.name)
    with pytest.raises(WrongRequest, match="of other activations"):
        opened(tmp_path, lm="b")


def test_a_block_that_is_not_as_it_was_written_is_named_and_computed_anew(tmp_path, capsys):
    blocks = Blocks(opened(tmp_path)).take(4)
    cache = opened(tmp_path)
    content = cache.path(0).read_bytes()
    cache.path(0).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    cache.path(1).write_bytes(content[:999])
    os.replace(cache.path(3), cache.path(2))
    stream = Blocks(cache)
    assert stream.take(4) == blocks and stream.by_lm == [0, 1, 2, 3]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all("computed anew" in line for line in said)
    assert [f"block_00000{i}" in line for i, line in enumerate(said)] == [True] * 3
    assert "checksum is wrong" in said[0] and "another block" in said[2]
    assert (again := Blocks(opened(tmp_path))).take(4) == blocks and again.by_lm == []


def test_numbers_that_bfloat16_holds_take_half_the_place_and_others_are_rounded_when_asked(tmp_path):
    x = torch.randn(50, 8)
    assert kept.narrowed(x) is x and kept.narrowed(x.bfloat16().float()).dtype == torch.bfloat16
    first, again = Blocks(opened(tmp_path, rounded=True)), Blocks(opened(tmp_path, rounded=True))
    block, plain = first.take(1)[0][0], Blocks(opened(tmp_path)).take(1)[0][0]
    assert again.take(1)[0][0] == block and again.by_lm == [], "who writes trains on what others read"
    assert block[0] == torch.tensor(plain[0]).bfloat16().tolist() and block[1:] == plain[1:]
    assert "rounded to bfloat16" in first.kept.doubts[0]
    sizes = [c.path(0).stat().st_size for c in (opened(tmp_path), first.kept)]
    assert sizes[0] - sizes[1] == pytest.approx(50 * 8 * 2, abs=64)


def test_what_a_killed_process_left_goes_and_files_of_others_stay(tmp_path):
    cache = opened(tmp_path)
    left = [f"block_000007.safetensors{files.HALF_WRITTEN}", "mine.txt", f"notes{files.HALF_WRITTEN}"]
    for name in left:
        (cache.folder / name).write_text("x")
    Blocks(cache).take(1)
    assert names(cache.folder) == {"about.json", ".lock", "block_000000.safetensors", *left[1:]}


def test_training_goes_on_when_a_block_cannot_be_written(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stream = Blocks(cache := opened(tmp_path))
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        stream.take(2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device; free disk space" in said
    assert stream.by_lm == [0, 1] and names(cache.folder) == {"about.json", ".lock"}
    assert cache.keeps is False


def test_a_cache_that_may_only_be_read_is_read(tmp_path, capsys, monkeypatch):
    blocks = Blocks(opened(tmp_path)).take(2)
    monkeypatch.setattr(os, "access", lambda *_: False)
    stream = Blocks(opened(tmp_path))
    assert stream.take(3)[:2] == blocks and stream.by_lm == [2]
    assert not stream.kept.path(2).exists() and "is not writable" in capsys.readouterr().err
    with pytest.raises(WrongRequest, match="not writable"):
        opened(tmp_path, lm="b")


def test_who_writes_waits_for_another_and_a_lock_that_is_kept_stops_no_one(tmp_path, capsys, monkeypatch):
    one, other = Blocks(opened(tmp_path)), Blocks(opened(tmp_path))
    kept.Kept.keep(one.kept, 0, one.block_from_lm(), 0.0, {})
    first = one.kept.path(0).read_bytes()
    other.kept.keep(0, other.block_from_lm(), 9.0, {})
    assert one.kept.path(0).read_bytes() == first, "the one that was first stays"
    monkeypatch.setattr(kept, "PATIENCE", 0)
    with (one.kept.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        other.block_index = 1
        other.take(1)
    assert not other.kept.path(1).exists() and "timed out" in capsys.readouterr().err


def test_another_machine_is_named_by_a_warning_and_only_where_it_computed(tmp_path, monkeypatch):
    Blocks(opened(tmp_path)).take(1)
    here = kept.made_on()
    with monkeypatch.context() as m:
        m.setattr(kept, "made_on", lambda: here | {"hardware": "another"})
        there = opened(tmp_path)
        assert "other versions or hardware" in there.doubts[0]
        Blocks(there).take(1)
        assert opened(tmp_path).doubts
    assert opened(tmp_path).doubts == [], "the other one has read alone"


def test_a_place_that_can_be_no_cache_is_refused(tmp_path):
    (file := tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    (link := tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, why in (
        (file, "is a file"),
        (file / "below", "is a file"),
        (tmp_path / "other", "'thesis.tex' and no activations"),
        (link, "leads nowhere"),
        (tmp_path / "run", "run folder of this command"),
    ):
        with pytest.raises(WrongRequest, match=why):
            kept.refuse_place(str(place), [str(tmp_path / "run")])
    opened(tmp_path / "other")
    (inner,) = kept.folders_in(tmp_path / "other")
    with pytest.raises(WrongRequest, match=f"a folder within a cache: name the one above, {tmp_path}/other"):
        kept.refuse_place(str(inner))
    for place in (str(tmp_path / "other"), str(tmp_path / "new"), None):
        kept.refuse_place(place)


def test_all_that_a_block_depends_on_is_in_its_identity(micro):
    stream = SimpleNamespace(n_contexts=8, n_lm_batches=2, special=torch.tensor([0]), seed=0)
    known = kept.identity(micro, stream, 128, False)
    text = datasets.Dataset.from_dict({"text": micro.retain.train["text"][1:]})
    lm = micro.describe["sources"]["lm"]
    moved = micro.describe | {"sources": {"lm": lm | {"source": "elsewhere"}}}
    anew = micro.describe | {"sources": {"lm": lm | {"sha256": {"model.safetensors": "0"}}}}
    assert kept.identity(replace(micro, describe=moved), stream, 128, False) == known, "the same weights"
    for others in (
        replace(micro, describe=anew),
        replace(micro, layer=2),
        replace(micro, retain=replace(micro.retain, train=text)),
        replace(micro, forget=micro.retain),
    ):
        assert kept.identity(others, stream, 128, False) != known
    for name in ("n_contexts", "n_lm_batches", "seed"):
        assert kept.identity(micro, SimpleNamespace(**vars(stream) | {name: 9}), 128, False) != known
    assert kept.identity(micro, stream, 64, False) != known != kept.identity(micro, stream, 128, True)


def test_the_stream_goes_on_behind_what_is_kept_to_the_same_bits(micro, tmp_path):
    how = micro, 128, 8192, 0, 4096
    plain, first, again = (ActivationStream(*how) for _ in range(3))
    for stream in (first, again):
        stream.kept = opened(tmp_path)
    first.next_block()
    for _ in range(2):
        blocks = [stream.next_block() for stream in (plain, again)]
        assert torch.equal(blocks[0].x, blocks[1].x) and torch.equal(blocks[0].forget, blocks[1].forget)
        assert (plain.passes, plain.with_massive) == (again.passes, again.with_massive)


def test_an_lm_is_loaded_when_a_block_is_missing_and_is_then_the_same(micro):
    bed = replace(micro, lm=None)
    testbeds.give_lm(bed, Path(micro.lm.config.name_or_path), weights=False)
    assert bed.lm.device.type == "meta" and bed.device == micro.device
    stream, plain = (ActivationStream(some, 128, 4096, lm_tokens=2048) for some in (bed, micro))
    assert kept.identity(bed, stream, 128, False) == kept.identity(micro, plain, 128, False)
    assert (bed.hook_name, bed.d_in) == (micro.hook_name, micro.d_in)
    assert bed.load_weights and torch.equal(stream.next_block().x, plain.next_block().x)
    assert bed.load_weights is None and bed.lm.device == micro.device


def test_a_run_from_kept_activations_is_the_same_run(micro, tmp_path, monkeypatch, capsys):
    weights: list[bool] = []
    monkeypatch.setattr("sae_separation.testbeds.load", lambda *args: weights.append(args[-1]) or micro)
    how = "--arm=fixed --testbed=micro --seeds 0 --tokens 12800 --batch_size 128 --buffer_tokens 4096"
    how += " --d_sae 32 --target_l0 4 --evals none --checkpoint_seconds 0"

    def run(name: str, *more: str) -> int:
        argv = ["--out_dir", str(tmp_path / name), *how.split(), *more]
        try:
            command, requests = experiment.unfinished(*experiment.parse_command(argv))
            experiment.check(command, requests)
        except WrongRequest as error:
            return tell(error)
        return experiment.main(command, requests) if requests else 0

    cache = f"--activations={tmp_path / 'cache'}"
    assert run("plain") == run("first", cache) == 0
    assert "activations: 0 blocks are in" in capsys.readouterr().out
    with monkeypatch.context() as m:
        m.setattr(ActivationStream, "activations", lambda *_: pytest.fail("the LM was run"))
        assert run("again", cache) == 0
    assert "the LM is not run" in capsys.readouterr().out and weights == [True, False, False]
    for name in ("first", "again"):
        for file in ("config.json", "train_log.jsonl", "warnings.json", "sae_seed0/sae_weights.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    assert run("dry", cache, "--dry_run") == 0
    assert "there already: of this LM, text and settings, by their names, 2 blocks" in capsys.readouterr().out
    assert run("small", f"--activations={tmp_path / 'plain'}") == 2
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert run("small", f"--activations={tmp_path / 'other'}") == 2
    assert "and 0.0 MB are free" in capsys.readouterr().err and not (tmp_path / "small").exists()
