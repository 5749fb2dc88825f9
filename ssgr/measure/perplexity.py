"""Perplexity: of a text in windows, or of the dense model's own traces."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssgr.loadable import Loadable, context_of
from ssgr.progress import Progress
from ssgr.records import Item, Trace
from ssgr.text import Text

_ROWS = 256  # positions whose logits are held in float32 at a time


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of `text` in windows of `window` tokens, or of what the dense model wrote on the benchmark `traces`.

    The text is tokenised whole and cut, as in SparseGPT (arXiv 2301.00774, section 4); of traces only the responses count.
    """

    name: str
    text: str | None = None
    window: int = 2048
    windows: int | None = None
    column: str = "text"
    subset: str | None = None
    split: str = "test"
    revision: str | None = None
    traces: Any = field(default=None, metadata={"key": False})  # their own key goes beside

    def __post_init__(self) -> None:
        if (self.text is None) == (self.traces is None):
            raise ValueError("bench.text and bench.traces: give one of them, a text or a benchmark")
        if isinstance(self.traces, str | int | float | list):
            raise ValueError(
                f"bench.traces={self.traces}: it is a benchmark; type bench@bench.traces=NAME, of bench=perplexity_traces"
            )
        for name, value in (("window", self.window), ("windows", self.windows)):
            if value is not None and (not isinstance(value, int) or value < 1 + (name == "window")):
                raise ValueError(f"bench.{name}={value}: give a whole number, at least {1 + (name == 'window')}")

    @property
    def metric(self) -> str:
        """The exponential of the mean loss."""
        return "perplexity"

    def key_content(self) -> object:
        """The text is keyed by what it holds."""
        if self.text is None:
            return {"name": self.name, "windows": self.windows}
        rest = (self.name, self.window, self.windows, self.column, self.subset, self.split, self.revision)
        return {"text": self._text.key_content(), "rest": rest}

    @property
    def _text(self) -> Text:
        return Text(str(self.text), "bench.text", self.column, self.subset, self.split, self.revision)

    def check(self, context: int | None) -> None:
        """See that a window of text fits into the context.

        Raises:
            ValueError: it does not.
        """
        self._see_room(0 if self.text is None else self.window, context)

    def _see_room(self, tokens: int, context: int | None) -> None:
        if context and tokens > context:
            raise ValueError(
                f"bench={self.name}: {tokens} tokens are more than the model's context of {context}; type bench.window={context}"
            )

    def measure(self, model: Loadable, tokenizer: PreTrainedTokenizerBase, traces: Sequence[Trace]) -> list[Item]:
        """The mean loss of each window, or of the responses to each problem, which are no independent ones, in nats a token.

        Raises:
            ValueError: the text is shorter than one window, or cannot be read; a window is longer than the context; or a loss
                is not finite.
        """
        rows = self._windows(tokenizer) if self.text is not None else _responses(traces)[: self.windows]
        if not rows:
            raise ValueError(f"bench={self.name}: there are no traces to measure on")
        loaded = model.load()
        self._see_room(max(len(ids) for _, ids, _ in rows), context_of(loaded.config))
        losses, tokens = defaultdict[str, float](float), Counter[str]()
        with Progress(self.name, len(rows)) as progress:
            for name, ids, first in rows:
                losses[name] += self._finite(_loss(loaded, ids, first), name) * (len(ids) - first)
                tokens[name] += len(ids) - first
                progress.step()
        return [Item(name, losses[name] / count, count) for name, count in tokens.items()]

    def _finite(self, loss: float, where: str) -> float:
        if not math.isfinite(loss):
            raise ValueError(
                f"bench={self.name}: the loss of {where} is {loss}: the model overflows there; type model.dtype=float32, or "
                "prune less"
            )
        return loss

    def _windows(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, tuple[int, ...], int]]:
        enough = (self.windows or 64) * self.window // 8 + 1  # paragraphs of prose: each has more than eight tokens
        ids = tokenizer(self._text.whole(enough), verbose=False)["input_ids"]
        count = min(len(ids) // self.window, self.windows or len(ids))
        if not count:
            raise ValueError(
                f"bench.text={self.text} has {len(ids)} tokens, less than a window; type bench.window={max(2, len(ids))} or less"
            )
        return [(f"{self.name}/{i}", tuple(ids[i * self.window : (i + 1) * self.window]), 1) for i in range(count)]


def _responses(traces: Sequence[Trace]) -> list[tuple[str, tuple[int, ...], int]]:
    return [(t.problem_id, (*t.prompt_ids, *t.generated_ids), len(t.prompt_ids)) for t in traces if t.generated_ids]


@torch.inference_mode()
def _loss(model: PreTrainedModel, ids: tuple[int, ...], first: int) -> float:
    """Mean loss of the tokens from position `first` on, each given all before it; sums in float32."""
    ids_T = torch.tensor(ids, device=model.device)
    logits_TV: Tensor = model(ids_T[None], use_cache=False).logits[0, first - 1 : -1]
    wanted_T = ids_T[first:].to(logits_TV.device)
    total = 0.0
    for some_RV, wanted_R in zip(torch.split(logits_TV, _ROWS), torch.split(wanted_T, _ROWS), strict=True):
        total += float(cross_entropy(some_RV.float(), wanted_R, reduction="sum"))
    return total / len(wanted_T)
