"""The whole path from the command line to the page in a browser, on one shared smoke run."""

import copy
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from slt_interp import cli
from slt_interp.errors import InputError
from slt_interp.report import hierarchical_equality as report
from slt_interp.report.basin_volume import volume_sentences
from slt_interp.report.render import render
from slt_interp.storage import RunDirectory, read_run
from slt_interp.studies import PRESETS, STUDIES

STUDY = "hierarchical-equality"


def command_line(*arguments, cwd=None, module=False):
    program = [sys.executable, "-m", "slt_interp"] if module else [str(Path(sys.executable).with_name("slt-interp"))]
    return subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Run the smoke preset once, through the command line, as a user would."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    done = command_line("run", STUDY, "--preset", "smoke", "--out", out, cwd=tmp_path_factory.getbasetemp())
    assert done.returncode == 0, done.stderr
    return out, done


def files(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_smoke_run_writes_everything_and_says_where(smoke):
    out, done = smoke
    assert {"config.json", "environment.json", "results.json", "report.html", "stages"} == {p.name for p in out.iterdir()}
    assert str(out / "report.html") in done.stdout
    assert "LLC (SGLD)" in done.stdout
    assert "sample" in done.stderr, "progress bars are shown"


def test_results_are_strict_json_and_hold_no_paths_or_times(smoke):
    out, _ = smoke
    text = (out / "results.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert str(out) not in text
    assert "seconds" not in text


def test_finished_run_is_only_rendered_again(smoke):
    out, _ = smoke
    before = files(out)
    again = command_line("run", STUDY, "--preset", "smoke", "--out", out)
    assert again.returncode == 0
    assert files(out) == before


@pytest.mark.slow
def test_equal_runs_give_equal_results(smoke, tmp_path):
    out, _ = smoke
    assert command_line("run", STUDY, "--preset", "smoke", "--out", tmp_path / "again").returncode == 0
    assert (tmp_path / "again" / "results.json").read_bytes() == (out / "results.json").read_bytes()


@pytest.mark.slow
def test_unfinished_run_goes_on_after_its_last_stage(smoke, tmp_path):
    out, _ = smoke
    copied = tmp_path / "run"
    shutil.copytree(out, copied)
    for gone in ("results.json", "report.html", "stages/degradation.json", "stages/degradation.npz", "stages/alignment.json"):
        (copied / gone).unlink()
    seconds = read_run(out).environment["seconds"]
    done = command_line("run", STUDY, "--preset", "smoke", "--out", copied)
    assert done.returncode == 0, done.stderr
    assert (copied / "results.json").read_bytes() == (out / "results.json").read_bytes()
    kept = read_run(copied).environment["seconds"]
    assert {name: kept[name] for name in ("training", "polish", "spectrum", "llc")} == {
        name: seconds[name] for name in ("training", "polish", "spectrum", "llc")
    }


def test_report_comes_from_the_run_directory_alone(smoke, tmp_path):
    out, _ = smoke
    moved = tmp_path / "elsewhere"
    shutil.copytree(out, moved)
    (moved / "report.html").unlink()
    done = command_line("report", moved, module=True)
    assert done.returncode == 0
    assert (moved / "report.html").read_text() == (out / "report.html").read_text()


def test_command_in_the_report_names_what_was_changed(smoke, tmp_path):
    out, _ = smoke
    copied = tmp_path / "run"
    shutil.copytree(out, copied)
    assert f"slt-interp run {STUDY} --preset smoke</pre>" in (out / "report.html").read_text()
    config = json.loads((copied / "config.json").read_text())
    config["settings"] |= {"seed": 7, "dial_nbetas": [500.0, 400.0, 300.0, 200.0, 100.0]}
    (copied / "config.json").write_text(json.dumps(config))
    expected = f"slt-interp run {STUDY} --preset smoke --seed 7 --dial-nbetas 500.0 400.0 300.0 200.0 100.0"
    assert expected in render(copied).read_text()


# What the numbers must satisfy, whatever they are.


def test_gaussian_prediction_is_recomputed_from_the_kept_eigenvalues(smoke):
    run = read_run(smoke[0])
    spectrum, settings = run.results["spectrum"], run.config["settings"]
    values = run.arrays("spectrum")["ritz_values"][0]
    nbeta = settings["num_examples"] / np.log(settings["num_examples"])
    assert len(values) == spectrum["dimension"] == 850
    k = nbeta * values
    assert spectrum["gaussian_llc"] == pytest.approx(0.5 * np.sum(k / (k + settings["localization"])), rel=1e-9)


def test_estimate_is_recomputed_from_the_kept_traces(smoke):
    run = read_run(smoke[0])
    estimate = run.results["llc"]
    losses = run.arrays("llc")["loss"].astype(np.float64)
    assert losses.shape[0] >= 8
    assert estimate["llc"] == pytest.approx(estimate["nbeta"] * (losses.mean() - estimate["init_loss"]), rel=1e-6)
    between = estimate["nbeta"] * losses.mean(axis=1).std(ddof=1) / np.sqrt(len(losses))
    assert estimate["std_error"] >= between * (1 - 1e-9)


def test_dials_are_matched_in_loss_at_five_or_more_levels(smoke):
    levels = read_run(smoke[0]).results["degradation"]["levels"]
    assert len(levels) >= 5
    for level in levels:
        ours, rival = level["dials"]["posterior"], level["dials"]["weight_noise"]
        assert rival["excess_loss"] == pytest.approx(ours["excess_loss"], rel=0.02)
        for dial in (ours, rival):
            for found in dial["sites"].values():
                chains = np.array(found["iia_per_chain"])
                assert found["iia"] == pytest.approx(chains.mean())
                assert found["iia_std_error"] == pytest.approx(chains.std(ddof=1) / np.sqrt(len(chains)))


def test_polish_lowers_loss_and_gradient(smoke):
    polish = read_run(smoke[0]).results["polish"]
    assert 0 <= polish["excess_after"] < polish["excess_before"]
    assert polish["grad_norm_after"] < polish["grad_norm_before"]


def test_gaussian_volume_is_recomputed_from_the_kept_eigenvalues(smoke):
    run = read_run(smoke[0])
    volume, values = run.results["volume"], run.arrays("spectrum")["ritz_values"][0]
    # Half the squares of the weights' distances, in units of the base, times the curvatures: by draws of the base.
    draws = np.random.default_rng(0).normal(size=(20_000, len(values))) ** 2
    losses = draws @ np.maximum(values, 0.0) * volume["base_scale"] ** 2 / 2
    for threshold, predicted in zip(volume["thresholds"], volume["gaussian"], strict=True):
        share = np.mean(losses <= threshold)
        error = np.sqrt(np.exp(predicted) * -np.expm1(predicted) / len(losses))
        assert abs(share - np.exp(predicted)) < 4 * error + 1e-9
    seeds = np.array(volume["subset"]["per_seed"])
    np.testing.assert_allclose(volume["subset"]["log_volume"], seeds.mean(axis=0))
    between = seeds.std(axis=0, ddof=1) / np.sqrt(len(seeds))
    assert np.all(np.array(volume["subset"]["std_error"]) >= between * (1 - 1e-9))


# Every sentence is computed: change a result and its sentence changes.


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("polish", "test_accuracy"), 0.75, "answers 75.000% of fresh examples"),
        (("llc", "gaussian_step_bias"), 123.4, "is predicted to add 123.4 to the LLC"),
        (("llc", "llc"), 1234.5, "Its LLC is 1234.5 "),
        (("llc", "status"), "do not trust", "(do not trust)"),
        (("llc", "status"), "ok", "(no warning)"),
        (("spectrum", "gaussian_llc"), None, "the Hessian predicts none"),
        (("spectrum", "gaussian_llc"), 1e6, "below the 1000000.0 that the Hessian predicts"),
        (("spectrum", "dimension"), 10, "d / 2 is 5"),
        (("alignment", "sites", "layer1", "iia"), 0.111, "In layer1 the alignment found has IIA 0.111"),
        (("alignment", "sites", "layer1", "random_iia_std"), 9.0, "no alignment there to speak of"),
        (("scrubbing", "hypotheses", 0, "kl"), 98.7, "KL 98.7"),
        (("scrubbing", "hypotheses", 1, "kl"), 87.6, "against 87.6"),
        (("search", "fits", 2, "iia"), 0.7531, "0.753"),
    ],
)
def test_changed_result_changes_its_sentence(smoke, path, value, expected):
    results = copy.deepcopy(read_run(smoke[0]).results)
    before = report.findings(results)
    place = results
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert report.findings(results) != before or path == ("llc", "status")
    assert expected in " ".join(report.findings(results))


def test_dial_comparison_is_decided_by_its_errors(smoke):
    results = copy.deepcopy(read_run(smoke[0]).results)
    results["alignment"]["sites"]["layer1"] |= {"iia": 0.9, "random_iia": 0.5, "random_iia_std": 0.01}
    levels = results["degradation"]["levels"]
    for level in levels:
        level["estimate"]["status"] = "ok"
        for dial, value in (("posterior", 0.6), ("weight_noise", 0.8)):
            level["dials"][dial]["accuracy"] = 0.9
            level["dials"][dial]["sites"]["layer1"] |= {"iia": value, "iia_std_error": 0.01}

    def sentence():
        return next(s for s in report.findings(results) if "layer1" in s)

    count = len(levels)
    assert f"less of it than weight noise at {count} of {count} levels and more at 0" in sentence()
    levels[0]["estimate"]["status"] = "do not trust"
    levels[1]["dials"]["posterior"]["accuracy"] = 0.6
    assert f"at {count - 2} of {count - 2} levels" in sentence()
    assert f"2 of {count} levels are left out" in sentence()
    for level in levels:
        level["dials"]["posterior"]["sites"]["layer1"]["iia_std_error"] = 0.5
    assert f"at 0 of {count - 2} levels and more at 0" in sentence()
    for level in levels:
        level["estimate"]["status"] = "do not trust"
    assert "nothing can be said" in sentence()


def with_volumes(results):
    """Give results of tempering at one of two thresholds, and errors of 1 nat."""
    results = copy.deepcopy(results)
    volume = results["volume"]
    assert len(volume["thresholds"]) == 2
    volume["gaussian"] = [-3.0, -1.0]
    volume["subset"] |= {"log_volume": [-40.0, -20.0], "std_error": [1.0, 1.0], "status": "ok", "warnings": []}
    volume["tempering"] = {"log_volume": [-22.0], "std_error": [1.0], "status": "ok", "warnings": []}
    return results


def test_sentences_about_the_volume_follow_from_its_numbers(smoke):
    results = with_volumes(read_run(smoke[0]).results)
    volume = results["volume"]

    def sentences():
        return " ".join(volume_sentences(results))

    low, high = volume["thresholds"]
    for part in (
        f"within {low:g} nats of L* (ln V = -3.0); subset simulation finds 4.2e-18 (ln V = -40.0 ± 1.0), 37.0 ± 1.0 nats less.",
        f"rises by {20 / np.log(high / low):.1f} per unit of ln ε; the Gaussian's by {2 / np.log(high / low):.1f}.",
        "agrees with subset simulation at the 1 thresholds that both reach",
        f"at most 1.4 standard errors apart (2.0 ± 1.4 nats at {high:g}).",
    ):
        assert part in sentences()
    assert volume_sentences(results)[0] in report.findings(results)
    volume["tempering"]["log_volume"] = [-25.0]
    assert "disagrees with subset simulation" in sentences()
    volume["gaussian"][0] = -38.0
    assert "(ln V = -40.0 ± 1.0), within 3 standard errors of that" in sentences()
    volume["gaussian"][0] = -50.0
    assert "10.0 ± 1.0 nats more" in sentences()
    volume["tempering"] |= {"log_volume": [None], "std_error": [None], "status": "refused", "warnings": ["no way"]}
    assert "have no threshold in common" in sentences()
    assert f"Tempering: refused at {high:g} nats. Warning of tempering: no way." in sentences()
    volume["tempering"] = None
    assert "No second route was gone" in sentences()
    volume["subset"] |= {"log_volume": [None, None], "std_error": [None, None], "status": "refused"}
    assert "gives no volume at any threshold" in volume_sentences(results)[0]
    assert f"Subset simulation: refused at {low:g} and {high:g} nats." in sentences()


@pytest.mark.parametrize("is_refused", [False, True])
def test_volumes_stand_in_the_report(smoke, tmp_path, is_refused):
    copied = tmp_path / "run"
    shutil.copytree(smoke[0], copied)
    results = with_volumes(RunDirectory(copied).results)
    if is_refused:
        results["volume"]["tempering"] |= {"log_volume": [None], "std_error": [None]}
    (copied / "results.json").write_text(json.dumps(results))
    html = render(copied).read_text()
    assert "-40.00 ± 1.00" in html
    assert "not asked" in html
    assert ("refused" if is_refused else "-22.00 ± 1.00") in html


def test_warnings_stand_in_the_report(smoke, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(smoke[0], copied)
    results = RunDirectory(copied).results
    results["llc"] |= {"status": "do not trust", "warnings": ["the moon was full: wait"]}
    (copied / "results.json").write_text(json.dumps(results))
    html = render(copied).read_text()
    assert "Warning: the moon was full: wait." in html
    assert "with the verdict: do not trust" in html


class Images(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.alts, self.outside = [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.sources.append(attributes["src"])
            self.alts.append(attributes["alt"])
        self.outside += [
            value for name, value in attributes.items() if name in ("src", "href") and not value.startswith("data:")
        ]


def test_report_is_one_self_contained_file(smoke):
    page = Images()
    page.feed((smoke[0] / "report.html").read_text())
    assert len(page.sources) == 9
    assert all(len(alt) > 40 for alt in page.alts)
    assert page.outside == []


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no headless Chromium here: install Debian's package `chromium`")
def test_report_opens_in_a_browser_with_all_figures_visible(smoke, tmp_path):
    # The page itself measures what a reader would see, and writes it where --dump-dom shows it.
    probe = """<script>window.onerror = m => { document.title = 'error: ' + m };
    addEventListener('load', () => { document.body.dataset.seen = JSON.stringify([...document.images].map(
      i => [i.complete && i.naturalWidth, i.getBoundingClientRect().width, i.getBoundingClientRect().height])) })</script>"""
    page = tmp_path / "page.html"
    page.write_text((smoke[0] / "report.html").read_text().replace("</body>", probe + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--disable-quic", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run(
        [
            BROWSER,
            *flags,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<title>error" not in done.stdout
    seen = json.loads(done.stdout.split('data-seen="')[1].split('"')[0].replace("&quot;", '"'))
    assert len(seen) == 9
    for natural, width, height in seen:
        assert natural > 100
        assert width > 300
        assert height > 100


# Bad input on the command line.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "no-such-study"), "there is no study 'no-such-study': choose one of hierarchical-equality"),
        (
            ("run", STUDY, "--preset", "huge"),
            "there is no preset 'huge' of hierarchical-equality: choose one of smoke, default, full",
        ),
        (("run", STUDY, "--preset=huge"), "there is no preset 'huge'"),
        (("report", "nowhere"), "nowhere is no run directory"),
        (("run", STUDY, "--nbeta", "-3"), "nbeta must lie between 1e-12 and 1e+12, but is -3.0"),
        (("run", STUDY, "--localization", "0"), "localization must lie between 1e-12 and 1e+12, but is 0.0"),
        (
            ("run", STUDY, "--dial-nbetas", "3", "0", "1", "2", "4"),
            "dial_nbetas must be five or more positive numbers",
        ),
        (("run", STUDY, "--llc-chains", "1"), "llc_chains must lie between 2 and inf, but is 1: change --llc-chains"),
        (("run", STUDY, "--llc-draws", "0"), "llc_draws must lie between 8 and inf"),
        (("run", STUDY, "--train-steps", "0"), "train_steps must lie between 1 and inf"),
        (("run", STUDY, "--alignment-size", "9"), "alignment_size must lie between 1 and 8, but is 9"),
        (("run", STUDY, "--volume-thresholds", "1", "0.5"), "thresholds must be a list of positive increasing numbers"),
        (("run", STUDY, "--volume-tempered", "-1"), "volume_tempered must lie between 0 and inf, but is -1"),
        (("run", STUDY, "--volume-chains", "5"), "volume_chains must be even, but is 5"),
        (("run", STUDY, "--seed", "-1"), "seed must lie between 0 and"),
    ],
)
def test_bad_input_exits_with_2_one_sentence_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["slt-interp", *arguments])
    monkeypatch.setattr(cli, "_prepare_jax", lambda **_: None)  # this process has used JAX
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert message in said
    assert said.startswith("slt-interp: error: ")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_input_shows_no_traceback():
    done = command_line("run", STUDY, "--preset", "huge")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["config.json", "results.json", "stages/llc.npz"])
def test_damaged_run_directory_is_named(smoke, tmp_path, name):
    copied = tmp_path / "run"
    shutil.copytree(smoke[0], copied)
    (copied / name).write_bytes((copied / name).read_bytes()[:100])
    with pytest.raises(InputError, match="is damaged"):
        render(copied)


def test_directory_of_another_configuration_is_refused_and_untouched(smoke):
    out, _ = smoke
    before = files(out)
    done = command_line("run", STUDY, "--preset", "smoke", "--seed", 5, "--out", out)
    assert done.returncode == 2
    assert "settings.seed = 0 there, 5 here" in done.stderr
    assert "Traceback" not in done.stderr
    assert files(out) == before


def test_list_names_every_study_and_every_study_has_the_presets():
    done = command_line("list", module=True)
    assert done.returncode == 0
    for name, study in STUDIES.items():
        assert name in done.stdout
        assert tuple(study.presets) == PRESETS


def test_unwritable_place_is_one_sentence(tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    done = command_line("run", STUDY, "--preset", "smoke", "--out", place / "run")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert os.fspath(place) in done.stderr
