"""Small random LMs of several architectures, text and questions, as a user's own files."""

import json
import random
from pathlib import Path
from typing import TypeVar

import numpy as np

from sae_separation.config import bounds_of

T = TypeVar("T")


def there(value: T | None) -> T:
    """A value that may be None where it must not be."""
    assert value is not None
    return value


def another_value(option):
    """Of an arm's option (config.option): an eighth of its default, or what its bounds allow."""
    least = bounds_of(option).least
    if isinstance(option.default, str):
        return f"{option.default}another"
    value = type(option.default)(option.default / 8)
    return value if least is None or value >= least else max(least, 2 * option.default)


def numpy_state() -> str:
    """The whole state of numpy's global generator."""
    return repr(np.random.get_state())


SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
D_IN, N_LAYERS = 32, 3
SIZES = dict(
    num_hidden_layers=N_LAYERS,
    hidden_size=D_IN,
    intermediate_size=64,
    num_attention_heads=4,
    max_position_embeddings=1024,
    initializer_range=0.3,
)
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=8)
KINDS = {
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "gpt2": (
        "GPT2Config",
        dict(n_layer=N_LAYERS, n_embd=D_IN, n_head=4, n_positions=1024, initializer_range=0.3),
    ),
    "llama": ("LlamaConfig", GROUPED),
    "gemma": ("Gemma2Config", GROUPED | dict(query_pre_attn_scalar=8, sliding_window=512)),
    "qwen": ("Qwen3Config", GROUPED),
}
SPREAD = dict(initializer_range=0.3)
OWN_SIZES = dict(hidden_size=D_IN) | SPREAD
GPT_NEO = dict(num_layers=N_LAYERS, num_heads=4, attention_types=[[["global"], 1], [["local"], 2]])
FURTHER_KINDS = {  # layers that put out tuples or lists, ALiBi or a table of places, other names of sizes
    "gpt_neo": ("GPTNeoConfig", OWN_SIZES | GPT_NEO),
    "mpt": ("MptConfig", dict(d_model=D_IN, n_heads=4, n_layers=N_LAYERS, max_seq_len=1024) | SPREAD),
    "falcon": ("FalconConfig", SIZES | dict(alibi=True)),
    "bloom": ("BloomConfig", OWN_SIZES | dict(n_layer=N_LAYERS, n_head=4)),
    "stablelm": ("StableLmConfig", SIZES | dict(num_key_value_heads=2)),
    "openai": ("OpenAIGPTConfig", dict(n_layer=N_LAYERS, n_embd=D_IN, n_head=4, n_positions=1024) | SPREAD),
}
WINDOW = dict(sliding_window=16)
CHUNKS = dict(attention_chunk_size=16, intermediate_size_mlp=64, no_rope_layers=[1, 0, 1])
MOE = dict(num_local_experts=4, num_experts_per_tok=2)
QWEN_WINDOW = WINDOW | dict(use_sliding_window=True, max_window_layers=1)
LONG = dict(original_max_position_embeddings=48)
FACTORS = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=20.0)
LONG_ROPE = LONG | FACTORS | dict(rope_type="longrope", rope_theta=1e4)
WINDOWED_KINDS = {  # layers that see the last 16 tokens alone; or other places in batches of over 48 tokens
    "mistral": ("MistralConfig", GROUPED | WINDOW),
    "phi3": ("Phi3Config", SIZES | dict(num_key_value_heads=2) | WINDOW),
    "cohere2": ("Cohere2Config", GROUPED | WINDOW | dict(logit_scale=1.0)),
    "gpt_oss": ("GptOssConfig", GROUPED | MOE | WINDOW),
    "gemma2": ("Gemma2Config", GROUPED | WINDOW | dict(query_pre_attn_scalar=8)),
    "gemma3": ("Gemma3TextConfig", GROUPED | WINDOW | dict(query_pre_attn_scalar=8)),
    "qwen2": ("Qwen2Config", SIZES | QWEN_WINDOW | dict(num_key_value_heads=2, vocab_size=300)),
    "qwen3": ("Qwen3Config", GROUPED | QWEN_WINDOW),
    "llama4": ("Llama4TextConfig", GROUPED | MOE | CHUNKS),
    "phi3_long": ("Phi3Config", SIZES | LONG | dict(num_key_value_heads=2, rope_parameters=LONG_ROPE)),
    "gpt_neo_window": ("GPTNeoConfig", FURTHER_KINDS["gpt_neo"][1] | dict(window_size=16)),
}


def config(**settings):
    """A run's Config on the embedded testbed, without loading it."""
    import experiment
    from sae_separation.config import complete
    from sae_separation.specs import SPECS, defaults_of

    request, defaults = experiment.Request(**settings), defaults_of(SPECS["micro"])
    return complete(request, experiment.Config, "micro", defaults, d_in=128)


def save_tokenizer(folder: Path, letters: bool = True):
    """Byte-level with Gemma's special tokens; with `letters`, " A" to " D" are whole tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(SPECIAL)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab.setdefault(byte, len(vocab))
    merges = [("Ġ", letter) for letter in "ABCD"] if letters else []
    for first, second in merges:
        vocab[first + second] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return len(vocab)


def save_prefix_space_tokenizer(folder: Path):
    """As Llama-2's: a text gets a space in front, and spaces belong to words behind them: "▁A", "▁the"."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, "▁", *sorted(set(map(chr, range(33, 127)))), "\n"]
    merges = [*(("▁", letter) for letter in "ABCDt"), ("h", "e"), ("▁t", "he")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.add_special_tokens(SPECIAL)
    roles = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)


def save_merging_tokenizer(folder: Path):
    """The same, but ":", a space and an "x" behind it are one token."""
    save_prefix_space_tokenizer(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    for pair in ((":", "▁"), (":▁", "x")):
        saved["model"]["vocab"]["".join(pair)] = len(saved["model"]["vocab"])
        saved["model"]["merges"].append(list(pair))
    (folder / "tokenizer.json").write_text(json.dumps(saved))


def save_lm(folder: Path, kind: str = "llama", letters: bool = True, seed: int = 0) -> Path:
    """A random LM of D_IN and N_LAYERS, and its tokenizer."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    config, sizes = (KINDS | FURTHER_KINDS | WINDOWED_KINDS)[kind]
    size = save_tokenizer(folder, letters)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    ids = dict(vocab_size=size, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    made = getattr(transformers, config)(**ids | sizes)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder


def documents(n: int, seed: int, letters: str = "abcdefgh") -> list[str]:
    """Prose of a kind: about 300 characters a document."""
    rng = random.Random(seed)
    return [" ".join("".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(50)) for _ in range(n)]


def save_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(r if isinstance(r, dict) else {"text": r}) + "\n" for r in rows))
    return path


def questions(subject: str, n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(f"{subject}{seed}")

    def word():
        return "".join(rng.choices("abcdefgh", k=rng.randint(4, 9)))

    return [
        {
            "subject": subject,
            "question": f"What is {word()} {i}?",
            "choices": [f"{word()} {c}" for c in "wxyz"],
            "answer": rng.randrange(4),
        }
        for i in range(n)
    ]


def own_files(folder: Path) -> dict[str, Path]:
    """A user's forget text, retain text and questions."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "forget_text": save_jsonl(folder / "forget.jsonl", documents(300, 1, "abcdefgh")),
        "retain_text": save_jsonl(folder / "retain.jsonl", documents(300, 2, "mnopqrst")),
        "questions": save_jsonl(folder / "asked.jsonl", questions("biology", 80) + questions("history", 80)),
    }
