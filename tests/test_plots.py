"""Laws of plots: what is drawn is the data, whatever its shape."""

import base64
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.figure import Figure

from jax_distill.evaluation import plots


def axes_of(draw):
    axes = Figure(layout="constrained").add_subplot()
    draw(axes, plots.LIGHT)
    axes.figure.canvas.draw()
    return axes


def test_running_mean_is_the_mean_of_the_neighbours():
    values = np.random.default_rng(0).normal(size=50)
    for window in (1, 3, 7, 99):
        half = window // 2
        naive = [values[max(i - half, 0) : i + half + 1].mean() for i in range(50)]
        np.testing.assert_allclose(plots.running_mean(values, window), naive, atol=1e-12)


def test_score_lines_hold_the_scores():
    student, few = {1: 0.5, 2: 0.7, 4: 0.75}, {1: 0.1, 4: 0.4}
    axes = axes_of(plots.score_by_steps(student, few, 0.8, "teacher, 50 steps"))
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_array_equal(lines["student"], list(student.items()))
    np.testing.assert_array_equal(lines["teacher at few steps"], list(few.items()))
    assert set(lines["teacher, 50 steps"][:, 1]) == {0.8}
    assert axes.get_xscale() == "log" and list(axes.get_xticks()) == [1, 2, 4]
    low, high = axes.get_ylim()
    assert low < 0 and high > 0.8


def test_bars_are_as_long_as_the_scores():
    tasks = ["a", "b"]
    student = {1: {"a": 0.1, "b": 0.2}, 2: {"a": 0.3}}
    axes = axes_of(plots.bars_by_task(tasks, {"a": 0.5, "b": 0.6}, "teacher", student))
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert widths["teacher"] == [0.5, 0.6] and widths["student, 1"] == [0.1, 0.2]
    assert widths["student, 2"][0] == 0.3 and np.isnan(widths["student, 2"][1])
    bars = sorted((bar.get_y(), bar.get_height()) for group in axes.containers for bar in group)
    assert all(y + height <= following for (y, height), (following, _) in zip(bars, bars[1:]))


@pytest.mark.parametrize("count", [1, 2, 40, 5000])
@pytest.mark.parametrize("log", [False, True])
def test_curves_of_any_length_are_drawn_within_the_range_of_their_values(count, log):
    values = np.random.default_rng(0).lognormal(size=count)
    steps = np.arange(1, count + 1) * 10.0
    axes = axes_of(plots.curve(steps, values, log=log, from_zero=False))
    assert axes.get_yscale() == ("log" if log else "linear")
    assert len(axes.lines) == (2 if count >= plots.MIN_SMOOTHED else 1)
    for line in axes.lines:
        assert len(line.get_xdata()) <= plots.MAX_POINTS
        assert values.min() <= line.get_ydata().min() <= line.get_ydata().max() <= values.max()


def test_a_schedule_is_drawn_as_it_is():
    values = np.concatenate([np.linspace(0, 1, 20), np.ones(50), np.linspace(1, 0, 30)])
    axes = axes_of(plots.curve(np.arange(100.0), values, log=False, from_zero=True))
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), values)
    assert len(axes.lines) == 1 and axes.get_ylim()[0] == 0


def test_an_inline_plot_is_valid_graphics_the_same_each_time_and_its_text_escaped():
    draw = plots.curve(np.arange(4.0), np.arange(4.0), log=False, from_zero=False)
    markup = plots.inline(draw, (2, 1), 'a "quoted" <b>')
    assert markup == plots.inline(draw, (2, 1), 'a "quoted" <b>')
    assert 'alt="a &#34;quoted&#34; &lt;b&gt;"' in markup
    uris = re.findall('(?:src|srcset)="data:image/svg[+]xml;base64,([^"]+)"', markup)
    light, dark = (base64.b64decode(uri) for uri in uris)
    assert light != dark
    for graphics in (light, dark):
        assert ET.fromstring(graphics).tag.endswith("svg")
