"""One system under measurement, in a process and an interpreter of its own; bench.py starts it and tells it
what to do.

    worker.py '{"system": "sae_lens", "variant": "best", "folder": ..., "d_sae": 4096, ...}'

Reads one command a line from stdin, {"do": "lm" | "step" | "end_to_end" | "train" | "stop", ...}, and
answers each with one line of JSON on stdout, after a first line when it is ready. What libraries print
goes to stderr. Every system reads the same LM and the same contexts from `folder`, holds one ReLU SAE
(sparsify: TopK, all that it has) and takes batches of 2,048 activations. The peers' packages are those of
benchmarks/requirements.txt, in an environment of their own.

With `d_in` instead of `folder` there is no LM: activations of that width are made up on `device`, and `step`
trains an SAE of `activation` relu or topk (BatchTopK where a system has it) on them; "build" makes another.
"""

import contextlib
import gc
import itertools
import json
import math
import os
import resource
import sys
import time
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "2"))
os.environ.update(
    WANDB_MODE="disabled", HF_HUB_OFFLINE="1", SPARSIFY_DISABLE_TRITON="1", TOKENIZERS_PARALLELISM="false"
)
BATCH, LAYER = 2048, 3


def load_lm(folder: str, dtype=None):
    import torch
    from transformers import AutoModelForCausalLM

    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
        .eval()
        .requires_grad_(False)
    )


def load_contexts(folder: str, size: int = 128):
    """Tokens [context, position] in contexts of `size`."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "contexts.safetensors")["tokens"].view(-1, size)


def made_up(d_in: int, device: str):
    """Eight batches [n, row, D] of sums of 32 of 4 D directions, with a mean squared norm of about D; at
    2,304 more than a GPU's caches hold."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=generator, device=device)
    some = torch.randint(4 * d_in, (8 * BATCH, 32), generator=generator, device=device)
    weight = torch.rand(8 * BATCH, 32, generator=generator, device=device)
    x = torch.nn.functional.embedding_bag(some, directions, mode="sum", per_sample_weights=weight)
    return (x * (3 / 32) ** 0.5).view(8, BATCH, d_in)


class System:
    """What all have in common. `lm(n)`, `step(n)` and `end_to_end(n)` return how many tokens went through;
    `train(xs)` trains on given batches."""

    rows: Any  # batches, without end

    def __init__(self, spec: dict):
        self.spec, self.d_sae, self.device = spec, spec["d_sae"], spec.get("device", "cpu")
        self.low, self.compiled = (word in spec.get("variant", "") for word in ("bf16", "compiled"))
        self.batch_top_k = spec.get("activation") == "topk"
        if self.compiled:  # what was compiled for other sizes is not stretched to this one
            import torch

            torch.compiler.reset()
        if "d_in" in spec:
            self.made_up = made_up(spec["d_in"], self.device)
            self.rows = itertools.cycle(self.made_up)
            self.build_sae(spec["d_in"])
        else:
            self.build()

    def wait(self):
        """Until the device has done all that it was told to."""
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def build(self):
        """Load the LM and the contexts, and make the SAE and its optimiser."""
        raise NotImplementedError

    def build_sae(self, d_in: int):
        """Make the SAE and its optimiser alone."""
        raise NotImplementedError

    def train(self, batches):
        """Train on batches x [row, D]."""
        raise NotImplementedError

    def features_and_reconstruction(self, x):
        """f [row, F] and x_hat [row, D] of x [row, D]."""
        raise NotImplementedError

    def fvu_and_l0(self, x) -> tuple[float, float]:
        """Of the reconstruction of x [row, D], in fp32, and mean active features a row."""
        import torch

        with torch.no_grad():
            error, active = 0.0, 0
            for part in x.split(BATCH):
                f, x_hat = self.features_and_reconstruction(part)
                error, active = error + (part - x_hat).double().pow(2).sum(), active + int((f > 0).sum())
            return (error / (x - x.mean(0)).double().pow(2).sum()).item(), active / len(x)


class Ours(System):
    def __init__(self, spec: dict):
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from sae_separation import openmp

        self.waits = contextlib.ExitStack()
        self.waits.enter_context(openmp.waits_follow_load())
        super().__init__(spec)

    def build(self):
        import torch

        import experiment
        from sae_separation import process
        from sae_separation.lm import Testbed
        from sae_separation.text import Text

        process.tune_memory()
        spec = self.spec
        contexts = load_contexts(spec["folder"], spec.get("context_size", 128))
        text = cast(Text, SimpleNamespace(train=None))  # the contexts are put in its place
        special = SimpleNamespace(
            all_special_ids=[],
            added_tokens_decoder={},
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            unk_token_id=None,
        )
        lm = load_lm(spec["folder"])
        self.testbed = Testbed("bench", lm, special, spec.get("layer", LAYER), text, text, {}, "")
        self.stream = experiment.ActivationStream(
            self.testbed, contexts.shape[1], spec.get("buffer_tokens", 32_768), **spec.get("stream", {})
        )
        drawn = [0.0] * contexts.shape[1]
        self.stream.texts = [
            ((tokens, drawn) for tokens in itertools.cycle(contexts[half::2].tolist())) for half in (0, 1)
        ]
        if "activations" in spec:
            x = stored(spec["activations"], 0, 32 * BATCH)
            block = experiment.ActivationBlock(x, torch.arange(len(x)) % 2 == 0)
        else:
            self.stream.activations(self._lm_batch())
            self.lm_rss_mb = (
                int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            )  # libraries, LM, one LM batch
            block = self.stream.next_block()
        self._make_trainers(self.testbed.d_in, block)

    def build_sae(self, d_in: int):
        import torch

        import experiment

        forget = torch.arange(BATCH, device=self.device) % 2 == 0
        self.rows = itertools.cycle([(x, forget) for x in self.made_up])
        block = experiment.ActivationBlock(self.made_up.flatten(0, 1), forget.repeat(len(self.made_up)))
        self._make_trainers(d_in, block)

    def _make_trainers(self, d_in: int, block):
        import experiment
        from sae_separation.config import complete
        from sae_separation.specs import SPECS, defaults_of

        self.trainers, spec = [], self.spec
        for seed, arm in enumerate(spec.get("arms", ["vanilla"])):
            request = experiment.Request(
                arm=arm,
                tokens=10**9,
                d_sae=self.d_sae,
                k=32,
                context_size=128,
                resample_steps=0,
                compile=self.compiled,
                activation="batchtopk" if self.batch_top_k else "relu",
                **{"target_l0": 0.0} | spec.get("settings", {}),
            )
            config = complete(request, experiment.Config, "bench", defaults_of(SPECS["micro"]), d_in)
            self.trainers.append(experiment.Trainer(config, seed, d_in, spec.get("steps", 10**6), block))

    @property
    def block(self):
        """What the stream gave last."""
        assert self.stream.block, "there is one from build on, where no activations are given"
        return self.stream.block

    @cached_property
    def rows(self):
        """Four batches of the block that is there when they are first asked for, again and again."""
        batches = itertools.islice(self.block.batches(BATCH), 4)
        return itertools.cycle([(x.clone(), forget.clone()) for x, forget in batches])

    def _lm_batch(self):
        import torch

        return torch.tensor(
            [c for text in self.stream.texts for c, _ in itertools.islice(text, self.stream.n_contexts // 2)]
        )

    def lm(self, n: int) -> int:
        done = 0
        while done < n:
            done += len(self.stream.next_block().x)
        return done

    def settle(self, n: int, l0: float) -> int:
        """Train the first SAE up to n steps, until its features are as few as in most of a run: what a
        step costs depends on it. All take over its state, Adam's moments among it, and go on from step 0
        of the learning rate's rise: otherwise they would soon differ in L0.
        """
        done = 0
        while not done or done < n and self.l0 > l0:
            done += self.step(10, arm=0) // BATCH
        tensors, facts = self.trainers[0].state()
        for trainer in self.trainers:
            own = {name: getattr(trainer, name) for name in ("log_alpha", "omega")}
            own |= trainer.rounds.state() if trainer.rounds else {}
            trainer.restore(
                {name: tensor.clone() for name, tensor in (tensors | own).items()},
                facts | {"seed": trainer.seed, "steps": 0, "updates": 0},
            )
        return done * BATCH

    def step(self, n: int, arm: int | None = None) -> int:
        for i, (x, forget) in enumerate(itertools.islice(self.rows, n)):
            for trainer in self.trainers if arm is None else [self.trainers[arm]]:
                measured = trainer.step(x, forget, look=i % 25 == 0)
        self.l0 = measured["l0"].item()
        return n * BATCH

    def profile(self, n: int, what: str = "step") -> dict[str, float]:
        """Milliseconds of n steps (`step`), a step, or of n tokens through the LM (`lm`): of all kernels on
        the device, and by name of those that take the most."""
        from torch.profiler import ProfilerActivity, profile

        on_cpu = self.device == "cpu"
        with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as seen:
            getattr(self, what)(n)
            self.wait()
        took: dict[str, float] = {}
        for event in seen.key_averages():
            total = event.self_cpu_time_total if on_cpu else event.self_device_time_total
            took[event.key] = total / 1000 / (n if what == "step" else 1)
        longest = sorted(took, key=took.__getitem__, reverse=True)[:12]
        return {"all": sum(took.values())} | {name: took[name] for name in longest}

    def side_by_side(self, n: int) -> dict[str, dict]:
        """Seconds of each of n steps, of every arm by turns on the same batch, so that what the machine
        does meanwhile meets all alike; and its mean L0. Losses on W_dec count next to nothing: all of
        their work is done, and their SAEs stay as sparse as vanilla's, whose step they are held to.
        """
        out = {trainer.config.arm: {"seconds": [], "l0": []} for trainer in self.trainers}
        for trainer in self.trainers:
            if trainer.rounds:
                trainer.log_alpha.fill_(math.log(1e-8))
        for x, forget in itertools.islice(self.rows, n):
            for trainer in self.trainers:
                before = time.perf_counter()
                measured = trainer.step(x, forget)
                out[trainer.config.arm]["seconds"].append(time.perf_counter() - before)
                out[trainer.config.arm]["l0"].append(measured["l0"].item())
        return {arm: of | {"l0": sum(of["l0"]) / n} for arm, of in out.items()}

    def form_groups(self) -> list[float]:
        """Seconds that it takes to form the groups of so many features, each time, from random profiles."""
        import torch

        from sae_separation import losses

        out = []
        for _ in range(3):
            sketch, before = torch.randn(self.d_sae, 16), time.perf_counter()
            losses.form_groups(losses.firing_profile(sketch, torch.zeros(self.d_sae)), 64)
            out.append(time.perf_counter() - before)
        return out

    def memory(self) -> dict[str, float]:
        """MB of the weights with Adam's moments of all SAEs, and of one buffer of activations."""

        def size(tensors):
            return sum(t.numel() * t.element_size() for t in tensors) / 2**20

        weights = sum(
            size(t for name, t in trainer.state()[0].items() if name.startswith(("sae.", "adam.")))
            for trainer in self.trainers
        )
        return {"weights_and_moments_mb": weights, "buffer_mb": size([self.block.x])}

    def nnsight(self, n: int) -> dict[str, list[float]]:
        """Seconds of n LM batches through nnsight, stopped after the hook, and of the same through a
        forward hook that stops the LM."""
        import torch

        from sae_separation.lm import parameters_as

        class Stop(Exception):
            pass

        def stop(module, args, out):
            raise Stop

        tokens, out = self._lm_batch(), {"nnsight": [], "hook": []}
        for _ in range(n + 1):  # the first warms up
            before = time.perf_counter()
            self.stream.activations(tokens)
            out["nnsight"].append(time.perf_counter() - before)
            handle = self.testbed.lm.get_submodule(self.testbed.hook_name).register_forward_hook(stop)
            before = time.perf_counter()
            with torch.no_grad(), parameters_as(self.stream.lm.low_precision):
                try:
                    self.testbed.lm(tokens, use_cache=False)
                except Stop:
                    pass
            out["hook"].append(time.perf_counter() - before)
            handle.remove()
        return {name: values[1:] for name, values in out.items()}

    def draw(self, n: int) -> list[float]:
        """Seconds of drawing one batch from the buffer, each time."""
        out, batches = [], self.block.batches(BATCH)
        for _ in range(min(n, len(self.block.x) // BATCH)):
            before = time.perf_counter()
            next(batches)
            out.append(time.perf_counter() - before)
        return out

    def end_to_end(self, n: int) -> int:
        done = 0
        while done < n:
            self.stream.next_block()
            done += self._train_on_block()
        return done

    def _train_on_block(self) -> int:
        for x, forget in self.block.batches(BATCH):
            for trainer in self.trainers:
                trainer.step(x, forget)
        return len(self.block.x) // BATCH * BATCH

    def train(self, batches):
        import torch

        for x in batches:
            self.trainers[0].step(x, torch.arange(len(x)) % 2 == 0)

    def features_and_reconstruction(self, x):
        sae = self.trainers[0].sae
        return sae.encode(x), sae(x)


class DictionaryLearning(System):
    """0.1.0: bf16 can be asked of the LM only (`autocast_dtype` is ignored on a CPU). The default buffer
    of 30,000 contexts would take eleven minutes to fill and 7.9 GB: 320 contexts, which also makes drawing
    a batch cheaper."""

    def build(self):
        import torch
        from dictionary_learning.buffer import ActivationBuffer  # pyright: ignore[reportMissingImports]
        from nnsight import LanguageModel
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        spec = self.spec
        lm = load_lm(spec["folder"], torch.bfloat16 if spec["variant"] == "bf16" else torch.float32)
        words = Tokenizer(models.WordLevel({str(i): i for i in range(lm.config.vocab_size)}, unk_token="0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        traced = LanguageModel(
            lm,
            tokenizer=PreTrainedTokenizerFast(
                tokenizer_object=words,
                pad_token="0",
                unk_token="0",
                model_input_names=["input_ids", "attention_mask"],
            ),
        )
        contexts = load_contexts(spec["folder"])
        texts = itertools.cycle([" ".join(map(str, c)) for c in contexts.tolist()])
        self.n_ctxs = 320
        self.buffer = ActivationBuffer(
            texts,
            traced,
            traced.gpt_neox.layers[LAYER],
            d_submodule=lm.config.hidden_size,
            n_ctxs=self.n_ctxs,
            ctx_len=contexts.shape[1],
            refresh_batch_size=32,
            out_batch_size=BATCH,
            device="cpu",
        )
        self.build_sae(lm.config.hidden_size)
        if "activations" not in spec:
            self.buffer.refresh()
            self.buffer.read[: self.n_ctxs * contexts.shape[1] // 2] = (
                True  # half read: from here on, one refill to every ten batches
            )
            self.rows = itertools.cycle(self.buffer.activations.float().split(BATCH)[:4])

    def build_sae(self, d_in: int):
        import torch
        from dictionary_learning.trainers import (  # pyright: ignore[reportMissingImports]
            BatchTopKTrainer,
            StandardTrainer,
        )

        self.trainer = (BatchTopKTrainer if self.batch_top_k else StandardTrainer)(
            steps=self.spec.get("steps", 10**6),
            activation_dim=d_in,
            dict_size=self.d_sae,
            layer=LAYER,
            lm_name="bench",
            seed=0,
            device=self.device,
            **({"k": 32} if self.batch_top_k else {}),
            **self.spec.get("settings", {}),
        )
        self.steps, self.dtype, self.autocast = 0, torch.float32, contextlib.nullcontext()
        if self.low and self.device != "cpu":  # as its trainSAE does with autocast_dtype
            self.dtype, self.autocast = torch.bfloat16, torch.autocast(self.device, torch.bfloat16)

    def lm(self, n: int) -> int:
        done = 0
        while done < n:
            self.buffer.read[self.buffer.activation_buffer_size // 2 :] = True
            self.buffer.refresh()
            done += self.buffer.activation_buffer_size // 2
        self.buffer.read[: self.buffer.activation_buffer_size // 2] = True
        return done

    def _update(self, x):
        x = x.to(self.dtype)
        with self.autocast:
            self.trainer.update(self.steps, x)
        self.steps += 1

    def step(self, n: int) -> int:
        for x in itertools.islice(self.rows, n):
            self._update(x)
        return n * BATCH

    def end_to_end(self, n: int) -> int:
        n = math.ceil(n / (10 * BATCH)) * 10  # whole cycles of the buffer
        for x in itertools.islice(self.buffer, n):
            self._update(x.float())
        return n * BATCH

    def train(self, batches):
        for x in batches:
            self._update(x / x.shape[1] ** 0.5)  # its losses are made for a mean squared norm of 1

    def features_and_reconstruction(self, x):
        x_hat, f = self.trainer.ae(x / x.shape[1] ** 0.5, output_features=True)
        return f, x_hat * x.shape[1] ** 0.5


class SAELens(System):
    """Defaults (fp32), the SAE's step compiled, and both with autocast in bfloat16 for LM and SAE; its
    HookedProxyLM stops at the hook."""

    def build(self):
        import datasets
        from sae_lens.load_model import HookedProxyLM
        from sae_lens.training.activations_store import ActivationsStore

        spec = self.spec
        contexts = load_contexts(spec["folder"])
        lm = load_lm(spec["folder"])
        ids: Any = SimpleNamespace(bos_token_id=0, eos_token_id=0, sep_token_id=0, all_special_ids=[0])
        self.build_sae(lm.config.hidden_size, contexts.shape[1])
        dataset = datasets.Dataset.from_dict({"tokens": contexts.tolist()})
        self.store = ActivationsStore.from_config(
            HookedProxyLM(lm, ids, hook_names=[self.cfg.hook_name]), self.cfg, override_dataset=dataset
        )
        self.trainer.data_provider = self.store
        if "activations" not in spec:
            self.rows = itertools.cycle([next(self.store) for _ in range(4)])

    def build_sae(self, d_in: int, context_size: int = 128):
        import sae_lens
        from sae_lens.saes import batchtopk_sae, standard_sae
        from sae_lens.training.sae_trainer import SAETrainer

        spec, size = self.spec, {"d_in": d_in, "d_sae": self.d_sae} | self.spec.get("sae", {})
        if self.batch_top_k:
            kind: Any = batchtopk_sae.BatchTopKTrainingSAE
            of_sae = batchtopk_sae.BatchTopKTrainingSAEConfig(k=32, **size)
        else:
            kind, of_sae = standard_sae.StandardTrainingSAE, standard_sae.StandardTrainingSAEConfig(**size)
        cfg = self.cfg = sae_lens.LanguageModelSAERunnerConfig(
            sae=of_sae,
            model_name="bench",
            hook_name=f"gpt_neox.layers.{LAYER}",
            dataset_path="bench",
            is_dataset_tokenized=True,
            streaming=False,
            context_size=context_size,
            training_tokens=spec.get("steps", 10**5) * BATCH,
            train_batch_size_tokens=BATCH,
            autocast=self.low,
            autocast_lm=self.low,
            compile_sae=self.compiled,
            logger=sae_lens.LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=None,
            device=self.device,
            exclude_special_tokens=False,
            **spec.get("settings", {}),
        )
        sae = kind(cfg.sae).to(self.device)
        if cfg.compile_sae:
            import torch

            sae.training_forward_pass = torch.compile(
                sae.training_forward_pass, mode=cfg.sae_compilation_mode
            )
        nothing: Any = iter(())  # in place of a store, where there is no LM
        self.trainer = SAETrainer(cfg=cfg.to_sae_trainer_config(), sae=sae, data_provider=nothing)

    def lm(self, n: int) -> int:
        done = 0
        while done < n:
            done += len(self.store.get_raw_llm_batch()[0])
        return done

    def _update(self, x):
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def step(self, n: int) -> int:
        for x in itertools.islice(self.rows, n):
            self._update(x)
        return n * BATCH

    def end_to_end(self, n: int) -> int:
        n = math.ceil(n / BATCH)
        for x in itertools.islice(self.store, n):
            self._update(x)
        return n * BATCH

    def train(self, batches):
        for x in batches:
            self._update(x)

    def features_and_reconstruction(self, x):
        f = self.trainer.sae.encode(x)
        return f, self.trainer.sae.decode(f)


class Sparsify(System):
    """TopK only, and the whole LM without its head (AutoModel, as its own command takes it): fp32, and the
    LM in bfloat16."""

    def build(self):
        import torch
        from transformers import GPTNeoXModel

        spec = self.spec
        lm = load_lm(spec["folder"], torch.bfloat16 if spec["variant"] == "bf16" else torch.float32)
        self.model = cast(GPTNeoXModel, lm.gpt_neox)
        contexts = load_contexts(spec["folder"])
        self._make_trainer(contexts)
        kept = []
        hook = self.model.layers[LAYER].register_forward_hook(
            lambda module, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for batch in contexts[: 4 * self.per_batch].split(self.per_batch):
            self.model(batch)
        hook.remove()
        self.rows = itertools.cycle([x.flatten(0, 1).float() for x in kept])

    def build_sae(self, d_in: int):
        """Its Trainer reads off an LM how wide the SAE is: here a small one."""
        import torch
        from transformers import GPTNeoXConfig, GPTNeoXModel

        if self.device != "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "0"
            torch.set_float32_matmul_precision("high")  # as its fit does
        config = GPTNeoXConfig(
            hidden_size=d_in,
            vocab_size=200,
            num_hidden_layers=LAYER + 1,
            num_attention_heads=8,
            intermediate_size=64,
        )
        self.model = GPTNeoXModel(config).to(self.device)  # pyright: ignore[reportArgumentType]
        self._make_trainer(torch.zeros(BATCH, 1, dtype=torch.long))

    def _make_trainer(self, contexts):
        import datasets
        from sparsify import SaeConfig, TrainConfig, Trainer  # pyright: ignore[reportMissingImports]

        self.contexts, self.per_batch = contexts, BATCH // contexts.shape[1]
        self.dataset = datasets.Dataset.from_dict({"input_ids": contexts.tolist()}).with_format("torch")
        config = TrainConfig(
            SaeConfig(num_latents=self.d_sae, k=32),
            batch_size=self.per_batch,
            hookpoints=[f"layers.{LAYER}"],
            log_to_wandb=False,
            save_every=10**9,
        )
        self.trainer = Trainer(config, self.dataset, self.model)
        self.trainer.save = lambda: None  # it would write the SAE after every call of fit
        self.sae = next(iter(self.trainer.saes.values()))

    def lm(self, n: int) -> int:
        done, batches = 0, itertools.cycle(self.contexts.split(self.per_batch))
        while done < n:
            batch = next(batches)
            self.model(batch)
            done += batch.numel()
        return done

    def step(self, n: int) -> int:
        """What the hook and fit do with a batch."""
        for x in itertools.islice(self.rows, n):
            self.sae.set_decoder_norm_to_unit_norm()
            self.sae(x, x, total_variance=(x - x.mean(0)).pow(2).sum()).fvu.backward()
            self.sae.remove_gradient_parallel_to_decoder_directions()
            for optimizer in self.trainer.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return n * BATCH

    def end_to_end(self, n: int) -> int:
        n = math.ceil(n / BATCH)
        self.trainer.dataset, self.trainer.global_step = self.dataset.select(range(n * self.per_batch)), 0
        self.trainer.fit()
        return n * BATCH


SYSTEMS = {"ours": Ours, "dictionary_learning": DictionaryLearning, "sae_lens": SAELens, "sparsify": Sparsify}


def stored(path: str, start: int, end: int):
    """Rows of the stored activations, scaled to a mean squared norm of D, in fp32."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_slice("x")[start:end].float()


def store(system: Ours, command: dict) -> dict:
    """Write activations of the stream, scaled so that the mean of ||x||² is D; `variance` is their total
    variance over D."""
    import torch
    from safetensors.torch import save_file

    x, done, block = (
        torch.empty(command["n"], system.testbed.d_in, dtype=torch.bfloat16),
        0,
        system.block,
    )
    scale = (block.x.shape[1] / block.x.pow(2).sum(1).mean()).sqrt()
    while done < len(x):
        part = block.x[: len(x) - done] * scale
        x[done : done + len(part)] = part
        done, block = done + len(part), system.stream.next_block()
    save_file({"x": x}, command["path"])
    part = part.double()
    return {"variance": ((part - part.mean(0)).pow(2).sum() / part.numel()).item()}


def rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def scaling(system: Ours, command: dict) -> dict:
    """Many tokens through a small SAE: tokens/s and peak memory as they pass."""
    seen, done, started, out = list(command["at"]), 0, time.perf_counter(), []
    while seen:
        done += system.end_to_end(1)
        while seen and done >= seen[0]:
            out.append({"tokens": done, "seconds": time.perf_counter() - started, "peak_rss_mb": rss_mb()})
            seen.pop(0)
    return {"curve": out}


def quality(system: System, command: dict) -> dict:
    """Train on the stored activations, in their order; then FVU and L0 on the last rows, which are not
    trained on."""
    path, n = system.spec["activations"], system.spec["steps"] * BATCH
    started = time.perf_counter()
    system.train(stored(path, i, i + BATCH) for i in range(0, n, BATCH))
    seconds = time.perf_counter() - started
    fvu, l0 = system.fvu_and_l0(stored(path, n, n + 8 * BATCH))
    return {"explained_variance": 1 - fvu, "l0": l0, "tokens": n, "seconds": seconds}


def main():
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print

    def say(value):
        return print(json.dumps(value), file=answer, flush=True)

    spec, started = json.loads(sys.argv[1]), time.perf_counter()
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    system = SYSTEMS[spec["system"]](spec)
    from importlib.metadata import version

    package = {
        "ours": "torch",
        "dictionary_learning": "dictionary-learning",
        "sae_lens": "sae-lens",
        "sparsify": "eai-sparsify",
    }[spec["system"]]
    say(
        {
            "ready_seconds": time.perf_counter() - started,
            "torch": torch.__version__,
            package: version(package),
            "rss_mb": rss_mb(),
            "lm_rss_mb": getattr(system, "lm_rss_mb", None),
        }
    )
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "stop":
            break
        if command["do"] in ("quality", "scaling", "store"):
            say({"quality": quality, "scaling": scaling, "store": store}[command["do"]](system, command))
            continue
        if command["do"] == "build":
            system = None  # lets go of the one before
            gc.collect()
            torch.cuda.empty_cache()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            before, spec = time.perf_counter(), spec | command
            system = SYSTEMS[spec["system"]](spec)
            system.wait()
            say({"ready_seconds": time.perf_counter() - before})
            continue
        if command["do"] in ("side_by_side", "form_groups", "memory", "nnsight", "draw", "profile"):
            say(getattr(system, command.pop("do"))(**command))
            continue
        before = time.perf_counter()
        tokens = getattr(system, command.pop("do"))(**command)
        system.wait()
        seconds = time.perf_counter() - before
        say(
            {
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "l0": getattr(system, "l0", None),
                "peak_device_mb": torch.cuda.max_memory_allocated() / 2**20,
            }
        )
    say({"peak_rss_mb": rss_mb()})


if __name__ == "__main__":
    main()
