"""Importance and weightings, held against exact fractions, 50-digit powers and a bisection, in three frameworks."""

import decimal
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recsys_importance.importance import Weighting, effective_sample_size, importance

FRAMEWORKS = ("numpy", "torch", "tensorflow")
SMALLEST_FLOAT32 = 2.0**-126  # smaller results are subnormal, and TensorFlow flushes them to zero

decimal.getcontext().prec = 50


def to_framework(values, framework, dtype="float64"):
    """The values as a NumPy, PyTorch or TensorFlow array of the named dtype."""
    values = np.asarray(values, dtype=dtype)
    if framework == "torch":
        return pytest.importorskip("torch").tensor(values)
    if framework == "tensorflow":
        return pytest.importorskip("tensorflow").constant(values)
    return values


def to_numpy(values) -> np.ndarray:
    return np.asarray(values.numpy() if hasattr(values, "numpy") else values)


def exact_importance(scores) -> list[Fraction]:
    """I_i in rational arithmetic: every float is a fraction, so nothing is rounded."""
    fractions = [Fraction(float(score)) for score in scores]
    total = sum(fractions)
    return [fraction / total for fraction in fractions]


def power_weights(scores, exponent: float) -> np.ndarray:
    """Mean-1 weights proportional to s ** p, with powers of 50 digits."""
    powers = [decimal.Decimal(float(score)) ** decimal.Decimal(exponent) for score in scores]
    return np.array([float(len(powers) * power / sum(powers)) for power in powers])


def bisected_cap(weights: np.ndarray, clip: float) -> np.ndarray:
    """Weights cut at the largest cap that is no more than `clip` times the mean of the positive cut weights, found by halving."""
    positive = weights[weights > 0]
    low, high = 0.0, float(weights.max())
    if high <= clip * positive.mean():
        return weights
    for _ in range(200):
        middle = (low + high) / 2
        if middle <= clip * np.minimum(positive, middle).mean():
            low = middle
        else:
            high = middle
    return np.minimum(weights, low)


def wide_floats(lowest=1e-30, highest=1e30):
    """Positive floats whose logarithms are spread evenly, with the ends."""
    between = st.floats(math.log(lowest), math.log(highest)).map(lambda power: min(max(math.exp(power), lowest), highest))
    return st.one_of(between, st.sampled_from([lowest, 1.0, highest]))


def score_lists(*, zeros=True, max_size=30, lowest=1e-30, highest=1e30):
    """Lists of scores, not all zero."""
    one = wide_floats(lowest, highest)
    return st.lists(st.one_of(one, st.just(0.0)) if zeros else one, min_size=1, max_size=max_size).filter(any)


# --- importance ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_worked_example(framework):
    shares = to_numpy(importance(to_framework(np.repeat([1.0, 0.1], 500), framework)))
    np.testing.assert_allclose(shares[:500], 1 / 550, rtol=2e-15)  # each framework sums the thousand in its own order
    np.testing.assert_allclose(shares[500:], 0.1 / 550, rtol=2e-15)
    assert math.isclose(shares[:500].sum(), 10 / 11, rel_tol=1e-14) and math.isclose(shares[500:].sum(), 1 / 11, rel_tol=1e-14)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(max_examples=60)
@given(scores=score_lists())
def test_float64_is_the_exact_fraction(framework, scores):
    shares = to_numpy(importance(to_framework(scores, framework)))
    assert shares.dtype == np.float64
    np.testing.assert_allclose(shares, [float(share) for share in exact_importance(scores)], rtol=len(scores) * 2**-52, atol=0)
    assert math.isclose(math.fsum(shares), 1, rel_tol=1e-14)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(max_examples=60)
@given(scores=score_lists())
def test_float32_is_the_exact_fraction_rounded(framework, scores):
    scores = np.asarray(scores, dtype=np.float32)
    shares = to_numpy(importance(to_framework(scores, framework, "float32")))
    assert shares.dtype == np.float32
    exact = [float(share) for share in exact_importance(scores)]
    np.testing.assert_allclose(shares.astype(float), exact, rtol=2**-24 * 1.001, atol=SMALLEST_FLOAT32)


@settings(max_examples=80)
@given(lowest=st.floats(-30, -6), offsets=st.lists(st.floats(0, 34), min_size=1, max_size=40))
def test_the_frameworks_agree_to_the_last_bit_of_float32(lowest, offsets):
    scores = (10.0 ** (lowest + np.array(offsets))).astype(np.float32)
    assume(float(min(exact_importance(scores))) > 2 * SMALLEST_FLOAT32)
    shares = [to_numpy(importance(to_framework(scores, framework, "float32"))) for framework in FRAMEWORKS]
    assert shares[0].tobytes() == shares[1].tobytes() == shares[2].tobytes()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e308])
def test_no_scale_overflows_or_underflows(framework, scale):
    np.testing.assert_allclose(to_numpy(importance(to_framework(np.array([1.0, 1.0, 1.0]) * scale, framework))), 1 / 3, rtol=1e-15)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), (6, 1)])
def test_kind_dtype_and_shape_are_kept(framework, dtype, shape):
    scores = to_framework(np.arange(1, 7).reshape(shape), framework, dtype)
    for result in (importance(scores), Weighting(exponent=0.5, clip=2)(scores)):
        assert type(result) is type(scores) and result.dtype == scores.dtype and tuple(result.shape) == shape
    assert effective_sample_size(scores).dtype == scores.dtype and tuple(effective_sample_size(scores).shape) == shape[:-1]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_integers_become_float64(framework, dtype):
    shares = to_numpy(importance(to_framework([1, 3], framework, dtype)))
    assert shares.dtype == np.float64 and shares.tolist() == [0.25, 0.75]


def test_lists_become_numpy():
    assert importance([1, 3]).tolist() == importance((1.0, 3.0)).tolist() == [0.25, 0.75]
    assert isinstance(importance([1, 3]), np.ndarray)


def test_bfloat16_of_torch_is_kept_and_computed_wide():
    torch = pytest.importorskip("torch")
    scores = torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16)
    assert torch.equal(importance(scores), (torch.tensor([1.0, 2.0, 4.0]) / 7).to(torch.bfloat16))
    ones = torch.ones(1001, dtype=torch.bfloat16)  # a bfloat16 sum would stick at 256
    assert torch.equal(importance(ones), torch.full((1001,), 1 / 1001).to(torch.bfloat16))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_axis(framework):
    scores = np.array([[1.0, 2.0, 5.0], [3.0, 2.0, 15.0]])
    given = to_framework(scores, framework)
    np.testing.assert_allclose(to_numpy(importance(given)), [[1 / 8, 2 / 8, 5 / 8], [3 / 20, 2 / 20, 15 / 20]], rtol=1e-15)
    np.testing.assert_allclose(to_numpy(importance(given, axis=0)), [[1 / 4, 1 / 2, 1 / 4], [3 / 4, 1 / 2, 3 / 4]], rtol=1e-15)
    np.testing.assert_allclose(to_numpy(effective_sample_size(given, axis=0)), [16 / 10, 16 / 8, 400 / 250], rtol=1e-14)


@pytest.mark.parametrize("weigh", [importance, Weighting(), Weighting(exponent=-1, clip=1.5, anneal=(0, 1))])
def test_no_gradient_flows(weigh):
    torch, tf = pytest.importorskip("torch"), pytest.importorskip("tensorflow")
    scores = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    assert not weigh(scores * 2).requires_grad
    (weigh(scores) * scores).sum().backward()
    assert torch.equal(scores.grad, weigh(scores))  # the weight is a constant: d(w s)/ds = w
    variable = tf.Variable([1.0, 2.0, 4.0])
    with tf.GradientTape(persistent=True) as tape:
        weights = weigh(variable)
        product = tf.reduce_sum(weights * variable)
    assert tape.gradient(weights, variable) is None
    np.testing.assert_array_equal(tape.gradient(product, variable).numpy(), weights.numpy())


def test_input_is_left_alone():
    scores = np.array([3.0, 1.0, 2.0])
    importance(scores), Weighting(exponent=2, threshold=0.4, threshold_on="quantile", clip=1.2)(scores)
    assert scores.tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("action", [importance, Weighting(), effective_sample_size])
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, -2.0, 3.0], "1 of 3 scores are negative, the first at index 1"),
        ([np.nan, 1.0], "1 of 2 scores are NaN, the first at index 0"),
        ([1.0, np.inf, np.inf], "2 of 3 scores are infinite, the first at index 1"),
        ([1.0, -np.inf], "1 of 2 scores are infinite, the first at index 1"),
        ([[1.0, 2.0], [3.0, -1.0]], r"1 of 4 scores are negative, the first at index \(1, 1\)"),
        ([-1.0, np.nan], "1 of 2 scores are NaN, the first at index 1"),
        ([], r"scores have shape \(0,\); expected \(\.\.\., N\) with at least one sample"),
        (np.zeros((3, 0)), r"shape \(3, 0\)"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (2.0, r"shape \(\)"),
        ([0.0, 0.0], "all scores are zero"),
        ([[1.0, 2.0], [0.0, 0.0]], "all scores are zero"),
    ],
)
def test_bad_scores_are_refused_with_their_place(framework, action, scores, message):
    with pytest.raises(ValueError, match=message):
        action(to_framework(scores, framework))


@pytest.mark.parametrize("axis", [0, 1])
def test_all_zero_is_judged_along_the_axis(axis):
    scores = np.array([[1.0, 2.0], [0.0, 0.0]])
    scores = scores.T if axis == 0 else scores
    with pytest.raises(ValueError, match="all scores are zero"):
        importance(scores, axis=axis)
    np.testing.assert_allclose(importance(scores, axis=1 - axis).sum(axis=1 - axis), 1)


@pytest.mark.parametrize("dtype", ["complex64", "bool", "str"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_is_not_a_number_is_refused(framework, dtype):
    if framework == "torch" and dtype == "str":
        pytest.skip("PyTorch has no text tensors")
    with pytest.raises(ValueError, match="scores must be numbers, got dtype"):
        importance(to_framework([1, 0], framework, dtype))


@pytest.mark.parametrize("scores", [["a", "b"], [None, 1.0], [{}], np.array(["2024-01-01"], dtype="datetime64[D]")])
def test_lists_of_what_is_not_a_number_are_refused(scores):
    with pytest.raises(ValueError, match="scores must be numbers, got dtype"):
        importance(scores)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_float16_never_overflows_silently(framework):
    """70,000 equal weights are worth 70,000 samples, and one in 100,000 weighs 100,000: more than float16's 65,504."""
    equal = to_framework(np.ones(70_000), framework, "float16")
    alone = to_framework(np.append(np.zeros(99_999), 1.0), framework, "float16")
    for action, scores in ((effective_sample_size, equal), (Weighting(), alone)):
        try:
            result = to_numpy(action(scores))
        except ValueError:
            continue
        assert np.isfinite(result).all()


def test_the_place_of_a_bad_score_is_found_on_a_device_that_numpy_cannot_read():
    torch = pytest.importorskip("torch")

    class Elsewhere(torch.Tensor):
        """Like a tensor on a GPU: NumPy is refused until it has been copied to the CPU."""

        __module__ = "torch"

        def __array__(self, *args, **kwargs):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    with pytest.raises(ValueError, match="1 of 2 scores are NaN, the first at index 1"):
        importance(torch.tensor([1.0, float("nan")]).as_subclass(Elsewhere))


@pytest.mark.gpu
def test_on_a_gpu_it_stays_there_and_names_the_place():
    torch = pytest.importorskip("torch")
    scores = torch.tensor([1.0, 3.0], device="cuda")
    assert importance(scores).device == scores.device and importance(scores).tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match="1 of 2 scores are NaN, the first at index 1"):
        importance(torch.tensor([1.0, float("nan")], device="cuda"))


# --- the exponent ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(max_examples=40)
@given(scores=score_lists(zeros=False, max_size=12), exponent=st.sampled_from([-4.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 3.5]))
def test_exponent_is_the_direct_power(framework, scores, exponent):
    expected = power_weights(scores, exponent)
    weights = to_numpy(Weighting(exponent=exponent)(to_framework(scores, framework)))
    np.testing.assert_allclose(weights, expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(max_examples=30)
@given(scores=score_lists())
def test_exponent_one_is_importance_and_zero_is_uniform(framework, scores):
    values = to_framework(scores, framework)
    rule = Weighting(normalisation="sum")(values)
    np.testing.assert_allclose(to_numpy(rule), to_numpy(importance(values)), rtol=1e-13, atol=1e-300)
    np.testing.assert_allclose(to_numpy(Weighting(exponent=0)(values)), 1, rtol=1e-15)


def test_wide_scores_with_a_large_exponent():
    weights = Weighting(exponent=-4, normalisation="sum")(np.array([1e-30, 2e-30, 1e30]))
    np.testing.assert_allclose(weights, [16 / 17, 1 / 17, 16 / 17 * 1e-240], rtol=1e-12)


def test_a_zero_score_weighs_zero_and_an_inverse_refuses_it():
    assert Weighting(exponent=0.5)([0.0, 4.0, 1.0]).tolist() == pytest.approx([0, 2, 1])
    with pytest.raises(
        ValueError,
        match=r"exponent -1 gives a score of zero an infinite weight; set a clip, which bounds it, or drop such samples with a threshold",
    ):
        Weighting(exponent=-1)([0.0, 1.0])
    kept = Weighting(exponent=-1, threshold=1 / 3, threshold_on="quantile")([0.0, 1.0, 2.0])
    assert kept.tolist() == pytest.approx([0, 2, 1])


# --- threshold --------------------------------------------------------------------------------------------------------------------


def test_threshold_by_value_keeps_what_is_at_the_threshold():
    assert (Weighting(threshold=0.25)([1.0, 2.0, 1.0, 4.0]) > 0).tolist() == [False, True, False, True]  # shares 1/8, 1/4, 1/8, 1/2
    assert Weighting(threshold=0.25)([1.0, 2.0, 1.0, 4.0]).tolist() == pytest.approx([0, 4 / 3, 0, 8 / 3])
    assert Weighting(threshold=0.25, exponent=0)([1.0, 2.0, 1.0, 4.0]).tolist() == pytest.approx([0, 2, 0, 2])
    np.testing.assert_array_equal(Weighting(threshold=0)([1.0, 0.0]), Weighting()([1.0, 0.0]))


@settings(max_examples=80)
@given(
    scores=st.lists(st.integers(1, 5), min_size=1, max_size=20), threshold=st.fractions(0, 1, max_denominator=40).filter(lambda t: t < 1)
)
def test_threshold_by_quantile_drops_at_most_that_share_and_never_splits_a_tie(scores, threshold):
    scores = np.array(scores, dtype=float)
    weights = Weighting(exponent=0, threshold=float(threshold), threshold_on="quantile")(scores)
    kept = weights > 0
    # The longest run of least important samples, whole ties only, that is no more than the share.
    cuts = [cut for cut in {0.0, *scores} if (scores < cut).sum() <= threshold * len(scores)]
    assert kept.tolist() == (scores >= max(cuts)).tolist()
    assert kept[scores.argmax()]
    np.testing.assert_allclose(weights[kept], len(scores) / kept.sum())


@pytest.mark.parametrize(("share", "dropped"), [(0.29, 29), (0.57, 57), (0.58, 58)])
def test_a_quantile_in_decimals_drops_that_many_of_a_hundred(share, dropped):
    """0.29 * 100 is 28.999999999999996 in floating point."""
    assert (Weighting(threshold=share, threshold_on="quantile")(np.arange(1.0, 101.0)) == 0).sum() == dropped


def test_a_threshold_that_leaves_nothing_is_refused():
    message = r"threshold 0\.6 leaves none of 2: the largest importance is 0\.5\. .* use threshold_on='quantile'"
    with pytest.raises(ValueError, match=message):
        Weighting(threshold=0.6)([1.0, 1.0])


def test_a_threshold_that_leaves_nothing_of_one_row_names_the_importance_of_that_row():
    with pytest.raises(ValueError, match=r"the largest importance is 0\.5\."):
        Weighting(threshold=0.6)(np.array([[1.0, 9.0], [1.0, 1.0]]))


# --- clip ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(max_examples=60)
@given(scores=score_lists(lowest=1e-6, highest=1e6), clip=st.sampled_from([1.0, 1.25, 1.5, 2.0, 3.0, 5.5, 40.0]))
def test_clip_bounds_the_largest_weight_and_equals_a_bisection(framework, scores, clip):
    weights = to_numpy(Weighting(clip=clip)(to_framework(scores, framework)))
    assert weights.max() <= clip * weights[weights > 0].mean() * (1 + 1e-9)
    expected = bisected_cap(np.array(scores) / max(scores), clip)
    np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-9, atol=1e-12)
    assert math.isclose(weights.mean(), 1, rel_tol=1e-12)


@settings(max_examples=60)
@given(scores=score_lists(), clip=st.floats(1, 8))
def test_clip_holds_over_sixty_orders_of_magnitude(scores, clip):
    weights = Weighting(clip=clip)(scores)
    assert weights.max() <= clip * weights[weights > 0].mean() * (1 + 1e-9)
    assert ((weights > 0) == (np.array(scores) > 0)).all()


def test_clip_by_hand():
    # The cap c over 1, 1, 1 and 97 with clip 2: c = 2 (3 + c) / 4, so c = 3 and the weights are 1, 1, 1, 3 over their mean 1.5.
    np.testing.assert_allclose(Weighting(clip=2)([1.0, 1.0, 1.0, 97.0]), np.array([1, 1, 1, 3]) / 1.5, rtol=1e-14)
    # Two outliers share the cap: c = 1.5 (2 + 2 c) / 4, so c = 3.
    np.testing.assert_allclose(Weighting(clip=1.5)([1.0, 50.0, 1.0, 97.0]), np.array([1, 3, 1, 3]) / 2, rtol=1e-14)
    # Dropped samples do not count in the mean: c = 1.5 (1 + c) / 2, so c = 3.
    by_hand = Weighting(clip=1.5, threshold=0.05)([1.0, 10.0, 97.0])
    np.testing.assert_allclose(by_hand, np.array([0, 10, 30]) * 3 / 40, rtol=1e-14)


@settings(max_examples=40)
@given(scores=score_lists())
def test_clip_changes_nothing_where_nothing_exceeds_it(scores):
    plain = Weighting()(scores)
    bound = max(float(plain.max() / plain[plain > 0].mean()), 1.0) * (1 + 1e-9)
    np.testing.assert_allclose(Weighting(clip=bound)(scores), plain, rtol=1e-13)


def test_clip_one_makes_the_kept_samples_equal():
    np.testing.assert_allclose(Weighting(clip=1)([0.0, 1e-3, 5.0, 1e6]), [0, 4 / 3, 4 / 3, 4 / 3], rtol=1e-14)


def test_clip_bounds_the_infinite_weight_of_a_zero_score():
    # With p = -1 the first weighs infinitely much; the cap is c = 2 (3 + c) / 4, so c = 3 over the mean 1.5.
    inverse = Weighting(exponent=-1, clip=2)
    np.testing.assert_allclose(inverse([0.0, 1.0, 1.0, 1.0]), np.array([3, 1, 1, 1]) / 1.5, rtol=1e-14)
    # Two of four infinite weights have a mean of half their size whatever it is: nothing is left for the others.
    np.testing.assert_allclose(inverse([0.0, 1.0, 0.0, 1.0]), [2, 0, 2, 0], rtol=1e-14)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(max_examples=40)
@given(scores=score_lists(lowest=1e-3, highest=1e3, max_size=12), clip=st.sampled_from([1.25, 1.5, 2.75, 3.25]))
def test_the_weight_of_a_zero_score_is_the_limit_of_small_ones(framework, scores, clip):
    scores = np.array(scores)
    zeros = (scores == 0).sum()
    assume(zeros * clip < len(scores))  # otherwise the limit is reached slowly
    limit = Weighting(exponent=-1, clip=clip)(np.where(scores == 0, 1e-200, scores))
    found = to_numpy(Weighting(exponent=-1, clip=clip)(to_framework(scores, framework)))
    np.testing.assert_allclose(found, limit, rtol=1e-9)


def test_clip_is_solved_for_each_row():
    scores = np.array([[1.0, 1.0, 1.0, 97.0], [1.0, 50.0, 1.0, 97.0], [1.0, 1.0, 1.0, 1.0]])
    rows = [Weighting(clip=2)(row) for row in scores]
    np.testing.assert_array_equal(Weighting(clip=2)(scores), np.array(rows))


# --- anneal ---------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(scores=score_lists(zeros=False), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), progress=st.floats(0, 1))
def test_anneal_is_linear_between_uniform_and_final(scores, ends, progress):
    start, end = ends
    assume(end - start > 1e-6)
    gradual = Weighting(anneal=(start, end))
    final = Weighting()(scores)
    share = min(max((progress - start) / (end - start), 0), 1)
    np.testing.assert_allclose(gradual(scores, progress=progress), 1 + share * (final - 1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradual(scores, progress=start), 1, rtol=1e-14)
    np.testing.assert_allclose(gradual(scores, progress=end), final, rtol=1e-14)


def test_anneal_at_one_point_is_a_step():
    step = Weighting(anneal=(0.5, 0.5))
    assert [step.share(progress) for progress in (0.0, 0.499, 0.5, 1.0)] == [0, 0, 1, 1]
    assert Weighting(anneal=(0.2, 0.8)).share(0.35) == pytest.approx(0.25)
    assert Weighting().share(0.0) == 1


def test_anneal_lowers_dropped_samples_gradually():
    gradual = Weighting(threshold=0.2, anneal=(0, 1))
    assert gradual([1.0, 9.0], progress=0.25).tolist() == pytest.approx([0.75, 1.25])
    assert gradual([1.0, 9.0], progress=1.0).tolist() == pytest.approx([0, 2])
    assert Weighting(threshold=0.2, anneal=(0, 1), normalisation="sum")([1.0, 9.0], progress=0.25).tolist() == pytest.approx([0.375, 0.625])


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan"), float("inf")])
def test_progress_outside_training_is_refused(progress):
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\]"):
        Weighting()([1.0], progress=progress)


# --- all settings together ------------------------------------------------------------------------------------------------------------


weightings = st.builds(
    Weighting,
    exponent=st.sampled_from([-1.5, -1.0, 0.0, 0.5, 1.0, 2.0]),
    threshold=st.sampled_from([None, 0.0137, 0.03]),
    threshold_on=st.sampled_from(["importance", "quantile"]),
    clip=st.sampled_from([None, 1.0, 1.75, 4.0]),
    anneal=st.sampled_from([None, (0.0, 1.0), (0.25, 0.75)]),
    normalisation=st.sampled_from(["mean", "sum"]),
)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(max_examples=40)
@given(scores=score_lists(zeros=False, max_size=25), weighting=weightings, progress=st.sampled_from([0.0, 0.4, 1.0]))
def test_weights_add_up_and_are_never_negative(framework, scores, weighting, progress):
    weights = to_numpy(weighting(to_framework(scores, framework), progress=progress))
    assert weights.shape == (len(scores),) and (weights >= 0).all() and np.isfinite(weights).all()
    assert math.isclose(math.fsum(weights), len(scores) if weighting.normalisation == "mean" else 1, rel_tol=1e-12)


@settings(max_examples=60)
@given(scores=score_lists(zeros=False, max_size=25), weighting=weightings, shuffle=st.randoms(use_true_random=False))
def test_weights_follow_their_samples_in_any_order(scores, weighting, shuffle):
    order = list(range(len(scores)))
    shuffle.shuffle(order)
    scores = np.array(scores)
    np.testing.assert_allclose(weighting(scores[order]), weighting(scores)[order], rtol=1e-11, atol=1e-300)


@settings(max_examples=60)
@given(scores=score_lists(zeros=False, max_size=25, lowest=1e-10, highest=1e10), weighting=weightings, power=st.integers(-60, 60))
def test_weights_do_not_depend_on_the_scale_of_the_scores(scores, weighting, power):
    scores = np.array(scores)
    np.testing.assert_allclose(weighting(scores * 2.0**power), weighting(scores), rtol=1e-11, atol=1e-300)


@settings(max_examples=40)
@given(scores=score_lists(zeros=False, max_size=25, lowest=1e-12, highest=1e12), weighting=weightings)
def test_the_frameworks_agree_on_weights(scores, weighting):
    weights = [to_numpy(weighting(to_framework(scores, framework))) for framework in FRAMEWORKS]
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(weights[2], weights[0], rtol=1e-12, atol=1e-300)


@settings(max_examples=30)
@given(rows=st.integers(1, 4), columns=st.integers(1, 6), seed=st.integers(0, 1000), weighting=weightings)
def test_every_row_is_weighted_alone(rows, columns, seed, weighting):
    scores = np.random.default_rng(seed).lognormal(sigma=2, size=(rows, columns))
    each = np.array([weighting(row) for row in scores])
    np.testing.assert_allclose(weighting(scores), each, rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        (dict(exponent=float("nan")), "exponent must be finite, got nan"),
        (dict(exponent=float("inf")), "exponent must be finite, got inf"),
        (dict(threshold=-0.1), r"threshold must be in \[0, 1\)"),
        (dict(threshold=1.0), r"threshold must be in \[0, 1\)"),
        (dict(threshold=float("nan")), r"threshold must be in \[0, 1\)"),
        (dict(threshold=0.1, threshold_on="share"), "threshold_on must be 'importance' or 'quantile', got 'share'"),
        (dict(clip=0.5), "clip must be 1 or more times the mean weight, got 0.5"),
        (dict(clip=float("inf")), "clip must be 1 or more"),
        (dict(clip=float("nan")), "clip must be 1 or more"),
        (dict(anneal=(0.5, 0.2)), r"anneal must be \(start, end\) with 0 <= start <= end <= 1, got \(0.5, 0.2\)"),
        (dict(anneal=(-0.1, 0.2)), r"anneal must be \(start, end\)"),
        (dict(anneal=(0.1, 1.2)), r"anneal must be \(start, end\)"),
        (dict(anneal=(0.1,)), r"anneal must be \(start, end\)"),
        (dict(anneal=(float("nan"), 1)), r"anneal must be \(start, end\)"),
        (dict(normalisation="max"), "normalisation must be 'mean' or 'sum', got 'max'"),
    ],
)
def test_settings_out_of_range_are_refused(given_settings, message):
    with pytest.raises(ValueError, match=message):
        Weighting(**given_settings)


# --- effective sample size --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(max_examples=40)
@given(weights=score_lists())
def test_effective_sample_size_is_kish_and_between_one_and_n(framework, weights):
    size = float(effective_sample_size(to_framework(weights, framework)))
    fractions = [Fraction(weight) for weight in weights]
    assert math.isclose(size, float(sum(fractions) ** 2 / sum(f * f for f in fractions)), rel_tol=1e-13)
    assert 1 - 1e-12 <= size <= len(weights) * (1 + 1e-12)


def test_effective_sample_size_by_hand():
    assert effective_sample_size(np.ones(7)) == pytest.approx(7)
    assert effective_sample_size([0.0, 3.0, 0.0]) == 1
    assert effective_sample_size(np.repeat([1.0, 0.1], 500)) == pytest.approx(550**2 / 505)


# --- inside a tf.function -----------------------------------------------------------------------------------------------------------------

RUNS = [(compiled, known) for compiled in (False, True) for known in (True, False)]


def inside(weighting, *, compiled: bool, known: bool, length: int, rank: int = 1):
    """(scores, progress) -> weights, run inside a tf.function, XLA or not, the length known or not while it is traced."""
    tf = pytest.importorskip("tensorflow")
    shape = [None] * (rank - 1) + [length if known else None]
    signature = [tf.TensorSpec(shape, tf.float32), tf.TensorSpec((), tf.float64)]
    return tf.function(lambda scores, progress: weighting(scores, progress=progress), input_signature=signature, jit_compile=compiled)


@pytest.mark.parametrize(("compiled", "known"), RUNS)
@settings(max_examples=15)
@given(data=st.data(), weighting=weightings, progress=st.sampled_from([0.0, 0.3, 0.4, 0.5, 1.0]))
def test_a_tf_function_gives_the_float32_bits_of_numpy(compiled, known, data, weighting, progress):
    scores = np.array(data.draw(score_lists(zeros=weighting.exponent >= 0, max_size=12, lowest=1e-8, highest=1e8)), dtype=np.float32)
    expected = weighting(scores, progress=progress)
    assume((expected[expected > 0] > 2 * SMALLEST_FLOAT32).all())
    found = inside(weighting, compiled=compiled, known=known, length=len(scores))(scores, progress).numpy()
    assert found.dtype == np.float32 and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("compiled", "known"), RUNS)
def test_a_tf_function_weighs_every_row_alone(compiled, known):
    scores = np.random.default_rng(0).lognormal(sigma=2, size=(3, 5)).astype(np.float32)
    scores[1, 2] = np.nan  # a fault stays in its row
    weighting = Weighting(exponent=0.5, clip=1.5, anneal=(0.2, 0.8), threshold=0.25, threshold_on="quantile")
    found = inside(weighting, compiled=compiled, known=known, length=5, rank=2)(scores, 0.5).numpy()
    assert np.isnan(found).tolist() == [[False] * 5, [True] * 5, [False] * 5]
    for row in (0, 2):
        assert found[row].tobytes() == weighting(scores[row], progress=0.5).tobytes()


@pytest.mark.parametrize(("compiled", "known"), RUNS)
@pytest.mark.parametrize(
    ("weighting", "scores", "message"),
    [
        (Weighting(), [1.0, np.nan, 2.0], "NaN"),
        (Weighting(), [1.0, np.inf, 2.0], "infinite"),
        (Weighting(clip=1.5), [1.0, -1.0, 2.0], "negative"),
        (Weighting(exponent=0), [-np.inf, 1.0, 2.0], "infinite"),
        (Weighting(exponent=0), [0.0, 0.0, 0.0], "all scores are zero"),
        (Weighting(exponent=-1, clip=2), [0.0, 0.0, 0.0], "all scores are zero"),
        (Weighting(threshold=0.5, threshold_on="quantile", clip=2), [0.0, 0.0, 0.0], "all scores are zero"),
        (Weighting(exponent=-1), [0.0, 1.0, 2.0], "infinite weight"),
        (Weighting(exponent=-1, anneal=(0.5, 1)), [0.0, 1.0, 2.0], "infinite weight"),
        (Weighting(threshold=0.6), [1.0, 1.0, 1.0], "leaves none"),
        (Weighting(threshold=0.6, exponent=0, clip=2), [1.0, 1.0, 1.0], "leaves none"),
    ],
)
def test_what_raises_outside_is_nan_inside(compiled, known, weighting, scores, message):
    scores = np.array(scores, dtype=np.float32)
    for progress in (0.0, 1.0):
        with pytest.raises(ValueError, match=message):
            weighting(scores, progress=progress)
        found = inside(weighting, compiled=compiled, known=known, length=3)(scores, progress).numpy()
        assert np.isnan(found[0]) if "infinite weight" in message else np.isnan(found).all()


@pytest.mark.parametrize(("compiled", "known"), RUNS)
def test_importance_and_effective_sample_size_inside_a_tf_function(compiled, known):
    tf = pytest.importorskip("tensorflow")
    signature = [tf.TensorSpec((4 if known else None,), tf.float32)]
    both = tf.function(lambda scores: (importance(scores), effective_sample_size(scores)), input_signature=signature, jit_compile=compiled)
    for scores in ([1.0, 2.0, 5.0, 0.0], [1e-30, 3e-30, 0.5e-30, 7e-30]):
        scores = np.array(scores, dtype=np.float32)
        for found, expected in zip(both(scores), (importance(scores), effective_sample_size(scores)), strict=True):
            assert found.numpy().tobytes() == expected.tobytes()
    for scores in ([1.0, np.nan, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, 1.0]):
        assert all(np.isnan(found.numpy()).all() for found in both(np.array(scores, dtype=np.float32)))


def test_progress_of_float32_inside_a_tf_function():
    tf = pytest.importorskip("tensorflow")
    weigh = tf.function(lambda scores, progress: Weighting(anneal=(0.25, 0.75))(scores, progress=progress))
    scores = np.array([1.0, 2.0, 5.0], dtype=np.float32)
    for progress in (0.0, 0.25, 0.375, 0.5, 0.75, 1.0):
        expected = Weighting(anneal=(0.25, 0.75))(scores, progress=progress)
        assert weigh(tf.constant(scores), tf.constant(progress)).numpy().tobytes() == expected.tobytes()
    step = tf.function(lambda progress: Weighting(anneal=(0.5, 0.5))(tf.constant(scores), progress=progress))
    assert step(tf.constant(0.499)).numpy().tolist() == [1, 1, 1] and step(tf.constant(0.5)).numpy().tolist() != [1, 1, 1]


@settings(max_examples=60)
@given(data=st.data(), weighting=weightings, progress=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_the_frameworks_agree_on_weights_to_the_last_bit_of_float32(data, weighting, progress):
    zeros = weighting.exponent >= 0 or weighting.clip is not None
    scores = np.array(data.draw(score_lists(zeros=zeros, max_size=25, lowest=1e-8, highest=1e8)), dtype=np.float32)
    weights = [to_numpy(weighting(to_framework(scores, framework, "float32"), progress=progress)) for framework in FRAMEWORKS]
    assume((weights[0][weights[0] > 0] > 2 * SMALLEST_FLOAT32).all())
    assert weights[0].dtype == np.float32 and weights[0].tobytes() == weights[1].tobytes() == weights[2].tobytes()
