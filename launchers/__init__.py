"""Launchers: how the cells of a sweep are run, here or as jobs of a cluster, and what is typed after run.py."""
