"""The mask predictor: any transformers decoder, run bidirectionally over text and image tokens of one vocabulary.

    ids -> embeddings (+ bits of image codes, + row and column of image places)
        -> trunk (a Llama, Qwen, ... with `is_causal = False`)
        -> logits of the token at the same place, for the asked places and columns only

Two things help small models and large codebooks. *Bit-structured codes*: an image token's input is its table row plus a
linear map of its sign bits, and its output row likewise, so codes that differ in one bit share what is learned (the
structure that MAGVIT-v2's lookup-free codes have, arXiv 2310.05737). *Folding*: k x k neighbouring image tokens enter
the trunk as one position and are told apart again before the head (the feature compression of Meissonic, arXiv
2410.08261); a picture of 256 tokens then costs 64 positions. Ids, masks and logits stay one per token outside.

What nobody reads is not computed: the head for the asked places and columns only, and the last layer's queries and MLP
likewise (`mmdlm.models.last_layer`).

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

from mmdlm.models.attention_masks import mask_of_kind
from mmdlm.models.folding import Folding, fold_offsets, fold_plan, folding, picture_widths
from mmdlm.models.last_layer import can_read_some, read_last_layer
from mmdlm.models.lfq import bit_weights
from mmdlm.models.slot_cache import SlotCache
from mmdlm.models.weights import WeightsState, countable
from mmdlm.vocabulary import Vocabulary

__all__ = ["DEFAULT_TRUNK", "MaskPredictor", "MaskPredictorConfig", "MaskPredictorOutput", "fold_offsets", "fold_plan",
           "picture_widths"]  # fmt: skip


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
        if not isinstance(config.max_positions, int) or config.max_positions < 1:
            raise ValueError(f"max_positions is {config.max_positions!r}, expected a whole number from 1 on")
        bit_weights(config.code_bits, config.bit_order)  # an order that is none shows here
        width, vocabulary = trunk_config.hidden_size, config.shared_vocabulary
        self.vocabulary = vocabulary
        self.head = nn.Linear(width, vocabulary.table_rows, bias=False)
        self._kept_rows: tuple[tuple[int, int], WeightsState, Tensor] | None = None  # of `head_rows`
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
        folding: Folding | None = None,
        narrow: bool = True,
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
            folding: `fold_once(grid)`, for callers that pass the same grid often.
            narrow: without gradients, compute the last layer's queries and MLP for `where` only, where that is less and
                the trunk is known (`mmdlm.models.last_layer`). False is the slow twin, equal but for rounding.

        Returns logits [B, W, last + 1 - first]. Raises ValueError for a row longer than `max_positions` and for a
        missing grid.
        """
        if input_ids.shape[1] > self.config.max_positions:
            raise ValueError(f"a row has {input_ids.shape[1]} tokens, expected at most {self.config.max_positions}")
        if grid is None and (self.config.image_side or self.config.image_fold > 1):
            raise ValueError("this model places image tokens by row and column: give grid [B, L, 2]")
        hidden = self._embed(input_ids, grid)
        if self.config.image_fold > 1 and grid is not None:
            plan = self.fold_once(grid) if folding is None else folding
            assert plan is not None
            hidden = self._run_folded(hidden, attention_mask, position_ids, plan, where, cache, computed, narrow)
        else:
            read = where
            if self.config.prediction_offset:  # the first place has none before it
                read = torch.arange(input_ids.shape[1], device=hidden.device) if where is None else where
                read = (read - 1).clamp_min(0).expand(len(hidden), -1)
            fewer = narrow and where is not None and where.shape[1] < hidden.shape[1]
            hidden = self._run(hidden, attention_mask, position_ids, cache, computed, read, fewer)
        return MaskPredictorOutput(logits=hidden @ self.head_rows(columns).T, hidden=hidden)

    def fold_once(self, grid: Tensor | None) -> Folding | None:
        """How a canvas of this grid [B, L, 2] folds, for `forward(folding=...)`; None where this model does not fold.

        It waits for the device, which `forward` then has no need to. ValueError for pictures that do not fold.
        """
        return folding(grid, self.config.image_fold) if self.config.image_fold > 1 and grid is not None else None

    def head_rows(self, columns: tuple[int, int] | None = None) -> Tensor:
        """The output matrix [V', D] of the ids in `columns`, bit structure included: logits are hidden @ rows.T.

        With bit-structured codes it is made, not looked up. Without gradients and out of training the last one made is
        kept until a weight of it changes: do not write into it.
        """
        first, end = columns or (0, self.vocabulary.table_rows)
        if not self.config.code_bits or end <= self.vocabulary.image_start:
            return self.head.weight[first:end]
        made_of = (self.head.weight, self.bits_out)
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or not countable(made_of):
            self._kept_rows = None
            return self._with_bits(*made_of, first, end)
        kept = self._kept_rows
        if kept is None or kept[0] != (first, end) or not kept[1].holds(made_of):
            self._kept_rows = kept = None  # never two at a time
            self._kept_rows = kept = (first, end), WeightsState(made_of), self._with_bits(*made_of, first, end)
        return kept[2]

    def _with_bits(self, table: Tensor, weight: Tensor, first: int, end: int) -> Tensor:
        """Rows [first, end) of a table, with the image codes' bits mapped by `weight` [bits, D] and added."""
        start, stop = self.vocabulary.image_columns
        low, high = max(first, start), min(end, stop)
        codes = torch.arange(low - start, high - start, device=table.device)
        parts = [table[first:low], table[low:high] + self._bits(codes, table.dtype) @ weight, table[high:end]]
        parts = [part for part in parts if len(part)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _bits(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """`codes_to_bits`, whose check of the range would wait for the device in every pass."""
        powers = bit_weights(self.config.code_bits, self.config.bit_order, codes.device)
        return ((codes.unsqueeze(-1) & powers) != 0).to(dtype) * 2 - 1

    def _embed(self, ids: Tensor, grid: Tensor | None) -> Tensor:
        hidden = F.embedding(ids, cast(Tensor, self.get_input_embeddings().weight))
        if self.config.code_bits:  # of the codes that are there, not of all: 18 bits have 262,144
            start, stop = self.vocabulary.image_columns
            image = (ids >= start) & (ids < stop)
            bits = self._bits(ids - start, hidden.dtype)
            hidden = torch.where(image.unsqueeze(-1), hidden + bits @ self.bits_in, hidden)
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
        cache: SlotCache | None,
        computed: Tensor | None,
        read: Tensor | None,
        fewer: bool,
    ) -> Tensor:
        """The trunk over every place, or over the computed ones while it sees the others' slots: [B, M, D].

        With `read` int [B, N] what stands there, [B, N, D]; `fewer`: the last layer may leave out the others.
        """
        device = hidden.device
        fewer = fewer and not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and can_read_some(self.trunk)
        if cache is not None:
            hidden, attention_mask, position_ids = cache.open(hidden, attention_mask, position_ids, computed)
            fewer = fewer and not cache.keep_hidden
        if fewer and read is not None:
            read = read if cache is None else cache.among_computed(read)
            return read_last_layer(self.trunk, hidden, attention_mask, position_ids, cache, read)
        if attention_mask is not None:
            attention_mask = mask_of_kind(attention_mask, self.trunk.config._attn_implementation, hidden)
        out = self.trunk(
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state.to(device)  # layers may lie on other devices than the embedding and the head
        out = out if cache is None else cache.close(out)
        return out if read is None else out.gather(1, read.unsqueeze(-1).expand(-1, -1, out.shape[-1]))

    def _run_folded(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        plan: Folding,
        where: Tensor | None,
        cache: SlotCache | None,
        computed: Tensor | None,
        narrow: bool,
    ) -> Tensor:
        """The trunk over folded places: [B, L, D] -> [B, W or L, D]."""
        at = plan.group if where is None else plan.group.gather(1, where)
        # W asked tokens have at most W leaders; how many fewer only the device knows
        fewer = narrow and at.shape[1] < plan.leads.shape[1]
        out = self._run(plan.hidden(hidden, self.fold), plan.mask(mask), plan.positions(position_ids), cache,
                        plan.computed(computed), at if fewer else None, fewer)
        if fewer:
            at = torch.arange(at.shape[1], device=at.device).expand_as(at)
        return plan.told_apart(out, at, where, self.unfold)


AutoConfig.register("mask_predictor", MaskPredictorConfig)
AutoModel.register(MaskPredictorConfig, MaskPredictor)
