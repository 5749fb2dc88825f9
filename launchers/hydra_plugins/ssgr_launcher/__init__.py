"""The launchers, where Hydra looks for them; what they do lies in `launchers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from ssgr import lean


class _Launcher(Launcher):
    """A grid as one graph of unique stages."""

    kind: str

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.config: DictConfig | None = None
        self.context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives."""
        self.config, self.context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Plan the cells, and hand their stages on."""
        lean.load_transformers()
        from launchers import grid

        assert self.config is not None and self.context is not None
        with grid.explained(self.config):
            return grid.launch(self.context, self.config, job_overrides, initial_job_idx, self.kind, self.settings)


class SlurmLauncher(_Launcher):
    """Submit to SLURM and return, or stay; its settings are those of launchers/hydra/launcher/slurm.yaml."""

    kind = "slurm"


class LocalLauncher(_Launcher):
    """Run in processes of this machine, several at a time; its settings are those of launchers/hydra/launcher/local.yaml."""

    kind = "local"
