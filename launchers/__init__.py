"""Launchers: how the cells of a sweep are run. Until the SLURM launcher is here, sweeps use Hydra's basic launcher."""
