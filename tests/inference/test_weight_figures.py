"""Figures of weights: contents read back from the figure, and the numbers behind them computed by hand."""

import numpy as np
import pytest

from mlpmixer_flax import UserError
from mlpmixer_flax.inference import weight_figures


def waves(frequencies, shape, *, phase=0.3):
    """Returns maps (n, *shape); `frequencies` are (cycles down, cycles across) of each."""
    down, across = np.meshgrid(*(np.arange(size) / size for size in shape), indexing="ij")
    return np.stack([np.cos(2 * np.pi * (a * down + b * across) + phase) for a, b in frequencies])


def drawn(figure):
    """Returns the array of the first image in a figure; the gaps of a sheet are NaN."""
    return np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)


def test_frequency_of_a_wave_does_not_depend_on_its_amplitude_and_phase():
    frequencies, shape = [(0, 0), (1, 0), (0, 1), (2, 3), (4, 6)], (8, 12)
    expected = [np.hypot(a / 8, b / 12) for a, b in frequencies]
    for scale, phase in [(1, 0.3), (1e-20, 0.3), (100, 1.2)]:
        found = weight_figures.spatial_frequency(scale * waves(frequencies, shape, phase=phase))
        np.testing.assert_allclose(found, expected, atol=1e-9)
    assert weight_figures.spatial_frequency(np.zeros((1, 4, 4))) == [0]


def test_frequency_of_a_sum_is_weighted_by_power_over_all_channels():
    low, high = waves([(1, 0), (3, 0)], (8, 8))
    for mixed in (low + 2 * high, np.stack([low, 2 * high], axis=-1)):
        assert weight_figures.spatial_frequency(mixed[None]) == pytest.approx((1 / 8 + 4 * 3 / 8) / 5)


def test_opposites_are_found_at_any_scale_and_each_unit_is_in_one_pair():
    rng = np.random.default_rng(0)
    half = rng.normal(size=(20, 49))
    negatives = -half * rng.uniform(0.1, 10, size=(20, 1)) + 0.05 * rng.normal(size=(20, 49))
    order = rng.permutation(40)
    pairs = order[weight_figures.opposites(np.concatenate([half, negatives])[order])]
    assert sorted(map(sorted, pairs.tolist())) == [[i, i + 20] for i in range(20)]


def test_the_most_opposed_pair_is_taken_first_and_an_odd_unit_is_left():
    degrees = np.radians([0, 175, 180, 90, 80])
    pairs = weight_figures.opposites(np.stack([np.cos(degrees), np.sin(degrees)], axis=1))
    assert pairs.tolist() == [[0, 2], [1, 4]]  # 180 and 95 degrees apart; the unit at 90 is left


def test_token_mixing_draws_pairs_of_opposites_from_low_to_high_frequency():
    frequencies = [(2, 1), (0, 0), (3, 2), (0, 1)]
    maps = waves(frequencies, (6, 4))
    kernel = np.concatenate([maps, -maps / 2]).reshape(8, 24).T  # layout (tokens, units)
    figure = weight_figures.token_mixing(kernel.astype(np.float32), grid=(6, 4), title="block 0")
    sheet = drawn(figure)
    assert sheet.shape == (60, 4 * (40 + 4 + 40) + 3 * 10)
    for i, which in enumerate([1, 3, 0, 2]):
        first, second = sheet[::10, 94 * i :][:, :40:10], sheet[::10, 94 * i + 44 :][:, :40:10]
        whole = maps[which] / abs(maps[which]).max()
        assert np.isnan(sheet[:, 94 * i + 40 : 94 * i + 44]).all()
        np.testing.assert_allclose(first, whole, atol=1e-6)
        np.testing.assert_allclose(second, -whole / 2, atol=1e-6)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "0.00"
    assert figure.axes[0].get_ylabel() == "cycles per patch"
    caption = figure.axes[0].get_xlabel()
    assert "4 of 4 pairs" in caption and "cycles" not in caption
    assert figure.axes[0].images[0].get_clim() == (-1, 1)


def test_of_many_pairs_some_are_drawn_evenly_and_a_single_unit_is_refused():
    kernel = np.random.default_rng(0).normal(size=(16, 512))
    figure = weight_figures.token_mixing(kernel, grid=(4, 4), title="")
    assert "96 of 256 pairs" in figure.axes[0].get_xlabel()
    labels = [float(label.get_text()) for label in figure.axes[0].get_yticklabels()]
    frequency = weight_figures.spatial_frequency(kernel.T.reshape(-1, 4, 4))
    assert len(labels) == 12 and labels == sorted(labels)
    assert labels[0] < np.quantile(frequency, 0.05) and labels[-1] > np.quantile(frequency, 0.8)
    with pytest.raises(UserError, match="tokens_mlp_dim=1"):
        weight_figures.token_mixing(kernel[:, :1], grid=(4, 4), title="")


def test_stem_draws_each_kernel_in_its_own_range_around_gray_by_frequency():
    kernel = np.zeros((2, 2, 3, 4), np.float32)
    kernel[0, 0, :, 0] = kernel[1, 1, :, 0] = 7  # a chessboard of white and gray
    kernel[0, :, 0, 1] = 1e-3  # a red row
    kernel[:, :, 2, 2] = -20  # no blue anywhere; the last kernel is 0
    sheet = drawn(weight_figures.stem(kernel, title="stem"))
    assert sheet.shape == (130, 130, 3)  # each has 60 px, with gaps of 10 px
    corners = [sheet[y : y + 60 : 30, x : x + 60 : 30].tolist() for y in (0, 70) for x in (0, 70)]
    gray, white, red, yellowish = [0.5] * 3, [1.0] * 3, [1.0, 0.5, 0.5], [0.5, 0.5, 0.0]
    rows = [[red, red], [gray, gray]]
    board = [[white, gray], [gray, white]]
    assert corners == [[[yellowish] * 2] * 2, [[gray] * 2] * 2, rows, board]


def random_kernels(tokens, units):
    return np.random.default_rng(0).normal(size=(tokens, units))


def smooth(kernels):
    """Returns kernels (h, w, ...) as they may be after long training: each value is the mean of its neighbors."""
    return sum(np.roll(kernels, (down, across), (0, 1)) for down in (0, 1) for across in (0, 1)) / 4


@pytest.mark.parametrize("learned", [False, True])
def test_a_caption_says_that_noise_is_normal_if_the_weights_look_like_it(learned):
    noise = random_kernels(64, 48).reshape(8, 8, 48)
    units = smooth(noise) if learned else noise
    mixing = weight_figures.token_mixing(units.reshape(64, 48), grid=(8, 8), title="block")
    kernels = weight_figures.stem(units.reshape(8, 8, 3, 16), title="stem")
    for figure in (mixing, kernels):
        caption = figure.axes[0].get_xlabel().split("\n")
        says = caption[-1].startswith("This looks like noise") and "normal in a small model" in caption[-1]
        assert says != learned and len(caption) == 3 - learned
        figure.draw_without_rendering()
        box = figure.axes[0].xaxis.label.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width


def test_kernels_of_one_pixel_are_not_called_noise():
    figure = weight_figures.stem(random_kernels(1, 48).reshape(1, 1, 3, 16), title="stem")
    assert "noise" not in figure.axes[0].get_xlabel()


@pytest.mark.parametrize(("units", "columns"), [(4, 2), (6, 3), (32, 8), (37, 13), (300, 16)])
def test_the_last_row_of_a_stem_has_few_empty_places_and_the_figure_no_blank_strip(units, columns):
    figure = weight_figures.stem(random_kernels(48, units).reshape(4, 4, 3, units), title="stem")
    axes = figure.axes[0]
    rows, shown = len(axes.get_yticks()), min(units, 256)
    assert drawn(figure).shape[1] == columns * 70 - 10 and 0 <= columns * rows - shown <= 2
    assert axes.get_ylabel() == "cycles per pixel"
    figure.draw_without_rendering()
    picture = axes.get_window_extent()
    assert picture.width / picture.height == pytest.approx((columns * 70 - 10) / (rows * 70 - 10), rel=0.01)
    assert figure.bbox.height - picture.height < 1.5 * figure.dpi  # a title and a caption of three lines


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_stem_for_any_number_of_channels_is_drawn_in_rgb(channels):
    kernel = np.random.default_rng(0).normal(size=(3, 5, channels, 300))
    figure = weight_figures.stem(kernel, title="stem")
    sheet = drawn(figure)
    assert sheet.shape[-1] == 3 and 0 <= sheet.min() < sheet.max() <= 1
    assert "256 of 300 kernels" in figure.axes[0].get_xlabel()
    assert (sheet[..., 0] == sheet[..., 1]).all() == (channels == 1)
