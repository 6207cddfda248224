"""The rolling window: what it remembers, what it warns of, and how rarely it does so for nothing."""

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

HONEST = np.array([[1, 1, 2, 3, 5, 8, 10, 15, 25, 30], [2, 4, 6, 8, 10, 12, 14, 16, 14, 14], [10] * 10]) / 100
SHARES = np.array([0.5, 0.3, 0.2])


def certified(num_images: int = 2000) -> Calibration:
    """A baseline that has exactly the shares and the confidence of the honest stream."""
    return tuple(
        group.model_copy(
            update={
                "predicted_share": float(share),
                "confidence_counts": tuple(round(num_images * share * part) for part in parts),
            }
        )
        for group, share, parts in zip(toy_calibration(), SHARES.tolist(), HONEST.tolist(), strict=True)
    )


def filled(
    window: Window,
    num_images: int,
    rng: np.random.Generator,
    shares: NDArray[np.float64] = SHARES,
    confidence_KB: NDArray[np.float64] = HONEST,
) -> WindowReport:
    """Predictions drawn with some shares and confidences."""
    for group, num in enumerate(rng.multinomial(num_images, shares)):
        bins = rng.choice(HISTOGRAM_BINS, size=num, p=confidence_KB[group])
        for confidence in ((bins + 0.5) / HISTOGRAM_BINS).tolist():
            window.add(group, confidence, abstained=confidence < 0.4, now=0.0)
    return window.report()


@pytest.mark.parametrize("num_images", [20, 200, 1000])
def test_an_honest_stream_warns_in_at_most_the_nominal_share_of_windows(num_images: int) -> None:
    rng = np.random.default_rng(0)
    num_windows = 300
    window, alarms = Window(certified(), num_images), 0
    for _ in range(num_windows):  # each fills the window anew
        alarms += bool(filled(window, num_images, rng).warnings)
    # if the true rate is the nominal one, more than this many happen once in a thousand runs of this test
    assert alarms <= binom.ppf(0.999, num_windows, FALSE_ALARMS)


def test_the_baselines_own_chance_is_counted_too() -> None:
    """A baseline of 100 images is a draw itself: held against it, an honest stream must still not warn."""
    rng = np.random.default_rng(1)
    num_windows, alarms = 200, 0
    for _ in range(num_windows):
        baseline = tuple(
            group.model_copy(
                update={
                    "predicted_share": int(num) / 100,
                    "confidence_counts": tuple(rng.multinomial(num, parts).tolist()),
                }
            )
            for group, num, parts in zip(toy_calibration(), rng.multinomial(100, SHARES), HONEST, strict=True)
        )
        alarms += bool(filled(Window(baseline, 200), 200, rng).warnings)
    assert alarms <= binom.ppf(0.999, num_windows, FALSE_ALARMS)  # as above


def test_a_tail_that_vanishes_from_the_predictions_warns() -> None:
    report = filled(Window(certified(), 1000), 1000, np.random.default_rng(0), np.array([0.6, 0.37, 0.03]))
    assert [seen.vanishing for seen in report.groups] == [False, False, True]
    assert report.warnings[0].startswith("tail is vanishing: ")
    assert "certified 20.0 %" in report.warnings[0]


def test_a_tail_that_loses_less_than_half_its_share_is_drift_but_does_not_vanish() -> None:
    report = filled(Window(certified(), 1000), 1000, np.random.default_rng(0), np.array([0.55, 0.31, 0.14]))
    assert not any(seen.vanishing for seen in report.groups)


def test_confidence_that_moves_in_one_group_warns_of_that_group() -> None:
    moved = HONEST.copy()
    moved[2] = HONEST[2][::-1] * np.array([0.2] * 5 + [1.8] * 5)
    report = filled(Window(certified(), 1000), 1000, np.random.default_rng(0), confidence_KB=moved)
    drifts = [seen.confidence_drift for seen in report.groups]
    assert [drift is not None and drift.drifted for drift in drifts] == [False, False, True]
    assert report.warnings == (next(said for said in report.warnings if said.startswith("confidence in tail")),)


def test_shares_that_move_warn() -> None:
    report = filled(Window(certified(), 1000), 1000, np.random.default_rng(0), np.array([0.2, 0.3, 0.5]))
    assert report.share_drift is not None
    assert report.share_drift.drifted
    assert any(said.startswith("the groups' shares have drifted") for said in report.warnings)


def test_a_handful_of_predictions_does_not_cry_wolf() -> None:
    window = Window(certified(), 1000)
    for _ in range(5):
        window.add(0, 0.95, abstained=False, now=0.0)
    report = window.report()
    drift = report.groups[0].confidence_drift
    assert drift is not None
    assert drift.psi > 0.25  # a large shift by the rule of thumb that knows no sample size
    assert report.warnings == ()


def test_a_large_window_does_not_warn_of_a_shift_that_matters_to_nobody() -> None:
    rng = np.random.default_rng(0)
    report = filled(Window(certified(50_000), 20_000), 20_000, rng, np.array([0.52, 0.29, 0.19]))
    assert report.share_drift is not None
    assert report.share_drift.psi > chance_psi(3, 20_000, 50_000, FALSE_ALARMS)  # more than chance
    assert report.warnings == ()


def test_the_window_forgets_what_is_old() -> None:
    rng = np.random.default_rng(0)
    window = Window(certified(), 400)
    assert filled(window, 400, rng, np.array([0.7, 0.3, 0.0])).groups[2].vanishing
    report = filled(window, 400, rng)
    assert report.warnings == ()
    assert report.num_images == sum(seen.predictions for seen in report.groups) == 400


def test_the_window_says_since_when_it_remembers() -> None:
    window = Window(certified(), 3)
    assert window.report().since is None
    oldest = []
    for second in range(5):
        window.add(0, 0.5, abstained=False, now=float(second))
        since = window.report().since
        assert since is not None
        oldest.append(since.timestamp())
    assert oldest == [0, 0, 0, 1, 2]


def test_an_empty_window_knows_nothing_and_warns_of_nothing() -> None:
    report = Window(certified(), 10).report()
    assert (report.num_images, report.share_drift, report.warnings) == (0, None, ())
    for seen, name in zip(report.groups, GROUPS.names, strict=True):
        assert (seen.group, seen.predictions, seen.share, seen.confidence, seen.confidence_drift, seen.vanishing) == (
            name, 0, None, None, None, False,
        )  # fmt: skip


def test_each_group_has_its_share_its_quantiles_and_its_abstentions() -> None:
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


def test_memory_is_taken_once() -> None:
    window = Window(certified(), 1000)

    def held() -> int:
        return sum(part.__sizeof__() for part in vars(window).values())

    before = held()
    filled(window, 5000, np.random.default_rng(0))
    assert held() <= before + 8  # the counter of what was seen may need one more word


@pytest.mark.parametrize(
    ("confidence", "place"), [(0.0, 0), (0.05, 0), (0.1, 0), (0.100001, 1), (0.5, 4), (0.95, 9), (1.0, 9)]
)
def test_a_bin_of_confidence_holds_its_upper_end_as_the_certified_ones_do(confidence: float, place: int) -> None:
    assert confidence_histogram(np.array([confidence])).tolist() == np.eye(HISTOGRAM_BINS)[place].tolist()


def test_the_index_is_zero_for_equal_histograms_and_by_hand_otherwise() -> None:
    assert population_stability_index(np.array([5.0, 5.0]), np.array([5.0, 5.0])) == 0
    # with half a count more: q = (7.5, 3.5) / 11 and p = (5.5, 5.5) / 11
    by_hand = (2 / 11) * np.log(7.5 / 5.5) - (2 / 11) * np.log(3.5 / 5.5)
    assert population_stability_index(np.array([7.0, 3.0]), np.array([5.0, 5.0])) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("num_bins", [2, 3, 4, 10])
def test_the_level_of_chance_is_the_chi_square_quantile(num_bins: int) -> None:
    level = chance_psi(num_bins, 100, 300, FALSE_ALARMS / 7)
    exact = chi2.ppf(1 - FALSE_ALARMS / 7, num_bins - 1) * (1 / 100 + 1 / 300)
    assert 1 <= level / exact < 1.04  # Wilson and Hilferty's error so far out, towards fewer alarms


def test_a_model_of_one_group_has_no_shares_to_drift() -> None:
    alone = (certified()[0].model_copy(update={"predicted_share": 1.0}),)
    window = Window(alone, 100)
    for _ in range(100):
        window.add(0, 0.75, abstained=False, now=0.0)
    assert window.report().share_drift is None
