"""A prompt continued by a run's LM, as it is and with the knowledge switched off.

python -m sae_separation.generate run_6 "Question: ..."
python -m sae_separation.generate run_6 "Question: ..." --seed 1 --cell unlearning --max_new_tokens 60
"""

import argparse
import sys

from sae_separation.errors import WrongRequest, begin, finish, tell
from sae_separation.parser import Parser
from sae_separation.saved_run import load_run


def arguments(argv: list[str]) -> argparse.Namespace:
    """Raises WrongRequest."""
    parser = Parser("python -m sae_separation.generate", __doc__)
    parser.add_argument("run", help="folder of a complete run, its SAEs in it")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--seed", type=int, help="which of the run's seeds (default: the first)")
    parser.add_argument("--cell", help="name of a cell (default: the best one, which is printed)")
    parser.add_argument("--max_new_tokens", type=int, default=40, help="tokens to add, at most (default: 40)")
    parser.add_argument("--lm", default="", help="folder or hub name of an LM in place of the run's own")
    given = parser.parse_args(argv)
    if given.max_new_tokens < 1:
        raise WrongRequest(f"--max_new_tokens {given.max_new_tokens}: give at least 1")
    return given


def continued(lm, tokenizer, prompt: str, n: int, use_cache: bool = True) -> str:
    """The prompt with the likeliest continuation of at most n tokens, behind a BOS where there is one, as
    questions are asked."""
    import torch

    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = torch.tensor([bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=lm.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how = {"do_sample": False, "max_new_tokens": n, "use_cache": use_cache, "pad_token_id": pad}
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return prompt + tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def show(given: argparse.Namespace):
    """Print both continuations. Raises WrongRequest."""
    run = load_run(given.run)
    cell = run.cell(given.seed, given.cell)
    run.sae_folder(given.seed)
    from sae_separation.switch import switched_off

    lm, tokenizer = run.load_lm(given.lm)
    off = switched_off(lm, run, seed=given.seed, cell=given.cell, tokenizer=tokenizer)
    n = given.max_new_tokens
    print(f"cell: {cell.name}" + (f": {cell.described}" if cell.described != cell.name else ""))
    print(f"--- without\n{continued(lm, tokenizer, given.prompt, n)}")
    with off:
        print(f"--- switched off\n{continued(lm, tokenizer, given.prompt, n, use_cache=not off.sees_rows)}")


def main(argv: list[str]) -> int:
    """Exit code of the command. But for 0, the last line on stderr says why."""
    try:
        show(arguments(argv))
        return 0
    except Exception as error:
        return tell(error, take_less="give a shorter prompt")


if __name__ == "__main__":
    begin()
    finish(main(sys.argv[1:]))
