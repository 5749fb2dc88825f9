"""Experiment: one cell of a grid, what every config group was set to."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ssgr.allocation import Allocation
from ssgr.calib import Source
from ssgr.grader import Grader
from ssgr.measure import Measure
from ssgr.model import Model
from ssgr.problems import Problems
from ssgr.problems.decontaminate import Decontaminate
from ssgr.pruner import Pruner, Statistic
from ssgr.sampler import Decoding, Sampler
from ssgr.scope import Scope
from ssgr.select import Budget, Policy
from ssgr.sparsity import Sparsity
from ssgr.stages import evaluate
from ssgr.stages.export import Export
from ssgr.stages.plan import Memory
from ssgr.stages.prune import Passing


@dataclass(frozen=True)
class Experiment:
    """One cell of a grid: what every config group was set to."""

    model: Model
    problems: Problems
    sampler: Sampler
    decoding: Decoding
    grader: Grader
    calib: Source
    policy: Policy
    scope: Scope
    budget: Budget
    pruner: Pruner
    sparsity: Sparsity
    allocation: Allocation
    bench: evaluate.Bench | Measure | evaluate.Suite
    memory: Memory
    passing: Passing = Passing()  # noqa: RUF009 - it is frozen
    statistic: Statistic = "gram"
    export: Export = Export()  # noqa: RUF009 - it is frozen
    decontaminate: Decontaminate = Decontaminate()  # noqa: RUF009 - it is frozen
    shard: str | None = None

    def __post_init__(self) -> None:
        if self.shard is not None:
            part(self.shard)
        if type(self.calib.draw) is not int or self.calib.draw < 0:
            raise ValueError(f"calib.draw={self.calib.draw}: give a whole number of at least 0, the seed of the draw")
        if self.scope.bins and not self.policy.bins:
            raise ValueError(
                f"scope.bins.{min(self.scope.bins)}: traces have no bins to weigh; type bins=difficulty_length"
            )
        if self.policy.bins and (unknown := self.scope.bins.keys() - {*self.policy.bins.names}):
            raise ValueError(
                f"scope.bins.{min(unknown)}: bins={self.policy.bins.name} has no such bin; its bins are "
                + ", ".join(self.policy.bins.names)
            )
        if self.statistic not in ("norm", "gram"):
            raise ValueError(f"collect.statistic={self.statistic!r}: valid choices are norm, gram")
        if self.passing.propagate == "dense" and (self.pruner.statistic, self.statistic) == ("gram", "norm"):
            raise ValueError(f"collect.statistic=norm: pruner={self.pruner.name} needs Gram matrices; type gram")
        for bench in self.sampled_benches:
            if not bench.engine.runs_model:
                raise ValueError(
                    f"bench.engine={type(bench.engine).__name__} does not run the model that it is given, so the dense and the "
                    "pruned model would get the same answers: type bench.engine._target_=ssgr.sampler.hf.HfSampler"
                )
        if self.sparsity.group and self.allocation.needs != "nothing":
            raise ValueError(
                f"allocation={self.allocation.name} gives every layer a share of its own, and n:m is the same in all: type "
                "allocation=uniform, or sparsity=u50"
            )
        if self.pruner.statistic == "gradient":
            if self.passing.propagate == "dense":
                raise ValueError(
                    f"propagate=dense: pruner={self.pruner.name} needs gradients, which are not mixed after collection: type "
                    "propagate=pruned"
                )
            if self.allocation.needs == "scores":
                raise ValueError(
                    f"allocation={self.allocation.name} needs the scores of the dense model, and those of "
                    f"pruner={self.pruner.name} are known as its rows pass: type allocation=uniform, or owl"
                )

    @property
    def benches(self) -> list[evaluate.Bench | Measure]:
        """The benchmarks that the model is tried on."""
        return evaluate.members(self.bench)

    @property
    def sampled_benches(self) -> list[evaluate.Bench]:
        """Those that attempt problems, also as the text of a measure."""
        some = [one if isinstance(one, evaluate.Bench) else one.traces for one in self.benches]
        return [one for one in some if one is not None]

    @property
    def collects(self) -> Statistic:
        """The statistic of the dense model that is wanted beside, or instead of, those of the pruned blocks."""
        if self.passing.propagate == "dense" and self.pruner.statistic != "none":
            return self.statistic
        return {"nothing": "none", "norms": "norm", "scores": self.pruner.statistic}[self.allocation.needs]  # type: ignore[return-value]


def part(shard: str) -> slice:
    """Which of the problems the job `shard` samples, such as 2/8."""
    found = re.fullmatch(r"(\d+)/(\d+)", str(shard))
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"shard={shard}: give the number of a part and how many there are, 1/8 to 8/8")
    return slice(int(found[1]) - 1, None, int(found[2]))
