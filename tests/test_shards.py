"""One SAE whose features are split over two processes learns what one process learns."""

import multiprocessing
import traceback
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist

import experiment
from experiment import ActivationBlock, Trainer
from sae_separation import losses
from sae_separation.errors import RunFailed
from sae_separation.shards import WHOLE, Shard

STEPS = 30
SMALL = tiny.config(
    arm="vanilla",
    d_sae=192,
    target_l0=8.0,
    batch_size=64,
    tokens=200 * 64,
    resample_steps=10,
    dead_tokens=600,
    warmup_steps=5,
    group_size=32,
    group_update_steps=10,
    forget_features=20,
    k=8,
)
CASES = {
    "relu": {"grad_clip": 0.3, "feature_lr_power": 0.3},
    "jumprelu": {"activation": "jumprelu", "orthogonal_init": True},
    "batchtopk": {"activation": "batchtopk", "grad_accumulation": 2},
    "matryoshka": {"activation": "matryoshka"},
    "softk": {"activation": "softk", "unlock_steps": 2, "feature_dropout": 0.2},
    "fixed": {"arm": "fixed", "alpha": 1.0},
    "grouped": {"arm": "grouped", "alpha": 1.0},
    "ortsae": {"arm": "ortsae", "alpha": 1.0, "chunk_size": 50},
    "adaptive_both": {"arm": "adaptive_both", "forget_features": 110},
    "routed": {"arm": "routed"},
    "soft_frozen_decoder": {"arm": "soft_frozen_decoder"},
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
    split.gather()
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


def of_a_rank(rank: int, folder: Path, block: ActivationBlock):
    torch.set_num_threads(1)
    losses.has_bf16 = experiment.has_bf16 = lambda device: False  # rounding is not to hide what is wrong
    shard = Shard(rank, 2)
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
