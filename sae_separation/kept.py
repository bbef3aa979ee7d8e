"""Activations kept on disk (--activations): the stream's shuffled blocks, to train from without the LM.

    kept = cache_of(command, stream, testbed, settings, n_steps)      # None without --activations
    kept.next_block(stream)                                           # as it is kept, or from the LM

    cache/0123456789abcdef/about.json               # of what the blocks are: LM, layer, text, precision, ...
                           block_000000.safetensors

What the blocks depend on names their folder, so that those of another LM or text lie apart. The cache is no
part of a run: with it or without, the same SAEs come out, to the bit. torch is imported where it is used.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_separation import process, ranks
from sae_separation.errors import WrongRequest
from sae_separation.files import (
    HALF_WRITTEN,
    CannotWrite,
    Unusable,
    cause_and_remedy,
    gigabytes,
    header,
    read_sealed,
    read_tensors,
    seal,
    whole,
    write_json,
    writing,
)
from sae_separation.run_folder import made_on

if TYPE_CHECKING:
    from torch import Tensor

    from sae_separation.blocks import ActivationBlock
    from sae_separation.lm import Testbed

FORMAT = "sae-separation-activations-1"  # another one where the stream gives other blocks than before
FOLDER = re.compile("[0-9a-f]{16}")
BLOCK = re.compile(r"block_(\d{6,})\.safetensors")
BESIDE = 1 + 4  # bytes of an activation's label and of its document's number
PATIENCE = 60  # seconds that another process may take to write a block

# ---- the place


def folders_in(place: Path) -> list[Path]:
    """The folders of blocks in a cache, by name. Raises OSError."""
    there = sorted(place.iterdir()) if place.is_dir() else []
    return [path for path in there if FOLDER.fullmatch(path.name) and path.is_dir()]


def blocks_in(folder: Path) -> list[Path]:
    """The files of blocks in such a folder, usable or not, in order."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in there if BLOCK.fullmatch(path.name))


def refuse_place(said: str | None, out_dirs: Sequence[str] = ()):
    """Raises WrongRequest where no cache can be: a file, a link that leads nowhere, a run folder, a folder
    that holds other files and no cache. Nothing is made."""
    if said is None:
        return
    place, option = Path(said), f"--activations {said}"
    if os.path.realpath(place) in map(os.path.realpath, out_dirs):
        raise WrongRequest(f"{option} is a run folder of this command: give it a folder of its own")
    try:
        if place.is_symlink() and not place.exists():
            raise WrongRequest(f"{option} is a link that leads nowhere: name another folder")
        above = next(p for p in (place, *place.absolute().parents) if p.exists())
        if not above.is_dir():
            raise WrongRequest(f"{option}: {above} is a file: name a folder")
        if place.is_dir() and not folders_in(place) and (names := sorted(map(repr, os.listdir(place)))):
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            if FOLDER.fullmatch(place.name) and (place / "about.json").is_file():
                raise WrongRequest(f"{option} is a folder within a cache: name the one above, {place.parent}")
            why = f"holds {some} and no activations of this program"
            raise WrongRequest(f"{option} {why}: nothing is written there; name a new or an empty folder")
    except OSError as error:
        raise WrongRequest(f"{option} cannot be read: {error.strerror}; name another folder") from error


# ---- what blocks depend on


def runs_in(testbed: "Testbed") -> str:
    """The precision in which the LM runs on the stream."""
    import torch

    from sae_separation.losses import has_bf16

    low = testbed.lm.dtype == torch.float32 and has_bf16(testbed.device)
    return "bfloat16" if low else str(testbed.lm.dtype).removeprefix("torch.")


def identity(testbed: "Testbed", stream: Any, context_size: int, rounded: bool) -> dict:
    """All that a block depends on, but for the machine and the versions of libraries: those are compared when
    a cache is used (`Kept.doubts`)."""
    lm = testbed.describe["sources"]["lm"]
    config = {k: v for k, v in testbed.lm.config.to_dict().items() if not k.startswith("_")}
    config.pop("transformers_version", None)
    return {
        "format": FORMAT,
        "lm": lm.get("sha256", lm),  # of its weights, wherever they lie; else the hub's name and revision
        "lm_config": sha256_of_json(config),
        "tokenizer": sha256_of_tokenizer(testbed.tokenizer),
        "layer": testbed.layer,
        "precision": runs_in(testbed),
        "forget_text": sha256_of_text(testbed.forget.train),
        "retain_text": sha256_of_text(testbed.retain.train),
        "context_size": context_size,
        "contexts_a_batch": stream.n_contexts,
        "batches_a_block": stream.n_lm_batches,
        "left_out": stream.special.tolist(),
        "seed": stream.seed,
        "rounded": rounded,
    }


def sha256_of_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def sha256_of_tokenizer(tokenizer: Any) -> str:
    """Of what it does to a text; its padding, which others may have switched on, is no part of that."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    does = json.loads(fast.to_str()) if fast is not None else {"vocab": tokenizer.get_vocab()}
    does = {k: v for k, v in does.items() if k not in ("padding", "truncation")}
    return sha256_of_json([type(tokenizer).__name__, does, tokenizer.bos_token_id, tokenizer.eos_token_id])


def sha256_of_text(documents: Any) -> str:
    """Of a datasets.Dataset's documents, in order."""
    hashed = hashlib.sha256()
    for some in documents.iter(batch_size=1000):
        for document in some["text"]:
            hashed.update(document.encode(errors="surrogatepass") + b"\0")
    return hashed.hexdigest()


# ---- the blocks


@dataclass
class KeptBlock:
    """A block as it was kept, and what the stream knew when it had made it."""

    block: "ActivationBlock"
    with_massive: float
    passes: dict[str, int]


class Kept:
    """The blocks of one identity, in their folder of a cache. `keeps`: whether new ones are written."""

    def __init__(self, place: Path, of: dict, said: dict):
        """`said`: what the command says of LM and text, for about.json."""
        self.of, self.said, self.rounded = of, said, of["rounded"]
        self.digest = sha256_of_json(of)
        self.folder = place / self.digest[:16]
        self.machine = made_on()  # what else the bits of a block depend on
        self.unusable: set[int] = set()  # blocks that were there and are computed anew
        self.keeps, self.signed = True, False
        self.doubts: list[str] = []  # warnings for a run that trains from it
        if self.rounded:
            what = "trained on activations rounded to bfloat16 (--activations_dtype bf16)"
            self.doubts.append(f"{what}: not the same bits as without --activations")

    def open(self):
        """Make the folder, unless it is there. Raises WrongRequest for one that was tampered with, and where
        there is nothing to read and nothing can be written."""
        try:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            if os.access(self.folder, os.W_OK):
                if not (self.folder / "about.json").exists():
                    self._sign()
            elif blocks_in(self.folder):
                self._stop_keeping("it is not writable")
            else:
                raise WrongRequest(f"--activations: {self.folder} is not writable: name another folder")
        except CannotWrite as error:
            cause = cause_and_remedy(error.__cause__)[0]
            why = f"cannot be made ({cause})"
            raise WrongRequest(f"--activations: {self.folder} {why}: name another folder") from error
        if any(maker != self.machine for maker in self._about()["made_by"]):
            what = f"trained on activations that other versions or hardware computed ({self.folder})"
            self.doubts.append(f"{what}: not the same bits as without --activations")

    def _about(self) -> dict:
        """about.json; what it will hold, where there is none. Raises WrongRequest."""
        try:
            about = read_sealed(self.folder / "about.json")
        except Unusable as why:
            raise WrongRequest(f"{why}; remove {self.folder}, or name another --activations") from why
        if about and about.get("of") != self.of:
            raise WrongRequest(
                f"{self.folder} is of other activations: move it, or name another --activations"
            )
        return about or {"of": self.of, "said": self.said, "made_by": []}

    def _sign(self):
        """Write down, in about.json, that this machine and these versions computed some of the blocks."""
        with self._alone():
            about = self._about()
            if self.machine not in about["made_by"]:
                about["made_by"].append(self.machine)
                write_json(self.folder / "about.json", seal({k: about[k] for k in ("of", "said", "made_by")}))
        self.signed = True

    def path(self, index: int) -> Path:
        return self.folder / f"block_{index:06d}.safetensors"

    def next_block(self, stream: Any) -> "ActivationBlock":
        """The stream's next block as it is kept, or from the LM and then kept."""
        found = self.read(stream.block_index, stream.device)
        missing, *_ = ranks.agree(found is None)  # to any of them
        if found and not missing:
            stream.with_massive = found.with_massive
            stream.passes.update(found.passes)
            return found.block
        block = stream.block_from_lm()
        self.keep(stream.block_index, block, stream.with_massive, stream.passes)
        return block

    def read(self, index: int, device: Any) -> KeptBlock | None:
        """A block as it was kept, on a device (fp32). None where there is none, and where it is not as it was
        written, which is said: it is to be computed anew."""
        from sae_separation.blocks import ActivationBlock
        from sae_separation.devices import upload

        if not os.path.lexists(self.path(index)):
            return None
        try:
            tensors, facts = read_tensors(self.path(index), FORMAT, "a block of activations")
            if (facts["of"], facts["index"]) != (self.digest, index):
                raise Unusable(f"{self.path(index)} is of other activations, or another block")
        except Unusable as why:
            say(f"warning: {why}; computed anew")
            self.unusable.add(index)
            return None
        x, *rest = (upload(tensors[name], device) for name in ("x", "forget", "document"))
        return KeptBlock(ActivationBlock(x.float(), *rest), facts["with_massive"], facts["passes"])

    def keep(self, index: int, block: "ActivationBlock", with_massive: float, passes: dict[str, int]):
        """Write a block, unless another process has; it is rounded to bfloat16 in place where that is asked
        for. What keeps it from being written is said once, and training goes on."""
        import torch
        from safetensors.torch import save_file

        if self.rounded:
            block.x.copy_(block.x.to(torch.bfloat16))
        if not self.keeps or not ranks.here.first:
            return
        named = vars(block) | {"x": narrowed(block.x)}
        tensors = {name: t.cpu() for name, t in named.items() if t is not None}
        facts = {"of": self.digest, "index": index, "with_massive": with_massive, "passes": passes}
        path, about = self.path(index), self.folder / "about.json"
        try:
            with process.signals.held():
                if not self.signed:
                    self._sign()
                with self._alone():
                    if index in self.unusable or not os.path.lexists(path):
                        with whole(path) as beside:
                            save_file(tensors, beside, header(FORMAT, tensors, facts))
                            beside.chmod(about.stat().st_mode)  # for others, too: safetensors' is not
                        process.signals.something_is_kept()
        except CannotWrite as error:
            cause, remedy = cause_and_remedy(error.__cause__)
            self._stop_keeping(f"{cause}; {remedy}")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no other process writes into the folder, and what a killed one left half written is gone.
        Raises CannotWrite, also where another one is at it for longer than PATIENCE."""
        path = self.folder / ".lock"
        with contextlib.ExitStack() as stack:
            with writing(path):
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
                stack.callback(os.close, file)
                lock(file, time.monotonic() + PATIENCE)
                for left in self.folder.glob(f"block_*{HALF_WRITTEN}"):
                    if BLOCK.fullmatch(left.name.removesuffix(HALF_WRITTEN)):
                        left.unlink()
            yield

    def _stop_keeping(self, why: str):
        rest = "training goes on, and what is not there yet is not kept"
        say(f"warning: activations cannot be written into {self.folder} ({why}): {rest}")
        self.keeps = False

    def steps(self, batch_size: int) -> list[int]:
        """Optimiser steps that each of the first blocks gives, up to the first that is not there."""
        from safetensors import SafetensorError, safe_open

        found = []
        with contextlib.suppress(OSError, SafetensorError):  # a damaged one is named when it is read
            while True:
                with safe_open(self.path(len(found)), framework="pt") as file:
                    found.append(file.get_slice("forget").get_shape()[0] // batch_size)
        return found


def narrowed(x: "Tensor") -> "Tensor":
    """x in bfloat16 where nothing is lost by it: where the LM runs in bfloat16, or x was rounded."""
    import torch

    if bool((x[:1].to(torch.bfloat16) == x[:1]).all()):  # of another LM the first row says it
        narrow = x.to(torch.bfloat16)
        return narrow if bool((narrow == x).all()) else x
    return x


def lock(file: int, until: float):
    """Take the lock on an open file (flock). Raises TimeoutError where another process holds it until then
    (time.monotonic())."""
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
            time.sleep(0.05)


def say(text: str):
    """A line on stderr, above a bar; of several ranks the first says it."""
    from tqdm import tqdm

    if ranks.here.first:
        tqdm.write(text, file=sys.stderr)


def bytes_of(n_rows: int, d_in: int, bytes_a_number: int) -> int:
    return n_rows * (d_in * bytes_a_number + BESIDE)


def said_of(testbed: str, defaults: Mapping[str, Any], settings: Any) -> dict:
    """What a command says of the activations: by that a dry run knows them, without LM and text."""
    of_data = ("lm", "layer", "forget_text", "forget_entities", "retain_text")
    of_pass = ("context_size", "buffer_tokens")
    said = {"testbed": testbed} | {name: defaults.get(name) for name in of_data}
    return json.loads(json.dumps(said | {name: getattr(settings, name) for name in of_pass}))


def cache_of(command: Any, stream: Any, testbed: "Testbed", settings: Any, n_steps: int) -> Kept | None:
    """The cache that a command names, for its stream; how large it will be and what is there is said first.
    `settings`: those of the pass (config.one_pass). Raises WrongRequest, also where the disk is too small."""
    if command.activations is None:
        return None
    precision = runs_in(testbed)
    rounded = command.activations_dtype == "bf16" and precision != "bfloat16"
    of = identity(testbed, stream, settings.context_size, rounded)
    kept = Kept(Path(command.activations), of, said_of(testbed.name, testbed.defaults, settings))
    kept.open()
    n_rows = stream.n_contexts * (settings.context_size - 1) * stream.n_lm_batches
    size = bytes_of(n_rows, testbed.d_in, 2 if rounded or precision == "bfloat16" else 4)
    steps = kept.steps(settings.batch_size)
    left = n_steps - sum(steps)
    if left <= 0:
        print(f"activations: all are in {kept.folder}: the LM is not run for training")
        return kept
    more = math.ceil(left / max(1, n_rows // settings.batch_size))
    need, free = gigabytes(more * size), shutil.disk_usage(kept.folder).free
    print(f"activations: {len(steps)} blocks are in {kept.folder}, about {more} are to be computed: {need}")
    if kept.keeps and more * size > free:
        remedy = "free disk space, name another place, or halve it with --activations_dtype bf16"
        why = f"needs {need} more, and {gigabytes(free)} are free"
        raise WrongRequest(f"--activations {command.activations} {why}: {remedy}")
    return kept


def foreseen(command: Any, said: dict, n_tokens: int, d_in: int) -> str:
    """What a dry run says of a cache: its size, and what is there of the same LM and text by their names."""
    place, rounded = Path(command.activations), command.activations_dtype == "bf16"
    n_rows = math.ceil(n_tokens / said["buffer_tokens"]) * said["buffer_tokens"]  # in whole blocks
    least, most = (gigabytes(bytes_of(n_rows, d_in, n)) for n in (2, 4))
    size = least if rounded else f"{most} ({least} where the LM runs in bfloat16)"
    there = []
    for folder in folders_in(place):
        with contextlib.suppress(Unusable):
            about = read_sealed(folder / "about.json")
            fits = about and about["of"]["rounded"] == (rounded and about["of"]["precision"] != "bfloat16")
            if about and fits and about["said"] == said:
                blocks = blocks_in(folder)
                total = gigabytes(sum(path.stat().st_size for path in blocks))
                there.append(f"{len(blocks)} blocks ({total}) in {folder.name}")
    known = f"of this LM, text and settings, by their names, {', '.join(there)}" if there else "none"
    return f"{size} in {place}; there already: {known}"
