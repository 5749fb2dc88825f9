"""A report of Weights & Biases, written by code: panels over the runs of a sweep, its tables, and what they rest on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from ssgr.tracker import content

_AXES = (  # title, setting; a panel each
    ("Source of the calibration rows", "cell.calib"),
    ("Difficulty", "cell.difficulty"),
    ("Length", "cell.length"),
    ("Pruner", "cell.pruner"),
)
_WIDTH, _HEIGHT = 12, 9  # of a panel, in cells of the grid, which has 24 columns


def publish(
    name: str, results: Sequence[content.Result], tables: Mapping[str, str], project: str, entity: str | None = None
) -> str:
    """Send the report of a sweep and return its address.

    `tables` are Markdown by their titles; panels show the runs that the tracker made of `results`.

    Raises:
        ValueError: nobody is logged in, the library is not installed, or the server refuses.
    """
    try:
        import wandb

        wr: Any = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise ValueError(
            f"--wandb needs wandb-workspaces, which is not installed ({error}): type pip install -e '.[wandb_reports]'"
        ) from error
    wandb.setup(wandb.Settings(silent=True))
    try:
        if wandb.login(prompt=False):
            entity = entity or str(wandb.Api().default_entity)
            report = wr.Report(
                project=project,
                entity=entity,
                title=f"ssgr {name}"[:128],
                description=f"{len(results)} cells, built by python -m ssgr.report --wandb",
                blocks=_blocks(wr, results, tables, project, entity),
                width="fluid",
            )
            report.save()
            return str(report.url)
    except Exception as error:  # the library has one class for each of its layers
        said = content.without_secrets(" ".join(str(error).split()) or type(error).__name__)
        raise ValueError(
            f"W&B did not take the report ({said}): send the runs first (wandb sync), give their --project and --entity, "
            "and see that the network reaches it"
        ) from error
    raise ValueError("--wandb sends the report to W&B, and nobody is logged in: type wandb login, or set WANDB_API_KEY")


def _blocks(
    wr: Any, results: Sequence[content.Result], tables: Mapping[str, str], project: str, entity: str
) -> list[Any]:
    cells = _runs(wr, results, project, entity, "cells", content.run_id)
    dense = _runs(wr, results, project, entity, "dense models", content.dense_id)
    metrics = _metrics(results)
    out = [wr.H1("What was run"), *[wr.P(line) for line in told(results)]]
    for title, table in tables.items():
        out += [wr.H1(title), wr.MarkdownBlock(table)]
    for bench, metric in metrics.items():
        score, tokens = f"scores/{bench}/pruned/{metric}", f"scores/{bench}/pruned/mean_tokens"
        panels = [
            wr.BarPlot(title=f"{title}: {metric}", metrics=[score], groupby=wr.Config(setting), groupby_aggfunc="mean",
                       groupby_rangefunc="minmax")
            for title, setting in _AXES
        ]  # fmt: skip
        shown = [score, tokens] if metric == "accuracy" else [score]
        panels += [
            wr.ScatterPlot(title=f"Sparsity: {one.rpartition('/')[2]}", x=wr.SummaryMetric("prune/sparsity_realised"),
                           y=wr.SummaryMetric(one))
            for one in shown
        ]  # fmt: skip
        out += [wr.H1(bench), wr.PanelGrid(runsets=[cells, dense], panels=_laid_out(wr, panels))]
    layers = [wr.LinePlot(title=f"Layers: {name}", x="layer", y=[f"layer/{name}"]) for name in ("error", "sparsity")]
    out += [wr.H1("Layers"), wr.PanelGrid(runsets=[cells], panels=_laid_out(wr, layers))]
    logged = [
        wr.WeavePanelSummaryTable(table_name=f"tables/{name}") for name in ("samples", "layers", "stages", "funnel")
    ]
    return [*out, wr.H1("Tables"), wr.PanelGrid(runsets=[cells], panels=_laid_out(wr, logged))]


def _runs(wr: Any, results: Sequence[content.Result], project: str, entity: str, name: str, id_of: Any) -> Any:
    from wandb_workspaces import expr

    ids = sorted({id_of(result) for result in results})
    return wr.Runset(entity=entity, project=project, name=name, filters=[expr.Metric("ID").isin(ids)])


def _metrics(results: Sequence[content.Result]) -> dict[str, str]:
    """What is measured on each benchmark, as it is called among the scalars."""
    return {
        bench: "accuracy" if "accuracy" in one["pruned"] else "value"
        for result in results
        for bench, one in result["scores"].items()
    }


def _laid_out(wr: Any, panels: Sequence[Any]) -> list[Any]:
    """Panels in two columns."""
    for i, panel in enumerate(panels):
        panel.layout = wr.Layout(x=_WIDTH * (i % 2), y=_HEIGHT * (i // 2), w=_WIDTH, h=_HEIGHT)
    return list(panels)


def told(results: Sequence[content.Result]) -> list[str]:
    """Sentences that say what the numbers rest on: models, budget, draws, seeds, problems, and what an interval is."""
    configs = [result["config"] for result in results]

    def each(*path: str) -> str:
        return ", ".join(sorted({str(_at(config, path)) for config in configs} - {"None"})) or "none"

    budgets = sorted({_budget(config["budget"]) for config in configs})
    draws = {str(_at(config, ("calib", "draw"))) for config in configs}
    out = [
        f"{len(results)} cells of {each('model', 'name')}.",
        f"Budget of calibration: {', '.join(budgets)}.",
        f"Draws of the calibration set: {each('calib', 'draw')} ({len(draws)}). Seeds of sampling: "
        f"{each('sampler', 'decoding', 'seed')}; of evaluation: {each('bench', 'decoding', 'seed')}.",
        f"Benchmarks: {', '.join(_tried(results))}.",
        "Intervals are 95 %, clustered by problem; differences to dense are paired by problem. Bars over groups of runs are "
        "means, and their whiskers the smallest and largest, no intervals.",
    ]
    if len(budgets) > 1:
        out.append("The cells have different budgets: compare only those of the same.")
    if len(draws) == 1:
        out.append("One draw: intervals do not tell how far another calibration set would move a result.")
    return out


def _at(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = config
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _budget(budget: Mapping[str, Any]) -> str:
    return f"{budget['tokens']} tokens" if budget["tokens"] is not None else f"{budget['rows']} rows"


def _tried(results: Sequence[content.Result]) -> list[str]:
    out = set()
    for result in results:
        for bench, one in result["scores"].items():
            found = one["dense"]
            size = (
                f"{found['problems']} problems, attempts {found['attempts']}"
                if "attempts" in found
                else f"{found['items']} items"
            )
            out.add(f"{bench} ({size})")
    return sorted(out)
