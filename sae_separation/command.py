"""The console command sae-separation: what `python experiment.py` does, from wherever it was installed."""

import runpy


def main():
    """Run experiment.py as a script, with this process's arguments; it ends the process."""
    runpy.run_module("experiment", run_name="__main__", alter_sys=True)
