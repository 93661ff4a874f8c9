import pickle
import subprocess
import sys

import numpy as np
import pytest

import headway as hw

pytest.importorskip("matplotlib", reason="the plot extra is not installed")
from headway.plot import attention_map


def test_one_panel_for_each_head_shows_its_weights():
    q, k = np.random.default_rng(0).normal(size=(2, 3, 4, 8))
    weights = hw.attention_weights(q, k, causal=True)
    figure = attention_map(weights, ["a", "b", "c", "d"], columns=2)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) == 3
    for head, axis in enumerate(shown):
        np.testing.assert_allclose(np.asarray(axis.images[0].get_array()) ** 2, weights[head], atol=1e-12)
        assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c", "d"]


def test_it_saves_a_picture(tmp_path):
    path = tmp_path / "map.png"
    attention_map(np.full((2, 4), 0.25)).savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_fresh_notebook_shows_it():
    """IPython asks for the method; where pyplot is loaded, its own way of showing figures comes first."""
    figure = pickle.loads(pickle.dumps(attention_map(np.full((2, 4), 0.25))))
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert hw.explain([1.0, 2.0], top_k=1).plot()._repr_png_().startswith(b"\x89PNG")
    code = """
import sys, numpy as np
from headway.plot import attention_map
from IPython.core.formatters import DisplayFormatter
data, _ = DisplayFormatter().format(attention_map(np.full((2, 4), 0.25)))
assert data["image/png"].startswith(b"\\x89PNG"), data
assert "matplotlib.pyplot" not in sys.modules
"""
    pytest.importorskip("IPython", reason="IPython is not installed")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_queries_are_the_last_of_the_tokens():
    figure = attention_map(np.full((1, 3), 1 / 3), ["a", "b", "c"])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["c"]


@pytest.mark.parametrize(
    ("weights", "tokens", "words"),
    [
        (np.zeros(3), None, "weights: expected shape"),
        (np.zeros((1, 0, 3)), None, "weights: expected shape"),
        (np.zeros((2, 3)), ["a"], "tokens: expected 3 words"),
    ],
)
def test_what_does_not_fit_is_said(weights, tokens, words):
    with pytest.raises(ValueError, match=words):
        attention_map(weights, tokens)
