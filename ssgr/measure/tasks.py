"""Tasks of lm-evaluation-harness, run by that library."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from ssgr.errors import first_line
from ssgr.loadable import Loadable, one_day
from ssgr.records import Item, Trace


@cache
def known(folder: str | None) -> Any:
    """The library's index of its tasks and of those in `folder`, thousands of files that are read once."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


@dataclass(frozen=True)
class LmEvalTask:
    """The task `task` of lm-evaluation-harness by its `metric`, with `fewshot` examples (None: as the task says).

    `folder` holds task files of your own; `chat` puts the questions through the chat template, with `model.system` and
    `model.chat`; `limit` takes the first documents only. The library shuffles and draws by its own fixed seeds.
    """

    name: str
    task: str
    metric: str
    fewshot: int | None = None
    limit: int | None = None
    chat: bool = False
    folder: str | None = None
    unsafe_code: bool = False
    batch_size: int = field(default=8, metadata={"key": False})
    traces: ClassVar[Any] = None

    def key_content(self) -> object:
        """Task files of your own are keyed by what they hold, those of `folder`; not what they read elsewhere."""
        kept = {one.name: getattr(self, one.name) for one in fields(self) if one.metadata.get("key", True)}
        return {**kept, "folder": _sums(Path(self.folder).expanduser()) if self.folder else None}

    def check(self, context: int | None) -> None:
        """See that the library is there.

        Raises:
            ValueError: it is not.
        """
        if find_spec("lm_eval") is None:
            raise self._lacks("it is not installed")

    def _lacks(self, why: object) -> ValueError:
        return ValueError(f"bench={self.name} needs lm-evaluation-harness ({why}): type pip install 'ssgr[lm_eval]'")

    def measure(self, model: Loadable, tokenizer: PreTrainedTokenizerBase, traces: Sequence[Trace]) -> list[Item]:
        """The metric of each document.

        Raises:
            ValueError: the library is not installed, knows no such task or metric, or the task's data cannot be loaded.
        """
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import get_task_dict
        except ImportError as error:
            raise self._lacks(error) from error
        manager = known(self.folder)
        if self.task not in manager.all_tasks:
            near = [name for name in manager.all_tasks if name.startswith(self.task[:4])][:5]
            raise ValueError(
                f"bench.task={self.task}: lm-evaluation-harness {lm_eval.__version__} has no such task"
                + (f"; near are {', '.join(near)}" if near else "; give bench.folder=DIR with your own")
            )
        try:
            tasks = _tasks(get_task_dict([self.task], manager))
        except Exception as error:
            raise self._cannot(error) from error
        declared = self._check_metric(tasks)
        how = {"batch_size": self.batch_size, "chat_template_args": dict(model.chat)}
        wrapped = HFLM(pretrained=model.load(), tokenizer=tokenizer, **how)

        def evaluated(limit: int | None) -> list[Item]:
            try:
                found = lm_eval.simple_evaluate(
                    model=wrapped,
                    tasks=tasks,
                    num_fewshot=self.fewshot,
                    limit=limit,
                    task_manager=manager,
                    log_samples=True,
                    bootstrap_iters=0,
                    apply_chat_template=self.chat,
                    system_instruction=model.system if self.chat else None,
                    confirm_run_unsafe_code=self.unsafe_code,
                )
            except Exception as error:
                raise self._cannot(error) from error
            return self._items(found["samples"])

        with one_day():
            if not declared:  # a task may give metrics that it does not declare: one document shows which
                evaluated(1)
            return evaluated(self.limit)

    def _cannot(self, error: Exception) -> ValueError:
        """What the library, datasets or the hub raised, of many kinds: all mean that the task cannot be run."""
        return ValueError(
            f"bench={self.name}: lm-evaluation-harness cannot run the task {self.task} "
            f"({first_line(error)}); its data comes from the hub: fetch it once "
            "on a machine with network, or give bench.folder=DIR with a task of local files"
        )

    def _check_metric(self, tasks: Sequence[Any]) -> bool:
        """Whether `tasks` declare the metric; refuse one that is not the mean of what each document has, before hours of
        evaluation."""
        from lm_eval.api.metrics import mean

        means = {name for task in tasks for name, how in task.aggregation().items() if how is mean}
        others = {name for task in tasks for name, how in task.aggregation().items() if how is not mean}
        if self.metric in others:
            raise ValueError(
                f"bench.metric={self.metric}: the task {self.task} makes it of all documents at once, and a metric must be the "
                f"mean over documents: it has {', '.join(sorted(means - others)) or 'none of these'}"
            )
        return self.metric in means

    def _items(self, samples: dict[str, list[dict[str, Any]]]) -> list[Item]:
        """Of a group's tasks one after the other; each document counts once, whichever filter its metric is of."""
        items: dict[str, Item] = {}
        for task, rows in samples.items():
            for row in rows:
                if self.metric in row:
                    name = f"{task}/{row['doc_id']}"
                    if not isinstance(row[self.metric], (bool, int, float, np.number, np.bool_)):
                        raise ValueError(
                            f"bench.metric={self.metric}: the task {self.task} gives no number for {name}; choose another metric"
                        )
                    items.setdefault(name, Item(name, float(row[self.metric]), 1))
        if not items:
            there = {k for rows in samples.values() for row in rows[:1] for k in row.get("metrics", ())}
            raise ValueError(
                f"bench.metric={self.metric}: the task {self.task} has {', '.join(sorted(there)) or 'no documents'}"
            )
        return list(items.values())


def _sums(folder: Path) -> list[tuple[str, str]]:
    """The files of `folder` and their SHA-256, without hidden ones and what Python compiles."""
    found = sorted((str(file.relative_to(folder)), file) for file in folder.rglob("*") if file.is_file())
    seen = [(name, file) for name, file in found if not re.search(r"(^|/)(\.|__pycache__/)", name)]
    return [(name, hashlib.sha256(file.read_bytes()).hexdigest()) for name, file in seen]


def _tasks(found: dict[Any, Any]) -> list[Any]:
    """The tasks of a group and of the groups in it, or the one that it is."""
    return [task for one in found.values() for task in (_tasks(one) if isinstance(one, dict) else [one])]
