"""TRIM: prune by how much each patch resembles the question in CLIP's joint space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from foveate.core import Keep, Selection, Signals, Site, check_choices, check_keep
from foveate.forms import Stepwise
from foveate.methods._merged import Space, everything, in_raster_order, of_all_rows, with_rest
from foveate.methods._words import WordSpace, check_word_space, question_signals, tokens_and_question
from foveate.ops.device import Steps
from foveate.ops.pooling import others, take
from foveate.ops.scores import cosines
from foveate.ops.subsets import descending, outlier_counts, outliers


@dataclass(frozen=True)
class TRIM(Stepwise):
    """TRIM: keeps the patches whose resemblance to the question stands out in CLIP's joint space, and one mean.

    The score is a softmax over the patches of their cosine to the question (mean over the pieces of a long one).
    Without `keep`, the patches above Q3 + 1.5 * (Q3 - Q1) of their image stay. All others become one more token, their
    mean, which stands at the largest index that is free; the tokens are encoder tokens in raster order.

    The authors' code (`official`) takes dot products in place of cosines, NEGATES them, so that what resembles the
    question least stays, and takes the quartiles over the whole batch.

    Args:
        keep: tokens per image, or a share of them, rounded half to even: `keep` - 1 patches and the mean of the
            others; all hands everything on as it is. None for the image's own count, the outliers and the mean.
        space: where patches meet the question: "clip" in CLIP's joint space as in the paper; "decoder" compares the
            projected tokens with the mean embedding of the text after the image and takes the mean of the others among
            them, for encoders that are no CLIP and projectors that join patches.
        relevance: "negated" keeps what resembles the question least.
        official: the code's score, whatever `relevance` says, and, without `keep`, its count.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2409.10994"
    site: ClassVar[Site] = "input"
    encoded: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    keep: Keep | None = None
    space: WordSpace = "clip"
    relevance: Literal["direct", "negated"] = "direct"
    official: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if self.keep is not None:
            check_keep(self.keep)
        check_word_space(self.space, self.official)
        # The class speaks for the defaults.
        object.__setattr__(self, "adaptive", self.keep is None)
        object.__setattr__(self, "encoded", self.space == "clip")

    @property
    def needs(self) -> tuple[str, ...]:
        return (*(("tower.read.hidden",) if self.space == "clip" else ()), *question_signals(self.space))

    def steps(self, signals: Signals) -> Steps[Selection]:
        handed: Tensor | None = signals.tower["read"].hidden if self.space == "clip" else signals.features
        left = signals.shape[1]
        assert handed is not None
        total = None if self.keep is None else self.wanted(signals)
        if total == left:
            return everything(signals)
        index, tokens, scores = in_raster_order(signals, handed, self.scores(signals))
        space: Space = "encoded" if self.space == "clip" else "projected"
        order = descending(scores)
        if total is not None:
            return _handed_on(index, tokens, order, total - 1, space)
        (found,) = yield [outliers(scores, together=self.official)]
        counts = outlier_counts(found, (len(scores), left))
        rows = zip(index.split(1), tokens.split(1), order.split(1), counts, strict=True)
        return of_all_rows([_handed_on(*row, space) for row in rows])

    def scores(self, signals: Signals) -> Tensor:
        """(B, N), sums to 1: the higher, the sooner a patch stays."""
        image, text = tokens_and_question(signals, self.space, "TRIM")
        likeness = image.float() @ text.float().transpose(1, 2) if self.official else cosines(image, text)
        likeness = likeness.mean(dim=-1)
        return (-likeness if self.official or self.relevance == "negated" else likeness).softmax(dim=-1)


def _handed_on(index: Tensor, tokens: Tensor, order: Tensor, patches: int, space: Space) -> Selection:
    """The first `patches` of the (b, N) places in `order`, and the mean of the others."""
    kept = order[:, :patches]
    dropped = others(kept, index.shape[1])
    rest = take(tokens, dropped).float().mean(dim=1, keepdim=True).to(tokens.dtype)
    return with_rest(index, kept, dropped, take(tokens, kept), rest, space)
