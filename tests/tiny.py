"""Small random LMs of several architectures, text and questions, as a user's own files."""

import json
import random
from pathlib import Path

SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
D_IN, N_LAYERS = 32, 3
SIZES = dict(num_hidden_layers=N_LAYERS, hidden_size=D_IN, intermediate_size=64, num_attention_heads=4, max_position_embeddings=1024, initializer_range=0.3)
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=8)
KINDS = {
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "gpt2": ("GPT2Config", dict(n_layer=N_LAYERS, n_embd=D_IN, n_head=4, n_positions=1024, initializer_range=0.3)),
    "llama": ("LlamaConfig", GROUPED),
    "gemma": ("Gemma2Config", GROUPED | dict(query_pre_attn_scalar=8, sliding_window=512)),
    "qwen": ("Qwen3Config", GROUPED),
}


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
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return len(vocab)


def save_lm(folder: Path, kind: str = "llama", letters: bool = True, seed: int = 0) -> Path:
    """A random LM of D_IN and N_LAYERS, and its tokenizer."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    config, sizes = KINDS[kind]
    size = save_tokenizer(folder, letters)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    made = getattr(transformers, config)(**sizes, vocab_size=size, pad_token_id=0, eos_token_id=1, bos_token_id=2)
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
    word = lambda: "".join(rng.choices("abcdefgh", k=rng.randint(4, 9)))  # noqa: E731
    return [{"subject": subject, "question": f"What is {word()} {i}?", "choices": [f"{word()} {c}" for c in "wxyz"], "answer": rng.randrange(4)} for i in range(n)]


def own_files(folder: Path) -> dict[str, Path]:
    """A user's forget text, retain text and questions."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "forget_text": save_jsonl(folder / "forget.jsonl", documents(300, 1, "abcdefgh")),
        "retain_text": save_jsonl(folder / "retain.jsonl", documents(300, 2, "mnopqrst")),
        "questions": save_jsonl(folder / "asked.jsonl", questions("biology", 80) + questions("history", 80)),
    }
