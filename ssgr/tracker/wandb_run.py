"""The process that talks to Weights & Biases: reads what to do from standard input, makes the runs, and ends."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ssgr.tracker import content

TAG = 64  # characters that a tag may have
NAME = 128  # and a name
_NO_TAG = ("hydra", "store.", "tracker", "device", "memory.")  # overrides that say nothing of what was run


def make(asked: dict[str, Any]) -> None:
    """Make the runs that `asked` names of the result.json in its folder."""
    folder = Path(asked["folder"])
    result = json.loads((folder / "result.json").read_text())
    for id_, kind in asked["runs"].items():
        # what is to be uploaded lies beside the run until then, and not in the home directory
        os.environ["WANDB_DATA_DIR"] = str(Path(asked["root"]) / "wandb" / "staged" / id_)
        run = _open(asked, result, id_, kind["dense"])
        if not kind["dense"]:
            if kind["history"]:
                _log_layers(run, result)
            _log_artifacts(run, folder, result)
        _show(run, asked, result, kind["dense"])
        run.finish()


def _open(asked: dict[str, Any], result: dict[str, Any], id_: str, dense: bool) -> Any:
    """The run `id_`: a new one, or the one that was there."""
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=asked["timeout"],
        disable_git=True,
        disable_code=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_disable_meta=True,  # host, user, and the command line with whatever was typed there
        x_save_requirements=False,
    )
    config = result["config"]
    told = [content.without_secrets(one) for one in asked["overrides"] if not one.lstrip("+~").startswith(_NO_TAG)]
    if dense:
        name, kept = f"dense {config['model']['name']}", ("model", "problems", "bench", "grader")
        tags = ["dense"]
        config = {key: config[key] for key in kept if key in config}
    else:
        name, tags = ",".join(told) or "defaults", [one[:TAG] for one in told]
    keys = {key: value for key, value in result["keys"].items() if not dense or key.startswith("evaluate_dense.")}
    own = {"dense": {"model": config["model"]["name"]}} if dense else {"cell": content.axes(result)}
    shown = {**config, **own, "keys": keys, "versions": result["versions"]}
    return wandb.init(
        id=id_,
        project=asked["project"],
        entity=asked["entity"],
        dir=asked["root"],
        mode=asked["mode"],
        resume="allow" if asked["mode"] == "online" else None,  # offline there is nobody to ask
        group=content.without_secrets(Path(asked["root"]).name),
        job_type="evaluate" if dense else "prune",
        name=name[:NAME],
        tags=tags,
        config=content.without_secrets(shown),
        settings=settings,
    )


def _log_layers(run: Any, result: dict[str, Any]) -> None:
    """A point of history for each layer, and nothing else there: all other values have no steps, and lie in the summary."""
    run.define_metric("layer", summary="none")
    run.define_metric("layer/*", step_metric="layer", summary="none")
    for i, layer in enumerate(content.layers(result)):
        values = {f"layer/{name}": layer[name] for name in content.LAYER if layer[name] is not None}
        run.log({"layer": i, **values}, step=i)


def _show(run: Any, asked: dict[str, Any], result: dict[str, Any], dense: bool) -> None:
    """Scores, costs and tables, in the run's summary."""
    import wandb

    run.summary.update(content.scalars(result, dense_only=dense))
    rows = content.samples(Path(asked["folder"]), result, asked["samples"], asked["sample_chars"])
    columns = list(content.SAMPLE)
    if dense:
        kept = [i for i, name in enumerate(columns) if not name.startswith("pruned")]
        columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    shown = [("samples", columns, content.without_secrets(rows))]
    if not dense:
        each = content.layers(result)
        shown.append(("layers", ["layer", "name", *content.LAYER], [[i, *row.values()] for i, row in enumerate(each)]))
        shown.append(("stages", ["stage", "seconds", "peak MiB"], content.stages(result)))
        shown.append(("funnel", ["step", "left"], result["calibration"]["funnel"]))
    for name, columns, rows in shown:
        run.summary[f"tables/{name}"] = wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)


def _log_artifacts(run: Any, folder: Path, result: dict[str, Any]) -> None:
    """The calibration set that the run used and the checkpoint that it made, as references to where they lie."""
    import wandb

    def reference(kind: str, stage: str, path: Path) -> Any:
        key = result["keys"][stage]
        artifact = wandb.Artifact(f"{kind}-{key}", type=kind, metadata={"stage": stage, "key": key})
        artifact.add_reference(path.resolve().as_uri(), checksum=False)  # the key says what it holds; nothing is read
        return artifact

    used = reference("calibration", "select", folder / "calibration.parquet")
    made = reference("checkpoint", "prune", Path(result["prune"]["checkpoint"]))
    # what use_artifact does first; it then waits for the server's answer, and so refuses offline
    run._log_artifact(used, is_user_created=True, use_after_commit=True)
    run.log_artifact(made)


if __name__ == "__main__":
    try:
        make(json.load(sys.stdin))
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
