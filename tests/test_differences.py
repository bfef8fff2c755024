"""Tests the differences of students, paired by seed: against scipy's t-test, by their rate of errors, by hand."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from kd_det.analysis.differences import find_differences, paired_difference
from kd_det.errors import InputError

# AP of students with and without a teacher, seeds 1 to 5.
DISTILLED, PLAIN = [27.1, 25.3, 28.8, 21.0, 24.9], [19.2, 18.4, 22.0, 20.1, 14.9]


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
@pytest.mark.parametrize("sides", [(DISTILLED, PLAIN), (PLAIN, DISTILLED), (PLAIN, [20.0, 18.0, 21.0, 21.0, 14.0])])
def test_the_interval_and_the_verdict_are_those_of_scipy(sides, seeds):
    values, baseline = (side[:seeds] for side in sides)
    found, expected = paired_difference(values, baseline), ttest_rel(values, baseline)
    assert found["mean"] == pytest.approx(np.mean(values) - np.mean(baseline))
    assert [found["low"], found["high"]] == pytest.approx(list(expected.confidence_interval(0.95)))
    assert found["seeds"] == seeds
    significant = {1: "helps", -1: "hurts"}[np.sign(expected.statistic)]
    verdict = significant if expected.pvalue < 0.05 else "no evidence"
    assert found["verdict"] == (verdict if seeds > 2 else "")


def test_an_interval_by_hand():
    """The differences 1, 2 and 3 have the deviation 1, and with two degrees of freedom t is 4.303."""
    found = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert found == {
        "mean": 2.0,
        "low": pytest.approx(2 - 4.303 / 3**0.5, abs=1e-3),
        "high": pytest.approx(2 + 4.303 / 3**0.5, abs=1e-3),
        "seeds": 3,
        "verdict": "no evidence",
    }


@pytest.mark.parametrize("seeds", range(3, 11))
def test_equal_students_are_no_evidence(seeds):
    values = np.random.default_rng(seeds).normal(50, 5, seeds)
    assert paired_difference(values, values)["verdict"] == "no evidence"
    # Every difference comes with both signs, so that their mean is zero.
    noise = np.random.default_rng(seeds).normal(0, 1, seeds // 2)
    noise = np.concatenate([noise, -noise, np.zeros(seeds % 2)])
    assert paired_difference(values + noise, values)["verdict"] == "no evidence"


@pytest.mark.parametrize("seeds", range(3, 11))
def test_one_verdict_in_twenty_is_false(seeds):
    """Two students of one kind differ by chance alone, and the seed moves both."""
    random = np.random.default_rng(seeds)
    common = random.normal(30, 5, (2000, seeds))
    values, baseline = (common + random.normal(0, 2, common.shape) for _ in range(2))
    verdicts = [paired_difference(*pair)["verdict"] for pair in zip(values, baseline, strict=True)]
    assert 0.035 <= 1 - verdicts.count("no evidence") / 2000 <= 0.065
    assert abs(verdicts.count("helps") - verdicts.count("hurts")) < 50


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "no evidence"), (0.5, "helps"), (-0.5, "hurts")])
def test_differences_that_are_all_equal(shift, verdict):
    found = paired_difference([x + shift for x in (10, 20, 40)], [10, 20, 40])
    assert found == {"mean": shift, "low": shift, "high": shift, "seeds": 3, "verdict": verdict}


def test_a_single_seed_has_no_interval():
    found = paired_difference([12.0], [10.0])
    assert (found["mean"], found["seeds"], found["verdict"]) == (2.0, 1, "")
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])


def run(name, seed, ap=0.0, **metrics):
    return {"name": name, "seed": seed, "metrics": {"bbox AP": ap, **metrics}}


def test_runs_are_paired_by_their_seeds_and_not_by_their_order():
    runs = [run("plain", seed, ap) for seed, ap in zip((1, 2, 3), (10.0, 20.0, 30.0), strict=True)]
    runs += [run("soft", seed, ap) for seed, ap in zip((3, 1, 2, 9), (31.0, 11.1, 21.2, 99.0), strict=True)]
    result = find_differences(runs, [("", "plain")])
    difference = result["differences"]["plain"]["soft"]["bbox AP"]
    assert (difference["mean"], difference["seeds"]) == (pytest.approx(1.1), 3)
    assert difference["verdict"] == "helps"
    assert result["unpaired"] == {"plain": {}}


def test_the_sign_of_a_verdict_depends_on_the_metric():
    values = {"ms per image": 5.0, "score threshold": 0.5, "segm AP": 7.0}
    runs = [run("plain", seed, 10.0 + seed, **values) for seed in range(3)]
    runs += [run("soft", seed, 9.0 + seed, **{key: x - 0.25 for key, x in values.items()}) for seed in range(3)]
    found = find_differences(runs, [("", "plain")])["differences"]["plain"]["soft"]
    verdicts = {metric: difference["verdict"] for metric, difference in found.items()}
    assert verdicts == {"bbox AP": "hurts", "ms per image": "helps", "score threshold": "", "segm AP": "hurts"}


def test_metrics_of_one_side_or_of_some_runs():
    """A metric that one run lacks, or has as NaN, which JSON holds as null, has no mean and no verdict."""
    runs = [run("plain", seed, a=1.0, b=1.0, masks=1.0) for seed in range(3)]
    runs += [run("soft", 0, a=2.0, b=None), run("soft", 1, b=2.0), run("soft", 2, a=2.0, b=2.0)]
    found = find_differences(runs, [("", "plain")])["differences"]["plain"]["soft"]
    assert list(found) == ["bbox AP", "a", "b"]
    for metric in ("a", "b"):
        assert math.isnan(found[metric]["mean"])
        assert (found[metric]["seeds"], found[metric]["verdict"]) == (3, "")


def test_what_cannot_be_paired_is_explained():
    runs = [run("plain", seed) for seed in (1, 2)]
    runs += [run("teacher", 0), run("random", None), run("random", 1), run("twice", 2), run("twice", 2), run("ok", 1)]
    result = find_differences(runs, [("", "plain")])
    assert list(result["differences"]["plain"]) == ["ok"]
    assert result["unpaired"]["plain"] == {
        "teacher": "no seed in common with plain",
        "random": "a run of random has no SEED",
        "twice": "two runs of twice have SEED 2",
    }


def test_experiments_have_baselines_of_their_own():
    """The name of a chain stands for its generations and their ensemble, and for nothing that begins alike."""
    names = ["plain", "long", "ban gen 1", "ban gen 2", "ban ensemble", "ban gentle", "soft"]
    runs = [run(name, seed) for seed in (1, 2) for name in names]
    baselines = [("soft", "plain"), ("soft", "long"), ("ban", "plain"), ("soft", "plain")]
    found = find_differences(runs, baselines)["differences"]
    assert {key: list(value) for key, value in found.items()} == {
        "plain": ["soft", "ban gen 1", "ban gen 2", "ban ensemble"],
        "long": ["soft"],
    }


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (("", "plane"), "--baseline plane: no run is named 'plane', only 'plain', 'soft', 'random', 'twice'."),
        (("sofd", "plain"), "--baseline sofd=plain: no run is named 'sofd', only"),
        (("plain", "plain"), "--baseline plain=plain: an experiment cannot be its own baseline"),
        (("", "random"), "--baseline random: runs are paired by the SEED of their configs, but a run of random has no"),
        (("soft", "twice"), "--baseline soft=twice: .*, but two runs of twice have SEED 1"),
    ],
)
def test_mistakes_end_in_one_line(baseline, message):
    runs = [run("plain", 1), run("soft", 1), run("random", None), run("twice", 1), run("twice", 1)]
    with pytest.raises(InputError, match=message) as error:
        find_differences(runs, [baseline])
    assert "\n" not in str(error.value)
