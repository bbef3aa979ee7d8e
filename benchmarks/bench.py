"""Speed and scale, against other SAE trainers and against what the machine's matrix products allow.

    make bench            # or: python benchmarks/bench.py [--quick] [--only peers quality curves costs]
    make bench-quick

Every system runs in a process of its own (worker.py), peers in the environment of `--peers_python`. All
processes of one size stand by and are measured in turns, so that what the machine does meanwhile meets all
of them alike. The work: activations after layer 3 of a GPT-NeoX of Pythia-70M's dimensions (random
weights, fixed seed), contexts of 128, batches of 2,048, one ReLU SAE with L1. Writes results.json,
results.md and scaling.png (results_quick.* with --quick) beside this file.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path

HERE = Path(__file__).resolve().parent
D_IN, LAYERS, CONTEXT, BATCH = 512, 4, 128, 2048  # LAYERS: up to the hook
SYSTEMS = [
    ("dictionary_learning", "default"),
    ("dictionary_learning", "bf16"),
    ("sae_lens", "default"),
    ("sae_lens", "compiled"),
    ("sae_lens", "bf16"),
    ("sae_lens", "bf16 compiled"),
    ("sparsify", "default"),
    ("sparsify", "bf16"),
    ("ours", "default"),
]
PLAN_ARMS = [
    "vanilla",
    "fixed",
    "grouped",
    "grouped",
    "adaptive",
    "ortsae",
    "grouped",
    "grouped",
    "adaptive",
    "adaptive",
    "frozen_decoder",
]
PARTS = ("peers", "quality", "curves", "costs")
STEADY = {
    "target_l0": 32.0,
    "l1": 0.1,
}  # our lambda follows this L0 and is soon there; the peers' speed does not depend on theirs


class Worker:
    """A worker process: `ask` sends one command and returns the answer."""

    def __init__(self, python: str, log: Path, **spec):
        self.name, self.log, self.error = f"{spec['system']} {spec.get('variant', '')}".strip(), log, None
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py"), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "2"},
        )
        assert self.process.stdin and self.process.stdout, "pipes, as asked for"
        self.commands, self.answers = self.process.stdin, self.process.stdout
        self.about = self._answer()

    def _answer(self) -> dict:
        line = self.answers.readline()
        if not line:
            last = self.log.read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"{self.name} ended: {' '.join(last)[:300]}")
        return json.loads(line)

    def ask(self, do: str, **command) -> dict:
        self.commands.write(json.dumps({"do": do, **command}) + "\n")
        self.commands.flush()
        return self._answer()

    def stop(self) -> dict:
        last = self.ask("stop")
        self.process.wait()
        return last


class Others:
    """What processes that are not of this session take of the machine's cores, from here on."""

    def __init__(self):
        self.began = self._now()

    def cores(self) -> float:
        """Cores that they kept busy, on average; processes started here count once they have ended."""
        seconds, busy = (now - then for now, then in zip(self._now(), self.began))
        return max(0.0, busy / seconds)

    def _now(self) -> tuple[float, float]:
        """The time, and the seconds of all cores that others took until then."""
        import psutil

        of_all, own = psutil.cpu_times(), os.times()
        # guests are counted in user and nice too; not every system has all
        idle = sum(getattr(of_all, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
        return time.monotonic(), sum(of_all) - idle - sum(own[:4])


class Session:
    """One run of the benchmark: where its files lie, which interpreters it uses, how long it has taken."""

    def __init__(self, folder: Path, peers_python: str, quick: bool):
        self.folder, self.peers_python, self.quick, self.started = (
            folder,
            peers_python,
            quick,
            time.perf_counter(),
        )
        self.peaks = []

    def say(self, text: str):
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}", flush=True)

    def start(self, system: str, variant: str = "default", **spec) -> Worker:
        python = sys.executable if system == "ours" else self.peers_python
        return Worker(
            python,
            self.folder / f"{system}.log",
            system=system,
            variant=variant,
            folder=str(self.folder),
            **spec,
        )

    def once(self, do: str, command: dict | None = None, **spec) -> dict:
        """One command to a worker of its own."""
        worker = self.start(**spec)
        answer = worker.ask(do, **(command or {}))
        return worker.about | answer | worker.stop()

    def prepare(self):
        """The LM, and contexts of Zipf-distributed tokens, half of each from its document's topic."""
        import torch
        from safetensors.torch import save_file
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        torch.manual_seed(0)
        torch.set_num_threads(2)
        config = GPTNeoXConfig(  # rotary positions on a quarter of each head, as by default
            hidden_size=D_IN,
            num_hidden_layers=6,
            num_attention_heads=8,
            intermediate_size=2048,
            vocab_size=50_304,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=0,
        )
        GPTNeoXForCausalLM(config).save_pretrained(self.folder)
        zipf, words = 1 / torch.arange(1, 20_001, dtype=torch.double), torch.randperm(50_000)[:20_000] + 100
        n, size = (1_200_000 if not self.quick else 300_000) // 1024, 1024
        rank = torch.multinomial(zipf, n * size, replacement=True).view(n, size)
        shift = torch.randint(0, 200, (n, 1)) * 97
        topical = torch.rand(n, size) < 0.5
        save_file(
            {"tokens": words[torch.where(topical, (rank + shift) % 20_000, rank)].contiguous()},
            self.folder / "contexts.safetensors",
        )

    @cached_property
    def precisions(self) -> dict:
        """What products run in here; without the instructions for it, bfloat16 is hundreds of times slower
        and measures nothing."""
        import torch

        return {"fp32": torch.float32} | (
            {"bf16": torch.bfloat16} if torch.cpu._is_avx512_bf16_supported() else {}
        )

    def systems(self, some: list[tuple[str, str]] = SYSTEMS) -> list[tuple[str, str]]:
        """Those that this machine can run."""
        return [
            (system, variant)
            for system, variant in some
            if "bf16" in self.precisions or "bf16" not in variant
        ]

    def matmul_peak(self) -> dict:
        """GFLOP/s of the best of several products of 2,048 x 2,048 matrices, in this moment."""
        import torch

        out = {}
        for name, dtype in self.precisions.items():
            a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
            times = []
            for _ in range(8):
                before = time.perf_counter()
                torch.mm(a, b)
                times.append(time.perf_counter() - before)
            out[name] = 2 * 2048**3 / min(times) / 1e9
        self.peaks.append(out)
        return out

    def limits(self, d_sae: int) -> dict:
        """Tokens/s if every dense product ran at the measured peak: the LM's layers, six of the SAE's."""
        lm, sae = LAYERS * (24 * D_IN**2 + 4 * CONTEXT * D_IN), 12 * D_IN * d_sae
        return {
            name: {"lm": 1e9 * peak / lm, "step": 1e9 * peak / sae, "end_to_end": 1e9 * peak / (lm + sae)}
            for name, peak in ((k, statistics.median(p[k] for p in self.peaks)) for k in self.peaks[0])
        }


SETTLE = {"n": 150, "l0": 1.25 * STEADY["target_l0"]}


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def start_workers(
    session: Session, d_sae: int, systems: list[tuple[str, str]]
) -> tuple[dict[str, Worker], dict[str, dict]]:
    """A worker for each system, by its name; and of those that do not start, why."""
    workers, failed = {}, {}
    for system, variant in systems:
        settings = {"settings": STEADY} if system == "ours" else {}
        try:
            workers[f"{system} {variant}"] = session.start(system, variant, d_sae=d_sae, **settings)
        except RuntimeError as error:
            failed[f"{system} {variant}"] = {"failed": str(error)}
            session.say(f"failed: {error}")
    return workers, failed


def warm_up(name: str, worker: Worker) -> float:
    """Tokens/s of a few steps; ours of an SAE that is as sparse as in most of a run."""
    worker.ask("settle", **SETTLE) if name.startswith("ours") else worker.ask("step", n=2)
    rate = worker.ask("step", n=4)["tokens_per_second"]
    worker.ask("lm", n=16_384)
    return rate


def one_turn(worker: Worker, warm: float) -> dict[str, dict]:
    """What a system answers in one turn; `warm`, its tokens/s, says how many steps are enough."""
    return {
        "step": worker.ask("step", n=max(4, min(40, round(2 * warm / BATCH)))),
        "lm": worker.ask("lm", n=16_384),
        "end_to_end": worker.ask("end_to_end", n=20_480),
    }


def compare(systems: dict[str, dict], limits: dict[str, dict]):
    """Add to each rate ours over it, turn by turn, and its share of each limit."""
    for result in systems.values():
        for what in ("lm", "step", "end_to_end") if "failed" not in result else ():
            turns = zip(systems["ours default"][what]["values"], result[what]["values"])
            result[what] |= {
                "ours_over_this": spread([ours / theirs for ours, theirs in turns]),
                "share_of_limit": {p: result[what]["median"] / limits[p][what] for p in limits},
            }


def peers(session: Session, d_sae: int, systems: list[tuple[str, str]], repetitions: int) -> dict:
    """Tokens/s of the LM to the hook, of the SAE's step and end to end, by turns; ratios are ours over
    theirs of the same turn."""
    workers, out = start_workers(session, d_sae, systems)
    rates = {name: {"lm": [], "step": [], "end_to_end": [], "l0": []} for name in workers}
    warm: dict[str, float] = {}
    for turn in range(repetitions + 1):  # the first warms up, and says how much is enough
        session.matmul_peak()
        for name, worker in list(workers.items()):
            try:
                if turn == 0:
                    warm[name] = warm_up(name, worker)
                    continue
                answers = one_turn(worker, warm[name])
            except RuntimeError as error:
                out[name] = {"failed": str(error)}
                session.say(f"failed: {error}")
                del workers[name]
                continue
            for what, answer in answers.items():
                rates[name][what].append(answer["tokens_per_second"])
            rates[name]["l0"].append(answers["step"]["l0"])
        session.say(f"d_sae {d_sae}: turn {turn} of {repetitions}")
    for name, worker in workers.items():
        measured = {what: spread(rates[name][what]) for what in ("lm", "step", "end_to_end")}
        out[name] = {"about": worker.about} | worker.stop() | measured
        if name.startswith("ours"):
            out[name]["l0"] = rates[name]["l0"]
    limits = session.limits(d_sae)
    compare(out, limits)
    return {"systems": out, "limits": limits}


def quality(session: Session, d_sae: int, steps: int, peers: list[tuple[str, str]]) -> dict:
    """Explained variance and L0 on held-out rows after training on the same rows in the same order with
    the same lambda and learning rate, translated into each system's own units; ours also with lambda
    steered to each peer's L0.
    """
    path, lr, l1 = str(session.folder / "activations.safetensors"), 1e-3, 0.15
    variance = session.once("store", {"n": (steps + 8) * BATCH, "path": path}, system="ours", d_sae=64)[
        "variance"
    ]
    warm, decay = steps // 10, steps // 5
    common = {"d_sae": d_sae, "activations": path, "steps": steps}

    def train(**spec):
        return session.once("quality", **common, **spec)

    def ours(**settings):
        return train(
            system="ours", settings={"lr": lr, "warmup_steps": warm, "l1": l1, "target_l0": 0.0} | settings
        )

    out = {"tokens": steps * BATCH, "lambda": l1, "lr": lr, "ours": ours()}
    session.say(
        f"quality at {d_sae}: ours {out['ours']['explained_variance']:.4f} at L0 {out['ours']['l0']:.1f}"
    )
    for system, variant in peers:
        if system == "sae_lens":  # loss: mean ||e||² + l1 mean Σ f, in units where the mean of ||x||² is D
            spec = {
                "settings": {"lr": lr, "lr_warm_up_steps": warm, "lr_decay_steps": decay},
                "sae": {"l1_coefficient": l1 * variance * D_IN**0.5},
            }
        else:  # the same where the mean of ||x||² is 1
            spec = {
                "settings": {
                    "lr": lr,
                    "warmup_steps": warm,
                    "sparsity_warmup_steps": None,
                    "decay_start": steps - decay,
                    "l1_penalty": l1 * variance,
                }
            }
        try:
            out[f"{system} {variant}"] = theirs = train(system=system, variant=variant, **spec)
        except RuntimeError as error:
            out[f"{system} {variant}"] = {"failed": str(error)}
            session.say(f"failed: {error}")
            continue
        out[f"ours at the L0 of {system} {variant}"] = same = ours(target_l0=theirs["l0"])
        session.say(
            f"quality at {d_sae}: {system} {variant} {theirs['explained_variance']:.4f} at L0"
            f" {theirs['l0']:.1f}; ours steered there {same['explained_variance']:.4f} at {same['l0']:.1f}"
        )
    return out


def by_phase(seconds: list[float], period: int = 16) -> float:
    """Mean over the steps of a round of losses on W_dec, the median of each: what happens once in a round
    counts once."""
    return statistics.mean(statistics.median(seconds[phase::period]) for phase in range(period))


def arms_side_by_side(session: Session, d_sae: int) -> list[dict]:
    """ms of a step of each arm, all on the same batches by turns; and what forming groups adds to a step
    of `grouped`, which forms them once in 96 steps."""
    arms = ("vanilla", "fixed", "grouped", "ortsae", "adaptive")
    worker = session.start(
        "ours",
        d_sae=d_sae,
        arms=arms,
        settings=STEADY,
        layer=0,
        buffer_tokens=8192,
        stream={"lm_tokens": 4096},
    )
    worker.ask("settle", **SETTLE | ({"n": 10} if d_sae > 100_000 else {}))
    worker.ask("side_by_side", n=1)  # forms the first groups
    taken = worker.ask("side_by_side", n=16 if d_sae > 100_000 else 64)
    forming = statistics.median(worker.ask("form_groups")) / 96
    worker.stop()
    ms = {
        arm: 1000 * (by_phase(of["seconds"]) + (forming if arm == "grouped" else 0))
        for arm, of in taken.items()
    }
    return [
        {
            "d_sae": d_sae,
            "arm": arm,
            "ms_per_step": ms[arm],
            "over_vanilla": ms[arm] / ms["vanilla"],
            **taken[arm],
            "forming_ms_per_step": 1000 * forming if arm == "grouped" else 0.0,
        }
        for arm in arms
    ]


def memory(session: Session, d_sae: int) -> dict:
    """Peak memory of a run of one arm beyond the interpreter, its libraries and an LM that has read a
    batch, over what must be there: weights, Adam's moments, one buffer."""
    worker = session.start("ours", d_sae=d_sae, settings=STEADY, layer=0, buffer_tokens=131_072)
    worker.ask("end_to_end", n=300_000 if d_sae < 10_000 else 1)  # whole buffers: the most is taken early
    parts = worker.ask("memory")
    base, peak = worker.about["lm_rss_mb"], worker.stop()["peak_rss_mb"]
    return (
        {"d_sae": d_sae, "base_mb": base, "peak_mb": peak}
        | parts
        | {"over_needed": (peak - base) / sum(parts.values())}
    )


def costs(session: Session, d_sae: int) -> dict[str, float]:
    """Of our time end to end, the shares of torch's operations that take the most: `lm` and `step` in all,
    and of each its own."""
    worker = session.start("ours", d_sae=d_sae, settings=STEADY)
    worker.ask("settle", **SETTLE)
    rates = {what: worker.ask(what, n=n)["tokens_per_second"] for what, n in (("lm", 16_384), ("step", 16))}
    of_all = {what: (1 / rate) / sum(1 / r for r in rates.values()) for what, rate in rates.items()}
    out = dict(of_all)
    for what, n in (("lm", 16_384), ("step", 16)):
        took = worker.ask("profile", n=n, what=what)
        total = took.pop("all")
        out |= {f"{what}: {name}": of_all[what] * ms / total for name, ms in list(took.items())[:6]}
    worker.stop()
    return dict(sorted(out.items(), key=lambda cost: -cost[1]))


def curves(session: Session) -> dict:
    """How our cost grows: with d_sae (each arm), with the number of SAEs on one pass of the LM, with the
    context, with the tokens; and what nnsight adds."""
    quick, out = session.quick, {"d_sae": [], "memory": [], "arms": [], "context": [], "tokens": []}
    for d_sae in (4096,) if quick else (1024, 4096, 16_384, 131_072):
        out["d_sae"] += arms_side_by_side(session, d_sae)
        session.say(
            f"d_sae {d_sae}: "
            + ", ".join(f"{p['arm']} {p['ms_per_step']:.0f} ms" for p in out["d_sae"] if p["d_sae"] == d_sae)
        )
    for d_sae in () if quick else (4096, 4096, 16_384, 16_384, 131_072):
        out["memory"].append(memory(session, d_sae))
        session.say(
            "memory at d_sae {d_sae}: {peak_mb:.0f} MB, {over_needed:.2f} of what is needed".format(
                **out["memory"][-1]
            )
        )
    for n in (1,) if quick else (1, 6, 11):
        worker = session.start("ours", d_sae=4096, arms=PLAN_ARMS[:n], settings=STEADY)
        worker.ask("settle", **SETTLE)
        answers = [worker.ask("end_to_end", n=20_480) for _ in range(1 if quick else 2)]
        out["arms"].append(
            {"arms": n, "seconds_per_million_tokens": 1e6 / max(a["tokens_per_second"] for a in answers)}
            | worker.stop()
        )
    alone = out["arms"][0]["seconds_per_million_tokens"]
    for point in out["arms"]:
        point["share_of_separate_runs"] = point["seconds_per_million_tokens"] / (point["arms"] * alone)
    session.say(
        "arms: "
        + ", ".join(f"{p['arms']}: {p['share_of_separate_runs']:.2f} of separate runs" for p in out["arms"])
    )
    for size in (128,) if quick else (64, 128, 1024):
        worker = session.start("ours", d_sae=64, context_size=size)
        rate = spread([worker.ask("lm", n=20_480)["tokens_per_second"] for _ in range(2)])
        through, draw = worker.ask("nnsight", n=8), worker.ask("draw", n=16)
        out["context"].append(
            {
                "context": size,
                "tokens_per_second": rate,
                "nnsight_over_hook": statistics.median(
                    a / b for a, b in zip(through["nnsight"], through["hook"])
                ),
                "draw_ms": 1000 * statistics.median(draw),
            }
            | worker.stop()
        )
    session.say(
        "context: "
        + ", ".join(
            f"{p['context']}: {p['tokens_per_second']['median']:.0f} tokens/s" for p in out["context"]
        )
    )
    at = (
        [100_000]
        if quick
        else [200_000, 1_000_000, 3_000_000, 10_000_000][: None if "bf16" in session.precisions else 3]
    )
    spec = {"system": "ours", "d_sae": 1024, "layer": 0, "settings": STEADY, "buffer_tokens": 131_072}
    out["tokens"] = session.once("scaling", {"at": at}, **spec)[
        "curve"
    ]  # the LM's first layer and 1,024 features, so that ten million fit the time
    session.say(
        "tokens: "
        + ", ".join(
            f"{p['tokens']:,} in {p['seconds']:.0f} s, {p['peak_rss_mb']:.0f} MB" for p in out["tokens"]
        )
    )
    return out


def table(results: dict) -> str:
    """The results as Markdown."""
    about, lines = results["about"], []
    others = f"; others kept {about['cores_of_others']:.2f} cores busy" if "cores_of_others" in about else ""
    lines += [
        (
            f"{about['date']}, code of commit {about['commit']}, {about['machine']}, torch {about['torch']};"
            f" matmul peak {' and '.join(f'{v:.0f} ({k})' for k, v in about['peak'].items())}"
            f" GFLOP/s{'' if 'bf16' in about['peak'] else ': no bfloat16 instructions, so all in fp32'}"
            f"{others}{'. Tokens/s, median [least, most]' if 'peers' in results else ''}"
        ),
        "",
    ]
    for d_sae, result in results.get("peers", {}).items():
        lines += [
            (
                f"| d_sae {int(d_sae):,} | LM to the hook | SAE step | end to end | ours is faster end to end"
                f" | share of the {list(result['limits'])[-1]} limit | peak RSS, MB |"
            ),
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, r in result["systems"].items():
            if "failed" in r:
                lines.append(f"| {name} | did not run: {r['failed']} |  |  |  |  |  |")
                continue
            shown = [
                f"{r[w]['median']:,.0f} [{r[w]['min']:,.0f}, {r[w]['max']:,.0f}]"
                for w in ("lm", "step", "end_to_end")
            ]
            ratio = r["end_to_end"]["ours_over_this"]
            lines.append(
                f"| {name} | {' | '.join(shown)} | {ratio['median']:.2f} [{ratio['min']:.2f},"
                f" {ratio['max']:.2f}] | {r['end_to_end']['share_of_limit'][list(result['limits'])[-1]]:.0%}"
                f" | {r['peak_rss_mb']:,.0f} |"
            )
        for precision, limit in result["limits"].items():
            lines.append(
                f"| dense limit, {precision} | {limit['lm']:,.0f} | {limit['step']:,.0f} |"
                f" {limit['end_to_end']:,.0f} |  |  |  |"
            )
        lines.append("")
    for d_sae, result in results.get("quality", {}).items():
        lines += [
            (
                f"| d_sae {int(d_sae):,}, after {result['tokens']:,} tokens | explained variance | L0 | SAE"
                " seconds |"
            ),
            "| --- | --- | --- | --- |",
        ]
        for name, r in result.items():
            if isinstance(r, dict):
                lines.append(
                    f"| {name} | did not run: {r['failed']} |  |  |"
                    if "failed" in r
                    else f"| {name} | {r['explained_variance']:.4f} | {r['l0']:.1f} | {r['seconds']:.0f} |"
                )
        lines.append("")
    for d_sae, shares in results.get("costs", {}).items():
        lines += [f"| of our time end to end, d_sae {int(d_sae):,} | share |", "| --- | --- |"]
        lines += [f"| {name} | {share:.0%} |" for name, share in shares.items() if share >= 0.01] + [""]
    if "curves" in results:
        lines += curves_table(results["curves"])
    return "\n".join(lines)


def curves_table(curves: dict) -> list[str]:
    arms = list(dict.fromkeys(p["arm"] for p in curves["d_sae"]))
    lines = [
        f"| SAE step, ms (over vanilla's) | {' | '.join(arms)} | of which forming groups |",
        f"| --- {'| --- ' * len(arms)}| --- |",
    ]
    for d_sae in dict.fromkeys(p["d_sae"] for p in curves["d_sae"]):
        at = {p["arm"]: p for p in curves["d_sae"] if p["d_sae"] == d_sae}
        shown = ["{ms_per_step:.0f} ({over_vanilla:.3f})".format(**at[arm]) for arm in arms]
        lines.append(
            f"| d_sae {d_sae:,} | {' | '.join(shown)} |"
            f" {sum(p['forming_ms_per_step'] for p in at.values()):.1f} |"
        )
    lines += (
        []
        if not curves["memory"]
        else [
            "",
            (
                "| memory, MB | interpreter and LM | weights and moments | buffer | peak | peak less the"
                " first over the others |"
            ),
            "| --- | --- | --- | --- | --- | --- |",
        ]
    )
    lines += [
        "| d_sae {d_sae:,} | {base_mb:,.0f} | {weights_and_moments_mb:,.0f} | {buffer_mb:,.0f} |"
        " {peak_mb:,.0f} | {over_needed:.2f} |".format(**p)
        for p in curves["memory"]
    ]
    lines += [
        "",
        (
            "| SAEs on one LM pass, d_sae 4,096 | seconds a million tokens | share of separate runs | peak"
            " RSS, MB |"
        ),
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {p['arms']} | {p['seconds_per_million_tokens']:.0f} | {p['share_of_separate_runs']:.0%} |"
        f" {p['peak_rss_mb']:,.0f} |"
        for p in curves["arms"]
    ]
    lines += [
        "",
        "| LM to the hook | tokens/s | nnsight over a hook | drawing a batch, ms |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| context {p['context']:,} | {p['tokens_per_second']['median']:,.0f} | {p['nnsight_over_hook']:.3f}"
        f" | {p['draw_ms']:.3f} |"
        for p in curves["context"]
    ]
    lines += ["", "| one run, layer 0, d_sae 1,024 | seconds | peak RSS, MB |", "| --- | --- | --- |"]
    return (
        lines
        + [
            f"| {p['tokens']:,} tokens | {p['seconds']:.0f} | {p['peak_rss_mb']:,.0f} |"
            for p in curves["tokens"]
        ]
        + [""]
    )


def draw(curves: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    (by_size, by_arms), (by_context, by_tokens) = axes
    for arm in dict.fromkeys(p["arm"] for p in curves["d_sae"]):
        points = [p for p in curves["d_sae"] if p["arm"] == arm]
        by_size.loglog([p["d_sae"] for p in points], [p["ms_per_step"] for p in points], "o-", label=arm)
    by_size.set(xlabel="d_sae", ylabel="ms a step of 2,048 tokens", title="SAE step")
    by_size.legend()
    n = [p["arms"] for p in curves["arms"]]
    by_arms.plot(n, [p["seconds_per_million_tokens"] for p in curves["arms"]], "o-", label="on one LM pass")
    by_arms.plot(
        n,
        [k * curves["arms"][0]["seconds_per_million_tokens"] for k in n],
        "--",
        color="grey",
        label="separate runs",
    )
    by_arms.set(
        xlabel="SAEs trained (arms in the plan's order)",
        ylabel="seconds a million tokens",
        title="Several SAEs, d_sae 4,096",
        ylim=0,
    )
    by_arms.legend()
    by_context.semilogx(
        [p["context"] for p in curves["context"]],
        [p["tokens_per_second"]["median"] for p in curves["context"]],
        "o-",
        base=2,
    )
    by_context.set(xlabel="context", ylabel="tokens/s", title="LM to the hook", ylim=0)
    tokens = [p["tokens"] for p in curves["tokens"]]
    by_tokens.loglog(tokens, [p["seconds"] for p in curves["tokens"]], "o-", label="seconds")
    by_tokens.loglog(tokens, [p["peak_rss_mb"] for p in curves["tokens"]], "s-", label="peak RSS, MB")
    by_tokens.set(xlabel="tokens", title="One run, layer 0, d_sae 1,024")
    by_tokens.legend()
    figure.savefig(path, dpi=110)


def machine() -> str:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return (
        f"{cpu}, {os.cpu_count()} cores,"
        f" {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GB"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=(
            "a shortened form; the whole takes 26 to 44 minutes on 2 cores with bfloat16 instructions, 70"
            " without"
        ),
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=None,
        help="default: all; with --quick peers and curves",
    )
    parser.add_argument(
        "--peers_python",
        default=str(HERE / ".venv" / "bin" / "python"),
        help="interpreter that the peers are installed for",
    )
    parser.add_argument("--out", type=Path, default=None, help="where results go, without a suffix")
    args = parser.parse_args()
    args.only = args.only or (["peers", "curves"] if args.quick else list(PARTS))
    if set(args.only) - {"curves", "costs"} and not Path(args.peers_python).exists():
        parser.error(
            f"--peers_python {args.peers_python} is not there: make benchmarks/.venv/ready makes it, and"
            " --only curves costs needs none"
        )
    out, quick = args.out or HERE / ("results_quick" if args.quick else "results"), args.quick
    file = out.with_suffix(".json")
    if not out.parent.is_dir():
        parser.error(f"--out {out}: there is no folder {out.parent}")
    if file.exists() and (lost := set(PARTS) & json.loads(file.read_text()).keys() - set(args.only)):
        parser.error(f"{file} holds {', '.join(sorted(lost))}, which would be lost: give another --out")
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        parser.error(f"--out {out}: {out.parent} cannot be written to: {error.strerror}")
    import torch

    sys.path.insert(0, str(HERE.parent))
    from sae_separation.run_folder import provenance

    def leave(number, frame):  # the folder below is then removed
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        session = Session(Path(folder), args.peers_python, quick)
        others, load = Others(), os.getloadavg()[0]
        session.prepare()
        session.matmul_peak()
        results = {
            "about": {
                "date": time.strftime("%Y-%m-%d"),
                "commit": provenance()["git"],
                "machine": machine(),
                "torch": torch.__version__,
                "load_before": load,
                "quick": quick,
            }
        }
        every = session.systems()
        few = session.systems(
            [
                ("dictionary_learning", "default"),
                ("sae_lens", "default"),
                ("sae_lens", "bf16"),
                ("sparsify", "default"),
                ("sparsify", "bf16"),
                ("ours", "default"),
            ]
        )
        lens = session.systems([("sae_lens", "default"), ("sae_lens", "bf16")])[-1:]
        parts = [
            ("curves", "", lambda: curves(session)),
            (
                "peers",
                "4096",
                lambda: peers(
                    session,
                    4096,
                    [s for s in few if s[0] != "sparsify"] if quick else every,
                    1 if quick else 3,
                ),
            ),
            ("quality", "4096", lambda: quality(session, 4096, 48 if quick else 488, lens)),
            ("costs", "4096", lambda: costs(session, 4096)),
        ]
        if not quick:
            parts.insert(2, ("peers", "16384", lambda: peers(session, 16_384, few, 2)))
            parts.append(("quality", "16384", lambda: quality(session, 16_384, 100, lens)))
        for part, size, measure in parts:  # written after each, so that nothing is lost
            if part in args.only:
                found = measure()
                results[part] = found if part == "curves" else results.get(part, {}) | {size: found}
                results["about"] |= {
                    "peak": {k: statistics.median(p[k] for p in session.peaks) for k in session.precisions},
                    "peaks": session.peaks,
                    "seconds": time.perf_counter() - session.started,
                    "cores_of_others": others.cores(),
                }
                write(results, out)
    print(table(results))


def write(results: dict, out: Path):
    """The results as JSON, Markdown and, with curves, a figure."""
    out.with_suffix(".json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    out.with_suffix(".md").write_text(table(results))
    if "curves" in results:
        draw(results["curves"], out.with_name(out.name.replace("results", "scaling")).with_suffix(".png"))


if __name__ == "__main__":
    main()
