"""studies/gates.py: what the gates learn from and read, and the patterns that know the world."""

import pytest
import torch

from micro_pythia.world import FORGET, SHARED, World
from sae_separation.exam import Residuals
from sae_separation.methods import mlp
from studies import gates


def test_context_is_what_came_before_and_nothing_of_what_follows():
    x = torch.randn(2, 7, 3)
    read = gates.seen(x, "context")
    assert (
        read.shape == (2, 7, 9) and torch.equal(read[..., :3], x) and torch.equal(gates.seen(x, "token"), x)
    )
    for i, decay in enumerate(gates.DECAYS, 1):
        mean = torch.zeros(2, 3)
        for t in range(7):
            assert torch.allclose(read[:, t, 3 * i : 3 * i + 3], mean, atol=1e-6)
            mean = decay * mean + (1 - decay) * x[:, t]


@pytest.mark.parametrize("regularised", [False, True])
def test_a_probe_learns_and_its_thresholds_are_shares_of_what_counts(regularised):
    draw = torch.Generator().manual_seed(0)
    forget = (torch.rand(4000, generator=draw) < 0.5).float()
    x = torch.randn(4000, 6, generator=draw) + 3 * forget[:, None] * torch.eye(6)[0]
    weight = torch.rand(4000, generator=draw)
    data, gate = gates.Examples(x, forget, weight), gates.Gate(1, "token", regularised=regularised, hidden=8)
    probe = gates.fit(data, gate, d_in=6, steps=200, seed=0)
    assert ((mlp(x, probe) > 0) == (forget > 0.5)).float().mean() > 0.9
    cells = gates.thresholds(data, probe)
    score, retain = mlp(x, probe), forget < 0.5
    for cell in cells:
        share = weight[retain & (score > cell["threshold"])].sum() / weight[retain].sum()
        assert share <= cell["retain_share"] <= share + 2 / weight[retain].sum()


def test_the_ideal_gate_fires_on_forget_facts_alone(micro):
    world = World(0)
    of = {s: next(f for f in world.facts if f.subject == s) for s in (FORGET, SHARED)}
    for which in ("all", "last"):
        ideal = gates.Ideal(micro, world, which)
        for subject, fact in of.items():
            told = fact.relation.sentence.format(e=fact.entity)
            for text in (told, f"Question: {fact.question}\nAnswer:"):
                ids = micro.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                fires = ideal(Residuals(torch.zeros(*ids.shape, 1), ids > 0, ids))[0]
                assert fires[-1] == (subject == FORGET)
                assert fires.sum() == 0 if subject != FORGET else fires.sum() == 1 or which == "all"
