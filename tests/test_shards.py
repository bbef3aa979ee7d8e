"""One SAE whose features are split over two processes learns what one process learns."""

import json
import multiprocessing
import traceback
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import test_trainer
import torch
import torch.distributed as dist
from conftest import run_here
from test_ranks import on_ranks, own  # noqa: F401  (fixtures)
from test_resume import at_step, interrupt

import experiment
from experiment import ActivationBlock, Trainer
from sae_separation import checks, losses, ranks
from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.shards import WHOLE, Shard

STEPS = 30
SMALL = replace(
    test_trainer.SMALL,
    d_sae=192,
    batch_size=64,
    tokens=200 * 64,
    resample_steps=10,
    dead_tokens=600,
    warmup_steps=5,
    group_update_steps=10,
    forget_features=20,
)
CASES = {
    "relu": {"grad_clip": 0.3, "feature_lr_power": 0.3},
    "batchtopk": {"activation": "batchtopk", "grad_accumulation": 2, "arm": "soft_frozen_decoder"},
    "softk": {"activation": "softk", "unlock_steps": 2, "feature_dropout": 0.2},
    "fixed": {"arm": "fixed", "alpha": 1.0},
    "grouped": {"arm": "grouped", "alpha": 1.0},
    "ortsae": {"arm": "ortsae", "alpha": 1.0, "chunk_size": 50, "activation": "jumprelu"},
    "adaptive_both": {"arm": "adaptive_both", "forget_features": 110},
    "routed": {"arm": "routed", "activation": "matryoshka", "orthogonal_init": True},
}


def made_up() -> ActivationBlock:
    """Sums of a few of 64 directions each, in 32 dimensions; of forget text the first half more often."""
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=random), dim=1)
    forget = torch.rand(700, generator=random) < 0.5
    often = torch.where((torch.arange(64) < 32) == forget[:, None], 0.1, 0.03)
    f = torch.rand(700, 64, generator=random) * (torch.rand(700, 64, generator=random) < often)
    return ActivationBlock(f @ directions + 0.02 * torch.randn(700, 32, generator=random), forget)


def trained(case: str, block: ActivationBlock, shard: Shard) -> Trainer:
    """With every third feature dead from the start."""
    config = replace(SMALL, **CASES[case])
    trainer = Trainer(config, 0, block.x.shape[1], 200, block, shard)
    trainer.sae.b_enc.data[::3] = -100.0
    batches = list(islice(block.batches(config.batch_size), 10))
    for step in range(STEPS):
        trainer.step(*batches[step % len(batches)])
    return trainer


def compare(case: str, block: ActivationBlock, shard: Shard):
    """The state after STEPS; a checkpoint that goes on with another number of ranks; the SAE exported."""
    split = trained(case, block, shard)
    tensors, facts = split.shard.whole(split.state()[0]), split.state()[1]
    again = Trainer(split.config, 0, block.x.shape[1], 200, block, shard)
    split.gather(0)
    if shard.rank:
        return
    whole = trained(case, block, WHOLE)
    assert facts["resampled"] == whole.resampled > 0
    for name, expected in whole.state()[0].items():
        torch.testing.assert_close(tensors[name], expected, msg=f"{case}: {name}", rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(split.sae(block.x[:64]), whole.sae(block.x[:64]), rtol=1e-4, atol=1e-4)
    again.restore(*whole.state())
    for name, t in shard.parts(whole.state()[0]).items():
        assert torch.equal(again.state()[0][name], t), f"{case}: {name}"


def alike_failures(block: ActivationBlock, shard: Shard):
    """What is wrong on one rank is said on both."""
    trainer = Trainer(SMALL, 0, block.x.shape[1], 200, block, shard)
    if shard.rank:
        trainer.sae.b_enc.data[5] = torch.nan
    with pytest.raises(RunFailed, match=r"b_enc not finite in 1 of 96 entries .* at step 0"):
        trainer.refuse_nonfinite({"b_enc": trainer.sae.b_enc})
    x, forget = next(block.batches(64))
    with pytest.raises(RunFailed, match="fvu = nan"):
        trainer.step(x, forget)


def no_bf16(device: torch.device) -> bool:
    """Its rounding is not to hide what is wrong."""
    return False


def of_a_rank(rank: int, folder: Path, block: ActivationBlock):
    torch.set_num_threads(1)
    losses.has_bf16 = experiment.has_bf16 = no_bf16
    shard = Shard(rank, 2)
    ranks.here.rank, ranks.here.size = rank, 2
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for case in CASES:
            compare(case, block, shard)
        alike_failures(block, shard)
    except BaseException:
        (folder / f"rank{rank}.txt").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()


def test_an_sae_over_two_processes_is_that_of_one(tmp_path):
    block = made_up()
    fork = multiprocessing.get_context("fork")  # no second import of torch
    ranks = [fork.Process(target=of_a_rank, args=(rank, tmp_path, block)) for rank in range(2)]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
        ranks[0].join(0.1)
    for process in ranks:
        process.join(5)  # after one has failed
        process.kill()
    said = "\n".join(path.read_text() for path in tmp_path.glob("rank*.txt"))
    assert not said and [process.exitcode for process in ranks] == [0, 0], said


def test_the_command_splits_features_and_goes_on_without_ranks(on_ranks, own, tmp_path):  # noqa: F811
    """Stopped with its features on two ranks it goes on in one process, and ends as where they stay there."""
    given = {"tokens": 100 * 128, "batch_size": 128, "buffer_tokens": 1024, "context_size": 32, "d_sae": 64}
    given |= {"target_l0": 8, "seeds": 0, "arm": "fixed", "checkpoint_seconds": 1000, "evals": "none"}
    given |= {name: value[0] if isinstance(value, tuple) else value for name, value in own.items()}
    argv = [text for name, value in given.items() for text in (f"--{name}", value)]

    def command(folder, *more, step=None):
        def work(rank):
            losses.has_bf16 = experiment.has_bf16 = no_bf16
            with pytest.MonkeyPatch.context() as patch:
                if step is not None:
                    at_step(patch, step, interrupt(), seed=0)
                return run_here("--out_dir", tmp_path / folder, *more, *argv)

        return work

    assert on_ranks(2, command("stopped", "--shard_features", step=17)).codes == [143, 143]
    assert on_ranks(1, command("stopped")).codes == [0]
    assert on_ranks(2, command("split", "--shard_features")).codes == [0, 0]
    files = (tmp_path / folder / "final_info.json" for folder in ("stopped", "split"))
    one, two = (json.loads(file.read_text()) for file in files)
    ours, theirs = (found["training"]["final_info_dict"] for found in (one, two))
    for name in ours.keys() - {"train_seconds", "tokens_per_second"}:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_what_cannot_be_split_is_refused_before_anything_is_read(monkeypatch):
    with pytest.raises(WrongRequest, match="torchrun --nproc_per_node=N"):
        checks.check_shards(experiment.Request())
    monkeypatch.setattr(ranks.here, "size", 3)
    checks.check_shards(experiment.Request(arm="rmu"))
    checks.check_shards(experiment.Request(d_sae=3072))
    for request, said in (
        (experiment.Request(d_sae=64), "give --d_sae 63"),
        (experiment.Request(compile=True), "--compile"),
    ):
        with pytest.raises(WrongRequest, match=said):
            checks.check_shards(request)
