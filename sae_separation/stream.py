"""The activation stream: resid_post of one layer, from the LM, as shuffled blocks.

    stream = ActivationStream(testbed, context_size, buffer_tokens)
    block = stream.next_block()
    stream.work_ahead(share, rows)                   # between two steps: that share of the next block

On a GPU the next block is made while training is at this one, an LM batch after some of its steps. One thread
sends off both; the LM's kernels go to a CUDA stream of their own, and fill what the SAEs' steps leave of the
GPU. Where a row comes to lie depends on the text of its whole block, and a thread reads text no faster than a
small SAE learns: so text is drawn a block earlier still, while the GPU is busy with the LM's kernels.
"""

import contextlib
import math
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import islice

import torch
from torch import Tensor

from sae_separation import process, ranks, testbeds
from sae_separation.blocks import ActivationBlock, shuffled_places
from sae_separation.devices import upload
from sae_separation.exam import special_ids
from sae_separation.kept import Kept
from sae_separation.lm import StreamLM, Testbed, fast_lm_tokens, massive

AHEAD_ON = ("cuda",)  # kinds of devices


def works_ahead(device: torch.device, kept: object) -> bool:
    """Whether the next block is made beside training, so that two are held. Not by several ranks, whose
    collectives keep their order, and not where activations are kept (--activations)."""
    return device.type in AHEAD_ON and not ranks.here.many and kept is None


class ActivationStream:
    """resid_post of one layer, from the LM through nnsight, as shuffled blocks.

    Half of the contexts are forget text and half retain text, in every LM batch. The LM is stopped after the
    hook layer and runs in bfloat16 where the machine has it. Rows of special tokens (BOS, EOS, padding) and
    massive ones are left out.
    """

    def __init__(
        self,
        testbed: Testbed,
        context_size: int,
        buffer_tokens: int,
        seed: int = 0,
        lm_tokens: int | None = None,
    ):
        self.device, self.d_in, self.lm = testbed.device, testbed.d_in, StreamLM(testbed)
        self.special = special_ids(testbed.tokenizer)
        lm_tokens = lm_tokens or fast_lm_tokens(testbed)
        self.n_contexts = max(2, lm_tokens // context_size // 2 * 2)  # per LM batch
        self.n_lm_batches = max(1, round(buffer_tokens / (self.n_contexts * (context_size - 1))))
        self.passes = {"forget": 0, "retain": 0}  # over the text, begun for the blocks handed over
        self.begun = dict(self.passes)  # for those that are on their way, too
        self.texts: list = [
            testbeds.drawn_contexts(text.train, testbed.tokenizer, context_size, seed, on_pass=count)
            for text, count in (
                (getattr(testbed, domain), partial(self.begun.__setitem__, domain)) for domain in self.begun
            )
        ]
        self.seed, self.block_index, self.drawn = seed, 0, 0  # blocks whose contexts were drawn
        self.block: ActivationBlock | None = None
        self.makings: list[Making] = []  # the blocks that are begun, in order
        self.kept: Kept | None = None  # with --activations
        self.with_massive = 0.0  # share of the block's contexts that hold a massive row
        process.make_collections_short()

    def activations(self, tokens: Tensor) -> Tensor:
        """resid_post [context, pos, D] of tokens [context, pos], in the precision that the LM runs in."""
        return self.lm.resid(tokens)

    def next_block(self) -> ActivationBlock:
        """From the LM, or as it is kept. The stream lets go of the block before."""
        self.block = None
        process.return_freed_memory()
        self.block = self.kept.next_block(self) if self.kept else self.block_from_lm()
        self.block_index += 1
        process.return_freed_memory()
        return self.block

    def block_from_lm(self) -> ActivationBlock:
        """What is left of the next block is made. A GPU is waited for once, when all is on its way: which
        rows are massive."""
        with self._beside_training():
            making = self._begun(0)
            making.draw()
            making.read()
            block = making.finish()
        del self.makings[0]
        self.passes.update(making.passes)
        self.with_massive = making.with_massive
        if self.side:
            training = torch.cuda.current_stream(self.device)
            training.wait_stream(self.side)
            for t in (block.x, block.forget, block.document):
                if t is not None:
                    t.record_stream(training)  # no new tensor takes its place before training is done with it
        return block

    def work_ahead(self, share: float, rows: int):
        """Where the stream `works_ahead`: the LM's share in [0, 1] of the next block, and as much of the text
        of the one behind it, so far as they are needed for `rows` more activations than this block holds. No
        GPU is waited for, but by what the LM's own code looks at."""
        if rows <= 0 or not works_ahead(self.device, self.kept):
            return
        with self._beside_training():
            following = self._begun(0)
            following.draw()
            following.read(share)
            if rows > len(following.places):
                self._begun(1).draw(share)

    @cached_property
    def side(self) -> torch.cuda.Stream | None:
        """Where a GPU makes blocks beside training. It begins behind what training's stream was given before:
        the LM's weights."""
        if self.device.type != "cuda" or not works_ahead(self.device, self.kept):
            return None
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        return side

    def _beside_training(self) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(self.side) if self.side else contextlib.nullcontext()

    def _begun(self, i: int) -> "Making":
        """The i-th block from the next one on, as far as it is made. Text is drawn in order: of the one
        before all is drawn."""
        if len(self.makings) == i:
            index = self.block_index + i
            contexts = (index - self.drawn) * self.n_lm_batches * (self.n_contexts // 2)
            for text in self.texts:  # behind the blocks that were read or skipped
                next(islice(text, contexts, contexts), None)
            self.drawn = index + 1
            self.makings.append(Making(self, index))
        return self.makings[i]

    def skip_blocks(self, n: int):
        """Go on behind the first n blocks, without the LM: a block is a function of text, seed and index."""
        self.block_index = n


class Making:
    """A block of the stream on its way. The LM's output goes straight to its shuffled place: one buffer, one
    LM batch, no copy of the buffer."""

    passes: dict[str, int]  # over the text, begun for the blocks up to this one
    places: Tensor  # [row]: where the rows go, in the order of the text
    with_massive: float

    def __init__(self, stream: ActivationStream, index: int):
        self.stream, self.index = stream, index
        self.half, self.n_batches = stream.n_contexts // 2, stream.n_lm_batches
        self.batches: list[Tensor] = []  # tokens [context, pos] of each LM batch
        self.draws: list[Tensor] = []  # numbers [context, pos] of their documents
        self.kept: list[Tensor] = []  # rows [row] of a batch that are of no special token
        self.sinks: list[Tensor] = []  # which of these are massive [row]

    def draw(self, share: float = 1.0):
        """Text, up to this share of the LM batches. Of the last one on it is known where all rows go."""
        while len(self.batches) < math.ceil(share * self.n_batches):
            with process.signals.held():  # the text is not to be left in the middle
                self._draw_one()
                if len(self.batches) == self.n_batches:
                    n = sum(map(len, self.kept))
                    self.places = shuffled_places(n, self.stream.seed * 1_000_003 + self.index)
                    self.passes = dict(self.stream.begun)

    def _draw_one(self):
        contexts = [c for text in self.stream.texts for c in islice(text, self.half)]
        tokens = torch.tensor([tokens for tokens, _ in contexts])
        self.draws.append(torch.tensor([drawn for _, drawn in contexts]))
        self.kept.append((~torch.isin(tokens, self.stream.special)).flatten().nonzero()[:, 0])
        self.batches.append(tokens)

    def read(self, share: float = 1.0):
        """The LM reads up to this share of its batches, all of which are drawn."""
        while len(self.sinks) < math.ceil(share * self.n_batches):
            with process.signals.held():  # the LM's weights are not to be left in the middle
                self._read_one(len(self.sinks))

    @cached_property
    def block(self) -> ActivationBlock:
        n, device = len(self.places), self.stream.device
        x = torch.empty(n, self.stream.d_in, device=device)
        forget = torch.empty(n, dtype=torch.bool, device=device)
        return ActivationBlock(x, forget, torch.empty(n, device=device))

    @cached_property
    def resids(self) -> Iterator[Tensor]:
        """Of each LM batch, as it is read: `_rows`."""
        lengths = [len(rows) for rows in self.kept]
        return ranks.shared(list(zip(self.batches, self.kept)), self._rows, lengths, like=self.block.x)

    def _rows(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """resid_post (fp32) [row, D] of an LM batch's tokens [context, pos], of the rows [row] to be kept."""
        tokens, rows = batch
        resid = self.stream.activations(upload(tokens, self.stream.device)).flatten(0, 1)
        return resid.index_select(0, upload(rows, self.stream.device)).float()

    def _read_one(self, i: int):
        block, rows, device = self.block, self.kept[i], self.stream.device
        resid = next(self.resids)
        first = sum(map(len, self.kept[:i]))
        place = upload(self.places[first : first + len(rows)], device)
        block.x.index_copy_(0, place, resid)
        block.forget.index_copy_(0, place, upload(rows < self.half * self.batches[i].shape[1], device))
        assert block.document is not None
        block.document.index_copy_(0, place, upload(self.draws[i].flatten()[rows], device))
        self.sinks.append(massive(resid))

    def finish(self) -> ActivationBlock:
        """The block, all of which is read. Waits for a GPU."""
        sink, with_sinks = torch.cat(self.sinks).cpu(), 0
        for tokens, rows, here in zip(self.batches, self.kept, sink.split([len(rows) for rows in self.kept])):
            with_sinks += len((rows[here] // tokens.shape[1]).unique())
        self.with_massive = with_sinks / sum(map(len, self.batches))
        return self.block.without(self.places[sink])
