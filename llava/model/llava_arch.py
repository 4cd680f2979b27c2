"""From pixels and token ids to the embeddings that the language model reads.

    pixels -> vision tower -> projector -> (Script: keep the tokens that matter) -> spliced between the text embeddings

``grep -rn "# Script:" llava/model`` shows every place where pruning touches LLaVA's own path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import clean_question, last_question
from llava.decoder.stages import PictureSpan
from llava.layout.pooling import derived_tokens, pool_patches
from llava.layout.views import FRAME_END, NEWLINE, SlowFast, ViewLayout
from llava.layout.visuals import VIDEO, VideoReading, as_views, modality_list, pick_visuals, picture_layouts
from llava.model.encoded_images import EncodedImages
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.prompt_splicing import EmbeddedPrompts, match_images, pad_rows, splice
from llava.model.questions import Questions
from llava.model.token_selection import (
    KeptTokens,
    count_kept,
    decoder_budget,
    layout_to_read,
    select_tokens,
)
from llava.pruning import DecoderPruner, Pruner


class LlavaMetaModel(nn.Module):
    """Adds tower, projector and newline embedding to a language model's body."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_tower = build_vision_tower(config)
        self.mm_projector = build_vision_projector(config)
        if "unpad" in getattr(config, "mm_patch_merge_type", "flat"):
            self.image_newline = nn.Parameter(torch.empty(config.hidden_size, dtype=self.dtype))
        if getattr(config, "add_faster_video", False):
            self.faster_token = nn.Parameter(torch.empty(config.hidden_size, dtype=self.dtype))

    def get_vision_tower(self) -> VisionTower:
        return self.vision_tower


class LlavaMetaForCausalLM(ABC):
    """What LLaVA adds to a causal language model, whatever its family."""

    tokenizer: Any = None  # set by load_pretrained_model; reads questions out of prompts
    model_name: str = ""  # likewise; chooses the conversation template
    crops_are_views: ClassVar[bool] = False  # whether single crops (N, 3, s, s) are read like lists of views
    cut_to_tokenizer: ClassVar[bool] = False  # whether rows of the vocabulary beyond the tokenizer's are cut off

    @abstractmethod
    def get_model(self) -> LlavaMetaModel: ...

    def get_vision_tower(self) -> VisionTower:
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
        self,
        images: Tensor | Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]] | None = None,
        modality: str = "image",
    ) -> EncodedImages:
        """Encode pictures as `process_images` returns them, or videos; the result can stand for ``images`` anywhere.

        Args:
            images: (N, 3, s, s), one view each; or (N, V, 3, s, s) or a list of (V, 3, s, s) or (3, s, s). The views
                of a video are its frames.
            image_sizes: (width, height) of each picture; needed for tiles, and to know the padding of squares. Not
                read for videos.
            modality: "image" or "video", for all of them.
        """
        layouts = self.layouts_of(images, image_sizes, modality)
        pixels = torch.cat(as_views(images))
        with torch.no_grad():
            seen = self.get_vision_tower().observe(pixels)
        patches = self.project(seen.features)
        pool_mode = VideoReading.of(self.config).pool_mode if modality == VIDEO else None
        derived = derived_tokens(patches, [pair[0] for pair in layouts], pool_mode)
        return EncodedImages(
            patches if pool_mode is None else pool_patches(patches, pool_mode),
            seen.features,
            [pair[0] for pair in layouts],
            [pair[1] for pair in layouts],
            seen.class_features,
            seen.layer_input,
            pixels,
            derived=derived,
            pool_mode=pool_mode,
        )

    def layouts_of(
        self,
        images: Tensor | Sequence[Tensor] | EncodedImages,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        modalities: str | Sequence[str] | None = None,
    ) -> list[tuple[ViewLayout, ViewLayout]]:
        """For each picture its layout, and the one it would have if padding counted like anything else.

        Raises:
            ValueError: sizes are missing or do not fit the number of views.
        """
        if isinstance(images, EncodedImages):
            return list(zip(images.layouts, images.layouts_with_padding, strict=True))
        views = [len(picture) for picture in as_views(images)]
        if image_sizes is not None and len(image_sizes) != len(views):
            raise ValueError(f"{len(views)} images but {len(image_sizes)} image_sizes")
        sizes = [None] * len(views) if image_sizes is None else [tuple(int(x) for x in s) for s in image_sizes]
        in_views = self.crops_are_views or not isinstance(images, Tensor) or images.ndim == 5
        tower = self.get_vision_tower()
        side, view_pixels = tower.num_patches_per_side, tower.config.image_size
        tokens = tower.num_patches + (tower.select_feature == "cls_patch")
        layouts = []
        for count, size, kind in zip(views, sizes, modality_list(modalities, len(views)), strict=True):
            if kind == VIDEO:
                reading = VideoReading.of(self.config)
                if reading.slow_every is not None and not hasattr(self.get_model(), "faster_token"):
                    raise ValueError("add_faster_video needs model.faster_token, which this checkpoint does not have")
                layouts.append((reading.layout(count, side),) * 2)
            else:
                layouts.append(picture_layouts(self.config, count, side, tokens, view_pixels, size, in_views))
        return layouts

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
        modalities: str | Sequence[str] | None = None,
    ) -> EmbeddedPrompts:
        """Put the visual tokens where the prompts have image placeholders.

        Args:
            input_ids: (B, L) with IMAGE_TOKEN_INDEX once per image.
            attention_mask: (B, L), 0 at padding; ``None`` means none.
            labels: (B, L).
            images: pictures in the order of the placeholders, or what `encode_pictures` made of them. As in official
                LLaVA, every row without placeholder may also bring one picture, which is not used.
            image_sizes: (width, height) of each picture; a video's entry is not read.
            pruner: selects the visual tokens of every view; ``None`` keeps all.
            query: the question, one for all rows or one per row; ``None`` reads the last question out of each prompt.
            sample_ids: a number per row that seeds random methods, so that results do not depend on the batch.
            padding_side: of the batch; ``None`` takes the checkpoint's ``tokenizer_padding_side``, else "right".
            truncate: cut prompts at the checkpoint's ``tokenizer_model_max_length`` with a warning, as official LLaVA
                does without one; False refuses them.
            modalities: "image" or "video" for each of ``images``, or one for all; ``None``: all are pictures.
                Not read where ``images`` are encoded already.

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
        given = 0 if images is None else len(images)
        of_row, used = match_images(placeholders, given)
        kept: list[KeptTokens] = []
        features: list[Tensor] = []
        if used:
            modalities = modality_list(modalities, given)
            if len(used) < given:
                images = images.pick(used) if isinstance(images, EncodedImages) else pick_visuals(images, used)
                image_sizes = None if image_sizes is None else [image_sizes[i] for i in used]
                modalities = [modalities[i] for i in used]
            visual = self._count_visual(images, image_sizes, pruner, modalities)
            lengths = [
                len(row) + sum(visual[p] - 1 for p in pictures) for row, pictures in zip(rows, of_row, strict=True)
            ]
            self._check_length(max(lengths), truncate)  # before the tower runs
            queries = self._queries(rows, query)
            owners = [row for row, pictures in enumerate(of_row) for _ in pictures]
            ids = [0 if sample_ids is None else sample_ids[row] for row in owners]
            kept, features = self._visual_tokens(
                images, image_sizes, modalities, pruner, [queries[row] for row in owners], ids
            )
        embed = self.get_input_embeddings()
        texts = embed(torch.cat(rows).clamp_min(0).to(embed.weight.device, non_blocking=True)).split(
            [len(row) for row in rows]
        )
        spliced = [
            splice(row, text, label, [features[picture] for picture in pictures])
            for row, text, label, pictures in zip(rows, texts, row_labels, of_row, strict=True)
        ]
        inside = pruner if isinstance(pruner, DecoderPruner) else None
        spans = [
            self._spans(row, [kept[picture] for picture in pictures], inside)
            for row, pictures in zip(rows, of_row, strict=True)
        ]
        limit = self._check_length(max(len(row) for row, _ in spliced), truncate)
        left = (padding_side or getattr(self.config, "tokenizer_padding_side", "right")) == "left"
        prompts = pad_rows(spliced, spans, kept, limit, left)
        prompts.pruner = inside
        return prompts

    def _visual_tokens(
        self,
        images: Tensor | Sequence[Tensor] | EncodedImages,
        image_sizes: Sequence[tuple[int, int]] | None,
        modalities: Sequence[str],
        pruner: Pruner | None,
        queries: Sequence[str | None],
        sample_ids: Sequence[int],
    ) -> tuple[list[KeptTokens], list[Tensor]]:
        """For each picture and video what is kept of it, and its tokens (t, d).

        Pictures go through the tower and the selection together, and so do videos, whose views have fewer tokens.
        """
        groups = [list(range(len(images)))]
        if not isinstance(images, EncodedImages):
            groups = [[i for i, kind in enumerate(modalities) if kind == each] for each in dict.fromkeys(modalities)]
        kept: dict[int, KeptTokens] = {}
        tokens: dict[int, Tensor] = {}
        for group in groups:
            is_encoded, kind = isinstance(images, EncodedImages), modalities[group[0]]
            visuals = images if is_encoded else pick_visuals(images, group)
            sizes = None if image_sizes is None else [image_sizes[i] for i in group]
            tokens_of_view = self.layouts_of(visuals, sizes, kind)[0][0].eligible.shape[1]
            questions = Questions(self, pruner, tokens_of_view, [queries[i] for i in group])  # begun before the tower
            encoded = visuals if is_encoded else self.encode_pictures(visuals, sizes, kind)
            # Script: choose the visual tokens that go on, by the question of the row that a picture stands in
            chosen = select_tokens(self, pruner, encoded, questions, [sample_ids[i] for i in group])
            kept |= zip(group, chosen, strict=True)
            tokens |= zip(group, self.gather_tokens(encoded, chosen), strict=True)
        return [kept[i] for i in range(len(images))], [tokens[i] for i in range(len(images))]

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
        """Visual tokens (t, d) of every picture in reading order, with the learned ones that stand between them."""
        rows, first = [], 0
        for picture, tokens in enumerate(kept):
            table = encoded.features[first : first + tokens.layout.views].flatten(0, 1)
            first += tokens.layout.views
            made = encoded.derived[picture] if tokens.made is None else tokens.made.flatten(0, 1)
            if made is not None:
                table = torch.cat([table, made.to(table.device, table.dtype)])
            sequence = tokens.sequence.to(table.device, non_blocking=True)
            row = table[sequence.clamp_min(0)]
            if tokens.newlines:
                learned = {NEWLINE: "image_newline"}
                if isinstance(tokens.layout.derived, SlowFast):
                    learned[FRAME_END] = "faster_token"
                for number, name in learned.items():
                    token = getattr(self.get_model(), name).to(table.device, table.dtype)
                    row = torch.where((sequence == number)[:, None], token, row)
            rows.append(row)
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
        modalities: str | Sequence[str] | None = None,
    ) -> list[int]:
        """Positions that each picture will take."""
        layouts = self.layouts_of(images, image_sizes, modalities)
        return [count_kept(pruner, layout_to_read(pruner, *pair)) for pair in layouts]

    def check_prompt(
        self,
        input_ids: Tensor,
        images: Tensor | Sequence[Tensor] | EncodedImages,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        pruner: Pruner | None = None,
        modalities: str | Sequence[str] | None = None,
    ) -> None:
        """Raise ValueError if a prompt (1, L) and its images do not match or exceed the context, before any work."""
        match_images([int((input_ids == IMAGE_TOKEN_INDEX).sum())], len(images))
        visual = self._count_visual(images, image_sizes, pruner, modalities)
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
                "give it to generate or forward, or attach it with llava.decoder.attachment"
            )
        mask, positions = prompts.attention_mask, prompts.position_ids
        if attention_mask is not None:
            mask = mask.to(attention_mask.dtype)
        elif bool(mask.all()):
            mask = None
        positions = None if position_ids is None else positions
        return None, positions, mask, past_key_values, prompts.inputs_embeds, prompts.labels
