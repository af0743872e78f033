"""The mask predictor: any transformers decoder, run bidirectionally over text and image tokens of one vocabulary.

    ids -> embeddings (+ bits of image codes, + row and column of image places)
        -> trunk (a Llama, Qwen, ... with `is_causal = False`)
        -> logits of the token at the same place, for the asked places and columns only

Two things help small models and large codebooks. *Bit-structured codes*: an image token's input is its table row plus a
linear map of its sign bits, and its output row likewise, so codes that differ in one bit share what is learned (the
structure that MAGVIT-v2's lookup-free codes have, arXiv 2310.05737). *Folding*: k x k neighbouring image tokens enter
the trunk as one position and are told apart again before the head (the feature compression of Meissonic, arXiv
2410.08261); a picture of 256 tokens then costs 64 positions. Ids, masks and logits stay one per token outside.

Shape letters: B rows, L places, W asked places, V ids, D width, M places after folding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from mmdlm.models.lfq import codes_to_bits
from mmdlm.models.slot_cache import SlotCache
from mmdlm.vocabulary import Vocabulary


class MaskPredictorConfig(PreTrainedConfig):
    """Configuration of MaskPredictor.

    Args:
        trunk: configuration of the decoder, as its `to_dict()` or as a transformers config; its vocabulary size and
            causality are set here. Default: a Llama of about 20M parameters.
        vocabulary: `Vocabulary.to_dict()`.
        code_bits: bits of an image code for the bit-structured table (0: plain table).
        bit_order: "big" or "little", the visual tokenizer's.
        image_side: side of the largest grid of image codes with learned row and column embeddings (0: none).
        image_fold: k, side of the square of image tokens that share a trunk position (1: none).
        prediction_offset: 0, or 1 where a model born autoregressive predicts place p from the hidden state at p - 1.
        max_positions: longest row, in tokens.
        block_length: places of a block where the model was trained block by block (0: it sees the whole row).
        published: where the weights came from, `{"family": ..., "config": its own config.json}`, so that they can be
            written back in their own format.
        tie_word_embeddings: the head is the embedding table.
    """

    model_type = "mask_predictor"

    def __init__(
        self,
        trunk: dict[str, Any] | PreTrainedConfig | None = None,
        vocabulary: dict[str, Any] | None = None,
        code_bits: int = 0,
        bit_order: str = "big",
        image_side: int = 0,
        image_fold: int = 1,
        prediction_offset: int = 0,
        max_positions: int = 1024,
        block_length: int = 0,
        published: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ):
        kinds = kwargs.pop("architectures", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, architectures=kinds, **kwargs)
        self.trunk = trunk.to_dict() if isinstance(trunk, PreTrainedConfig) else dict(trunk or DEFAULT_TRUNK)
        self.vocabulary = vocabulary
        self.code_bits, self.bit_order = code_bits, bit_order
        self.image_side, self.image_fold = image_side, image_fold
        self.prediction_offset, self.max_positions = prediction_offset, max_positions
        self.block_length, self.published = block_length, published

    def trunk_config(self) -> PreTrainedConfig:
        """The decoder's configuration, bidirectional and of this vocabulary's size."""
        settings = dict(self.trunk)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        config.vocab_size = self.shared_vocabulary.table_rows
        config.is_causal = False
        config.use_cache = False
        config.pad_token_id = None
        config.tie_word_embeddings = False
        return config

    @property
    def shared_vocabulary(self) -> Vocabulary:
        """The id space; ValueError where the configuration holds none."""
        if self.vocabulary is None:
            raise ValueError("the mask predictor's configuration has no vocabulary: give Vocabulary.to_dict()")
        return Vocabulary.from_dict(self.vocabulary)


DEFAULT_TRUNK: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 11,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
}


@dataclass
class MaskPredictorOutput(ModelOutput):
    """logits [B, W or L, V or columns]; hidden [B, W or L, D], what the head read."""

    logits: Tensor | None = None
    hidden: Tensor | None = None


class MaskPredictor(PreTrainedModel):
    """Predicts the token at every asked place from all visible places, whatever mixture of text and image they are."""

    config_class = MaskPredictorConfig
    base_model_prefix = "trunk"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _tied_weights_keys = {"head.weight": "trunk.embed_tokens.weight"}  # noqa: RUF012 (transformers' name and form)

    def __init__(self, config: MaskPredictorConfig):
        super().__init__(config)
        trunk_config = config.trunk_config()
        trunk_config._attn_implementation = config._attn_implementation
        self.trunk = AutoModel.from_config(trunk_config)
        if config.prediction_offset not in (0, 1):
            raise ValueError(f"prediction_offset is {config.prediction_offset!r}, expected 0 or 1")
        width, vocabulary = trunk_config.hidden_size, config.shared_vocabulary
        self.vocabulary = vocabulary
        self.head = nn.Linear(width, vocabulary.table_rows, bias=False)
        if config.code_bits:
            if vocabulary.image_size != 2**config.code_bits:
                raise ValueError(
                    f"code_bits is {config.code_bits} for {vocabulary.image_size} image codes, expected 2^bits codes"
                )
            self.bits_in = nn.Parameter(torch.empty(config.code_bits, width))
            self.bits_out = nn.Parameter(torch.empty(config.code_bits, width))
        if config.image_side:
            self.rows = nn.Embedding(config.image_side, width)
            self.columns = nn.Embedding(config.image_side, width)
        if config.image_fold > 1:
            if config.prediction_offset:
                raise ValueError(
                    "image_fold above 1 cannot be combined with prediction_offset 1: folded places have no order"
                )
            self.fold = nn.Linear(config.image_fold**2 * width, width, bias=False)
            self.unfold = nn.Linear(width, config.image_fold**2 * width, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MaskPredictor) and module.config.code_bits:
            nn.init.normal_(module.bits_in, std=0.02)
            nn.init.normal_(module.bits_out, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.trunk.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        grid: Tensor | None = None,
        where: Tensor | None = None,
        columns: tuple[int, int] | None = None,
        cache: SlotCache | None = None,
        computed: Tensor | None = None,
    ) -> MaskPredictorOutput:
        """Logits at the asked places.

        Args:
            input_ids: [B, L] in [0, V).
            attention_mask: None (everybody sees everybody), or bool [B, 1, 1 or L, L], True where a place may be seen,
                or float [B, 1, 1 or L, L], added to the attention scores as it is (sdpa and eager attention).
            position_ids: [B, L]; default 0 .. L-1.
            grid: [B, L, 2] row and column of image places, -1 at text places; needed with `image_side` or `image_fold`.
            where: [B, W] asked places; default all.
            columns: (first, last + 1) of the ids wanted; default all.
            cache: what earlier passes over this canvas left, and where this one leaves its own. Every other tensor is
                for the whole canvas all the same.
            computed: bool [B, L], with a cache: the places to compute, at least one per row; the others are as the pass
                that last computed them left them. Default all. Folded places are computed if one of them is.

        Returns logits [B, W, last + 1 - first]. Raises ValueError for a row longer than `max_positions` and for a
        missing grid.
        """
        if input_ids.shape[1] > self.config.max_positions:
            raise ValueError(f"a row has {input_ids.shape[1]} tokens, expected at most {self.config.max_positions}")
        if grid is None and (self.config.image_side or self.config.image_fold > 1):
            raise ValueError("this model places image tokens by row and column: give grid [B, L, 2]")
        hidden = self._embed(input_ids, grid)
        if self.config.image_fold > 1 and grid is not None:
            hidden = self._run_folded(hidden, attention_mask, position_ids, grid, where, cache, computed)
        else:
            hidden = self._run(hidden, attention_mask, position_ids, cache, computed)
            if self.config.prediction_offset:
                hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], 1)  # the first place has none before it
            if where is not None:
                hidden = hidden.gather(1, where.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return MaskPredictorOutput(logits=hidden @ self.head_rows(columns).T, hidden=hidden)

    def head_rows(self, columns: tuple[int, int] | None = None) -> Tensor:
        """The output matrix [V', D] of the ids in `columns`, bit structure included: logits are hidden @ rows.T."""
        first, end = columns or (0, self.vocabulary.table_rows)
        return self._with_bits(self.head.weight, "bits_out", first, end)

    def _with_bits(self, table: Tensor, name: str, first: int, end: int) -> Tensor:
        """Rows [first, end) of a table, with the image codes' bits mapped and added."""
        start, stop = self.vocabulary.image_columns
        if not self.config.code_bits or end <= start:
            return table[first:end]
        low, high = max(first, start), min(end, stop)
        codes = torch.arange(low - start, high - start, device=table.device)
        bits = codes_to_bits(codes, self.config.code_bits, self.config.bit_order, table.dtype)
        parts = [table[first:low], table[low:high] + bits @ getattr(self, name), table[high:end]]
        parts = [part for part in parts if len(part)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _embed(self, ids: Tensor, grid: Tensor | None) -> Tensor:
        table = cast(Tensor, self.get_input_embeddings().weight)
        hidden = F.embedding(ids, self._with_bits(table, "bits_in", 0, self.vocabulary.table_rows))
        if self.config.image_side and grid is not None:
            at_image = (grid[..., :1] >= 0).to(hidden.dtype)
            place = grid.clamp_min(0)
            hidden = hidden + at_image * (self.rows(place[..., 0]) + self.columns(place[..., 1]))
        return hidden

    def _run(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: SlotCache | None = None,
        computed: Tensor | None = None,
    ) -> Tensor:
        """The trunk over every place, or over the computed ones while it sees the others' slots: [B, M, D]."""
        if cache is not None:
            hidden, attention_mask, position_ids = cache.open(hidden, attention_mask, position_ids, computed)
        if attention_mask is not None:
            attention_mask = _mask_of_kind(attention_mask, self.trunk.config._attn_implementation, hidden)
        out = self.trunk(
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state.to(hidden.device)  # layers may lie on other devices than the embedding and the head
        return out if cache is None else cache.close(out)

    def _run_folded(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        grid: Tensor,
        where: Tensor | None,
        cache: SlotCache | None = None,
        computed: Tensor | None = None,
    ) -> Tensor:
        """The trunk over folded places: [B, L, D] -> [B, W or L, D]."""
        side = self.config.image_fold
        batch, length, width = hidden.shape
        leader, leads, group = fold_plan(grid, side)
        members = leads.unsqueeze(-1) + fold_offsets(grid, side, leads)  # [B, M, k*k]; text leaders repeat themselves
        taken = hidden.gather(1, members.flatten(1).unsqueeze(-1).expand(-1, -1, width))
        folded_images = self.fold(taken.view(batch, -1, side * side * width))
        at_image = (grid[..., 0] >= 0).gather(1, leads).unsqueeze(-1)
        folded = torch.where(at_image, folded_images, taken.view(batch, -1, side * side, width)[:, :, 0])

        if position_ids is None:
            position_ids = torch.arange(length, device=grid.device).expand(batch, length)
        positions = (position_ids - (~leader).long().cumsum(1)).gather(1, leads)
        count = leader.sum(1, keepdim=True)
        real = torch.arange(leads.shape[1], device=grid.device) < count
        if mask is not None:
            if mask.is_floating_point():
                raise ValueError("a folded model got a float mask, expected bool: folded places share what they see")
            mask = mask.expand(batch, 1, -1, length)
            mask = mask.gather(3, leads[:, None, None].expand(-1, -1, mask.shape[2], -1))
            if mask.shape[2] > 1:
                mask = mask.gather(2, leads[:, None, :, None].expand(-1, -1, -1, leads.shape[1]))
            mask = mask & real[:, None, None]
        elif not bool(real.all()):
            mask = real[:, None, None]
        if computed is not None:
            computed = torch.zeros_like(real.expand(batch, -1)).scatter_reduce(1, group, computed, "amax")
        out = self._run(folded, mask, positions.clamp_min(0), cache, computed)

        where = torch.arange(length, device=grid.device).expand(batch, length) if where is None else where
        at = group.gather(1, where)
        place = grid.gather(1, where.unsqueeze(-1).expand(-1, -1, 2))
        slot = (place[..., 0] % side) * side + place[..., 1] % side
        told_apart = self.unfold(out).view(batch, -1, side * side, width)
        flat = (at * side * side + slot.clamp_min(0)).unsqueeze(-1).expand(-1, -1, width)
        image = told_apart.flatten(1, 2).gather(1, flat)
        text = out.gather(1, at.unsqueeze(-1).expand(-1, -1, width))
        return torch.where(place[..., :1] >= 0, image, text)


def _mask_of_kind(seen: Tensor, implementation: str | None, hidden: Tensor) -> Any:
    """A mask bool or float [B, 1, 1 or Q, M] as the attention implementation takes it; hidden [B, Q, D] of the queries.

    Raises ValueError where it takes none of this shape or type.
    """
    batch, queries = hidden.shape[:2]
    length = seen.shape[3]
    if seen.is_floating_point():
        if implementation in ("sdpa", "eager"):
            return seen.to(hidden.dtype).expand(batch, 1, queries, length)
        raise ValueError(
            f"{implementation} takes no float mask, which is added to the scores: use attn_implementation='sdpa'"
        )
    if implementation == "sdpa":
        return seen
    if implementation == "eager":
        return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        rows = seen.expand(batch, 1, queries, length)
        return create_block_mask(
            lambda b, h, q, k: rows[b, 0, q, k], batch, None, queries, length, device=str(seen.device)
        )
    if seen.shape[2] == 1 and queries == length:  # flash attention drops padding, and knows no other mask
        return seen[:, 0, 0].expand(batch, length)
    raise ValueError(
        f"{implementation} takes padding only, got a mask {tuple(seen.shape)}: use attn_implementation='sdpa'"
    )


def picture_widths(grid: Tensor) -> Tensor:
    """Codes per line of the picture each place belongs to: [B, L]; 0 at text places.

    A picture's places lie row by row, so the place of row r and column c is its start + r * width + c.
    """
    row, column = grid.unbind(-1)
    index = torch.arange(grid.shape[1], device=grid.device).expand_as(row)
    # Every place after a picture's (0, 0) shares that start; the widest column seen from it gives the width.
    start = torch.where((row == 0) & (column == 0), index, torch.zeros_like(index)).cummax(1).values
    last = torch.where(row >= 0, column + 1, torch.zeros_like(column))
    return torch.zeros_like(row).scatter_reduce(1, start, last, "amax").gather(1, start) * (row >= 0)


def fold_plan(grid: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which places lead a folded one.

    A text place leads itself; an image place leads its square when its row and column are multiples of `side`.

    Args:
        grid: [B, L, 2], pictures with sides that `side` divides (ValueError otherwise).

    Returns leader bool [B, L]; leads [B, M], the leaders' places in order, rows with fewer padded by place 0; and
    group [B, L], the rank of each place's leader.
    """
    row, column = grid.unbind(-1)
    image = row >= 0
    leader = ~image | ((row % side == 0) & (column % side == 0))
    if int(image.sum()) != int((image & leader).sum()) * side * side:
        raise ValueError(f"a picture's code grid has a side that is no multiple of image_fold {side}: use such a size")
    count = leader.sum(1)
    order = torch.sort((~leader).to(torch.uint8), dim=1, stable=True).indices[:, : int(count.max())]
    real = torch.arange(order.shape[1], device=grid.device) < count.unsqueeze(1)
    index = torch.arange(grid.shape[1], device=grid.device)
    back = (row % side) * picture_widths(grid) + column % side
    rank = leader.long().cumsum(1) - 1
    group = rank.gather(1, torch.where(image, index - back, index))
    return leader, torch.where(real, order, torch.zeros_like(order)), group


def fold_offsets(grid: Tensor, side: int, leads: Tensor) -> Tensor:
    """Distance from each leader to the members of its square, row by row: [B, M, side * side]; zero at text."""
    step = torch.arange(side, device=grid.device)
    width = picture_widths(grid).gather(1, leads)[:, :, None, None]
    offsets = step.view(1, 1, side, 1) * width + step.view(1, 1, 1, side)
    return (offsets * (width > 0)).flatten(2)


AutoConfig.register("mask_predictor", MaskPredictorConfig)
AutoModel.register(MaskPredictorConfig, MaskPredictor)
