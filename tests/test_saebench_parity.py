"""Our way into SAEBench's unlearning protocol gives the numbers of SAEBench's own, on an LM that it accepts
by itself.

SAEBench knows Gemma by name. A small Gemma-2 with random weights, once as a HookedTransformer called
gemma-2-2b-it in SAEBench's unpatched code, once as a transformers model in ours: same prompts, same
answers, same sweep, same score.
"""

import random
from functools import partial
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import numpy_state
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

import experiment
from sae_separation import process, saebench
from sae_separation.evals.evaluator import Evaluator, Questions
from sae_separation.evals.unlearning import sweep, sweeps
from sae_separation.exam import special_ids
from sae_separation.export import export, load_exported
from sae_separation.lm import InterventionLM, Testbed
from sae_separation.questions import Question
from sae_separation.text import Text

LAYER, D_IN = 1, 32
SUBJECTS = {"wmdp-bio": 40, "high_school_geography": 30, "human_aging": 30}


def gemma_tokenizer(folder):
    """Byte-level, with Gemma's special tokens and whole-token letters."""
    vocab = {t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"])}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab.setdefault(byte, len(vocab))
    for letter in "ABCD":
        vocab.setdefault(f"Ġ{letter}", len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", letter) for letter in "ABCD"]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(
        folder
    )  # transformer_lens reloads a tokenizer from where it came from


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The random LM as transformers has it and as SAEBench wants it, and its tokenizer."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    torch.manual_seed(0)
    tokenizer = gemma_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    vocab = len(tokenizer)
    config = Gemma2Config(
        vocab_size=vocab,
        hidden_size=D_IN,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        sliding_window=512,
        query_pre_attn_scalar=8,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    config._attn_implementation = "eager"
    hf = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    hooked = HookedTransformer(
        HookedTransformerConfig(
            n_layers=3,
            d_model=D_IN,
            n_ctx=512,
            d_head=8,
            n_heads=4,
            d_mlp=64,
            d_vocab=vocab,
            act_fn="gelu_pytorch_tanh",
            normalization_type="RMS",
            eps=1e-6,
            rotary_base=10_000.0,
            positional_embedding_type="rotary",
            use_attn_scale=True,
            attn_scale=8**0.5,
            n_key_value_heads=2,
            window_size=512,
            use_local_attn=True,
            attn_types=["local", "global", "local"],
            attn_scores_soft_cap=50.0,
            output_logits_soft_cap=30.0,
            gated_mlp=True,
            final_rms=True,
            use_normalization_before_and_after=True,
            rotary_dim=8,
            model_name="gemma-2-2b-it",
            original_architecture="Gemma2ForCausalLM",
            default_prepend_bos=True,
            device="cpu",
            seed=0,
        ),
        tokenizer=tokenizer,
        default_padding_side="right",
    )
    hooked.load_state_dict(convert_gemma_weights(hf, hooked.cfg), strict=False)
    hooked.eval().requires_grad_(False)
    return hf, hooked, tokenizer


@pytest.fixture(scope="module")
def questions():
    rng = random.Random(3)

    def word():
        return "".join(rng.choices("abcdefghij", k=rng.randint(3, 6)))

    return {
        s: [
            Question(
                "biology" if s == "wmdp-bio" else s,
                f"what is {word()}?",
                tuple(word() for _ in range(4)),
                rng.randrange(4),
            )
            for _ in range(n)
        ]
        for s, n in SUBJECTS.items()
    }


@pytest.fixture(scope="module")
def sae(tmp_path_factory, gemma):
    hf, hooked, _ = gemma
    module = experiment.OrthogonalSAE(D_IN, 64, seed=0)
    with torch.no_grad():
        module.b_enc.sub_(0.5)
    folder = tmp_path_factory.mktemp("sae")
    export(
        module,
        folder,
        {
            "model_name": "gemma-2-2b-it",
            "hook_name": f"blocks.{LAYER}.hook_resid_post",
            "hook_layer": LAYER,
            "context_size": 32,
            "prepend_bos": True,
        },
    )
    return load_exported(folder)


@pytest.fixture
def ours(gemma, questions):
    """An Evaluator around the transformers model, without its corpora."""
    hf, _, tokenizer = gemma
    nothing = Dataset.from_dict({"text": []})
    evaluator, no_text = Evaluator.__new__(Evaluator), Text(nothing, nothing)
    named = {("bio" if s == "wmdp-bio" else s): q for s, q in questions.items()}
    evaluator.testbed = Testbed(
        "gemma-2-2b-it",
        hf,
        tokenizer,
        LAYER,
        no_text,
        no_text,
        named,
        "bio",
        "letter",
        "GEMMA_INST_FORMAT",
        "absolute",
    )
    evaluator.lm = InterventionLM(evaluator.testbed)
    evaluator.questions = Questions(evaluator.testbed, evaluator.lm)
    evaluator.questions.by_subject = questions
    evaluator.artifacts = process.private_folder(evaluator, "saebench")
    vars(evaluator)["retain_residuals"] = None
    evaluator._firing = WeakKeyDictionary()
    return evaluator


def answers(ours, **asked):
    """As SAEBench is given them."""
    return saebench.mcq_metrics(ours.questions.ask, ours.lm, 64, str(ours.artifacts), **asked)


def serve(questions):
    """SAEBench asks the hub for its questions; nothing else of it is replaced."""
    rows = {s: [vars(q) | {"choices": list(q.choices)} for q in qs] for s, qs in questions.items()}
    return lambda path, name, split: rows[name]


def test_the_two_forms_of_the_lm_agree(gemma):
    hf, hooked, _ = gemma
    tokens = torch.randint(5, 200, (3, 40))
    torch.testing.assert_close(hooked(tokens), hf(tokens).logits, atol=2e-4, rtol=1e-3)


def test_letter_answers_equal_saebench_unpatched_with_and_without_question(gemma, questions, ours):
    from sae_bench.evals.unlearning.utils import metrics

    _, hooked, _ = gemma
    for without_question in (False, True):
        for name in SUBJECTS:
            asked: dict[str, Any] = dict(
                dataset_name=name,
                permutations=saebench.ALL_PERMUTATIONS[::5],
                without_question=without_question,
            )
            with patch.object(metrics, "load_dataset", serve(questions)):
                theirs = metrics.calculate_MCQ_metrics(
                    hooked, 64, str(ours.artifacts), verbose=False, **asked
                )
            mine = answers(ours, **asked)
            np.testing.assert_allclose(mine["output_probs"], theirs["output_probs"], atol=2e-3)
            assert (mine["is_correct"] == theirs["is_correct"]).mean() > 0.999
            assert 0.1 < theirs["mean_correct"] < 0.6, "the comparison would be empty"


def test_a_question_that_is_wrong_once_is_not_asked_again(gemma, ours):
    """Right under all permutations is what the whole exam says, for a seventh of its prompts."""
    asked = []
    ask, ours.questions._plain = ours.lm.ask, {}
    with patch.object(
        ours.lm, "ask", lambda batch, read: asked.append(len(batch.tokens)) or ask(batch, read)
    ):
        found = {name: ours.questions.ask(name, None, saebench.ALL_PERMUTATIONS) for name in SUBJECTS}
    n_asked, n_questions, n_right = sum(asked), 0, 0
    for name, (probs, answers) in found.items():
        exam = ours.questions.exam(name, None, tuple(map(tuple, saebench.ALL_PERMUTATIONS)))
        whole = exam.probs_from(partial(ours.lm.ask, read=exam.read))
        assert torch.equal(answers, exam.answers)
        every = saebench.right(probs, answers).view(-1, 24).all(1)
        assert torch.equal(every, (whole.argmax(-1) == answers).view(-1, 24).all(1))
        torch.testing.assert_close(probs[~probs.isnan()], whole[~probs.isnan()], atol=1e-5, rtol=1e-4)
        n_questions, n_right = n_questions + len(every), n_right + int(every.sum())
    assert n_asked < (24 * n_questions + 6 * 24 * n_right) / 7 and n_right < n_questions


def test_the_sweep_and_its_score_equal_saebench_unpatched(gemma, questions, ours, sae, tmp_path, monkeypatch):
    """SAEBench clamps the turn markers of a chat prompt, on which no SAE is trained; for the comparison we
    do, too."""
    monkeypatch.setattr(
        "sae_separation.exam.special_ids", lambda tokenizer: torch.tensor([tokenizer.bos_token_id])
    )
    from sae_bench.evals.unlearning import main as unlearning
    from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
    from sae_bench.evals.unlearning.utils import eval as sweep_eval
    from sae_bench.evals.unlearning.utils import feature_activation, metrics

    _, hooked, _ = gemma
    rng = np.random.default_rng(0)
    forget_rate, retain_rate = rng.uniform(0.01, 0.5, 64), np.where(rng.random(64) < 0.5, 0.0005, 0.005)
    settings = {"retain_thresholds": [0.001, 0.01], "n_features_list": [5, 20], "multipliers": [2, 20]}

    def prepare(folder):
        """A random LM knows nothing: let the known questions be those it gets right as listed (SAEBench
        then skips its search)."""
        for name in SUBJECTS:
            right = answers(ours, dataset_name=name)["is_correct"].nonzero()[0]
            full = name if name == "wmdp-bio" else f"mmlu-{name.replace('_', '-')}"
            for split in ("train", "test", "all"):
                (folder / "data/question_ids" / split).mkdir(parents=True, exist_ok=True)
                for kind in ("correct", "correct-iff-question", "correct-no-tricks"):
                    np.savetxt(folder / "data/question_ids" / split / f"{full}_{kind}.csv", right, fmt="%d")

    prepare(tmp_path)
    sparsities = tmp_path / "sae" / feature_activation.SPARSITIES_DIR
    sparsities.mkdir(parents=True)
    np.savetxt(sparsities / feature_activation.FORGET_FILENAME, forget_rate, fmt="%f")
    np.savetxt(sparsities / feature_activation.RETAIN_FILENAME, retain_rate, fmt="%f")
    config = UnlearningEvalConfig(
        dataset_names=list(SUBJECTS),
        model_name="gemma-2-2b-it",
        llm_batch_size=32,
        llm_dtype="float32",
        **settings,
    )
    with patch.object(metrics, "load_dataset", serve(questions)), torch.no_grad():
        sweep_eval.run_eval_single_sae(hooked, sae, config, str(tmp_path), "sae", force_rerun=False)
    theirs = unlearning.get_metrics_df(str(tmp_path / "sae/results/metrics"))
    their_score = unlearning.get_unlearning_scores(theirs)

    prepare(ours.artifacts)
    chosen = ours.choose(sae, (forget_rate, retain_rate), torch.ones(64), settings["retain_thresholds"])
    rates = forget_rate, retain_rate
    cells, score = sweep(ours, chosen, rates, "sae", list(SUBJECTS), **settings)
    assert score == pytest.approx(their_score) and len(cells) == len(theirs) == 8
    for cell in cells:
        row = theirs[
            (theirs.retain_thres == cell["retain_threshold"])
            & (theirs.n_features == cell["n_features"])
            & (theirs.multiplier == cell["multiplier"])
        ].iloc[0]
        assert cell["forget_accuracy"] == pytest.approx(row["wmdp-bio"], abs=1e-6)
        assert cell["retain_accuracy"] == pytest.approx(row["all_side_effects_mcq"], abs=1e-6)
    assert len({round(c["forget_accuracy"], 6) for c in cells}) > 2, (
        "the interventions must do something for this to mean anything"
    )


def test_firing_rates_equal_saebench_unpatched(gemma, ours, sae):
    from sae_bench.sae_bench_utils.activation_collection import get_feature_activation_sparsity

    _, hooked, tokenizer = gemma
    tokens = torch.randint(5, 200, (8, 32))
    tokens[:, 0] = tokenizer.bos_token_id
    tokens[:, 11] = tokenizer.eos_token_id
    theirs = get_feature_activation_sparsity(
        tokens,
        hooked,
        sae,
        batch_size=4,
        layer=LAYER,
        hook_name=f"blocks.{LAYER}.hook_resid_post",
        mask_bos_pad_eos_tokens=True,
    )
    ours.select = {d: (tokens, ours.lm.resid(tokens)) for d in ("forget", "retain")}
    ours.special = special_ids(tokenizer)
    rate = ours.firing(sae).forget
    torch.testing.assert_close(rate, theirs.float(), atol=2e-3, rtol=1e-3)
    assert 0.01 < rate.mean() < 0.99


def test_global_state_is_as_before(gemma, questions, ours, sae):
    import os

    answers(ours, dataset_name="wmdp-bio")
    state, torch_state, cwd, environ = (
        numpy_state(),
        torch.get_rng_state(),
        os.getcwd(),
        dict(os.environ),
    )
    with (
        patch.object(ours.questions, "ask", side_effect=RuntimeError("stop")),
        pytest.raises(RuntimeError, match="stop"),
    ):
        sweeps(
            ours,
            sae,
            (np.ones(64), np.zeros(64)),
            torch.ones(64),
            "broken",
            list(SUBJECTS),
            [0.001, 0.01],
            [0.1],
        )
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert numpy_state() == state and torch.equal(torch.get_rng_state(), torch_state)
    assert os.getcwd() == cwd and dict(os.environ) == environ
    assert ours.lm.hook is None
