"""Knowledge separation in sparse autoencoders: what a run has made, and how to use it.

from sae_separation import load_run, switched_off

run = load_run("run_6")                          # config, results, SAEs, cells
lm, tokenizer = run.load_lm()
with switched_off(lm, run, seed=0):              # docs/use.md
    lm.generate(...)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_separation.saved_run import Cell, SavedRun, load_run
    from sae_separation.switch import SwitchedOff, switched_off

__all__ = ["Cell", "SavedRun", "SwitchedOff", "load_run", "switched_off"]


def __getattr__(name: str) -> Any:
    """Each name is imported where it is first used: torch comes with switched_off alone."""
    if name in ("SwitchedOff", "switched_off"):
        from sae_separation import switch

        return getattr(switch, name)
    if name in __all__:
        from sae_separation import saved_run

        return getattr(saved_run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
