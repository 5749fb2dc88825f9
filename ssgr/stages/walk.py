"""Walk: a decoder whose blocks have weights one at a time, read from the disk while the one before is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ssgr.loadable import context_of
from ssgr.model import Model
from ssgr.model.attention import attend_causally
from ssgr.model.blocks import Matrix, Tail, decoder_blocks, empty, outside, prunes_head, put
from ssgr.model.checkpoint import DTYPES, Checkpoint
from ssgr.model.layout import Layout
from ssgr.products import finite, native
from ssgr.stages.activations import Batch, Passage, first_inputs
from ssgr.stages.clock import Clock
from ssgr.stages.collect import Collector
from ssgr.stages.ranks import Ranks

_CONFIGURED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Walk:
    """The decoder of `model`, block by block; its `clock` counts what is spent on waiting for weights and on running blocks.

    Where the output layer is pruned too, what follows the blocks, up to it, comes after them as if it were one more.
    """

    def __init__(self, model: Model, ranks: Ranks, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self.model, self.ranks = model.skeleton(), ranks
        self.source = Checkpoint(model.files())
        self.layout = Layout(self.model, self.source)
        self.name, self.decoder = decoder_blocks(self.model)
        tail = [Tail(self.model, self.decoder)] if prunes_head(self.model, include, exclude) else []
        self.blocks = [*self.decoder, *tail]
        self.device = ranks.device(model.torch_device())
        self.dtype = _dtype(model, self.source, self.stored(0), self.device)
        if self.device.type == "cpu" and self.dtype == torch.bfloat16 and native(self.dtype):
            attend_causally(self.model)
        self.exact: dict[str, Tensor] = {}  # parameters of the block at hand as stored, where its own are rounded
        self.clock = Clock(self.device)

    def __len__(self) -> int:
        return len(self.blocks)

    def names(self, i: int) -> dict[str, str]:
        """What block `i` holds: the names inside the block, and in the model."""
        return {name: self.full(i, name) for name in self.blocks[i].state_dict()}

    def full(self, i: int, name: str = "") -> str:
        """The name in the model of what is called `name` in block `i`; that of the block itself without it."""
        if i < len(self.decoder):
            return f"{self.name}.{i}.{name}".removesuffix(".")
        return name or "what follows the blocks"

    def stored(self, i: int) -> list[str]:
        """The stored tensors of block `i`."""
        return [stored for name in self.names(i).values() for stored in self.layout.stored(name)]

    def filled(
        self, which: Sequence[int], source: Callable[[int], Checkpoint | None]
    ) -> Iterator[tuple[int, nn.Module]]:
        """The blocks `which`, each with its weights from `source`, or from the model where that is None.

        Raises:
            ValueError: a tensor is missing, quantised or not finite.
        """

        def read(i: int) -> dict[str, Tensor]:
            return {name: self.layout.read(full, source(i)) for name, full in self.names(i).items()}

        with ThreadPoolExecutor(1) as pool:
            coming: list[Future[dict[str, Tensor]]] = [pool.submit(read, i) for i in which[:1]]
            for n, i in enumerate(which, 1):
                with self.clock.timed("load"):
                    full = self.names(i)
                    for name, value in coming.pop().result().items():
                        put(self.blocks[i], name, self._placed(full[name], value))
                coming = [pool.submit(read, after) for after in which[n : n + 1]]
                yield i, self.blocks[i]
                empty(self.blocks[i])
                self.exact.clear()

    def weight_OI(self, i: int, matrix: Matrix) -> Tensor:
        """A matrix of block `i` as the checkpoint holds it, as a view: read again where the block runs in a dtype that rounds."""
        full = self.full(i, matrix.parameter)
        if torch.promote_types(self.layout.dtype(full), matrix.weight_OI.dtype) == matrix.weight_OI.dtype:
            return matrix.weight_OI
        if full not in self.exact:
            self.exact[full] = self.layout.read(full)
        return matrix.of(self.exact[full])

    def replace(self, i: int, matrix: Matrix, new_OI: Tensor) -> None:
        """Let a matrix of block `i` be `new_OI`, where it runs and where it is stored."""
        self.weight_OI(i, matrix).copy_(new_OI)
        if self.exact:
            matrix.weight_OI.copy_(new_OI)

    def begin(self, rows: Sequence[Passage], tokenizer: PreTrainedTokenizerBase, file: Path | None) -> list[Batch]:
        """Bring the rows to the first block: the batches of this rank.

        Raises:
            ValueError: a row has a token that the model does not know.
        """
        known = len(self.model.get_input_embeddings().get_parameter("weight"))
        if (last := max(max(row.ids) for row in rows)) >= known:
            raise ValueError(
                f"calib: a row has token {last}, and the model has embeddings of tokens 0 to {known - 1} only (its tokenizer has "
                f"{len(tokenizer)}); calibrate with tokens of this model, or call resize_token_embeddings and save it again"
            )
        self._check_positions(max(len(row.ids) for row in rows))
        before = outside(self.model, self.decoder)
        with self.clock.timed("load"):
            for name in (*before, *self.names(0).values()):
                put(self.model, name, self._placed(name, self.layout.read(name)))
            for name, buffer in self.model.named_buffers():
                put(self.model, name, buffer.to(self.device))
        try:
            with self.clock.timed("forward"):
                return first_inputs(self.model, self.decoder, rows, self.device, file, self.ranks.mine, self.apart)
        finally:
            for name, parameter in before.items():
                put(self.model, name, parameter)
            empty(self.blocks[0])

    @property
    def apart(self) -> int | None:
        """The length of rows beyond which the model turns all positions of a batch otherwise (rope_type=longrope), if any."""
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        if "'longrope'" not in str(rope):
            return None
        named = [rope, *(one for one in rope.values() if isinstance(one, Mapping)), vars(config)]
        found = [
            one["original_max_position_embeddings"] for one in named if one.get("original_max_position_embeddings")
        ]
        return int(found[0]) if found else None

    def _check_positions(self, longest: int) -> None:
        """See that what a row is does not depend on the rows beside it.

        Raises:
            ValueError: the model turns the positions of a whole batch otherwise where one of its rows is longer than its context.
        """
        context, config = context_of(self.model.config), self.model.config.get_text_config()
        if context and longest > context and "'dynamic'" in str(getattr(config, "rope_parameters", None)):
            raise ValueError(
                f"calib: a row has {longest} tokens, and beyond {context} this model's positions depend on the longest row of a "
                f"batch (rope_type=dynamic); type budget.max_row_tokens={context}"
            )

    def advance(self, i: int, batches: Sequence[Batch], collector: Collector | None = None) -> None:
        """Pass the rows through block `i`; a `collector` hears what enters its matrices.

        Raises:
            ValueError: its output is not finite.
        """
        with self.clock.timed("forward"):
            runs = ((batch, partial(batch.through, self.blocks[i], i, self.device)) for batch in batches)
            if collector is None:
                self.keep(i, ((batch, run()) for batch, run in runs))
            else:
                self.keep(i, ((batch, collector.run(run, batch.streams, True, batch.tokens)) for batch, run in runs))

    def listen(self, i: int, batches: Sequence[Batch], collector: Collector) -> None:
        """Pass the rows through block `i` only as far as `collector` hears something."""
        with self.clock.timed("forward"):
            for batch in batches:
                run = partial(batch.through, self.blocks[i], i, self.device)
                collector.run(run, batch.streams, False, batch.tokens)

    def keep(self, i: int, outputs: Iterable[tuple[Batch, Tensor | None]]) -> None:
        """Let the outputs of block `i` be what enters the next.

        Raises:
            ValueError: they are not finite.
        """
        fine = torch.ones((), dtype=torch.bool, device=self.device)
        for batch, out in outputs:
            assert out is not None
            fine &= finite(out)
            batch.hidden_NTD.copy_(out)
        if not fine:
            raise ValueError(f"{self.full(i)}: its output holds NaN or infinity on the calibration rows; {self.remedy}")

    @property
    def remedy(self) -> str:
        """What to do where activations overflow."""
        if self.dtype in (torch.float16, torch.bfloat16):
            return "type model.dtype=float32"
        return "they overflow in float32, so the checkpoint is damaged: use another copy"

    def _placed(self, name: str, value: Tensor) -> Tensor:
        return value.to(self.device, self.layout.run_dtype(name, self.dtype) if value.is_floating_point() else None)


def _dtype(model: Model, source: Checkpoint, stored: Sequence[str], device: torch.device) -> torch.dtype:
    """What the blocks run in: the configured dtype, or that of the checkpoint where the processor computes in it."""
    if model.dtype != "auto":
        return _CONFIGURED[model.dtype]
    largest = max((source.places[name] for name in stored), key=lambda place: place.stop - place.start)
    dtype = DTYPES.get(largest.dtype, torch.float32)
    return dtype if device.type != "cpu" or native(dtype) else torch.float32


class Behind:
    """Work done in the order it is given, one piece behind; an error shows at the next piece, or at the end."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Wait for the piece before, then let this one begin."""
        self.wait()
        self._last = self._pool.submit(work)

    def wait(self) -> None:
        """Wait for what was given last.

        Raises:
            Exception: what it raised.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()
