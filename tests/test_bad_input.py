"""What a wrong command line says: one clear sentence, exit status 1, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from torch import nn
from transformers import BartConfig, BartForCausalLM

from launchers import typed
from ssgr.model import locate
from tests.conftest import ROOT, TINY, Run, tmpfs

CASES = {
    "group choice": (["pruner=wnda"], ["pruner", "magnitude", "sparsegpt", "wanda"]),
    "key in a group": (["pruner.dampening=0.1"], ["pruner.dampening", "damping"]),
    "key at the top": (["prunr=wanda"], ["prunr", "pruner"]),
    "added key": (["+pruner.dampening=0.1"], ["pruner", "dampening"]),
    "empty selection": (
        ["calib=ssgr", "difficulty.low=0.97", "difficulty.high=0.98"],
        ["128 graded -> ", "difficulty.low="],
    ),
    "budget over the pool": (["calib=prompts", "budget.tokens=100000"], ["budget.tokens=100000", "budget.tokens="]),
    "sparsity": (["sparsity.ratio=1.5"], ["sparsity.ratio=1.5", "sparsity.ratio=0.5"]),
    "sparsity zero": (["sparsity.ratio=0"], ["between 0 and 1"]),
    "n:m": (["sparsity=n2m4", "sparsity.m=5", "calib=corpus", "bench=smoke"], ["q_proj", "192 inputs", "groups of 5"]),
    "n:m by layer": (["sparsity=n2m4", "allocation=owl"], ["allocation=owl gives every layer a share of its own"]),
    "model path": (["model=local", "model.path=./nowhere"], ["model.path=./nowhere", "config.json"]),
    "model without path": (["model=local"], ["model.path"]),
    "device": (["device=gpu0"], ["gpu0", "cuda"]),
    "dtype": (["model.dtype=fp8"], ["fp8", "bfloat16"]),
    "text": (["calib=corpus", "calib.text=no/such.txt", "bench=smoke"], ["calib.text=no/such.txt", "prose"]),
    "whole budget": (["budget.tokens=1e3"], ["budget.tokens=1000.0", "without a point or exponent"]),
    "exclude": (["pruner.exclude=[lm_hed]"], ["pruner.exclude", "lm_hed", "self_attn.q_proj"]),
    "window": (["calib=corpus", "calib.window=1"], ["calib.window=1", "at least 2"]),
    "window of noise": (["calib=random_tokens", "calib.window=2e3"], ["calib.window=2000.0", "whole number"]),
    "compare": (["pruner=wanda", "pruner.compare=rows"], ["pruner.compare='rows'", "a row or a layer"]),
    "no such GPU": (["device=cuda:99"], ["device=cuda:99", "device=auto"]),
    "system prompt": (["model.system=Think.", "bench=smoke"], ["chat template", "model.system=null"]),
    "level": (["problems.levels=[12]"], ["1 to 8"]),
    "launcher of one cell": (["hydra/launcher=slurm"], ["launches sweeps alone", "type -m"]),
    "no choice": (["pruner=null"], ["pruner=NAME, of alps, dsnot"]),
    "choice that is a number": (["calib=4"], ["calib=NAME, of c4, corpus"]),
    "home": (["model=local", "model.path=~/m"], ["model.path=~/m: type $HOME in place of ~"]),
    "option of another choice": (
        ["calib.text=a.txt"],
        ["calib.text is an option of calib=c4|corpus|wikitext: choose"],
    ),
    "option of another engine": (
        ["sampler.engine.url=http://x"],
        ["sampler.engine.url is an option of sampler=server: choose"],
    ),
    "option without a value": (
        ["sampler=server"],
        ["[ERROR] sampler.engine.url has no value; type sampler.engine.url=VALUE\n"],
    ),
}


def told(run: Run, overrides: list[str], wanted: list[str], small: bool = True) -> str:
    done = run(*overrides, small=small)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "Traceback" not in said, said
    for word in wanted:
        assert word in said, f"{word!r} is not in:\n{said}"
    return said


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_in_a_sentence(case: str, run: Run) -> None:
    assert "cells failed" not in told(run, *CASES[case]), "it is said once"


def test_an_output_layer_without_statistics_is_refused_before_they_are_collected(run: Run, tmp_path: Path) -> None:
    model = TINY.load()
    model.config.tie_word_embeddings = False
    model.get_output_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    TINY.tokenizer().save_pretrained(tmp_path / "untied")
    own = ["model.path=./untied", "pruner.include=[*,lm_head]", "propagate=dense", "calib=corpus", "bench=smoke"]
    said = told(run, own, ["output layer is not among the stored statistics"])
    assert "collect:" not in said


def test_a_row_without_an_answer_is_named(run: Run, tmp_path: Path) -> None:
    rows = [{"problem": "1+1", "answer": "2"}, {"problem": "1+2"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ["problems=jsonl", "problems.path=x.jsonl", "problems.test_path=x.jsonl", "bench=held_out", "device=cpu"]
    told(run, own, ["row 2", "no answer", "problems.columns.answer=COLUMN"], small=False)
    told(run, ["problems=jsonl", "problems.path=none.jsonl"], ["none.jsonl", "problems.path=FILE.jsonl"], small=False)


def test_golds_that_the_grader_cannot_read_are_told_beside_the_accuracy(run: Run, tmp_path: Path) -> None:
    own = ["problems=jsonl", "problems.path=x.jsonl", "problems.test_path=x.jsonl", "grader=math", "calib=corpus"]
    own += [
        "pruner=magnitude",
        "bench.decoding.attempts=1",
        "bench.decoding.max_new_tokens=160",
        "budget.tokens=400",
        "device=cpu",
    ]
    rows = [{"problem": f"Compute {n}+5.", "answer": "\\frac{"} for n in range(12, 16)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told(run, own, ["can read none of the 4 gold answers (row/1: ", "mend the rows"], small=False)
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({**row, "answer": "\\frac{" if i else "17"}) for i, row in enumerate(rows))
    )
    done = run(*own, small=False)
    said = done.stdout + done.stderr
    assert (
        done.returncode == 0 and "cannot read 3 of 4 gold answers" in said and "row/2, row/3, row/4 (row/2: " in said
    ), said
    assert "the grader failed on 75.0 % of the answers of the dense model" in said and "] ! " in done.stdout, said


def test_an_unwritable_store(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told(run, [f"store.path={tmp_path / 'file' / 'store'}"], ["store.path=", "cannot be written"])


def test_an_unwritable_output_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told(
        run, [f"hydra.run.dir={tmp_path / 'file' / 'run'}"], ["output folder", "cannot be written", "hydra.run.dir=DIR"]
    )


def test_an_output_folder_on_a_full_disk(tmp_path: Path) -> None:
    """An empty file has room on it, and what Hydra writes has none."""
    with tmpfs(tmp_path / "disk", 16):
        asked = get_args_parser().parse_args([f"hydra.run.dir={tmp_path / 'disk' / 'run'}"])
        with pytest.raises(ValueError, match=r"output folder .* cannot be written .No space left .*hydra.run.dir=DIR"):
            typed.check(asked)


def test_an_output_folder_at_home(run: Run, tmp_path: Path) -> None:
    """Hydra makes a folder of the name ~ where one stands."""
    told(run, ["hydra.run.dir='~/run'"], ["hydra.run.dir=~/run: type $HOME in place of ~"])
    assert not (tmp_path / "~").exists()


def test_an_output_folder_that_is_the_models(run: Run, tmp_path: Path) -> None:
    """A result.json there counted as a part of the model, and was copied into the next checkpoint."""
    shutil.copytree(locate(TINY.path), tmp_path / "model")
    here = [f"model.path={tmp_path / 'model'}", f"hydra.run.dir={tmp_path / 'model'}", "calib=corpus", "bench=smoke"]
    told(run, ["model=local", *here], ["the output folder", "is that of the model", "hydra.run.dir=DIR"])
    assert not (tmp_path / "model" / "result.json").exists()


def test_a_command_that_only_shows_makes_no_folder_and_quotes_are_hydras(run: Run, tmp_path: Path) -> None:
    for flag in (("--cfg", "job"), ("--help",)):
        assert run(*flag, f"hydra.run.dir='{tmp_path / 'my run'}'").returncode == 0
        assert not list(tmp_path.iterdir())
    (tmp_path / "a file").write_text("")
    told(
        run,
        [f"hydra.run.dir='{tmp_path / 'a file' / 'run'}'"],
        [f"the output folder {tmp_path / 'a file' / 'run'} cannot"],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_two_experiments_are_two_commands(run: Run) -> None:
    """Each would be one cell without the axes of its sweep."""
    told(run, ["-m", "experiment=length,difficulty"], ["each experiment is a sweep", "one command for each"])


def test_the_config_of_a_sweep_is_that_of_each_cell(run: Run) -> None:
    told(run, ["--cfg", "job", "-m", "pruner=wanda,ria"], ["--cfg shows the config of one cell: leave out -m"])


def test_a_config_that_is_not_there(run: Run) -> None:
    done = run("--config-name=foo")
    assert done.returncode == 1 and "--config-name=foo: conf has config.yaml alone. Leave it out" in done.stderr
    assert "the top level has no" not in done.stderr, done.stderr


def test_an_option_that_a_choice_inherits_is_not_told_of_others(run: Run) -> None:
    done = run("calib=wikitext", "calib.text=a.txt", "prunr=wanda")
    assert "did you mean pruner?" in done.stderr and "is an option of" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["-m", "hydra.sweep.dir=setup.cfg/s"], "choose another with hydra.sweep.dir=DIR"),
        (["bench=3"], ", suite/smoke, svamp"),
        (["pruner=1.5"], "type pruner=NAME"),
        (["pruner={a:1}"], "type pruner=NAME"),
        (["budget.tokns=3"], "budget has no tokns; did you mean tokens? Valid are held_out, max_row_tokens"),
        (["~prunr=wanda"], "prunr: the top level has no prunr; did you mean pruner?"),
        (["zzz~=3"], "no zzz~. Valid are"),
        (["--help", "calib=4"], ""),
        (["--hydra-help", "calib=4"], ""),
        (["--shell-completion", "calib=4"], ""),
        (["a=[b"], "top level has no a"),
        (["-m", "~pruner", "experiment=length"], ""),
        (["shard.x=null"], ""),
        (["pruner@pruner.base=wanda", "pruner@a=wanda"], ""),
        (["--config-name=config"], ""),
        (["--config-name=config.yaml"], ""),
        (["--config-name=foo", "--config-dir=there"], ""),
    ],
)
def test_what_is_typed_is_told(line: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "setup.cfg").touch()
    monkeypatch.chdir(tmp_path)
    asked = get_args_parser().parse_args(line)
    try:
        typed.check(asked)
        shown = typed.hint(asked)
    except ValueError as error:
        shown = str(error)
    assert said in shown if said else not shown, shown
    assert "_target_" not in shown and "$HOME" not in shown


def test_hydras_own_settings_are_told_by_hydra(run: Run) -> None:
    done = run("+hydra.launcher.x=3", "prunr=wanda")
    assert done.returncode == 1 and "did you mean pruner?" in done.stderr
    assert "hydra has no launcher" not in done.stderr, done.stderr


def test_a_checkpoint_with_nan_names_its_tensor(run: Run, tmp_path: Path) -> None:
    model = TINY.load()
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    TINY.tokenizer().save_pretrained(tmp_path / "nan")
    told(run, ["model=local", f"model.path={tmp_path / 'nan'}"], ["model.layers.2.mlp.up_proj.weight", "NaN"])


def test_a_checkpoint_without_some_weights_names_one(run: Run, tmp_path: Path) -> None:
    """Transformers would draw them at random, and say nothing."""
    weights = TINY.load().state_dict()
    weights = {f"_orig_mod.{name}": weight.clone() for name, weight in weights.items() if name != "lm_head.weight"}
    TINY.load().save_pretrained(tmp_path / "wrapped", state_dict=weights)
    TINY.tokenizer().save_pretrained(tmp_path / "wrapped")
    told(
        run,
        ["model=local", f"model.path={tmp_path / 'wrapped'}"],
        ["are not in the checkpoint", "the first is lm_head.weight", "is cut to the model's context of 1024"],
    )


def test_a_cut_shard_is_named(run: Run, tmp_path: Path) -> None:
    TINY.load().save_pretrained(tmp_path / "cut", max_shard_size="2MB")
    TINY.tokenizer().save_pretrained(tmp_path / "cut")
    shard = sorted((tmp_path / "cut").glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-9])
    told(run, ["model=local", f"model.path={tmp_path / 'cut'}"], [str(shard), "it is cut; download the model again"])
    shard.unlink()
    told(run, ["model=local", f"model.path={tmp_path / 'cut'}"], [str(shard), "this shard cannot be read"])


def test_a_model_without_decoder_blocks(run: Run, tmp_path: Path) -> None:
    size = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    config = BartConfig(vocab_size=512, encoder_layers=3, decoder_layers=2, encoder_ffn_dim=32, **size)
    BartForCausalLM(config).save_pretrained(tmp_path / "bart")
    TINY.tokenizer().save_pretrained(tmp_path / "bart")
    told(
        run,
        ["model=local", f"model.path={tmp_path / 'bart'}"],
        ["decoder blocks of BartForCausalLM", "num_hidden_layers=3"],
    )


def test_a_failed_cell_does_not_stop_the_others(run: Run, tmp_path: Path) -> None:
    done = run("-m", "sparsity.ratio=0.5,1.5", "calib=corpus", "bench=smoke")
    assert done.returncode == 1
    assert "1 of 2 cells failed" in done.stderr and "sparsity.ratio=1.5" in done.stderr
    assert (tmp_path / "sweep" / "0" / "result.json").exists()
    assert "Traceback" not in done.stdout + done.stderr


def test_the_whole_traceback_on_request(run: Run) -> None:
    done = run("sparsity.ratio=1.5", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "sparsity.ratio=1.5" in done.stderr


def test_remote_code_is_not_run(run: Run, tmp_path: Path) -> None:
    """A checkpoint that brings its own code runs none of it unless model.trust_remote_code=true."""
    TINY.tokenizer().save_pretrained(tmp_path / "evil")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "evil" / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    told(run, ["model=local", f"model.path={tmp_path / 'evil'}"], ["model.trust_remote_code=true"])
    assert not (tmp_path / "ran").exists()


def test_a_wrong_report_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ssgr.report.__main__ import main

    assert main([str(tmp_path)]) == 1
    assert "no result.json at or below" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["run.py", "prunr=wanda"], ["-m", "ssgr.report", "nowhere"], ["-m", "ssgr.status", "nowhere"]]
)
def test_a_mistyped_command_is_told_before_torch_is_loaded(command: list[str]) -> None:
    python = [sys.executable, "-X", "importtime"]
    done = subprocess.run([*python, *command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1 and command[-1].split("=")[0] in done.stdout + done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "ssgr" in imported and not imported & {"torch", "transformers"}


def test_a_report_loads_no_torch() -> None:
    """Its job reads small files: seconds of imports would be most of it."""
    look = "import sys, launchers.work, ssgr.assemble; assert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", look], cwd=ROOT, check=True)


def test_a_job_loads_nothing_that_transformers_wants_for_other_models() -> None:
    """scikit-learn and scipy take a second of every process; whoever needs them later has them."""
    look = (
        "import gc, sys; from launchers.work import _quieten_libraries; _quieten_libraries(1); assert gc.isenabled()",
        "import launchers.experiment, ssgr.pipeline; assert 'transformers.modeling_utils' in sys.modules",
        "assert not {'scipy', 'sklearn'} & {*sys.modules}; import scipy.optimize, sklearn.metrics",
    )
    subprocess.run([sys.executable, "-c", "; ".join(look)], cwd=ROOT, check=True)


@pytest.mark.slow
def test_transformers_that_will_not_load_without_them_is_loaded_whole() -> None:
    look = (
        "from transformers.utils import is_sklearn_available; assert is_sklearn_available()",  # it remembers that it is there
        "from ssgr import lean; lean.load_transformers(); import launchers.experiment, sklearn.metrics",
    )
    subprocess.run([sys.executable, "-c", "; ".join(look)], cwd=ROOT, check=True)
