"""Laws of runs: which are variants, what their curves say, what a command writes and refuses."""

import json
import math
import re
import shutil
import statistics
import sys

import pytest

from commands import TEXT, make_source, smelt
from smelt.analyse import drawing, page
from smelt.analyse.curves import curves
from smelt.analyse.draw_gradients import over_experts
from smelt.analyse.drawing import TABLE
from smelt.analyse.ground import AnalysisSettings, read_ground
from smelt.analyse.run import analyse
from smelt.analyse.runs import Run, open_runs
from smelt.analyse.summary import spread
from smelt.errors import CalibrationError, CheckpointError, RecipeError

QUICK = AnalysisSettings(micro_batches=3, batch_size=1)


# --- runs ----------------------------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_only_are_one_variant(ground):
    runs = open_runs([ground / "samoe", ground / "ar"])
    assert [run.name for run in runs] == ["samoe/seed-0", "samoe/seed-1", f"{ground.name}/ar"]
    assert [run.variant for run in runs] == ["SaMoE", "SaMoE", "AR-MoE"]
    assert [run.seed for run in runs] == [0, 1, 0]


def test_variants_of_a_kind_are_told_apart_by_what_differs_and_no_more(ground, write, tmp_path):
    wide = write(tmp_path / "wide", ground, seed=0, hidden_size=32)
    many = write(tmp_path / "many", ground, seed=0, num_experts=8)
    labels = [run.variant for run in open_runs([ground / "samoe", wide, many])]
    assert labels == ["SaMoE · E=4 · D=16"] * 2 + ["SaMoE · E=4 · D=32", "SaMoE · E=8 · D=16"]


def test_what_follows_from_an_architecture_is_not_named_beside_it(ground, write, tmp_path):
    weight = write(tmp_path / "weight", ground, seed=0, mix="weight")
    with (weight / "smelt" / "recipe.yaml").open("a") as recipe:
        recipe.write("learning_rate: 0.5\n")  # searched for every variant
    labels = [run.variant for run in open_runs([ground / "samoe" / "seed-0", weight])]
    assert labels == ["SaMoE · mix=activation", "SaMoE · mix=weight"]


def test_a_checkpoint_on_the_way_has_the_recipe_and_log_of_its_run(ground, tmp_path):
    run = shutil.copytree(ground / "ar", tmp_path / "run")
    step = run / "smelt" / "checkpoints" / "step-20"
    step.mkdir(parents=True)
    for file in run.glob("*.*"):
        shutil.copy(file, step)
    last, way = open_runs([run, step])
    assert way.recipe == last.recipe and way.step == 20
    assert [line["step"] for line in way.log] == [10, 20]
    assert way.variant != last.variant


def test_the_default_text_is_what_the_recipe_holds_out(ground):
    run = open_runs([ground / "ar"])[0]
    found = read_ground(run, QUICK)
    assert found.sources == (str(ground / "text.txt"),)
    assert [batch["input_ids"].shape for batch in found.batches] == [(1, 32)] * 3
    assert found.sha256 == read_ground(run, QUICK).sha256
    other = read_ground(run, QUICK.model_copy(update={"seed": 1}))
    assert found.sha256 != other.sha256
    bare = Run(run.folder, run.name, {}, (), run.config)
    assert read_ground(bare, QUICK).sources == ("python:held-out",)


def test_a_sequence_that_would_need_padding_is_not_looked_at(ground, tmp_path):
    run = open_runs([ground / "ar"])[0]
    text = tmp_path / "short.txt"
    text.write_text(TEXT * 3)
    full, rest = divmod(len(run.tokenizer()(text.read_text()).input_ids) + 1, 32)
    assert full > 2 and rest > 0
    settings = QUICK.model_copy(update={"text": (str(text),), "micro_batches": full + 1})
    with pytest.raises(CalibrationError, match=f"{full} sequences of 32"):
        with pytest.warns(UserWarning, match="going on with them"):
            read_ground(run, settings)


def test_a_masked_model_is_looked_at_on_masked_tokens(ground, write, tmp_path, model):
    from smelt.text import parse_source
    from smelt.train.data import train_tokenizer

    folder = write(tmp_path / "masked", ground, seed=0, is_causal=False)
    source = parse_source(str(ground / "text.txt"))
    train_tokenizer([source], vocab_size=300, with_mask=True).save_pretrained(folder)
    run = open_runs([folder])[0]
    batch = read_ground(run, QUICK).batches[0]
    hidden = batch["labels"] != -100
    assert hidden.sum() == round(0.15 * 32)
    assert not (batch["input_ids"] == batch["labels"])[hidden].all()


# --- curves --------------------------------------------------------------------------------------


def run_of(lines, seed=0):
    return Run(None, "run", {"seed": seed}, tuple(lines), None)


def test_curves_are_mean_and_deviation_over_runs_at_every_step():
    first = [{"step": s, "nats": float(s)} for s in (10, 20, 30)]
    second = [{"step": s, "nats": s + 2.0} for s in (10, 20)]
    found = curves([run_of(first), run_of(second)])["nats"]
    assert found["step"] == [10, 20, 30] and found["n"] == [2, 2, 1]
    assert found["mean"] == [11, 21, 30]
    assert found["sd"] == [pytest.approx(statistics.stdev([10, 12]))] * 2 + [None]


def test_a_held_out_line_does_not_hide_the_training_line_of_its_step():
    lines = [{"step": 5, "nats": 4.0}, {"step": 5, "held_out": {"prose": 5.0}}]
    found = curves([run_of(lines)])
    assert found["nats"]["mean"] == [4.0] and found["held_out"]["prose"]["mean"] == [5.0]
    assert curves([run_of(reversed(lines))]) == found


def test_values_that_are_no_numbers_are_passed_over():
    found = curves([run_of([{"step": 1, "nats": math.nan}, {"step": 2, "nats": 3.0}])])
    assert found["nats"]["step"] == [2]
    assert curves([run_of([])]) == {}


def test_layers_are_averaged_and_phases_are_milliseconds():
    line = {"step": 1, "dropped": [0.1, 0.3], "phase_seconds": {"router": 0.002, "experts": 0.01}}
    found = curves([run_of([line])])
    assert found["dropped"]["mean"] == [pytest.approx(0.2)]
    assert found["phases"]["experts"]["mean"] == pytest.approx(10)
    assert found["phases"]["router"]["n"] == 1


def test_a_spread_leaves_out_what_is_no_number():
    assert spread([1.0, None, 3.0, math.inf]) == {"mean": 2, "sd": pytest.approx(2**0.5), "n": 2}
    assert spread([None, math.nan]) is None
    assert spread([5.0])["sd"] is None


# --- the whole -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysis(ground, tmp_path_factory):
    """Two variants and a stock MoE, analysed."""
    stock = make_source(ground / "stock")
    out = tmp_path_factory.mktemp("analysis") / "out"
    text = AnalysisSettings(
        micro_batches=3, batch_size=1, sequence_length=32, text=(str(ground / "text.txt"),)
    )
    return analyse([ground / "samoe", ground / "ar", stock], out, text)


def test_the_numbers_are_strict_json_and_those_that_were_returned(analysis):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = (analysis.folder / "analysis.json").read_text()
    assert json.loads(text, parse_constant=refuse) == analysis.value
    assert [one["variant"] for one in analysis.value["variants"]] == [
        "SaMoE",
        "AR-MoE",
        "qwen3_moe",
    ]


def test_the_page_needs_no_other_file_and_has_every_figure(analysis):
    html = (analysis.folder / "index.html").read_text()
    assert len(analysis.figures) == len(TABLE) - 1  # no variant comes with several E
    assert html.count("<svg") == len(analysis.figures)
    for name in analysis.figures:
        assert f'id="{name}"' in html
        assert (analysis.folder / "figures" / f"{name}.svg").read_text() in html
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(link.startswith(("#", "data:")) for link in links)


def test_the_page_says_when_runs_saw_other_tokens(analysis):
    value = json.loads((analysis.folder / "analysis.json").read_text())
    assert "Not all runs saw the same tokens" not in page.page(value, [])
    value["runs"][0]["ground"]["text_sha256"] = "another"
    assert "Not all runs saw the same tokens" in page.page(value, [])


def test_figures_drawn_again_from_the_file_are_the_same(analysis, monkeypatch):
    monkeypatch.setattr(drawing, "TABLE", [row for row in TABLE if row[0] in ("loss", "cka")])
    value = json.loads((analysis.folder / "analysis.json").read_text())
    for figure in drawing.draw(value):
        file = analysis.folder / "figures" / f"{figure.name}.svg"
        assert file.read_text() == figure.svg


def test_a_variant_that_comes_with_several_numbers_of_experts_is_a_line_over_them(analysis):
    value = json.loads((analysis.folder / "analysis.json").read_text())
    assert over_experts(value) is None
    for variant, number in zip(value["variants"], (4, 8, 16), strict=True):
        variant |= {"without_experts": "SaMoE", "num_experts": number}
    drawn = over_experts(value).axes[1].lines[0]
    snr = [one["gradients"]["per_stored_expert"]["snr"]["mean"] for one in value["variants"]]
    assert drawn.get_xdata().tolist() == [4, 8, 16] and drawn.get_ydata().tolist() == snr


def test_a_variant_is_the_mean_of_its_runs(analysis):
    runs = [one for one in analysis.value["runs"] if one["variant"] == "SaMoE"]
    variant = analysis.value["variants"][0]
    snr = [run["gradients"]["experts_stored"]["mean"]["snr"] for run in runs]
    found = variant["gradients"]["per_stored_expert"]["snr"]
    assert found == {
        "mean": pytest.approx(statistics.mean(snr)),
        "sd": pytest.approx(statistics.stdev(snr)),
        "n": 2,
    }
    cka = [run["similarity"]["cka"][1][2] for run in runs]
    assert variant["similarity"]["cka"]["mean"][1][2] == pytest.approx(statistics.mean(cka))
    assert variant["curves"]["held_out"]["prose"]["mean"] == [pytest.approx(5.505)]


def test_what_a_stock_model_has_not_got_is_named(analysis):
    stock = analysis.value["runs"][-1]
    assert stock["gradients"]["experts_stored"]["mean"]["units"] == 16
    assert stock["similarity"]["mutual_information"] and stock["mixing"] is None
    assert any("no log.jsonl" in line or "no smelt/log.jsonl" in line for line in stock["left_out"])
    assert any("α and β" in line for line in stock["left_out"])


def test_without_matplotlib_numbers_are_written_and_the_lack_is_said(ground, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = smelt(
        "analyse", ground / "ar", "--out", tmp_path / "o", "--micro-batches", 2, "--batch-size", 1
    )
    assert done.code == 0
    assert "pip install 'smelt[report]'" in done.err
    assert "look at" in done.out and "analysis.json" in done.out
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["analysis.json"]


def test_a_run_without_weights_has_its_curves(ground, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "run" / "smelt").mkdir(parents=True)
    for name in ("log.jsonl", "recipe.yaml"):
        shutil.copy(ground / "ar" / "smelt" / name, tmp_path / "run" / "smelt" / name)
    with pytest.warns(UserWarning, match="matplotlib"):
        found = analyse([tmp_path / "run"], tmp_path / "out", QUICK)
    run, variant = found.value["runs"][0], found.value["variants"][0]
    assert variant["variant"] == "AR-MoE" and variant["curves"]["nats"]["n"] == [1, 1, 1]
    assert run["gradients"] is None and "not finished" in run["left_out"][0]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "there is no such folder"),
        (["empty"], "is no run.*output folder of `smelt train`"),
        (["ar", "ar"], "given twice"),
        (["ar", "--micro-batches", 1], "micro_batches = 1 cannot be"),
        (["ar", "--micro-batches", 100000], "sequences of 32 tokens.*Give more text"),
        (["ar", "--text", "none.txt"], "there is no such text"),
        (["ar", "--device", "tpu"], "no such device"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(ground, tmp_path, monkeypatch, words, message):
    for name in ("ar",):
        (tmp_path / name).symlink_to(ground / name)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    done = smelt("analyse", *words, "--out", "out")
    assert done.code == 2 and not done.out
    assert re.search(message, done.err), done.err
    assert not list(tmp_path.glob("out*"))


def test_an_output_that_exists_is_left_alone(ground, tmp_path):
    with pytest.raises(RecipeError, match="exists.*another folder"):
        analyse([ground / "ar"], tmp_path)


def test_damaged_runs_say_what_is_damaged(ground, tmp_path):
    run = shutil.copytree(ground / "ar", tmp_path / "run")
    (run / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="weights cannot be loaded"):
        analyse([run], tmp_path / "out", QUICK)
    (run / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer|tokenizer"):
        analyse([run], tmp_path / "out", QUICK)
    log = run / "smelt" / "log.jsonl"
    log.write_text('{"step": 1, "nats": 2.0}\n{"step": 2, "na')
    assert len(open_runs([run])[0].log) == 1  # a kill left the last line unfinished
    log.write_text('{"step\n{"step": 2, "nats": 2.0}\n')
    with pytest.raises(CheckpointError, match="line 1 is no JSON"):
        open_runs([run])
    (run / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json"):
        open_runs([run])
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(ground, write, tmp_path):
    folder = write(tmp_path / "small", ground, seed=0, vocab_size=64)
    with pytest.raises(CalibrationError, match="beyond the model's vocabulary"):
        analyse([folder], tmp_path / "out", QUICK)
