"""The page and its figures: the numbers of the tables, everything escaped, and sentences for what is missing."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import webbrowser
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from launchers import outcome
from ssgr import tables
from ssgr.records import Text
from ssgr.report import compare, figures, page, ran, table, traces
from ssgr.report.__main__ import main
from ssgr.report.cells import find, read
from ssgr.report.groups import groups
from ssgr.tracker import content as tracked
from tests.sweeps import grid, store, sweep

GRID = grid(calib=["corpus", "ssgr", "matched"], difficulty=["any", "hard"], length=["any", "short"], draw=[0, 1])


class Read(HTMLParser):
    """What a page holds: its elements with their attributes, and the text in each kind of element."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open, []).append(data)


def report(folder: Path) -> page.Report:
    return page.gather(*page.find([folder]))


def built(folder: Path) -> str:
    return page.render(report(folder))


def absent(found: page.Report) -> str:
    return " ".join(
        f"{one.title}: {one.why}" for own in found.by_group for one in own if isinstance(one, figures.Absent)
    )


def test_csv_table_and_page_have_the_numbers_of_the_comparison(tmp_path: Path) -> None:
    found = report(sweep(tmp_path, GRID))
    wanted = {
        tuple(one.cells[0].fields[name] for name in ("calib", "difficulty", "length")): one
        for one in compare.compare(found.groups[0].cells, against="calib=matched")
    }
    figure = next(one for one in found.figures if one.name.startswith("heat"))
    rows = list(csv.DictReader(io.StringIO(figures.comma_separated(figure))))
    assert len(rows) == 12
    for row in rows:
        own = wanted[row["panel"], row["difficulty"], row["length"]]
        assert [float(row[name]) for name in ("value", "low", "high")] == pytest.approx(
            [own.value.mean, *own.value.ci95], rel=1e-5
        )
        assert (row["draw"], row["seed"], row["problem"]) == ("2", "1", "12")
    board = {row["label"]: row for row in page.table(found.groups[0])["rows"]}
    shown = {
        (row["calib"], row["difficulty"], row["length"]): row
        for row in table.means(found.groups[0].cells, against="calib=matched")
    }
    content = page.render(found)
    for row in found.groups[0].pruned:
        same = shown[row["calib"], row["difficulty"], row["length"]]
        values = [value for value, _, _ in board[row["label"]]["cells"]]
        assert same["accuracy"] in values and same["accuracy"] in content
        assert re.sub(r" !$| \?$", "", same["difference to dense"]).split("]")[0] + "]" in values


def test_one_attempt_is_no_attempts(tmp_path: Path) -> None:
    facts = dict(ran.facts(report(sweep(tmp_path, [{}])).cells))
    assert facts["benchmarks"] == ["held_out: 12 problems × 1 attempt"]


def test_doubt_stands_in_words_beside_each_difference_that_may_be_zero(tmp_path: Path) -> None:
    found = report(sweep(tmp_path, grid(calib=["ssgr", "matched"], ratio=[0.1, 0.9], draw=[0, 1]), problems=40))
    doubts = {
        row["label"]: [doubt for _, _, doubt in row["cells"] if doubt] for row in page.table(found.groups[0])["rows"]
    }
    for row in found.groups[0].pruned:
        unsure = [row.get("to_dense_unsure"), row.get("to_control_unsure")]
        assert doubts[row["label"]] == ["not told apart"] * sum(map(bool, unsure))
    assert {row["to_dense_unsure"] for row in found.groups[0].pruned} == {True, False}


def test_a_mean_over_fewer_cells_than_draws_times_seeds_says_so(tmp_path: Path) -> None:
    group = report(sweep(tmp_path, grid(calib=["ssgr", "matched"]))).groups[0]
    group.pruned[0]["missing"] = 3
    words = [[doubt for _, _, doubt in row["cells"] if "missing" in doubt] for row in page.table(group)["rows"]]
    assert words == [[], ["3 missing"], []]


def test_the_share_that_the_grader_failed_on_stands_beside_the_accuracy(tmp_path: Path) -> None:
    folder = sweep(tmp_path, [{}])
    assert "the grader failed on" not in built(folder)
    result = json.loads((folder / "0" / "result.json").read_text())
    result["scores"]["held_out"]["pruned"]["grader_failed"] = 0.25
    (folder / "0" / "result.json").write_text(json.dumps(result))
    content = built(folder)
    assert content.count("the grader failed on 25.0%") == 1


def test_it_is_one_file_that_may_load_nothing_and_run_only_its_own_scripts(tmp_path: Path) -> None:
    content = built(sweep(tmp_path, GRID))
    read = Read(content)
    policy = next(
        a["content"] for tag, a in read.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy
    for tag, attributes in read.elements:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        assert not {"src", "style", "srcset", "action"} & attributes.keys() and not any(
            name.startswith("on") for name in attributes
        )
        assert (attributes.get("href") or "#").startswith("#")
    assert content.count("vegaEmbed = vegaEmbed") + content.count("window.vegaEmbed=") == 1  # one copy of the bundle
    assert len([a for tag, a in read.elements if tag == "script" and "type" not in a]) == 2


@pytest.mark.parametrize(
    "bad", ["</script><script>alert(1)</script>", "<!--<script>", "]]>", "&lt;b&gt;", "\u2028\x00\ud800"]
)
def test_what_a_model_wrote_never_leaves_its_json(bad: str, tmp_path: Path) -> None:
    folder = sweep(tmp_path, [{}])
    plain = Read(built(folder))
    file = folder / "0" / "texts" / "held_out.parquet"
    own = bad.encode("utf-8", "replace").decode()  # what Parquet can hold
    tables.write_texts(file, [Text(t.problem_id, 0, own, own, own, own) for t in tables.read_texts(file)])
    read = Read(built(folder))
    assert [tag for tag, _ in read.elements] == [tag for tag, _ in plain.elements]
    assert own not in "".join(text for text in read.texts["script"] if text.startswith(("{", "[")))
    held = json.loads(next(text for text in read.texts["script"] if text.startswith('{"attempts"')))
    assert any(answer["text"]["head"] == traces.visible(own.strip()) for answer in held["problems"][0]["answers"])


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_shown_steers_a_terminal_or_the_direction_of_text(text: str) -> None:
    shown = traces.visible(text)
    shown.encode("utf-8")
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\u2028\u2029\ufeff]", shown
    )
    kept = [c for c in text if c.isprintable() or c in "\n\t"]
    rest = iter(shown)
    assert all(c in rest for c in kept)  # in their order


def test_a_long_answer_says_how_much_is_left_out() -> None:
    part = traces.bounded("a" * 100_000 + "z" * 100_000)
    assert part["head"][0] == "a" and part["tail"][-1] == "z"
    assert len(part["head"]) + len(part["tail"]) + part["left_out"] == 200_000 and part["left_out"] > 130_000
    assert traces.bounded("short") == {"head": "short", "left_out": 0, "tail": ""}


def test_figures_are_files_of_paper_quality(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "sweep", grid(calib=["ssgr", "matched"], ratio=[0.4, 0.6], draw=[0, 1]))
    store(folder)
    assert main([str(folder), "--figures", str(tmp_path / "figures")]) == 0
    names = {file.stem for file in (tmp_path / "figures").iterdir()}
    assert names >= {"leaderboard_tiny_held_out", "sparsity_tiny_held_out", "funnel_tiny", "pool_length_tiny", "stages"}
    for name in names:
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            assert image.width > 1000 and len(image.convert("RGB").resize((200, 200)).getcolors(40_000) or ()) > 2
        root = ElementTree.parse(tmp_path / "figures" / f"{name}.svg").getroot()
        assert root.tag.endswith("svg") and len(list(root.iter())) > 20
        assert len((tmp_path / "figures" / f"{name}.csv").read_text().splitlines()) > 1


def test_the_histograms_count_the_pool_and_what_was_chosen(tmp_path: Path) -> None:
    folder = sweep(tmp_path, [{}])
    store(folder)
    by_name = {one.name: one for one in report(folder).figures}
    for name in ("pool_difficulty_tiny", "pool_length_tiny"):
        counts: dict[str, int] = {}
        for row in by_name[name].rows:
            counts[row["series"]] = counts.get(row["series"], 0) + row["count"]
        assert counts == {"pool": 96, "ssgr": 9}
    pool = [row["count"] for row in by_name["pool_difficulty_tiny"].rows if row["series"] == "pool"]
    # Problem i of 24 is right in min(i % 5, 4) of 4 attempts: shares of 1, 3/4, 1/2, 1/4 and 0.
    assert pool == [16, 0, 20, 0, 20, 0, 20, 0, 20]


def test_a_store_that_is_gone_is_said(tmp_path: Path) -> None:
    found = report(sweep(tmp_path, [{}]))
    why = next(one.why for one in found.by_model["tiny"] if isinstance(one, figures.Absent))
    assert "is not there any more: give the command of the sweep again" in why
    for file in tmp_path.glob("0/texts/*"):
        file.unlink()
    assert "not there any more" in built(tmp_path)


def test_one_cell_has_a_page_that_says_what_would_fill_it(tmp_path: Path) -> None:
    found = report(sweep(tmp_path, [{}]))
    assert (
        "experiment=sparsity" in absent(found)
        and "difficulty=easy,medium,hard" in absent(found)
        and "calib.draw" in absent(found)
    )
    assert "Results of 1 cell<" in page.render(found)


def test_models_and_benches_have_sections_of_their_own_and_budgets_are_named(tmp_path: Path) -> None:
    found = report(sweep(tmp_path, grid(model=["tiny", "other"], bench=["held_out", "gsm8k"], budget=[400, 800])))
    assert [(group.model, group.bench) for group in found.groups] == [
        (model, bench) for model in ("tiny", "other") for bench in ("held_out", "gsm8k")
    ]
    content = page.render(found)
    assert (
        "There are 4 combinations of sweep, model and benchmark" in content
        and content.count("These cells had different budgets (400, 800") == 4
    )
    for figure in found.figures:
        if "leaderboard" in figure.name:
            assert "Budgets differ (400, 800 tokens)" in figure.caption
            assert [row["label"] for row in figure.rows] == ["dense", "budget 400", "budget 800"]


def test_the_same_share_of_zeros_in_all_layers_is_labelled_as_it_is(tmp_path: Path) -> None:
    found = report(sweep(tmp_path, grid(calib=["corpus", "ssgr"])))
    (layers,) = (figure for figure in found.figures if "sparsity" in figure.name and "layers" in figure.name)
    spec = json.dumps(layers.spec)
    assert '"format": ".0%"' in spec and '"domain": [0, 1]' in spec


def test_the_room_for_answers_is_shared_among_the_benches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bench in ("aime24", "math500", "svamp"):
        sweep(tmp_path / bench, [{"bench": bench}], response="so " * 400)
    counts = {}
    for room in (6_000_000, 30_000):
        monkeypatch.setattr(traces, "MAX_CHARACTERS", room)
        counts[room] = [int(n) for n in re.findall(r"In this page: (\d+) of 12 problems", built(tmp_path))]
    assert counts[6_000_000] == [12, 12, 12]
    assert len(counts[30_000]) == 3 and min(counts[30_000]) > 0 and max(counts[30_000]) <= min(counts[30_000]) + 1 < 12


def test_where_the_room_ends_problems_of_all_levels_are_shown(tmp_path: Path) -> None:
    cells = find([sweep(tmp_path, grid(), response="so " * 400)])
    whole, part = (traces.sample([("one", cells[0])], traces.Room(room)) for room in (6_000_000, 14_000))
    assert isinstance(whole, dict) and isinstance(part, dict)
    every, some = ([problem["id"] for problem in one["problems"]] for one in (whole, part))
    assert len(some) == len(every) // 2 and some == every[::2]


def test_each_pattern_is_a_series_of_its_own_along_the_sparsity(tmp_path: Path) -> None:
    cells = grid(calib=["ssgr", "self"], ratio=[0.5, 0.6]) + grid(calib=["ssgr", "self"], pattern=["2:4", "4:8"])
    found = report(sweep(tmp_path, cells))
    figure = next(one for one in found.figures if one.name == "sparsity_tiny_held_out")
    points = [(row["panel"], row["series"], row["x"]) for row in figure.rows if row["kind"] == "pruned"]
    assert len(set(points)) == 8
    assert {("ssgr", "all", 0.5), ("ssgr", "all, 2:4", 0.5), ("ssgr", "all, 4:8", 0.5)} <= set(points)
    own = [tracked.axes(read(tmp_path / str(i) / "result.json")[0].result) for i in (0, 4)]
    assert [(one["sparsity"], one["pattern"]) for one in own] == [(0.5, "unstructured"), (0.5, "2:4")]


def test_an_older_sweep_has_the_overrides_that_hydra_noted(tmp_path: Path) -> None:
    folder = sweep(tmp_path, [{}])
    (folder / "multirun.yaml").write_text("hydra: {overrides: {task: ['calib=corpus,ssgr', 'calib.draw=range(2)']}}")
    said = dict(ran.facts(page.find([folder])[0]))
    assert said["command"] == ["python run.py -m calib=corpus,ssgr 'calib.draw=range(2)'"]
    assert said["commit of the code"] == ["not recorded"]


def test_sweeps_have_sections_of_their_own(tmp_path: Path) -> None:
    for name, axes in (("source", {"calib": ["corpus", "ssgr"]}), ("length", {"length": ["any", "short"]})):
        sweep(tmp_path / name, grid(**axes))
        (tmp_path / name / "multirun.yaml").write_text("")
    found = report(tmp_path)
    assert [group.title for group in found.groups] == ["length: tiny on held_out", "source: tiny on held_out"]
    assert [[row["label"] for row in group.pruned] for group in found.groups] == [
        ["ssgr", "length short"],
        ["corpus", "ssgr"],
    ]
    names = [figure.name for figure in found.figures]
    assert len(set(names)) == len(names) and {"leaderboard_length_tiny_held_out", "layers_error_source_tiny"} <= set(
        names
    )
    page.render(found)


def test_cells_that_share_a_result_because_a_filter_does_nothing_come_once(tmp_path: Path) -> None:
    folder = sweep(tmp_path, grid(calib=["corpus"], difficulty=["any", "hard"], ratio=[0.5, 0.6]), problems=40)
    for number in (2, 3):  # as a run leaves them: the same key
        own, twin = (json.loads((folder / str(n) / "result.json").read_text()) for n in (number, number - 2))
        own["keys"] = twin["keys"]
        (folder / str(number) / "result.json").write_text(json.dumps(own))
    group = report(folder).groups[0]
    assert group.alike == 2 and [row["label"] for row in group.pruned] == ["50 %", "60 %"]
    for by in (None, ["difficulty", "sparsity"]):  # the table that is printed corrects for as many
        printed = compare.compare(find([tmp_path]), by)
        assert [one.to_dense.p_adjusted for one in printed] == pytest.approx(
            [row["to_dense_p"] for row in group.pruned], 1e-5
        )
    assert all(row["to_dense_p"] < 0.5 for row in group.pruned)


def test_perplexity_alone_has_a_page(tmp_path: Path) -> None:
    from ssgr.records import Item

    folder = sweep(tmp_path, grid(draw=[0, 1]))
    for file in folder.glob("*/result.json"):
        result = json.loads(file.read_text())
        score = {
            "metric": "perplexity",
            "value": 8.0,
            "ci95": [7.0, 9.0],
            "items": 5,
            "seconds": 1.0,
            "bench": "held_out",
        }
        result["scores"]["held_out"] = {"dense": score, "pruned": score, "difference": 0.0, "ci95": [0.0, 0.0]}
        file.write_text(json.dumps(result))
        for which in ("dense", "pruned"):
            at = tables.outcomes_file(file.parent, "held_out", which)
            tables.write_items(at, [Item(str(i), 2.0 + i / 10, 10) for i in range(5)])
    content = built(folder)
    assert "perplexity (lower is better)" in content and "measured without answers" in content
    assert "Paired by item" in content and "problems" not in page.table(groups(find([folder]))[0])["columns"]


def test_an_older_record_is_named_and_the_rest_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep(tmp_path / "s", grid(draw=[0, 1, 2]))
    old = json.loads((folder / "0" / "result.json").read_text())
    del old["keys"]["select"]
    (folder / "0" / "result.json").write_text(json.dumps(old))
    bare = json.loads((folder / "1" / "result.json").read_text())
    for name in ("stages", "versions", "calibration"):
        del bare[name]
    del bare["prune"]["layers"]
    (folder / "1" / "result.json").write_text(json.dumps(bare))
    (folder / "2" / "outcomes" / "held_out.parquet").unlink()
    assert main([str(folder), "--html", str(tmp_path / "page.html")]) == 0
    assert "another version of ssgr" in capsys.readouterr().err
    content = (tmp_path / "page.html").read_text()
    assert "1 without a result" in content and "No means and no intervals over draws" in content


@pytest.mark.parametrize("content", [None, "{", "{}", "[]", '{"scores": {"b": 1}}'])
def test_no_result_is_one_sentence(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s").mkdir()
    if content is not None:
        (tmp_path / "s" / "result.json").write_text(content)
    assert main([str(tmp_path / "s"), "--html", str(tmp_path / "page.html")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: no result.json that can be read at or below") and "python run.py" in said
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("option", ["--html", "--figures"])
def test_a_place_that_cannot_be_written_is_one_sentence(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(tmp_path / "s", [{}])
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "s"), option, str(tmp_path / "file" / "below")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_missing_cells_are_listed(tmp_path: Path) -> None:
    cells, _ = page.find([sweep(tmp_path, [{}])])
    content = page.render(page.gather(cells, ["no result of calib=<b>: it failed"]))
    assert "1 without a result" in content and "no result of calib=&lt;b&gt;: it failed" in content


def test_a_cell_that_began_and_left_nothing_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep(tmp_path / "s", grid(draw=[0, 1]))
    for number in range(3):
        (folder / str(number) / ".hydra").mkdir(parents=True)
    assert main([str(folder), "--html", str(tmp_path / "page.html")]) == 0
    assert "2 results, 1 missing" in (said := capsys.readouterr()).out and "no result of cell 2 of" in said.err
    assert f"its log is {folder / '2' / 'run.log'}" in (tmp_path / "page.html").read_text()


def test_cells_that_a_killed_sweep_had_not_begun_are_told(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", [{}])
    (folder / "multirun.yaml").touch()
    (told,) = page.find([tmp_path])[1]
    assert told.startswith(f"the sweep in {folder} was stopped, or still runs")
    ran.record(folder, [], "", "", ["0"])
    assert page.find([tmp_path])[1] == []


def test_a_page_that_fails_warns_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = sweep(tmp_path, [{}])
    (folder / page.FILE).mkdir()
    assert page.leave(folder) is None
    assert "no page of" in caplog.text
    assert [file.name for file in folder.iterdir() if "tmp" in file.name] == []


@pytest.mark.parametrize("watched", [False, True])
def test_the_end_of_a_sweep_leaves_the_page_and_the_figures_of_an_experiment(
    watched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sweep(tmp_path, grid(draw=[0, 1]))
    (folder / "multirun.yaml").write_text("")
    opened: list[str] = []
    monkeypatch.setattr(outcome, "DONE", [*read(folder / "0" / "result.json"), *read(folder / "1" / "result.json")])
    monkeypatch.setattr(outcome, "FAILED", ["draw=2: no room"])
    monkeypatch.setattr(sys, "argv", ["run.py", "experiment=draws"])
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: watched, raising=False)
    outcome.finish()
    assert f"page: {folder / 'report.html'}" in capsys.readouterr().out
    assert opened == ([(folder / "report.html").as_uri()] if watched else [])
    content = (folder / "report.html").read_text()
    assert "python run.py experiment=draws" in content and "no result of draw=2: no room" in content
    assert (folder / "figures" / "draws_tiny_held_out.svg").exists()


def test_a_smaller_grid_in_the_same_folder_shows_no_cell_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sweep(tmp_path, grid(ratio=[0.3, 0.4, 0.5]))
    (folder / "multirun.yaml").write_text("")
    files = [folder / str(n) / "result.json" for n in range(3)]
    monkeypatch.setattr(outcome, "DONE", [])
    outcome.add(folder / "0")
    outcome.finish()
    assert [cell.path for cell in page.find([folder])[0]] == [cell.path for cell in find([folder])] == files[:1]
    assert "40 %" not in (folder / "report.html").read_text()
    monkeypatch.setattr(outcome, "DONE", [])
    outcome.add(folder / "1")  # of a command that is killed: which cells it has is not known
    assert [cell.path for cell in find([folder])] == files


def test_what_lies_beside_a_single_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sweep(tmp_path, grid(ratio=[0.5]))
    own = folder / "command.json"
    own.write_text("of somebody else")
    monkeypatch.setattr(outcome, "DONE", [])
    outcome.add(folder / "0")
    assert own.read_text() == "of somebody else"
