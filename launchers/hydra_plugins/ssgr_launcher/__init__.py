"""The launchers, where Hydra looks for them; what they do lies in `launchers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _Launcher(Launcher):
    """A grid as one graph of unique stages."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.config: DictConfig | None = None
        self.context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives."""
        self.config, self.context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Plan the cells, and hand their stages on."""
        from launchers import grid

        assert self.config is not None and self.context is not None
        return grid.launch(self.context, self.config, job_overrides, initial_job_idx, self.kind, self.settings)

    kind = ""


class SlurmLauncher(_Launcher):
    """Submit to SLURM and return, or stay."""

    kind = "slurm"

    def __init__(
        self,
        dry_run: bool,
        wait: bool,
        parts: int,
        max_array: int,
        max_parallel: int | None,
        max_timeouts: int,
        cancel_dropped: bool,
        fold: Mapping[str, str],
        resources: Mapping[str, Mapping[str, Any]],
    ) -> None:
        super().__init__(
            dry_run=dry_run,
            wait=wait,
            parts=parts,
            max_array=max_array,
            max_parallel=max_parallel,
            max_timeouts=max_timeouts,
            cancel_dropped=cancel_dropped,
            fold=fold,
            resources=resources,
        )


class LocalLauncher(_Launcher):
    """Run in processes of this machine, several at a time."""

    kind = "local"

    def __init__(
        self,
        dry_run: bool,
        parts: int,
        max_parallel: int | None,
        cpus_per_task: int | None,
        timeout_min: int,
        fold: Mapping[str, str],
    ) -> None:
        super().__init__(
            dry_run=dry_run,
            parts=parts,
            max_parallel=max_parallel,
            cpus_per_task=cpus_per_task,
            timeout_min=timeout_min,
            fold=fold,
        )
