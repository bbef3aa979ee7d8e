"""What an arm of the study is, and the options that arms share. Imports no torch before a loss is asked for.

ARMS = {"vanilla": Arm(), "fixed": Arm(loss="all_pairs_grad", prepare="rows_and_gram")}
ARMS["fixed"].function("all_pairs_grad", config)          # of losses.py, given its options
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from sae_separation.config import Config, option


@dataclass(frozen=True)
class Arm:
    """One row of the study: an SAE with alpha times a loss on the rows of W_dec, or a loss on firing that
    holds alpha; or a method that is told the labels and needs no SAE.

    `loss`, `prepare` and `firing_loss` name functions of losses.py, which says what each is given: it needs
    torch, and a request is read without. A function is given those of the row's `options` that are among its
    parameters.

    loss: a DecoderGrad of some blocks of features. `prepare`: which blocks there are, and what holds of all
    of them. firing_loss: the loss and its gradient by the pre-activations of the forget features.

    `every`, `longest`, `gentle`: bounds of a round (rounds.steps_of_round). With `longest` FVU is within 1 %
    of the variance all along of what it is with rounds of `every` (tested; notes.txt). `uses_groups`:
    features are grouped by how they fire. `selected`: its features are chosen with labels (selection.py).
    Without `trains_sae` it is the method of its name in methods.FITTED, or `loads_sae` that were trained
    elsewhere.

    `steers`: what of the forget group, the first --forget_features features, alpha is steered by: "sharing"
    the weight of firing_loss towards --target_sharing, "overlap" that of loss towards --target_overlap; an
    arm with both losses has an alpha for each. `routed`: the group alone learns from forget tokens, and from
    nothing else (gradients.accumulate_grads).
    """

    loss: str = ""
    prepare: str = "each_row"
    firing_loss: str = ""
    options: dict = field(default_factory=dict)
    every: int = 1
    longest: int = 16
    gentle: float = 3e-4
    uses_groups: bool = False
    steers: tuple[str, ...] = ()
    routed: bool = False
    trains_decoder: bool = True
    trains_encoder: bool = True
    selected: bool = False
    trains_sae: bool = True
    loads_sae: bool = False

    @property
    def has_sae(self) -> bool:
        return self.trains_sae or self.loads_sae

    @property
    def has_loss(self) -> bool:
        return bool(self.loss or self.firing_loss)

    def function(self, name: str, config: Config, **more) -> Callable:
        """A function of losses.py, given what it takes of the options and of `more`."""
        from sae_separation import losses

        given = {option: getattr(config, option) for option in self.options} | more
        takes = inspect.signature(getattr(losses, name)).parameters
        return partial(getattr(losses, name), **{k: v for k, v in given.items() if k in takes})


GROUPS = {
    "group_size": option(64, "grouped: features a group, at most d_in", least=2, cut_to="d_in"),
    "group_update_steps": option(
        100,
        "grouped: optimiser steps between two formations of the groups, to the nearest round over "
        "all of them",
        least=1,
    ),
}
CHUNKS = {"chunk_size": option(512, "ortsae: features a random chunk", least=2, cut_to="d_sae")}
FORGET_GROUP = {
    "label_noise": option(
        0.0, "adaptive and others told the labels: share of documents whose domain is told wrong", most=0.5
    ),
    "forget_features": option(40, "adaptive: features kept for the forget domain", least=1, within="d_sae"),
}
DIRECTIONS = {
    "target_overlap": option(
        0.1,
        "adaptive_directions, adaptive_both: d_in times the squared cosine that a forget feature may have "
        "with another at no cost, and the mean of it that alpha is steered to",
        above=0,
    ),
}
BOTH = {"alpha_directions": option(0.1, "adaptive_both: where alpha of the directions starts", above=0)}
NEAR_START = {
    "least_cosine": option(
        0.8, "soft_frozen_decoder: least cosine of a decoder row with where it started", below=1
    )
}
HINGES = {
    "margin": option(
        1.0,
        "adaptive: distance from 0, in units of u, that a forget feature's pre-activation keeps on "
        "retain text",
    ),
    "gap_weight": option(
        10.0, "adaptive: weight of the loss on forget tokens that no forget feature fires on"
    ),
    "target_sharing": option(
        0.0005,
        "adaptive: firing of the forget features on retain text over that on forget text, "
        "which alpha is steered to",
        above=0,
        most=1,
    ),
}
FEATURES = {
    "features_of": option(
        "",
        "feature_gate: complete run whose SAEs' features are read, each seed its own's; a bare name stands "
        "for a folder beside the new run's",
    )
}
OPTIONS = GROUPS | CHUNKS | FORGET_GROUP | DIRECTIONS | BOTH | NEAR_START | HINGES | FEATURES  # of all
