"""What cells found and how they differ from the dense model and from a control: the one place where that is computed.

Shapes: D draws of calibration sets, S seeds of the attempts, P problems or items.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssgr import intervals
from ssgr.records import shown
from ssgr.report.cells import Cell, by_id, shown_fields, values

_log = logging.getLogger("ssgr")
LEVEL = 0.05  # an adjusted p at or above this proves nothing
_DRAWN = ("draw", "sampler.decoding.seed")  # what makes a calibration set another draw
REPEATS = (*_DRAWN, "seed")  # what means are over
_APART = ("model", "bench", "budget")  # whose results have no common mean
FILTERS = frozenset({"difficulty", "length", "scope", "balance"})  # what one source uses and another need not


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Gap:
    """A mean paired difference with its 95 % interval, its two-sided p, and that after Holm's correction."""

    mean: float
    ci95: tuple[float, float]
    p: float
    p_adjusted: float

    @property
    def unsure(self) -> bool:
        """Whether the interval holds zero, or the adjusted p is 0.05 or more."""
        return holds_zero(self.ci95) or self.p_adjusted >= LEVEL


@dataclass(frozen=True)
class Comparison:
    """A group of cells that differ in draws and seeds alone, unless `by` asked for a mean over other fields.

    `names` are the fields, by their columns, in which the group agrees. `value` and `dense` are in the units that are
    shown, gaps in those of the paired differences (of perplexities: nats a token). `missing` are the combinations of its
    draws and seeds without a cell, such as one that failed.
    """

    names: dict[str, str]
    cells: tuple[Cell, ...]
    metric: str
    draws: int
    seeds: int
    missing: int
    problems: int
    value: Estimate
    dense: Estimate
    to_dense: Gap
    to_control: Gap | None


@dataclass(frozen=True)
class _Tables:
    """The (D, S, P) values of a group; a draw that a seed lacks is a row of NaN. `dense` is (1, S, P)."""

    pruned: NDArray[np.float64]
    dense: NDArray[np.float64]
    to_dense: NDArray[np.float64]
    to_control: NDArray[np.float64] | None


def compare(cells: Sequence[Cell], by: Sequence[str] | None = None, against: str | None = None) -> list[Comparison]:
    """Compare each group of cells that agree in the fields `by` with their dense model and with a control.

    By default `by` is all fields that differ but draws and seeds. `against` names the control as FIELD=VALUE, such as
    calib=matched: each cell is paired with the control's of the same draw and seed, and a cell of the dense model with that
    of the same seed. Intervals resample draws, seeds and problems (`intervals.bootstrap`); p is that of a t-test clustered
    by all three (`intervals.clustered_t`). Holm's correction is over all differences of one kind, to dense or to the
    control, in the list that is returned. A group that is another by all but filters that its source ignores is left out.

    Raises:
        ValueError: `by` or `against` names no field, no cell is the control, or a group mixes models, benchmarks, budgets
            or problems, or lacks some of its settings in a draw, or was tried on other problems than its control.
    """
    if not cells:
        return []
    by = list(by) if by else [f for f in shown_fields(cells) if f not in REPEATS]
    _check_fields("--by", by, cells)
    controls = _controls(cells, against) if against else {}
    groups: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[tuple(cell.fields[f] for f in by)].append(cell)
    first: dict[frozenset[tuple[str, ...]], tuple[str, ...]] = {}
    for names, group in groups.items():
        first.setdefault(frozenset(map(_found, group)), names)
    if alike := len(groups) - len(first):
        _log.warning("left out: %d groups whose source ignores the filters in which they differ from another", alike)
    groups = {names: groups[names] for names in first.values()}
    for group in groups.values():
        _check_group(group, by)
    found = [_tables(group, controls, against) for group in groups.values()]
    pruned, dense = (intervals.bootstrap([getattr(t, which) for t in found]) for which in ("pruned", "dense"))
    to_dense = _gaps([t.to_dense for t in found])
    paired = iter(_gaps([t.to_control for t in found if t.to_control is not None]))
    return [
        Comparison(
            names=dict(zip(by, names, strict=True)),
            cells=tuple(group),
            metric=group[0].metric,
            draws=own.pruned.shape[0],
            seeds=own.pruned.shape[1],
            missing=int(np.isnan(own.pruned[..., 0]).sum()),
            problems=own.pruned.shape[2],
            value=_estimate(group, "pruned", own.pruned, pruned[i]),
            dense=_estimate(group, "dense", own.dense, dense[i]),
            to_dense=to_dense[i],
            to_control=None if own.to_control is None else next(paired),
        )
        for i, ((names, group), own) in enumerate(zip(groups.items(), found, strict=True))
    ]


def once(cells: Sequence[Cell]) -> list[Cell]:
    """Without cells that are another by all but filters that their source ignores."""
    seen: dict[tuple[str, ...], Cell] = {}
    for cell in cells:
        seen.setdefault(_found(cell), cell)
    return list(seen.values())


def _found(cell: Cell) -> tuple[str, ...]:
    """The results of a cell and its settings but for the filters: the same for cells whose source ignores those."""
    rest = (value for name, value in cell.fields.items() if name.partition(".")[0] not in FILTERS)
    return cell.key("pruned"), cell.key("dense"), *rest


def holds_zero(ci95: Sequence[float]) -> bool:
    """Whether an interval of a difference holds zero."""
    return ci95[0] <= intervals.TINY and ci95[1] >= -intervals.TINY


def _estimate(group: Sequence[Cell], which: str, table_DSP: NDArray[np.float64], ci95: tuple[float, float]) -> Estimate:
    """The mean in shown units; that of one evaluation with the interval of its record, so that all tables agree."""
    metric, mean = group[0].metric, float(np.nanmean(table_DSP))
    if len({cell.key(which) for cell in group}) == 1:
        low, high = group[0].score[which]["ci95"]
        return Estimate(shown(metric, mean), (low, high))
    return Estimate(shown(metric, mean), (shown(metric, ci95[0]), shown(metric, ci95[1])))


def _gaps(tables_DSP: Sequence[NDArray[np.float64]]) -> list[Gap]:
    """The gaps of one family: their p-values are corrected together."""
    p = [intervals.clustered_t(table) for table in tables_DSP]
    columns = zip(tables_DSP, intervals.bootstrap(tables_DSP), p, intervals.holm(p), strict=True)
    return [Gap(float(np.nanmean(table)), ci95, own, adjusted) for table, ci95, own, adjusted in columns]


def draw_of(cell: Cell) -> tuple[str, ...]:
    """What makes the calibration set of a cell another draw than that of another cell."""
    return tuple(cell.fields.get(name, "") for name in _DRAWN)


def _tables(group: Sequence[Cell], controls: dict[tuple[str, ...], list[Cell]], against: str | None) -> _Tables:
    """The values of a group by draw, seed and problem; of several settings `by` joins, their mean."""
    draws, seeds = (list(dict.fromkeys(names)) for names in (map(draw_of, group), (c.fields["seed"] for c in group)))
    pruned: dict[tuple[int, int], list[NDArray[np.float64]]] = defaultdict(list)
    dense, control = defaultdict(list), defaultdict(list)
    for cell in group:
        at = draws.index(draw_of(cell)), seeds.index(cell.fields["seed"])
        pruned[at].append(values(cell, "pruned"))
        dense[at].append(values(cell, "dense"))
        if (twin := _control(cell, controls, against)) is not None:
            _check_pair(cell, twin)
            control[at].append(values(twin, "pruned"))
    shape = len(draws), len(seeds), len(values(group[0], "pruned"))
    pruned_DSP, dense_DSP = _filled(pruned, shape), _filled(dense, shape)
    complete = sum(map(len, control.values())) == len(group)
    itself = against is not None and any(_is(cell, against) for cell in group)
    return _Tables(
        pruned=pruned_DSP,
        dense=_filled({(0, s): one for (_, s), one in dense.items()}, (1, *shape[1:])),
        to_dense=pruned_DSP - dense_DSP,
        to_control=pruned_DSP - _filled(control, shape) if complete and not itself else None,
    )


def _filled(
    found: dict[tuple[int, int], list[NDArray[np.float64]]], shape: tuple[int, int, int]
) -> NDArray[np.float64]:
    out = np.full(shape, np.nan)
    for at, several in found.items():
        out[at] = np.mean(several, 0)
    return out


def _check_fields(option: str, given: Sequence[str], cells: Sequence[Cell]) -> None:
    valid = list(cells[0].fields)
    if unknown := [f for f in given if f not in valid]:
        raise ValueError(f"{option} {','.join(unknown)}: no such field; valid are {', '.join(valid)}")


def _check_group(group: Sequence[Cell], by: Sequence[str]) -> None:
    """Refuse a mean over what cannot be averaged, or over other settings in one draw than in another."""
    for field in _APART:
        if len(there := {cell.fields[field]: 1 for cell in group}) > 1:
            raise ValueError(
                f"results of more than one {field} ({', '.join(there)}) have no common mean and are not compared: "
                f"give --by {','.join([*by, field])}"
            )
    tried = {cell.path: (cell.metric, by_id(cell.outcomes("pruned")).keys()) for cell in group}
    if odd := [path for path, ids in tried.items() if ids != tried[group[0].path]]:
        raise ValueError(
            f"{group[0].path} and {odd[0]} were tried on different problems and have no common mean: give one sweep, "
            "or --by with the fields that tell them apart"
        )
    settings: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for cell in group:
        own = tuple(value for name, value in cell.fields.items() if name not in REPEATS)
        settings[*draw_of(cell), cell.fields["seed"]].add(own)
    if len(settings) > 1 and any(own != next(iter(settings.values())) for own in settings.values()):
        differ = [f for f in group[0].fields if f not in REPEATS and len({cell.fields[f] for cell in group}) > 1]
        raise ValueError(
            f"the cells of {', '.join(f'{f}={group[0].fields[f]}' for f in by)} differ in {', '.join(differ)}, and not every "
            f"draw and seed has all of them: give --by {','.join([*by, *differ])}"
        )


def _check_pair(cell: Cell, control: Cell) -> None:
    """Refuse a paired difference over other problems, which would pair them by their place in the list."""
    if by_id(cell.outcomes("pruned")).keys() != by_id(control.outcomes("pruned")).keys():
        raise ValueError(
            f"{cell.path} and its control {control.path} were tried on different problems and have no paired difference: give "
            "the folders of one of them, or run both again on the same problems"
        )


def _is(cell: Cell, against: str) -> bool:
    field, _, value = against.partition("=")
    return cell.fields[field] == value


def _twin(cell: Cell, against: str) -> tuple[str, ...]:
    """What a cell and its control agree in: all but the field compared and, between sources, the filters."""
    field = against.partition("=")[0]
    free = {field} | (FILTERS if field == "calib" else set())
    return tuple(value for name, value in cell.fields.items() if name.partition(".")[0] not in free)


def _controls(cells: Sequence[Cell], against: str) -> dict[tuple[str, ...], list[Cell]]:
    """The cells of the control by what they and those compared with them agree in."""
    field = against.partition("=")[0]
    _check_fields("--against", [field], cells)
    out: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for cell in cells:
        if _is(cell, against):
            out[_twin(cell, against)].append(cell)
    if not out:
        there = sorted({cell.fields[field] for cell in cells})
        raise ValueError(f"--against {against}: no such cell; {field} here is {', '.join(there)}")
    return out


def _control(cell: Cell, controls: dict[tuple[str, ...], list[Cell]], against: str | None) -> Cell | None:
    """The control of a cell: of several, the one with the cell's own filters; None where none or several fit."""
    if against is None:
        return None
    fit = controls.get(_twin(cell, against), [])
    alike = [one for one in fit if all(one.fields[name] == cell.fields[name] for name in FILTERS)]
    return alike[0] if len(alike) == 1 else fit[0] if len(fit) == 1 else None
