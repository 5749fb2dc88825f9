"""The nouns that flow from stage to stage: frozen dataclasses on the standard library alone."""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass, field
from typing import Any, Literal

Finish = Literal["stop", "length"]
PERPLEXITY = "perplexity"  # the metric of items that are losses
MANY_CUT = 0.05  # where more of the answers were cut at the cap, the accuracy tells of the cap rather than the model
Funnel = tuple[tuple[str, int], ...]  # what was left after each filter, in order


class Verdict(enum.StrEnum):
    """What a grader says of one answer; a grader that fails never counts as wrong."""

    RIGHT = "right"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    GRADER_FAILED = "grader_failed"


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer; `bare` is the question where more is asked, such as to reason step by step, and
    `alone` that of multiple choice without its options."""

    id: str
    question: str
    answer: str
    source: str = ""
    level: int | None = None
    solution: str | None = None
    bare: str | None = field(default=None, metadata={"key": False})  # it is part of the question
    alone: str | None = field(default=None, metadata={"key": False})  # likewise


@dataclass(frozen=True)
class Trace:
    """One attempt at a problem, as token ids; `generated_ids` end with the stop token if one was reached."""

    problem_id: str
    attempt: int
    prompt_ids: tuple[int, ...]
    generated_ids: tuple[int, ...]
    finish: Finish
    seed: int
    on_policy: bool = True


@dataclass(frozen=True)
class Unread:
    """Stands for token ids that were left in their file: how many they are is known, and no id can be asked for."""

    count: int
    __iter__ = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> Unread:
        return Unread(len(range(self.count)[part]))

    def __add__(self, other: Unread) -> Unread:
        return Unread(self.count + other.count)


@dataclass(frozen=True)
class Graded:
    """A trace with its verdict; `thinking` of its tokens come before the answer, all of them where it never `closed` that."""

    trace: Trace
    answer: str | None
    verdict: Verdict
    level: int | None = None
    thinking: int = 0
    closed: bool = True


@dataclass(frozen=True)
class Row:
    """One candidate for the calibration set: whole token ids, the first `prompt_tokens` of them the prompt.

    `bin` names its band of difficulty and length, where traces are binned.
    """

    ids: tuple[int, ...]
    prompt_tokens: int
    id: str
    level: int | None = None
    bin: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class CalibrationSet:
    """Ragged rows of token ids with one weight a token, and how they were chosen.

    `parts` says whether prompt and response may weigh differently; `held_out` are rows of the same kind on which the
    reconstruction is only measured.
    """

    source: str
    rows: tuple[Row, ...]
    weights: tuple[tuple[float, ...], ...]
    funnel: Funnel
    asked: int
    parts: bool = True
    held_out: tuple[Row, ...] = ()

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens asked for and realised, the latter also split into prompt and response."""
        prompt = sum(row.prompt_tokens for row in self.rows)
        total = sum(map(len, self.rows))
        return {"asked": self.asked, "realised": total, "prompt": prompt, "response": total - prompt}

    @property
    def copies(self) -> int:
        """Rows that are token for token the same as another, as attempts at an easy problem may be."""
        return len(self.rows) - len({row.ids for row in self.rows})

    def summary(self) -> dict[str, Any]:
        """What result.json says of the set."""
        return {
            "source": self.source,
            "rows": len(self.rows),
            "copies": self.copies,
            "tokens": self.tokens,
            "held_out": {"rows": len(self.held_out), "tokens": sum(map(len, self.held_out))},
            "parts": self.parts,
            "funnel": [*map(list, self.funnel)],
        }


@dataclass(frozen=True)
class LayerResult:
    """What pruning did to one matrix.

    Errors are relative, ||(W - W') X|| / ||W X||, on the calibration rows and on the held-out ones; `tokens` is the sum of
    the weights of the tokens that came, `emptied` counts outputs that lost all their weights, and `condition` is the
    condition number of the damped Hessian.
    """

    name: str
    shape: tuple[int, int]
    target: float
    sparsity: float
    tokens: float
    error: float | None
    error_held_out: float | None
    emptied: int
    condition: float | None
    damping: float | None
    seconds: float


@dataclass(frozen=True)
class PruneResult:
    """What pruning did to the model.

    `sparsity_realised` is over the matrices that were pruned, `sparsity_model` their zeros over all weights but the embeddings
    and the output layer, `sparsity_with_embeddings` over all; `unseen` matrices (experts) met no calibration token and were
    pruned by magnitude; `seconds` of rank 0, or of its GPU, are split into load, forward, statistics, solve and store. The
    peaks are those of the last attempt: of the host, with all its ranks, and of the GPU that needed most.
    """

    pruner: str
    allocation: str
    propagate: str
    sparsity_target: float
    sparsity_realised: float
    sparsity_model: float
    sparsity_with_embeddings: float
    unseen: int
    seconds: dict[str, float]
    peak_host_mib: float
    peak_device_mib: float | None
    layers: tuple[LayerResult, ...]
    checkpoint: str


@dataclass(frozen=True)
class Outcome:
    """One graded attempt of an evaluation."""

    problem_id: str
    attempt: int
    level: int | None
    verdict: Verdict
    answer: str | None
    tokens: int
    finish: Finish
    looping: bool
    thinking: int = 0
    closed: bool = True


@dataclass(frozen=True)
class Text:
    """What was asked and answered in one attempt of an evaluation, for people and other tools."""

    problem_id: str
    attempt: int
    question: str
    gold: str
    prompt: str
    response: str


@dataclass(frozen=True)
class Score:
    """What an evaluation found; shares are of attempts, `ci95` is clustered by problem."""

    bench: str
    problems: int
    attempts: int
    accuracy: float
    ci95: tuple[float, float]
    pass_at_k: dict[str, float]
    maj_at_k: float
    mean_tokens: float
    truncated: float
    looping: float
    no_answer: float
    unclosed: float
    grader_failed: float
    seconds: float
    tokens_per_second: float
    by_level: dict[str, float] = field(default_factory=dict)
    metric: str = "accuracy"


@dataclass(frozen=True)
class Item:
    """One item of a measure: a window of text, or all responses to a problem, with its mean loss, or a document of a task with
    its metric."""

    id: str
    value: float
    weight: int


@dataclass(frozen=True)
class Reading:
    """What a measure found: the weighted mean of its items (`perplexity`: the exponential of it), and its interval."""

    bench: str
    metric: str
    value: float
    ci95: tuple[float, float]
    items: int
    seconds: float


def shown(metric: str, mean: float) -> float:
    """What a mean of items is shown as: that of losses as a perplexity, infinity where it is no float64."""
    try:
        return math.exp(mean) if metric == PERPLEXITY else mean
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class StageRun:
    """What running one stage cost, or that it was read from the store."""

    seconds: float
    cached: bool
    peak_rss_mib: float


@dataclass(frozen=True)
class BenchResult:
    """What the dense and the pruned model are worth on one benchmark, and their paired difference with its interval.

    The difference of accuracies and of the metrics of tasks is in their own unit, that of perplexities in nats a token.
    """

    dense: Score | Reading
    pruned: Score | Reading
    difference: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class RunResult:
    """Everything one cell of a grid found: the content of result.json."""

    config: dict[str, Any]
    keys: dict[str, str]
    versions: dict[str, str]
    stages: dict[str, StageRun]
    calibration: dict[str, Any]
    prune: PruneResult
    scores: dict[str, BenchResult]


def to_json(record: Any) -> Any:
    """A record as plain JSON values."""
    return dataclasses.asdict(record)
