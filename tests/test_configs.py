"""Every YAML is composed, instantiated and explained."""

from __future__ import annotations

import re
from pathlib import Path

import hydra
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launchers.experiment import build as experiment_of
from launchers.experiment import store_of
from ssgr import keys
from ssgr.experiment import Experiment

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
YAMLS = sorted(CONF.rglob("*.yaml"))
CHOICES = [y for y in YAMLS if y.parent != CONF]
NEEDS = {  # what a choice cannot know by itself
    "model/local": ["model.path=."],
    "problems/jsonl": ["problems.path=x.jsonl"],
    "problems/hub": ["problems.path=some/dataset"],
    "bench/lm_eval/task": ["bench.name=own", "bench.task=own"],
    "sampler/replay": ["sampler.engine.path=x.parquet"],
    "sampler/server": ["sampler.engine.url=http://127.0.0.1:1/v1"],
}


def build(*overrides: str) -> Experiment:
    """The experiment of a command line."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        experiment: Experiment = experiment_of(compose("config", list(overrides)))
    return experiment


def choice_of(file: Path) -> tuple[str, str]:
    """The group of a YAML, and what one types to choose it."""
    group, *rest = file.relative_to(CONF).with_suffix("").parts
    return group, "/".join(rest)


@pytest.mark.parametrize("file", CHOICES, ids=lambda f: "/".join(choice_of(f)))
def test_every_choice_composes_and_instantiates(file: Path) -> None:
    group, choice = choice_of(file)
    sign = "+" if group == "experiment" else ""
    overrides = [f"{sign}{group}={choice}".replace("+experiment", "experiment"), *NEEDS.get(f"{group}/{choice}", [])]
    assert isinstance(build(*overrides), Experiment)


@pytest.mark.parametrize("file", YAMLS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_key_has_a_comment(file: Path) -> None:
    for number, line in enumerate(file.read_text().splitlines(), 1):
        key = re.match(r"^\s*([\w/@.]+):\s*(\S.*)?$", line)
        if key is None or key[1] in ("_target_", "defaults"):
            continue  # a comment, a list item, what Hydra itself reads
        assert re.search(r"\s#\s\S", line), f"{file.relative_to(ROOT)}:{number}: {line!r} has no comment"


def test_ssgr_implies_hard_and_medium() -> None:
    x = build("calib=ssgr")
    assert (x.policy.difficulty.name, x.policy.length.name) == ("hard", "medium")


def test_the_command_line_wins() -> None:
    x = build("calib=ssgr", "length=long", "difficulty=any")
    assert (x.policy.difficulty.name, x.policy.length.name) == ("any", "long")


@pytest.mark.parametrize("calib", ["self", "corpus", "written"])
def test_other_sources_imply_no_filter(calib: str) -> None:
    x = build(f"calib={calib}")
    assert (x.policy.difficulty.name, x.policy.length.name) == ("any", "any")


def test_what_cannot_change_a_result_is_in_no_key() -> None:
    a, b = build(), build("device=cpu", "sampler.engine.batch_size=7", "store.path=elsewhere")
    assert keys.key("s", 1, [a.model, a.sampler], {}) == keys.key("s", 1, [b.model, b.sampler], {})
    c = build("sampler.decoding.temperature=1.0")
    assert keys.key("s", 1, a.decoding, {}) != keys.key("s", 1, c.decoding, {})


@pytest.mark.parametrize("name", [f.stem for f in (CONF / "experiment").glob("*.yaml")])
def test_every_experiment_is_a_sweep_with_draws(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"experiment={name}"], return_hydra_config=True)
    params = OmegaConf.to_container(cfg.hydra.sweeper.params)
    assert isinstance(params, dict) and "calib.draw" in params
    assert cfg.hydra.mode == hydra.types.RunMode.MULTIRUN
    assert cfg.problems.get("test", cfg.problems.get("limit")) >= 512  # tables have a limit a split
    for axis, values in params.items():
        for value in str(values).split(","):
            if not value.startswith("range"):
                assert isinstance(build(f"experiment={name}", f"{axis}={value}"), Experiment)


def test_config_groups_are_the_agreed_ones() -> None:
    groups = {p.name for p in CONF.iterdir() if p.is_dir()}
    assert {"model", "problems", "sampler", "grader", "calib", "difficulty", "length", "scope", "pruner", "sparsity",
            "allocation", "bench", "experiment"} <= groups  # fmt: skip


def test_make_paper_runs_every_experiment_of_the_model_that_ships() -> None:
    """All but rac, whose models come from the hub."""
    named = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("EXPERIMENTS"))
    assert set(named.split(":= ")[1].split()) == {f.stem for f in (CONF / "experiment").glob("*.yaml")} - {"rac"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["calib.draw=null"], r"calib\.draw=None: give a whole number"),
        (["calib.draw=-1"], r"calib\.draw=-1: give a whole number"),
        (["+scope.bins.hard_medium=2"], r"scope\.bins\.hard_medium: .*; type bins=difficulty_length"),
        (
            ["bins=difficulty_length", "+scope.bins.hrd_medium=2"],
            r"scope\.bins\.hrd_medium: .* no such bin; its bins are easy_short, .*hard_medium, .*, other_other",
        ),
        (
            ["pruner=sparsegpt", "propagate=dense", "collect.statistic=norm"],
            r"collect\.statistic=norm: pruner=sparsegpt .*; type gram",
        ),
        (["pruner=wandapp", "propagate=dense"], r"propagate=dense: pruner=wandapp needs gradients.*propagate=pruned"),
        (["pruner=wandapp", "allocation=global"], r"allocation=global needs the scores .* type allocation=uniform"),
        (["sampler=server", "sampler.engine.url=http://x", "bench.engine=${sampler.engine}"], "does not run the model"),
        (["shard=0/8"], r"shard=0/8: give the number of a part"),
        (["shard=9/8"], r"shard=9/8: give the number of a part"),
    ],
)
def test_what_no_experiment_can_be_is_told(overrides: list[str], said: str) -> None:
    with pytest.raises(Exception, match=said):
        build(*overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.trust_remote_code=no"], r"^model\.trust_remote_code=no: give true or false$"),
        (["decontaminate=null"], r"^decontaminate=None: it has settings of its own; leave it out, or type"),
        (["decontaminate.enabled=off"], r"^decontaminate\.enabled=off: give true or false$"),
        (["model.thinking.required=no"], r"^model\.thinking\.required=no: give true or false$"),
        (["sampler=replay", "sampler.engine.path=x", "sampler.engine.on_policy=no"], r"on_policy=no: give true"),
        (["bench.decoding.seed=1.5"], r"^bench\.decoding\.seed=1\.5: give a whole number"),
        (["sampler.engine.workers=many"], r"^sampler\.engine\.workers=many: give a whole number \(.*\) or null$"),
        (["sampler.decoding.temperature=hot"], r"^sampler\.decoding\.temperature=hot: give a number$"),
        (["sampler.decoding.temperature=nan"], r"temperature=nan top_p=0\.95: give temperature >= 0"),
        (["bench.engine._target_=ssgr.sampler.hf.Nope"], r"Error loading 'ssgr\.sampler\.hf\.Nope'"),
        (["bench.engine=null"], r"^bench\.engine=None: it has settings of its own; leave it out, or type"),
        (["bench=suite/smoke", "bench.decoding=null"], r"^bench\.decoding=None: it has settings of its own"),
        (["model.thinking=null"], r"^model\.thinking=None: it has settings of its own"),
        (["model.chat=null"], r"^model\.chat=None: it has settings of its own"),
        (["bench.decoding=null"], r"^bench\.decoding=None: it has settings of its own; leave it out, or type"),
        (["bench=suite/smoke", "bench.benches.smoke.engine=hf"], r"^bench\.benches\.smoke\.engine=hf: it has settings"),
        (
            ["bench=suite/smoke", "bench.decoding.temperature=hot"],
            r"^bench\.decoding\.temperature=hot: give a number or null$",
        ),
        (
            ["bench=suite/smoke", "bench.decoding.seed=abc"],
            r"^bench\.decoding\.seed=abc: give a whole number \(.*\) or null$",
        ),
        (["bench=suite/smoke", "bench.decoding.seed=1.5"], r"^bench\.decoding\.seed=1\.5: give a whole number"),
        (["bench.name=3"], r"^bench\.name=3: give a text \(a number in quotes\)$"),
        (
            ["+bench.grader=math"],
            r"^bench\.grader=math: grader is a group of settings; type \+grader@bench\.grader=math$",
        ),
        (["+bench.grader=3"], r"^bench\.grader=3: grader is a group of settings"),
        (
            ["bench=perplexity_traces", "bench.traces=3"],
            r"^bench\.traces=3: it is a benchmark; type bench@bench\.traces=",
        ),
        (["bench.problems=gsm8k_train"], r"; type \+problems@bench\.problems=gsm8k_train$"),
        (
            ["bench=suite/smoke", "bench.benches.perplexity=null"],
            r"^bench\.benches\.perplexity=None: it is a benchmark .*; type ~bench\.benches\.perplexity to leave it out$",
        ),
        (["bench=suite/smoke", "bench.benches=3"], r"^bench\.benches=3: it has settings of its own"),
        (["select=level"], r"^select=level: it has settings of its own"),
        (["collect=norm"], r"^collect=norm: it has settings of its own"),
        (["scope.bins=2"], r"^scope\.bins=2: it has settings of its own"),
        (["pruner.include=down_proj"], r"^pruner\.include=down_proj: give a list of texts, such as \[a,b\]$"),
        (["pruner.exclude=null"], r"^pruner\.exclude=None: give a list of texts"),
        (["pruner=dsnot", "pruner.skip=[1]"], r"^pruner\.skip=\[1\]: give a list of texts"),
        (["pruner=dsnot", "pruner.base=ria"], r"^pruner\.base=ria: it is a pruner; type pruner@pruner\.base=ria$"),
        (["problems.levels=3"], r"^problems\.levels=3: give a list of whole numbers, such as \[1,2\]$"),
        (["problems.levels=[1.5]"], r"^problems\.levels=\[1\.5\]: give a list of whole numbers"),
        (["calib.verdict=correct"], r"^calib\.verdict='correct': valid choices are any, right"),
        (["bench=suite/smoke", "+bench.benches.smoke.grader=math"], r"\+grader@bench\.benches\.smoke\.grader=math$"),
    ],
)
def test_a_setting_is_of_the_kind_that_its_class_says(overrides: list[str], said: str) -> None:
    """To Hydra `no` is a word, and a word counts as true: remote code would be run."""
    with pytest.raises(ValueError, match=said):
        build(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["+grader@bench.grader=math", "bench.name='3'", "sampler.decoding.temperature=1"],
        ["bench=perplexity_traces", "bench@bench.traces=gsm8k"],
        ["+problems@bench.problems=gsm8k_train", "model.trust_remote_code=True"],
        ["bench=suite/smoke", "bench.decoding.temperature=1", "bench.decoding.top_p=null"],
        ["bench=suite/smoke", "~bench.benches.perplexity"],
        ["pruner=dsnot", "pruner@pruner.base=ria"],
        ["bench=suite/smoke", "+grader@bench.benches.smoke.grader=math", "budget.tokens=null", "budget.rows=8"],
    ],
)
def test_what_those_sentences_say_to_type_is_taken(overrides: list[str]) -> None:
    assert isinstance(build(*overrides), Experiment)


@pytest.mark.parametrize("given", ["store=there", "store.path=null", "store.path=5", "store.path=''"])
def test_a_store_is_a_folder(given: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(ValueError, match=r"^store"):
        store_of(compose("config", [given]))


def test_a_scope_names_its_bins() -> None:
    assert build("bins=difficulty_length", "+scope.bins.other_long=2").scope.bins == {"other_long": 2}
