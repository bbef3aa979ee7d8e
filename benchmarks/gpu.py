"""Speed of an SAE's training step on a GPU, against other SAE trainers and the card's matrix products.

    python benchmarks/gpu.py [--peers_python PYTHON] [--seconds 220]

Activations are made up and lie on the device: only the SAE's step is measured. One process a system
(worker.py), one measurement at a time, three repetitions each. ReLU SAEs with L1, and BatchTopK (sparsify:
TopK) with 32 active features a token. Sizes are those of the residual streams of Pythia-70M and Gemma-2-2B.
Writes gpu_results.json and gpu_results.md beside this file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.bench import BATCH, STEADY, Session, Worker, spread  # noqa: E402

SIZES = ((512, 16_384), (512, 65_536), (2304, 16_384), (2304, 65_536))
SYSTEMS = {  # activation -> system, variant; the first is what the others are held to
    "relu": (
        ("ours", "default"),
        ("sae_lens", "default"),
        ("sae_lens", "bf16"),
        ("dictionary_learning", "default"),
        ("dictionary_learning", "bf16"),
    ),
    "topk": (
        ("ours", "default"),
        ("sae_lens", "bf16"),
        ("dictionary_learning", "bf16"),
        ("sparsify", "default"),
    ),
}
COMPILED = (
    ("relu", "ours", "compiled"),
    ("relu", "sae_lens", "bf16 compiled"),
)  # last, from the largest size
SECONDS = 0.3  # of steps in one repetition


def plan() -> list[dict[str, Any]]:
    """What is to be measured, in order."""
    cells = [
        {"d_in": d_in, "d_sae": d_sae, "activation": activation, "system": system, "variant": variant}
        for d_in, d_sae in SIZES
        for activation, systems in SYSTEMS.items()
        for system, variant in systems
    ]
    names = ("activation", "system", "variant")
    return cells + [
        {"d_in": d_in, "d_sae": d_sae} | dict(zip(names, cell))
        for d_in, d_sae in reversed(SIZES)
        for cell in COMPILED
    ]


def peaks(device: str) -> dict[str, float]:
    """TFLOP/s of the card's products of 8,192 x 8,192 matrices, and TB/s of a copy, read and written: the
    median of ten."""
    import torch

    size = 8192 if device != "cpu" else 512
    out = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out[f"{name} TFLOP/s"] = 2 * size**3 / median_seconds(lambda a=a, b=b: a @ b, device) / 1e12
    a, b = (torch.randn(size * size * 4, device=device) for _ in range(2))
    out["copy TB/s"] = 2 * a.nbytes / median_seconds(lambda: b.copy_(a), device) / 1e12
    return out


def median_seconds(work, device: str) -> float:
    import torch

    def wait():
        if device != "cpu":
            torch.cuda.synchronize()

    times = []
    for _ in range(13):
        wait()
        before = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - before)
    return statistics.median(times[3:])


def spec_of(cell: dict) -> dict[str, Any]:
    """What a worker is told of it."""
    spec = {name: cell[name] for name in ("d_in", "d_sae", "activation", "variant")}
    steered = cell["system"] == "ours" and cell["activation"] == "relu"
    return spec | {"settings": STEADY if steered else {}}


class Systems:
    """A worker a system, started when it is first asked and anew after one that ended."""

    def __init__(self, session: Session, device: str):
        self.session, self.device, self.workers = session, device, dict[str, Worker]()

    def start(self, cell: dict):
        """With the first cell of a system, whose SAE it makes."""
        how = {"device": self.device} | spec_of(cell)
        self.workers[cell["system"]] = self.session.start(cell["system"], **how)

    def measure(self, cell: dict) -> dict[str, Any]:
        """Tokens/s, peak memory and, of ours, L0 and the kernels that take the most time. Raises
        RuntimeError, and forgets the worker, where it ended."""
        try:
            if cell["system"] not in self.workers:
                self.start(cell)
            return self._measured(self.workers[cell["system"]], cell)
        except RuntimeError:
            self.workers.pop(cell["system"], None)
            raise

    def _measured(self, worker: Worker, cell: dict) -> dict[str, Any]:
        ready = worker.ask("build", **spec_of(cell))
        worker.ask("step", n=10)
        warm = worker.ask("step", n=4)["tokens_per_second"]
        n = max(4, min(200, round(SECONDS * warm / BATCH)))
        answers = [worker.ask("step", n=n) for _ in range(3)]
        found = {"step": spread([a["tokens_per_second"] for a in answers]), "steps": n}
        found |= {"peak_device_mb": answers[-1]["peak_device_mb"], "ready_seconds": ready["ready_seconds"]}
        if cell["system"] == "ours":
            found["l0"] = answers[-1]["l0"]
            if self.device != "cpu":
                found["kernels_ms"] = worker.ask("profile", n=4)
        return found

    def stop(self):
        for worker in self.workers.values():
            worker.stop()


def compare(cells: list[dict], peak: float):
    """Add to each cell ours over it, and its share of six products at the card's peak (TFLOP/s)."""
    ours = {
        tuple(cell[k] for k in ("d_in", "d_sae", "activation")): cell["step"]["median"]
        for cell in cells
        if (cell["system"], cell["variant"]) == ("ours", "default") and "step" in cell
    }
    for cell in cells:
        if "step" in cell:
            rate, key = cell["step"]["median"], tuple(cell[k] for k in ("d_in", "d_sae", "activation"))
            cell["share_of_peak"] = rate * 12 * cell["d_in"] * cell["d_sae"] / (1e12 * peak)
            cell["ours_over_this"] = ours[key] / rate if key in ours else None


def table(results: dict) -> str:
    """The results as Markdown."""
    about, lines = results["about"], []
    speeds = ", ".join(f"{name} {value:.4g}" for name, value in about["peaks"].items())
    lines += [
        f"{about['date']}, commit {about['commit']}, {about['card']}, torch {about['torch']}; {speeds}.",
        "",
    ]
    titles = ("d_in", "d_sae", "SAE", "system", "tokens/s, median [least, most]", "ours is faster")
    titles += ("share of the bf16 peak", "peak memory, MB")
    lines += [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for cell in results["cells"]:
        size = f"| {cell['d_in']:,} | {cell['d_sae']:,} | {cell['activation']}"
        start = f"{size} | {cell['system']} {cell['variant']}"
        if "step" not in cell:
            lines.append(f"{start} | not measured: {cell.get('failed', '')} | | | |")
            continue
        rate, over = cell["step"], cell["ours_over_this"]
        over = "" if over is None else f"{over:.2f}"
        lines.append(
            f"{start} | {rate['median']:,.0f} [{rate['min']:,.0f}, {rate['max']:,.0f}] | {over}"
            f" | {cell['share_of_peak']:.0%} | {cell['peak_device_mb']:,.0f} |"
        )
    return "\n".join([*lines, ""])


def about(device: str, seconds: float) -> dict[str, Any]:
    """What was measured on, and when."""
    import torch

    from sae_separation.run_folder import provenance

    card = torch.cuda.get_device_name() if device != "cpu" else "a CPU"
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(driver, capture_output=True, text=True) if device != "cpu" else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": provenance()["git"],
        "card": card,
        "driver": done.stdout.strip() if done else "",
        "torch": torch.__version__,
        "batch": BATCH,
        "seconds_at_most": seconds,
    }


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    session, cells = Session(folder, args.peers_python, quick=False), plan()
    systems = Systems(session, args.device)
    first = {cell["system"]: cell for cell in reversed(cells)}
    with ThreadPoolExecutor() as pool:  # what they import takes long, and is imported side by side
        starting = {name: pool.submit(systems.start, cell) for name, cell in first.items()}
        results = {"about": about(args.device, args.seconds), "cells": cells}
    for name, done in starting.items():
        if error := done.exception():
            session.say(f"{name} did not start: {error}")
    results["about"]["peaks"] = peaks(args.device)
    session.say(f"{results['about']['card']}: {results['about']['peaks']}")
    for cell in cells:
        what = "{d_in} x {d_sae} {activation}: {system} {variant}".format(**cell)
        if time.perf_counter() - session.started > args.seconds:
            cell["failed"] = f"the {args.seconds:.0f} s given were over"
            continue
        try:
            cell |= systems.measure(cell)
            session.say(f"{what}: {cell['step']['median']:,.0f} tokens/s, {cell['peak_device_mb']:,.0f} MB")
        except (RuntimeError, OSError) as error:
            cell["failed"] = str(error)
            session.say(f"{what}: {error}")
        compare(cells, results["about"]["peaks"]["bf16 TFLOP/s"])
        results["about"]["seconds"] = time.perf_counter() - session.started
        write(results, args.out)  # after each, so that nothing is lost
    systems.stop()
    return results


def write(results: dict, out: Path):
    out.with_suffix(".json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    out.with_suffix(".md").write_text(table(results))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers_python", default=str(HERE / ".venv" / "bin" / "python"), help="as bench.py's"
    )
    parser.add_argument("--seconds", type=float, default=220.0, help="after which nothing more is begun")
    parser.add_argument("--out", type=Path, default=HERE / "gpu_results", help="without a suffix")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the code")
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        results = run(args, Path(folder))
    write(results, args.out)
    print(table(results))


if __name__ == "__main__":
    main()
