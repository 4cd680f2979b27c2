"""From pixels and token ids to the embeddings that the language model reads.

    pixels -> vision tower -> projector -> (Script: keep the tokens that matter) -> spliced between the text embeddings

``grep -rn "# Script:" llava/model`` shows every place where pruning touches LLaVA's own path.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import clean_question, last_question
from llava.mm_utils import anyres_grid
from llava.model.decoder_pruning import DecoderPruning
from llava.model.encoded_images import EncodedImages
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.prompt_stages import PictureSpan, PromptRow
from llava.model.questions import Questions
from llava.model.token_selection import (
    KeptTokens,
    count_kept,
    decoder_budget,
    eligible_layout,
    keeps_everything,
    select_tokens,
)
from llava.model.view_layout import (
    MERGE_TYPES,
    NEWLINE,
    ViewLayout,
    flat_layout,
    padded_square_layout,
    single_crop_layout,
    tiled_layout,
)
from llava.pruning import DecoderPruner, Pruner

logger = logging.getLogger(__name__)


@dataclass
class EmbeddedPrompts:
    """A padded batch of prompts, ready for the language model.

    Args:
        inputs_embeds: (B, T, d).
        attention_mask: (B, T) bool.
        position_ids: (B, T) int64, 0.. over the real tokens of a row, 0 at padding.
        labels: (B, T) int64 with IGNORE_INDEX at visual tokens and padding; ``None`` if none were given.
        kept: for each picture, which of its tokens stand in the prompt; after `generate` with a method inside the
            decoder, which are left after its last cut.
        rows: where the text and the pictures of each prompt stand.
        pruner: a method that is still to act, inside the decoder; ``None`` if there is none. It acts where `generate`
            gets the whole of this, not ``inputs_embeds`` alone.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    kept: list[KeptTokens]
    rows: list[PromptRow]
    pruner: DecoderPruner | None = None

    def decoder_pruning(self, decoder: nn.Module) -> DecoderPruning | None:
        """The method that is still to act, made ready for a decoder; ``None`` if there is none."""
        return None if self.pruner is None else DecoderPruning(decoder, self.pruner, self.rows)

    def note_survivors(self, pruning: DecoderPruning) -> None:
        """After the forward: write down in ``kept`` what the decoder has left of each picture."""
        places = pruning.survivors()
        self.kept = [tokens.surviving(place) for tokens, place in zip(self.kept, places, strict=True)]


class LlavaMetaModel(nn.Module):
    """Adds tower, projector and newline embedding to a language model's body."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_tower = CLIPVisionTower(
            config.mm_vision_tower,
            getattr(config, "mm_vision_select_layer", -2),
            getattr(config, "mm_vision_select_feature", "patch"),
        )
        self.mm_projector = build_vision_projector(config)
        if "unpad" in getattr(config, "mm_patch_merge_type", "flat"):
            self.image_newline = nn.Parameter(torch.empty(config.hidden_size, dtype=self.dtype))

    def get_vision_tower(self) -> CLIPVisionTower:
        return self.vision_tower


class LlavaMetaForCausalLM(ABC):
    """What LLaVA adds to a causal language model, whatever its family."""

    tokenizer: Any = None  # set by load_pretrained_model; reads questions out of prompts
    model_name: str = ""  # likewise; chooses the conversation template

    @abstractmethod
    def get_model(self) -> LlavaMetaModel: ...

    def get_vision_tower(self) -> CLIPVisionTower:
        return self.get_model().get_vision_tower()

    @property
    def relevance_sign(self) -> int:
        """Sign of the joint space's cosine: the checkpoint's ``mm_relevance_sign``, or the kind of tower's."""
        return getattr(self.config, "mm_relevance_sign", None) or self.get_vision_tower().relevance_sign

    # --- pictures --------------------------------------------------------------------------------------------------

    def encode_images(self, pixels: Tensor, any_size: bool = False) -> Tensor:
        """Pixels (V, 3, s, s) -> projected features (V, n, d); ``any_size`` takes other sizes, which give other n."""
        with torch.no_grad():
            features = self.get_vision_tower()(pixels, any_size)
        return self.project(features)

    def project(self, features: Tensor) -> Tensor:
        """Encoder features (..., c) -> the language model's space (..., d)."""
        parameter = next(self.get_model().mm_projector.parameters(), features)
        return self.get_model().mm_projector(features.to(parameter.device, parameter.dtype))

    def encode_pictures(
        self, images: Tensor | Sequence[Tensor], image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> EncodedImages:
        """Encode pictures as `process_images` returns them; the result can stand for ``images`` in every call.

        Args:
            images: (N, 3, s, s), one view each; or (N, V, 3, s, s) or a list of (V, 3, s, s) or (3, s, s).
            image_sizes: (width, height) of each picture; needed for tiles, and to know the padding of squares.
        """
        pictures = _as_views(images)
        layouts = self.layouts_of(images, image_sizes)
        pixels = torch.cat(pictures)
        with torch.no_grad():
            seen = self.get_vision_tower().observe(pixels)
        return EncodedImages(
            self.project(seen.features),
            seen.features,
            [pair[0] for pair in layouts],
            [pair[1] for pair in layouts],
            seen.class_features,
            seen.layer_input,
            pixels,
        )

    def layouts_of(
        self, images: Tensor | Sequence[Tensor] | EncodedImages, image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[tuple[ViewLayout, ViewLayout]]:
        """For each picture its layout, and the one it would have if padding counted like anything else.

        Raises:
            ValueError: sizes are missing or do not fit the number of views.
        """
        if isinstance(images, EncodedImages):
            return list(zip(images.layouts, images.layouts_with_padding, strict=True))
        pictures = _as_views(images)
        if image_sizes is not None and len(image_sizes) != len(pictures):
            raise ValueError(f"{len(pictures)} images but {len(image_sizes)} image_sizes")
        sizes = [None] * len(pictures) if image_sizes is None else [tuple(int(x) for x in s) for s in image_sizes]
        in_views = not isinstance(images, Tensor) or images.ndim == 5
        tower = self.get_vision_tower()
        tokens = tower.num_patches + (tower.select_feature == "cls_patch")
        return [self._layout(len(p), tokens, size, in_views) for p, size in zip(pictures, sizes, strict=True)]

    def _layout(
        self, views: int, tokens: int, size: tuple[int, int] | None, in_views: bool
    ) -> tuple[ViewLayout, ViewLayout]:
        merge_type = getattr(self.config, "mm_patch_merge_type", "flat")
        if merge_type not in MERGE_TYPES:
            raise ValueError(f"mm_patch_merge_type must be one of {', '.join(MERGE_TYPES)}, got {merge_type!r}")
        tower = self.get_vision_tower()
        side = tower.num_patches_per_side
        flat = flat_layout(views, tokens)
        if in_views and merge_type != "flat":
            if views == 1:
                return (single_crop_layout(tokens), flat) if merge_type == "spatial_unpad" else (flat, flat)
            if size is None:
                raise ValueError("tiled images need image_sizes: (width, height) of each picture")
            grid = anyres_grid(size, self.config.image_grid_pinpoints, tower.config.image_size)
            if grid[0] * grid[1] + 1 != views:
                raise ValueError(f"a picture of size {size} has 1 + {grid[0]} x {grid[1]} views, got {views}")
            return tiled_layout(size, grid, side, merge_type), tiled_layout(size, grid, side, "spatial")
        is_square = not in_views and getattr(self.config, "image_aspect_ratio", None) == "pad"
        if is_square and size is not None and tokens == side * side:
            return padded_square_layout(size, side), flat
        return flat, flat

    # --- prompts ---------------------------------------------------------------------------------------------------

    def embed_prompts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | Sequence[Tensor] | EncodedImages | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        pruner: Pruner | None = None,
        query: str | Sequence[str] | None = None,
        sample_ids: Sequence[int] | None = None,
        padding_side: str | None = None,
        truncate: bool = True,
    ) -> EmbeddedPrompts:
        """Put the visual tokens where the prompts have image placeholders.

        Args:
            input_ids: (B, L) with IMAGE_TOKEN_INDEX once per image.
            attention_mask: (B, L), 0 at padding; ``None`` means none.
            labels: (B, L).
            images: pictures in the order of the placeholders, or what `encode_pictures` made of them. As in official
                LLaVA, every row without placeholder may also bring one picture, which is not used.
            image_sizes: (width, height) of each picture.
            pruner: selects the visual tokens of every view; ``None`` keeps all.
            query: the question, one for all rows or one per row; ``None`` reads the last question out of each prompt.
            sample_ids: a number per row that seeds random methods, so that results do not depend on the batch.
            padding_side: of the batch; ``None`` takes the checkpoint's ``tokenizer_padding_side``, else "right".
            truncate: cut prompts at the checkpoint's ``tokenizer_model_max_length`` with a warning, as official LLaVA
                does without one; False refuses them.

        Raises:
            ValueError: images and placeholders do not match, or a prompt is longer than the model's context.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows = [ids[mask].cpu() for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]
        row_labels = [None] * len(rows)
        if labels is not None:
            row_labels = [label[mask] for label, mask in zip(labels, attention_mask.bool(), strict=True)]
        placeholders = [int((row == IMAGE_TOKEN_INDEX).sum()) for row in rows]
        of_row, used = _match_images(placeholders, 0 if images is None else len(images))
        kept: list[KeptTokens] = []
        features: list[Tensor] = []
        if used:
            if len(used) < len(images):
                images = images.pick(used) if isinstance(images, EncodedImages) else _pick(images, used)
                image_sizes = None if image_sizes is None else [image_sizes[i] for i in used]
            visual = self._count_visual(images, image_sizes, pruner)
            lengths = [
                len(row) + sum(visual[p] - 1 for p in pictures) for row, pictures in zip(rows, of_row, strict=True)
            ]
            self._check_length(max(lengths), truncate)  # before the tower runs
            # Script: choose the visual tokens that go on, by the question of the row that a picture stands in
            queries = self._queries(rows, query)
            owners = [row for row, pictures in enumerate(of_row) for _ in pictures]
            ids = None if sample_ids is None else [sample_ids[row] for row in owners]
            tokens = self.layouts_of(images, image_sizes)[0][0].eligible.shape[1]
            selecting = None if pruner is None or keeps_everything(pruner, tokens) else pruner
            questions = Questions(self, selecting, [queries[row] for row in owners])  # begun before the vision tower
            if not isinstance(images, EncodedImages):
                images = self.encode_pictures(images, image_sizes)
            kept = select_tokens(self, pruner, images, questions, ids)
            features = self.gather_tokens(images, kept)
        embed = self.get_input_embeddings()
        texts = embed(torch.cat(rows).clamp_min(0).to(embed.weight.device)).split([len(row) for row in rows])
        spliced = [
            _splice(row, text, label, [features[picture] for picture in pictures])
            for row, text, label, pictures in zip(rows, texts, row_labels, of_row, strict=True)
        ]
        inside = pruner if isinstance(pruner, DecoderPruner) else None
        spans = [
            self._spans(row, [kept[picture] for picture in pictures], inside)
            for row, pictures in zip(rows, of_row, strict=True)
        ]
        prompts = self._pad(spliced, spans, labels is not None, kept, padding_side, truncate)
        prompts.pruner = inside
        return prompts

    def _spans(self, ids: Tensor, kept: list[KeptTokens], pruner: DecoderPruner | None) -> list[PictureSpan]:
        """Where the pictures of a row (L,) stand once they are spliced in."""
        spans, shift = [], 0
        places = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        for place, tokens in zip(places, kept, strict=True):
            count = len(tokens.sequence)
            budget, eligible = (count, None) if pruner is None else decoder_budget(pruner, tokens.layout)
            spans.append(PictureSpan(place + shift, count, budget, eligible))
            shift += count - 1
        return spans

    def gather_tokens(self, encoded: EncodedImages, kept: Sequence[KeptTokens]) -> list[Tensor]:
        """Visual tokens (t, d) of every picture in reading order: kept ones, made ones, newline embeddings."""
        rows, first = [], 0
        for tokens in kept:
            table = encoded.features[first : first + tokens.layout.views].flatten(0, 1)
            first += tokens.layout.views
            if tokens.made is not None:
                table = torch.cat([table, tokens.made.flatten(0, 1).to(table.device, table.dtype)])
            sequence = tokens.sequence.to(table.device)
            picture = table[sequence.clamp_min(0)]
            if tokens.newlines:
                newline = self.get_model().image_newline.to(table.device, table.dtype)
                picture = torch.where((sequence == NEWLINE)[:, None], newline, picture)
            rows.append(picture)
        return rows

    def _queries(self, rows: list[Tensor], query: str | Sequence[str] | None) -> list[str | None]:
        """The question of every row, as given or as read from the prompt; ``None`` without a tokenizer."""
        if isinstance(query, str):
            return [clean_question(query)] * len(rows)
        if query is not None:
            if len(query) != len(rows):
                raise ValueError(f"{len(rows)} prompts but {len(query)} queries")
            return [clean_question(text) for text in query]
        if self.tokenizer is None:
            return [None] * len(rows)
        return [last_question(self.tokenizer.decode(row[row != IMAGE_TOKEN_INDEX])) for row in rows]

    def _count_visual(
        self,
        images: Tensor | Sequence[Tensor] | EncodedImages,
        image_sizes: Sequence[tuple[int, int]] | None,
        pruner: Pruner | None,
    ) -> list[int]:
        """Positions that each picture will take."""
        return [count_kept(pruner, eligible_layout(pruner, *pair)) for pair in self.layouts_of(images, image_sizes)]

    def check_prompt(
        self,
        input_ids: Tensor,
        images: Tensor | Sequence[Tensor] | EncodedImages,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        pruner: Pruner | None = None,
    ) -> None:
        """Raise ValueError if a prompt (1, L) and its images do not match or exceed the context, before any work."""
        _match_images([int((input_ids == IMAGE_TOKEN_INDEX).sum())], len(images))
        visual = self._count_visual(images, image_sizes, pruner)
        self._check_length(input_ids.shape[1] + sum(visual) - len(visual), truncate=False)

    def _check_length(self, longest: int, truncate: bool) -> int:
        """The length that prompts are cut to. Raises ValueError if they may not be cut and do not fit."""
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        context = limit or self.config.max_position_embeddings
        if longest > context and (limit is None or not truncate):
            raise ValueError(
                f"a prompt of {longest} tokens (visual ones included) is longer than the model's context of "
                f"{context}; use fewer images, or keep fewer tokens of each"
            )
        return context

    def _pad(
        self,
        rows: list[tuple[Tensor, Tensor | None]],
        spans: list[list[PictureSpan]],
        with_labels: bool,
        kept: list[KeptTokens],
        padding_side: str | None,
        truncate: bool,
    ) -> EmbeddedPrompts:
        longest = max(len(row) for row, _ in rows)
        limit = self._check_length(longest, truncate)
        if longest > limit:
            logger.warning(
                "a prompt of %d tokens is cut to %d, the checkpoint's limit: its end is lost", longest, limit
            )
            rows = [(row[:limit], None if labels is None else labels[:limit]) for row, labels in rows]
            longest = limit
        left = (padding_side or getattr(self.config, "tokenizer_padding_side", "right")) == "left"
        first = rows[0][0]
        embeds = first.new_zeros(len(rows), longest, first.shape[-1])
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        positions = torch.zeros(len(rows), longest, dtype=torch.long)
        padded_labels = torch.full((len(rows), longest), IGNORE_INDEX, device=first.device) if with_labels else None
        places = []
        for i, (row, labels) in enumerate(rows):
            place = slice(longest - len(row), longest) if left else slice(0, len(row))
            embeds[i, place] = row
            mask[i, place] = True
            positions[i, place] = torch.arange(len(row))
            inside = tuple(span.cut_at(len(row)) for span in spans[i])
            places.append(PromptRow(place.start, len(row), inside))
            if padded_labels is not None:
                padded_labels[i, place] = labels
        mask, positions = mask.to(first.device), positions.to(first.device)
        return EmbeddedPrompts(embeds, mask, positions, padded_labels, kept, places)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Tensor | Sequence[Tensor] | EncodedImages | None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        **options: Any,
    ) -> tuple[None, Tensor | None, Tensor | None, Any, Tensor, Tensor | None]:
        """`embed_prompts` under LLaVA's name and signature, for code written against it; ``options`` as there.

        Returns:
            (None, position_ids, attention_mask, past_key_values, inputs_embeds, labels). Positions and mask are
            ``None`` where none came in, except that a batch which had to be padded always gets its mask.
        """
        prompts = self.embed_prompts(input_ids, attention_mask, labels, images, image_sizes, **options)
        if prompts.pruner is not None:
            raise ValueError(
                f"pruner '{prompts.pruner.name}' acts inside the decoder, which embeddings alone cannot make it do: "
                "give it to generate or forward, or attach it with llava.model.decoder_pruning"
            )
        mask, positions = prompts.attention_mask, prompts.position_ids
        if attention_mask is not None:
            mask = mask.to(attention_mask.dtype)
        elif bool(mask.all()):
            mask = None
        positions = None if position_ids is None else positions
        return None, positions, mask, past_key_values, prompts.inputs_embeds, prompts.labels


def _match_images(placeholders: list[int], images: int) -> tuple[list[list[int]], list[int]]:
    """Deal images out to rows with so many placeholders each.

    Returns:
        For each row the numbers of its pictures among those used, and which of the ``images`` are used: all of them,
        unless every row without placeholder brings one along, as official LLaVA has it.

    Raises:
        ValueError: the numbers do not match.
    """
    needed, text_rows = sum(placeholders), placeholders.count(0)
    with_unused = images == needed + text_rows and images > needed
    if images != needed and not with_unused:
        raise ValueError(f"the prompts have {needed} <image> placeholders, but {images} images were given")
    of_row, used, next_image = [], [], 0
    for count in placeholders:
        of_row.append(list(range(len(used), len(used) + count)))
        used += range(next_image, next_image + count)
        next_image += count + (count == 0 and with_unused)
    return of_row, used


def _as_views(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One (V, 3, s, s) per picture."""
    return [image if image.ndim == 4 else image[None] for image in images]


def _pick(images: Tensor | Sequence[Tensor], used: list[int]) -> Tensor | list[Tensor]:
    return images[used] if isinstance(images, Tensor) else [images[i] for i in used]


def _splice(ids: Tensor, text: Tensor, labels: Tensor | None, pictures: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Replace every placeholder of a row by its picture's tokens: embeddings (t, d) and labels (t,)."""
    if not pictures:
        return text, labels
    embeds, new_labels, start = [], [], 0
    for end, picture in zip((ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist(), pictures, strict=True):
        embeds += [text[start:end], picture.to(text.device, text.dtype)]
        if labels is not None:
            new_labels += [labels[start:end], labels.new_full((len(picture),), IGNORE_INDEX)]
        start = end + 1
    embeds.append(text[start:])
    if labels is None:
        return torch.cat(embeds), None
    return torch.cat(embeds), torch.cat([*new_labels, labels[start:]])
