"""Training on a busy machine: tokens/s of three SAEs on the embedded testbed.

    python benchmarks/busy.py       # eight minutes; nothing else may run

Alone, beside two processes of one busy thread each, and beside another training whose OpenMP spins: with this
code, with what OpenMP does by itself, where its threads never spin, and with one thread. Every variant is a
process that stands by; all are measured in turns under each load.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bench import Others  # noqa: E402

TURNS, SECONDS, SETTLE = 3, 6.0, 2.0  # so many measurements of so many seconds, each after a shorter one
VARIANTS = {  # what is set for each
    "as it is": {},
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "never spins": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SPIN = [sys.executable, "-c", "while True: pass"]


class Worker:
    """A process that trains when it is asked to."""

    def __init__(self, variant: str):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
        command = [sys.executable, __file__, "train"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env | VARIANTS[variant]
        )
        self.answer()  # it stands by

    def ask(self, seconds: float):
        assert self.process.stdin
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def answer(self) -> float:
        assert self.process.stdout
        return float(self.process.stdout.readline())

    def end(self):
        self.process.kill()
        self.process.wait()


def train():
    """Train for as many seconds as each line of stdin says, and answer with tokens/s."""
    import experiment
    from sae_separation import openmp, process, testbeds
    from sae_separation.config import complete

    process.tune_memory()
    testbed = testbeds.load("micro")
    request = experiment.Request(arm="vanilla")
    config = complete(request, experiment.Config, "micro", testbed.defaults, testbed.d_in)
    stream = experiment.ActivationStream(testbed, config.context_size, config.buffer_tokens)
    block = stream.next_block()
    trainers = [experiment.Trainer(config, seed, testbed.d_in, 10**6, block) for seed in range(3)]

    def steps() -> Iterator[int]:
        while True:
            for x, forget in (stream.block or stream.next_block()).batches(config.batch_size):
                for trainer in trainers:
                    trainer.step(x, forget)
                yield len(x)
            stream.next_block()

    tokens = steps()
    with openmp.waits_follow_load():
        sum(islice(tokens, 20))  # until few features are active
        print(0.0, flush=True)
        for line in sys.stdin:
            done, began = 0, time.perf_counter()
            while (seconds := time.perf_counter() - began) < float(line):
                done += next(tokens)
            print(done / seconds, flush=True)


@contextlib.contextmanager
def spinners(n: int) -> Iterator[None]:
    """Inside, n processes of one busy thread each."""
    processes = [subprocess.Popen(SPIN) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def another_training() -> Iterator[None]:
    """Inside, another process trains, and its threads spin."""
    worker = Worker("OpenMP's default")
    worker.ask(1e9)
    try:
        yield
    finally:
        worker.end()


LOADS = {
    "alone": contextlib.nullcontext,
    "beside two busy threads": partial(spinners, 2),
    "beside a training that spins": another_training,
}


def main():
    others = Others()
    workers = {variant: Worker(variant) for variant in VARIANTS}
    rates = {load: {variant: [] for variant in VARIANTS} for load in LOADS}
    for load, around in LOADS.items():
        with around():
            for _ in range(TURNS):
                for variant, worker in workers.items():
                    for seconds in (SETTLE, SECONDS):
                        worker.ask(seconds)
                        rate = worker.answer()
                    rates[load][variant].append(rate)
                    print(f"{load}, {variant}: {rate:,.0f}", file=sys.stderr)
    for worker in workers.values():
        worker.end()
    print(f"Others kept {others.cores():.2f} cores busy meanwhile.\n")
    print(f"| tokens/s | {' | '.join(LOADS)} |\n| --- |{' --- |' * len(LOADS)}")
    quiet = statistics.median(rates["alone"]["OpenMP's default"])
    for variant in VARIANTS:
        medians = [statistics.median(rates[load][variant]) for load in LOADS]
        cells = " | ".join(f"{median:,.0f} ({median / quiet:.0%})" for median in medians)
        print(f"| {variant} | {cells} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        train()
    else:
        about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
        argparse.ArgumentParser(**about).parse_args()
        main()
