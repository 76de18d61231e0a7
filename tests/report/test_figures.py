"""Figures of an analysis: what is drawn, in every size, and files that are whole or not there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.core import FoveateError
from foveate.evaluate.analysis import Analysis, Input, Similarity
from foveate.methods.image_text_interaction import ImageTextInteraction
from foveate.report import figures


def analysis(inputs: int = 2, blocks: int = 3, *, cls: bool = True) -> Analysis:
    """Inputs whose second and later blocks are ever steeper."""
    made = []
    for number in range(inputs):
        curves = tuple(tuple((percent / 100) ** (1 / (1 + block)) for percent in range(101)) for block in range(blocks))
        holding = tuple(0.8 / (1 + block) + 0.01 * number for block in range(blocks))
        tokens = {"before": 3, "visual": 90, "after": 6 + number, "special": 1}
        found = Similarity((0.5, 0.3, 0.1, 0.1), 3, 2) if cls else None
        made.append(Input(f"picture $1 of $2 {number}.png", "what\nis this ?", curves, holding, tokens, found))
    return Analysis("clip_vision_model", blocks - 2, ImageTextInteraction(alpha=0.7), tuple(made))


def words(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_attention_has_a_curve_and_a_bar_for_each_block() -> None:
    curves, bars = figures.attention_figure(analysis()).axes
    drawn = {line.get_label(): line.get_ydata() for line in curves.lines if line.get_label().startswith("block")}
    assert list(drawn) == ["block 0", "block 1 (read)", "block 2"]
    assert list(drawn["block 1 (read)"])[25] == pytest.approx(50)
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([80.5, 40.5, 0.8 / 3 * 100 + 0.5])
    assert {"80 %", "40 %", "27 %", "25 %"} <= {word.replace("81", "80").replace("41", "40") for word in words(bars)}
    assert [label.get_text() for label in bars.get_xticklabels()] == ["0", "1\nread", "2"]


def test_many_blocks_share_their_labels() -> None:
    curves, bars = figures.attention_figure(analysis(blocks=25)).axes
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["block 0", "block 23 (read)", "block 24"]
    ticks = [label.get_text() for label in bars.get_xticklabels()]
    assert "23\nread" in ticks and "24" not in ticks
    assert len(ticks) <= 13


def test_each_prompt_is_a_bar_of_its_parts_and_the_last_is_the_mean() -> None:
    (axes,) = figures.tokens_figure(analysis()).axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths[:4] == pytest.approx([3, 90, 6, 1])
    assert sum(widths[8:]) == pytest.approx(100)
    assert words(axes) == ["90 of 100 tokens", "90 of 101 tokens", "90 of 100.5 tokens"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["picture $1 of $2 0.png\nwhat is this ?", "picture $1 of $2 1.png\nwhat is this ?", "mean of 2"]
    (alone,) = figures.tokens_figure(analysis(1)).axes
    assert len(alone.patches) == 4


def test_each_similarity_has_its_split() -> None:
    figure = figures.similarity_figure(analysis())
    for axes in figure.axes:
        assert words(axes) == ["i* = 3\nkept: 2"]
        curve, cut = axes.lines[:2]
        assert list(curve.get_ydata()) == pytest.approx([50, 30, 10, 10])
        assert list(cut.get_xdata()) == [3, 3]
    assert "split i* (red): 3 of 4 patches, mean over 2 pictures" in figure.texts[-1].get_text()


def test_no_more_than_twelve_pictures_have_a_panel() -> None:
    figure = figures.similarity_figure(analysis(14))
    assert len(figure.axes) == 12
    assert figure.texts[-1].get_text().endswith("mean over 14 pictures; the first 12 are shown")
    assert len(figures.tokens_figure(analysis(14)).axes[0].get_yticklabels()) == 13


def test_without_cls_there_is_no_similarity_to_draw() -> None:
    with pytest.raises(FoveateError, match="the encoder clip_vision_model has no CLS token"):
        figures.similarity_figure(analysis(cls=False))


def test_a_figure_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figures.tokens_figure(analysis(1))
    figures.save_figure(figure, tmp_path / "tokens.png")
    with Image.open(tmp_path / "tokens.png") as picture:
        assert picture.width > 1000
    before = (tmp_path / "tokens.png").read_bytes()

    def fail(path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(FoveateError, match=r"tokens\.png cannot be written: no space left"):
        figures.save_figure(figure, tmp_path / "tokens.png")
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.png"]
    assert (tmp_path / "tokens.png").read_bytes() == before


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (figures.check_drawing, lambda: figures.attention_figure(analysis())):
        with pytest.raises(FoveateError, match=r"pip install 'foveate\[draw\]'"):
            draw()
