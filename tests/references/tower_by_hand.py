"""Encoders of any family whose tokens leave or merge inside, by hand: every patch stays on the grid to the end.

A patch that has left is frozen and hidden from the others; patches that have merged hold one state, so that each of
them counts as a key of its own. Which patches are behind a token is found by asking what its features depend on.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from references import family_reference, merging_by_hand
from references.merging_by_hand import Token
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from foveate.core import Method
from foveate.families import family_of
from foveate.forms import Merger
from foveate.trace import Call

# Of each encoder: the path to its blocks, and of a block norm, attention, norm, MLP and what scales the two.
BLOCKS: dict[str, tuple[str, ...]] = {
    "clip_vision_model": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "siglip_vision_model": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "idefics3_vision": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "smolvlm_vision": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "internvl_vision": (
        "encoder.layer", "layernorm_before", "attention", "layernorm_after", "mlp", "lambda_1", "lambda_2",
    ),
    "pixtral": ("transformer.layers", "attention_norm", "attention", "ffn_norm", "feed_forward"),
    "qwen2_vl_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "qwen2_5_vl_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "qwen3_vl_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "qwen3_vl_moe_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "paddleocr_vl_vision": ("vision_model.encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "video_llama_3_vision": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "glm4v_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "glm4v_moe_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "glm_ocr_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
}  # fmt: skip
CLS = {"clip_vision_model": 1, "internvl_vision": 1}
NAME = "tower_by_hand"


@dataclass(eq=False)
class Piece:
    """The tokens of one tile."""

    picture: int
    tokens: list[int]  # numbers among those of the picture
    patches: dict[int, list[int]]  # of each of them, numbered through the encoding, ascending
    there: list[int]  # tokens that are left, in the order in which they run
    weights: dict[int, Tensor] = field(default_factory=dict)  # share of each of its patches
    size: dict[int, list[int]] = field(default_factory=dict)  # tokens that have merged into each
    place: int = 0  # among the tiles of its picture that have tokens
    together: list[int] = field(default_factory=list)  # tokens of each of these


def tower_of(model: Any) -> Any:
    names = ("vision_tower", "visual", "vision_model", "image_tower", "vision_encoder")
    return next(getattr(model.model, name) for name in names if hasattr(model.model, name))


def parts_of(model: Any) -> tuple[Any, list[Any], tuple[str, ...]]:
    tower = tower_of(model)
    path, *names = BLOCKS[tower.config.model_type]
    blocks: Any = tower
    for name in path.split("."):
        blocks = getattr(blocks, name)
    return tower, list(blocks), tuple(names)


def tile_lengths(tower: Any, given: Any, rows: int, patches: int) -> list[int]:
    """Patches of each sequence that the encoder sees."""
    for name in ("image_grid_thw", "video_grid_thw"):
        if name in given:
            return [height * width for frames, height, width in given[name].tolist() for _ in range(frames)]
    if tower.config.model_type == "pixtral":
        return [height * width // 16 for height, width in given["image_sizes"].tolist()]
    return [patches] * rows


@torch.enable_grad()
def pieces_of(model: Any, given: Any, encode: Callable[[], Any], visual: Sequence[Tensor]) -> list[Piece]:
    """The tiles of a call, by what each row of its features depends on.

    Args:
        visual: of each picture, which of its rows are visual tokens.
    """
    tower, blocks, _ = parts_of(model)
    read = family_of(model).read_block(model)
    leaf: list[Tensor] = []
    cls = CLS.get(tower.config.model_type, 0)

    def cut(block: Any, arguments: Any, output: Any) -> Tensor:
        assert isinstance(output, Tensor)
        leaf.append(output.detach().requires_grad_())
        return leaf[0]

    hook = blocks[read].register_forward_hook(cut, prepend=True)
    # Elsewhere a projector weighs the patches of a token, and a token is their mean.
    interpolated = model.config.model_type == "llava_onevision"
    if interpolated:
        model.model.multi_modal_projector.forward = lambda features: features
    flat = torch.cat(list(encode().pooler_output))
    sums = flat.sum(dim=1)
    hook.remove()
    if interpolated:
        del model.model.multi_modal_projector.forward
    shape = leaf[0].shape
    rows, patches = (1, shape[-2]) if tower.config.model_type not in _BATCHED else (shape[0], shape[1] - cls)
    lengths = tile_lengths(tower, given, rows, patches)
    tile_of = [number for number, length in enumerate(lengths) for _ in range(length)]
    found: dict[int, Piece] = {}
    start = 0
    for picture, mine in enumerate(visual):
        for token, row in enumerate(mine.tolist()):
            (grad,) = torch.autograd.grad(sums[start + row], leaf[0], retain_graph=True)
            weight = grad[..., cls:, :].reshape(-1, shape[-1]).norm(dim=-1)
            behind = (weight > 1e-9).nonzero().squeeze(-1).tolist()
            tile = tile_of[int(weight.argmax())]
            piece = found.setdefault(tile, Piece(picture, [], {}, []))
            piece.tokens.append(token)
            piece.there.append(token)
            piece.patches[token] = [patch for patch in behind if tile_of[patch] == tile]
            own = weight[piece.patches[token]]
            piece.weights[token] = own / own.sum() if interpolated else torch.full_like(own, 1 / len(own))
            piece.size[token] = [token]
        start += int(visual[picture].max()) + 1 if mine.numel() else 0
        start += _behind(model, visual[picture], flat, start)
    pieces = [found[tile] for tile in sorted(found)]
    for piece in pieces:
        mine = [one for one in pieces if one.picture == piece.picture]
        piece.together, piece.place = [len(one.tokens) for one in mine], [one is piece for one in mine].index(True)
    return pieces


_PACKED = {"pixtral", "paddleocr_vl_vision", "video_llama_3_vision"}
_BATCHED = {kind for kind in BLOCKS if kind not in _PACKED and BLOCKS[kind][0] != "blocks"}


def _behind(model: Any, visual: Tensor, flat: Tensor, start: int) -> int:
    """Rows of a picture behind its last visual token: a newline."""
    newline = getattr(model.model, "image_newline", None)
    return int(newline is not None and start < flat.shape[0] and torch.equal(flat[start].detach(), newline.detach()))


Choice = Callable[[Piece, Tensor], list[int]]
"""A tile and the mean hidden states (K, E) of its tokens that are left -> those that stay."""


@dataclass(eq=False)
class Run:
    """One encoding by hand.

    Attributes:
        pieces: its tiles that have tokens.
        drops: (blocks that run before, which tokens stay) for each stage.
        merges: of each tile, how many tokens merge in each block; nothing merges where empty.
    """

    model: Any
    pieces: list[Piece]
    lengths: list[int]
    drops: Sequence[tuple[int, Choice]] = ()
    merges: Callable[[Piece, int], int] | None = None

    def __post_init__(self) -> None:
        self.tower, self.blocks, self.names = parts_of(self.model)
        self.cls = CLS.get(self.tower.config.model_type, 0)
        self.batched = self.tower.config.model_type in _BATCHED
        total = sum(self.lengths)
        self.rep = torch.arange(total)  # the patch that each stands with
        self.alive = torch.ones(total, dtype=torch.bool)
        self.frozen: Tensor | None = None
        self.tile = torch.tensor([number for number, length in enumerate(self.lengths) for _ in range(length)])
        self.allowed: Tensor | None = None
        self.keys: Tensor | None = None  # (P, d) of the block at work, mean over heads
        self.bound = {patch for piece in self.pieces for behind in piece.patches.values() for patch in behind}

    # flat patches (P, E) of the encoder's hidden states, and back
    def flat(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.cls :].flatten(0, 1) if self.batched else hidden.reshape(-1, hidden.shape[-1])

    def back(self, hidden: Tensor, patches: Tensor) -> Tensor:
        if not self.batched:
            return patches.reshape(hidden.shape)
        return torch.cat([hidden[:, : self.cls], patches.unflatten(0, (hidden.shape[0], -1))], dim=1)

    def forward(self, number: int, block: Any, *arguments: Any, **options: Any) -> Tensor:
        hidden = arguments[0]
        patches = self.flat(hidden).clone()
        self.frozen = patches if self.frozen is None else torch.where(self.alive[:, None], patches, self.frozen)
        for depth, choice in self.drops:
            if depth == number:
                self.drop(choice, patches)
        hidden = self.back(hidden, patches)
        first, attention, second, mlp, *scales = (getattr(block, name) for name in self.names)
        self.look(number, options, hidden)
        options = self.moved(options, patches.shape[0])
        mixed = attention(first(hidden), **options)
        mixed = mixed[0] if isinstance(mixed, tuple) else mixed
        hidden = hidden + (scales[0] * mixed if scales else mixed)
        if self.merges is not None:
            hidden = self.back(hidden, self.merge(number, self.flat(hidden)))
        added = mlp(second(hidden))
        hidden = hidden + (scales[1] * added if scales else added)
        patches = self.flat(hidden)
        return self.back(hidden, torch.where(self.alive[:, None], patches, self.frozen))

    def drop(self, choice: Choice, patches: Tensor) -> None:
        for piece in self.pieces:
            means = torch.stack([piece.weights[token] @ patches[piece.patches[token]] for token in piece.there])
            stay = choice(piece, means)
            piece.there = [token for token in piece.there if token in stay]
        needed = {patch for piece in self.pieces for token in piece.there for patch in piece.patches[token]}
        for patch in self.bound - needed:
            self.alive[patch] = False

    def look(self, number: int, options: dict[str, Any], hidden: Tensor) -> None:
        """Which patch may look at which: those of its tile or window that are there."""
        segment = self.tile
        if "cu_seqlens" in options:
            bounds = options["cu_seqlens"]
            segment = torch.bucketize(torch.arange(self.rep.numel()), bounds[1:], right=True)
        segment = segment[self.rep]
        allowed = (segment[:, None] == segment[None, :]) & self.alive[None, :]
        if self.batched:
            rows, length = hidden.shape[0], hidden.shape[1] - self.cls
            whole = torch.ones(rows, length + self.cls, length + self.cls, dtype=torch.bool)
            for row in range(rows):
                mine = slice(row * length, (row + 1) * length)
                whole[row, self.cls :, self.cls :] = allowed[mine, mine]
                whole[row, : self.cls, self.cls :] = self.alive[mine]
            allowed = whole
        self.allowed = allowed

    def moved(self, options: dict[str, Any], patches: int) -> dict[str, Any]:
        """The block's arguments: one run of all patches, each at the position of the one that it stands with."""
        made = {name: value for name, value in options.items() if name not in {"attention_mask", "hidden_states"}}
        if "cu_seqlens" in made:
            made["cu_seqlens"] = torch.tensor([0, patches], dtype=torch.int32)
        if made.get("position_embeddings") is not None:
            made["position_embeddings"] = tuple(one[self.rep] for one in made["position_embeddings"])
        return made

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        mean = keys.mean(dim=1)
        self.keys = mean[:, self.cls :].flatten(0, 1) if self.batched else mean[0]
        assert self.allowed is not None
        allowed = self.allowed[:, None] if self.batched else self.allowed[None, None]
        logits = (queries @ keys.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
        # A tile of which nothing is left looks at itself; nobody asks what comes of it.
        return (logits.softmax(dim=-1).nan_to_num() @ values).transpose(1, 2).contiguous()

    def merge(self, number: int, patches: Tensor) -> Tensor:
        """ToMe between attention and MLP."""
        assert self.merges is not None and self.keys is not None
        patches = patches.clone()
        for piece in self.pieces:
            r = self.merges(piece, number)
            if not r:
                continue
            tokens = [Token(patches[piece.patches[token]].flatten(), token, piece.size[token]) for token in piece.there]
            metric = torch.stack([self.keys[piece.patches[token]].mean(dim=0) for token in piece.there])
            cls = self.cls
            if cls:
                tokens, metric = [Token(patches[0], None), *tokens], torch.cat([metric[:1], metric])
            left = merging_by_hand.step(tokens, metric, r, cls)
            piece.there = [token.index for token in left if token.index is not None]
            for token in left:
                assert token.index is not None
                piece.size[token.index] = token.members
                rows = token.row.unflatten(0, (len(piece.patches[token.index]), -1))
                for member in token.members:
                    patches[piece.patches[member]] = rows
                    self.rep[piece.patches[member]] = torch.tensor(piece.patches[token.index])
        return patches


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    scale = options.get("scaling")
    run: Run = module._by_hand
    return run.attend(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def installed(run: Run) -> Iterator[None]:
    """The encoder runs by hand."""
    attention = run.names[1]
    for number, block in enumerate(run.blocks):
        module = getattr(block, attention)
        module._by_hand, module._stock = run, module.config
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = NAME
        block.forward = lambda *arguments, number=number, block=block, **options: run.forward(
            number, block, *arguments, **options
        )
    try:
        yield
    finally:
        for block in run.blocks:
            module = getattr(block, attention)
            module.config = module._stock
            del block.forward, module._by_hand, module._stock


@dataclass(eq=False)
class ByHand:
    """What a call's pictures became."""

    pieces: list[Piece]
    rows: list[Tensor]  # (M, D) of each picture, with what is not visual; of tokens that left, nobody asks
    deep: list[tuple[Tensor, ...]]  # (M, D) each
    lengths: list[int]  # patches of each tile
    left: list[int]  # ... of which nobody has taken, those of no token among them; 0 for a tile without tokens

    def kept(self, picture: int) -> list[int]:
        """Tokens of a picture that are left."""
        return sorted(token for piece in self.pieces if piece.picture == picture for token in piece.there)


@torch.no_grad()
def encoded(
    model: Any,
    given: Any,
    visual: Sequence[Tensor],
    counts: Sequence[int],
    drops: Callable[[list[Piece]], Sequence[tuple[int, Choice]]] = lambda pieces: (),
    merges: Callable[[Piece, int], int] | None = None,
) -> ByHand:
    """Encode the pictures of a call by hand.

    Args:
        visual: of each picture, which of its rows are visual tokens.
        counts: rows of each.
        drops: of the tiles that have tokens, the stages at which these leave.
        merges: of a tile and a block, how many tokens merge.
    """
    encode = encoder(model, given)
    pieces = pieces_of(model, given, encode, visual)
    tower, blocks, _ = parts_of(model)
    shapes: list[tuple[int, ...]] = []
    hook = blocks[0].register_forward_pre_hook(lambda block, arguments: shapes.append(tuple(arguments[0].shape)))
    encode()
    hook.remove()
    lengths = tile_lengths(tower, given, shapes[0][0], shapes[0][-2] - CLS.get(tower.config.model_type, 0))
    run = Run(model, pieces, lengths, drops(pieces), merges)
    with installed(run):
        output = encode()
    rows = torch.cat(list(output.pooler_output)).split(list(counts))
    deep = [torch.cat(list(one)).split(list(counts)) for one in getattr(output, "deepstack_features", None) or ()]
    of_pictures = [tuple(block[number] for block in deep) for number in range(len(rows))]
    shown = {run.tile[next(iter(piece.patches.values()))[0]].item() for piece in pieces}
    left = [int(run.alive[run.tile == tile].sum()) * (tile in shown) for tile in range(len(lengths))]
    return ByHand(pieces, list(rows), of_pictures, lengths, left)


def replayed(model: Any, given: Any, method: Method, call: Call) -> Callable[..., list[family_reference.Seen]]:
    """`family_reference.pictures` with the encoder run by hand: tokens leave as the trace says, and merge as they do.

    Args:
        given: the whole call.
    """
    pictures = [picture for row in given.pictures for picture in row]
    images = {id(picture): image for picture, image in zip(pictures, call.images, strict=True)}
    stock, blocks = family_reference.pictures, family_of(model).read_block(model) + 1
    ahead = ("pixels", "tower")
    part = next(part for part in method.parts() if part.site in ahead)

    def encode(model: Any, given: Any) -> list[family_reference.Seen]:
        seen = stock(model, given)
        mine = [images[id(picture)] for row in given.pictures for picture in row]
        if not mine:
            return seen

        def drops(pieces: list[Piece]) -> list[tuple[int, Choice]]:
            depths = [] if isinstance(part, Merger) else part.depths(len(parts_of(model)[1]))
            depths = (0,) if part.site == "pixels" else depths
            kept = [[set(stage.kept.tolist()) for stage in image.stages if stage.site in ahead] for image in mine]
            return [
                (depth, lambda piece, _, stage=stage: [one for one in piece.there if one in kept[piece.picture][stage]])
                for stage, depth in enumerate(depths)
            ]

        def merges(piece: Piece, block: int) -> int:
            count = part.count(mine[piece.picture].original)
            assert isinstance(part, Merger) and count is not None
            sizes = piece.together
            share = divided(count[0], sizes)[piece.place] if len(sizes) > 1 else count[0]
            ready = dataclasses.replace(part, keep=share)
            return ready.schedule(len(piece.tokens), blocks)[block] if block < blocks else 0

        visual, counts = [one.visual for one in seen], [one.features.shape[0] for one in seen]
        hand = encoded(model, given, visual, counts, drops, merges if isinstance(part, Merger) else None)
        for number, image in enumerate(mine):
            assert hand.kept(number) == image.kept.tolist()
        both = zip(hand.rows, seen, hand.deep, strict=True)
        return [family_reference.Seen(rows, one.visual, deep) for rows, one, deep in both]

    return encode


def encoder(model: Any, given: Any) -> Callable[[], Any]:
    """Encodes the pictures of a call as the model does it."""
    base = model.model
    encode = base.get_video_features if "pixel_values_videos" in given else base.get_image_features
    names = [name for name in inspect.signature(encode).parameters if name in given]
    return lambda: encode(**{name: given[name] for name in names}, return_dict=True)


def divided(total: int, sizes: Sequence[int]) -> list[int]:
    """A picture's budget over its tiles: one each, then one by one to where there are most tokens for those given."""
    shares = [1] * len(sizes)
    while sum(shares) < total:
        open_ = [tile for tile, size in enumerate(sizes) if shares[tile] < size]
        most = max(open_, key=lambda tile: (sizes[tile] / shares[tile], -tile))
        shares[most] += 1
    return shares
