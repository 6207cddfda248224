"""The rolling window: its contents, its warnings, and its rate of false alarms."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, chi2
from serve_toys import GROUPS, toy_calibration

from ltkd.contract.calibration import HISTOGRAM_BINS, Calibration
from serve.monitoring.drift import (
    FALSE_ALARMS,
    Window,
    WindowReport,
    chance_psi,
    confidence_histogram,
    population_stability_index,
)

CONFIDENCE_KB = np.array([[1, 1, 2, 3, 5, 8, 10, 15, 25, 30], [2, 4, 6, 8, 10, 12, 14, 16, 14, 14], [10] * 10]) / 100
SHARES = np.array([0.5, 0.3, 0.2])


def certified(num_images: int = 2000) -> Calibration:
    """A baseline with exactly the shares and the confidence of the predictions without drift."""
    return tuple(
        group.model_copy(
            update={
                "predicted_share": float(share),
                "confidence_counts": tuple(round(num_images * share * fraction) for fraction in fractions),
            }
        )
        for group, share, fractions in zip(toy_calibration(), SHARES.tolist(), CONFIDENCE_KB.tolist(), strict=True)
    )


def filled(
    window: Window,
    num_images: int,
    rng: np.random.Generator,
    shares: NDArray[np.float64] = SHARES,
    confidence_KB: NDArray[np.float64] = CONFIDENCE_KB,
) -> WindowReport:
    """Add random predictions with these shares and confidences, and return the report."""
    for group, num in enumerate(rng.multinomial(num_images, shares)):
        bins = rng.choice(HISTOGRAM_BINS, size=num, p=confidence_KB[group])
        for confidence in ((bins + 0.5) / HISTOGRAM_BINS).tolist():
            window.add(group, confidence, abstained=confidence < 0.4, now=0.0)
    return window.report()


@pytest.mark.parametrize("num_images", [20, 200, 1000])
def test_without_drift_at_most_the_nominal_share_of_windows_has_warnings(num_images: int) -> None:
    rng = np.random.default_rng(0)
    num_windows = 300
    window, alarms = Window(certified(), num_images), 0
    for _ in range(num_windows):  # each iteration replaces the whole window
        alarms += bool(filled(window, num_images, rng).warnings)
    # if the true rate is the nominal one, this is exceeded once in a thousand runs of this test
    assert alarms <= binom.ppf(0.999, num_windows, FALSE_ALARMS)


def test_without_drift_a_small_baseline_causes_no_more_false_alarms() -> None:
    """A baseline of 100 images is a random sample itself; its sampling error must not raise alarms."""
    rng = np.random.default_rng(1)
    num_windows, alarms = 200, 0
    for _ in range(num_windows):
        baseline = tuple(
            group.model_copy(
                update={
                    "predicted_share": int(num) / 100,
                    "confidence_counts": tuple(rng.multinomial(num, fractions).tolist()),
                }
            )
            for group, num, fractions in zip(
                toy_calibration(), rng.multinomial(100, SHARES), CONFIDENCE_KB, strict=True
            )
        )
        alarms += bool(filled(Window(baseline, 200), 200, rng).warnings)
    assert alarms <= binom.ppf(0.999, num_windows, FALSE_ALARMS)  # as above


def test_a_tail_that_vanishes_from_the_predictions_is_a_warning() -> None:
    report = filled(Window(certified(), 1000), 1000, np.random.default_rng(0), np.array([0.6, 0.37, 0.03]))
    assert [group.vanishing for group in report.groups] == [False, False, True]
    assert report.warnings[0].startswith("tail is vanishing: ")
    assert "certified 20.0 %" in report.warnings[0]


def test_a_tail_that_loses_less_than_half_of_its_share_is_not_vanishing() -> None:
    report = filled(Window(certified(), 1000), 1000, np.random.default_rng(0), np.array([0.55, 0.31, 0.14]))
    assert not any(group.vanishing for group in report.groups)


def test_confidence_drift_in_one_group_is_a_warning_about_that_group() -> None:
    shifted = CONFIDENCE_KB.copy()
    shifted[2] = CONFIDENCE_KB[2][::-1] * np.array([0.2] * 5 + [1.8] * 5)
    report = filled(Window(certified(), 1000), 1000, np.random.default_rng(0), confidence_KB=shifted)
    drifts = [group.confidence_drift for group in report.groups]
    assert [drift is not None and drift.drifted for drift in drifts] == [False, False, True]
    assert report.warnings == (next(text for text in report.warnings if text.startswith("confidence in tail")),)


def test_drift_of_the_shares_is_a_warning() -> None:
    report = filled(Window(certified(), 1000), 1000, np.random.default_rng(0), np.array([0.2, 0.3, 0.5]))
    assert report.share_drift is not None
    assert report.share_drift.drifted
    assert any(text.startswith("the groups' shares have drifted") for text in report.warnings)


def test_few_predictions_raise_no_alarm() -> None:
    window = Window(certified(), 1000)
    for _ in range(5):
        window.add(0, 0.95, abstained=False, now=0.0)
    report = window.report()
    drift = report.groups[0].confidence_drift
    assert drift is not None
    assert drift.psi > 0.25  # a large shift by the rule of thumb, which ignores the sample size
    assert report.warnings == ()


def test_a_significant_but_minor_shift_in_a_large_window_raises_no_alarm() -> None:
    rng = np.random.default_rng(0)
    report = filled(Window(certified(50_000), 20_000), 20_000, rng, np.array([0.52, 0.29, 0.19]))
    assert report.share_drift is not None
    assert report.share_drift.psi > chance_psi(3, 20_000, 50_000, FALSE_ALARMS)  # more than chance
    assert report.warnings == ()


def test_new_predictions_replace_the_oldest_ones() -> None:
    rng = np.random.default_rng(0)
    window = Window(certified(), 400)
    assert filled(window, 400, rng, np.array([0.7, 0.3, 0.0])).groups[2].vanishing
    report = filled(window, 400, rng)
    assert report.warnings == ()
    assert report.num_images == sum(group.predictions for group in report.groups) == 400


def test_the_report_has_the_time_of_the_oldest_prediction() -> None:
    window = Window(certified(), 3)
    assert window.report().since is None
    oldest = []
    for second in range(5):
        window.add(0, 0.5, abstained=False, now=float(second))
        since = window.report().since
        assert since is not None
        oldest.append(since.timestamp())
    assert oldest == [0, 0, 0, 1, 2]


def test_an_empty_window_reports_no_values_and_no_warnings() -> None:
    report = Window(certified(), 10).report()
    assert (report.num_images, report.share_drift, report.warnings) == (0, None, ())
    for group, name in zip(report.groups, GROUPS.names, strict=True):
        assert (group.group, group.predictions, group.vanishing) == (name, 0, False)
        assert (group.share, group.confidence, group.confidence_drift) == (None, None, None)


def test_each_group_has_a_share_quantiles_and_abstentions() -> None:
    window = Window(certified(), 100)
    for confidence in (0.1, 0.2, 0.3, 0.4, 0.5):
        window.add(1, confidence, abstained=confidence < 0.25, now=0.0)
    for _ in range(15):
        window.add(0, 0.9, abstained=False, now=0.0)
    head, medium, _ = window.report().groups
    assert medium.confidence is not None
    assert (medium.predictions, medium.share, medium.abstentions, medium.confidence.p50) == (5, 0.25, 2, 0.3)
    assert medium.certified_share == 0.3
    assert head.abstentions == 0


def test_memory_does_not_grow_with_the_number_of_predictions() -> None:
    window = Window(certified(), 1000)

    def num_bytes() -> int:
        return sum(part.__sizeof__() for part in vars(window).values())

    before = num_bytes()
    filled(window, 5000, np.random.default_rng(0))
    assert num_bytes() <= before + 8  # the counter of predictions may need one more word


@pytest.mark.parametrize(
    ("confidence", "index"), [(0.0, 0), (0.05, 0), (0.1, 0), (0.100001, 1), (0.5, 4), (0.95, 9), (1.0, 9)]
)
def test_a_confidence_bin_includes_its_upper_end_as_in_certification(confidence: float, index: int) -> None:
    assert confidence_histogram(np.array([confidence])).tolist() == np.eye(HISTOGRAM_BINS)[index].tolist()


def test_psi_is_zero_for_equal_histograms_and_as_computed_by_hand_otherwise() -> None:
    assert population_stability_index(np.array([5.0, 5.0]), np.array([5.0, 5.0])) == 0
    # with half a count added to each bin: q = (7.5, 3.5) / 11 and p = (5.5, 5.5) / 11
    by_hand = (2 / 11) * np.log(7.5 / 5.5) - (2 / 11) * np.log(3.5 / 5.5)
    assert population_stability_index(np.array([7.0, 3.0]), np.array([5.0, 5.0])) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("num_bins", [2, 3, 4, 10])
def test_the_psi_of_chance_is_the_chi_square_quantile(num_bins: int) -> None:
    level = chance_psi(num_bins, 100, 300, FALSE_ALARMS / 7)
    exact = chi2.ppf(1 - FALSE_ALARMS / 7, num_bins - 1) * (1 / 100 + 1 / 300)
    assert 1 <= level / exact < 1.04  # Wilson and Hilferty's error this far in the tail; it makes alarms rarer


def test_a_model_with_one_group_has_no_share_drift() -> None:
    one_group = (certified()[0].model_copy(update={"predicted_share": 1.0}),)
    window = Window(one_group, 100)
    for _ in range(100):
        window.add(0, 0.75, abstained=False, now=0.0)
    assert window.report().share_drift is None
