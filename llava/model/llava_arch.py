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
from llava.decoder.attachment import check_host
from llava.decoder.stages import PictureSpan
from llava.layout.plan import PicturePlan, plan_picture
from llava.layout.visuals import Reading, Visuals
from llava.model.attached_pruner import AttachedPruner
from llava.model.encoded_images import EncodedImages
from llava.model.kept_tokens import KeptTokens
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.prompt_splicing import EmbeddedPrompts, match_images, pad_rows, splice
from llava.model.question_side import QuestionSide
from llava.model.token_selection import CallPlan, select_tokens
from llava.model.vision_side import VisionSide
from llava.pruning import DecoderPruner, Method
from llava.relevance.policy import Announcer, Offer, settle

Shown = Tensor | Sequence[Tensor] | Visuals | EncodedImages  # pictures and videos as a call may bring them


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

    attached_pruner: AttachedPruner | None = None

    @abstractmethod
    def get_model(self) -> LlavaMetaModel: ...

    def get_vision_tower(self) -> VisionTower:
        return self.get_model().get_vision_tower()

    @property
    def vision(self) -> VisionSide:
        """Tower, projector and learned tokens, and what they do with pictures and videos."""
        return VisionSide(self.get_model(), self.config, self.crops_are_views)

    @property
    def relevance_sign(self) -> int:
        """Sign of the joint space's cosine: the checkpoint's ``mm_relevance_sign``, or the kind of tower's."""
        return self.vision.relevance_sign

    # --- pictures --------------------------------------------------------------------------------------------------

    def encode_images(self, pixels: Tensor, any_size: bool = False) -> Tensor:
        """Pixels (V, 3, s, s) -> projected features (V, n, d); ``any_size`` takes other sizes, which give other n."""
        return self.vision.encode_images(pixels, any_size)

    def visuals(
        self,
        images: Tensor | Sequence[Tensor] | Visuals,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        modalities: str | Sequence[str] | None = None,
        reading: Reading | None = None,
    ) -> Visuals:
        """Pictures and videos as one value, which can be given as ``images`` anywhere.

        Args:
            images: as `process_images` and `process_video` return them.
            image_sizes: (width, height) of each picture; a video's entry is not read.
            modalities: "image" or "video" for each of ``images``, or one for all; ``None``: all are pictures.
            reading: how they are read, ``Reading.of(model.config, mm_spatial_pool_mode="max")`` for example; ``None``
                is as the checkpoint says.
        """
        return self.vision.visuals(images, image_sizes, modalities, reading)

    def encode_pictures(
        self,
        images: Tensor | Sequence[Tensor] | Visuals,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        modality: str | None = None,
    ) -> EncodedImages:
        """Encode pictures as `process_images` returns them, or videos; the result can be given as ``images`` anywhere.

        Args:
            images: (N, 3, s, s), one view each; or (N, V, 3, s, s) or a list of (V, 3, s, s) or (3, s, s). The views
                of a video are its frames. Or `visuals`. Where the number of a prompt's pictures decides how they are
                read, they are those of one prompt.
            image_sizes: (width, height) of each picture; needed for tiles, and to know the padding of squares. Not
                read for videos.
            modality: "image" (where ``None``) or "video", for all of them.

        Raises:
            ValueError: pictures and videos, which are encoded apart.
        """
        shown = self.vision.visuals(images, image_sizes, modality)
        if len(shown.groups()) > 1:
            raise ValueError("pictures and videos are encoded apart: call encode_pictures for each kind")
        shown = shown.in_prompts([range(len(shown))])
        return self.vision.encode(shown, self.vision.layouts(shown))

    # --- prompts ---------------------------------------------------------------------------------------------------

    def embed_prompts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Shown | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        pruner: Method | None = None,
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
            images: pictures in the order of the placeholders, or `visuals`, or what `encode_pictures` made of them. As
                in official LLaVA, every row without placeholder may also bring one picture, which is not used.
            image_sizes: (width, height) of each picture; a video's entry is not read.
            pruner: selects the visual tokens; ``None`` keeps all, unless a method is attached (`attach_pruner`).
            query: the question, one for all rows or one per row; ``None`` reads the last question out of each prompt.
            sample_ids: a number per row that seeds random methods, so that results do not depend on the batch.
            padding_side: of the batch; ``None`` takes the checkpoint's ``tokenizer_padding_side``, else "right".
            truncate: cut prompts at the checkpoint's ``tokenizer_model_max_length`` with a warning, as official LLaVA
                does without one; False refuses them.
            modalities: "image" or "video" for each of ``images``, or one for all; ``None``: all are pictures.
                Not read where ``images`` are encoded already.

        Raises:
            ValueError: images and placeholders do not match, a prompt is longer than the model's context, or the
                method cannot be used on what is shown or asked.
        """
        attached = self.attached_pruner if pruner is None else None
        if attached is not None:
            pruner, query = attached.method, attached.query if query is None else query
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows = [ids[mask].cpu() for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]
        row_labels = [None] * len(rows)
        if labels is not None:
            row_labels = [label[mask] for label, mask in zip(labels, attention_mask.bool(), strict=True)]
        placeholders = [int((row == IMAGE_TOKEN_INDEX).sum()) for row in rows]
        given = 0 if images is None else len(images)
        of_row, used = match_images(placeholders, given)
        plan, kept, features = CallPlan(), [], []
        if used:
            shown = self._shown(images, image_sizes, modalities)
            shown = shown if len(used) == given else shown.pick(used)
            shown = shown if isinstance(shown, EncodedImages) else shown.in_prompts(of_row)
            plan = self.plan(shown, pruner)
            lengths = [
                len(row) + sum(plan.pictures[picture].count - 1 for picture in pictures)
                for row, pictures in zip(rows, of_row, strict=True)
            ]
            self._check_length(max(lengths), truncate)  # before the tower runs
            owners = [row for row, pictures in enumerate(of_row) for _ in pictures]
            seeds = None if sample_ids is None else [sample_ids[row] for row in owners]
            plan = self.asked(plan, self.questions.read(rows, query), owners, seeds)
            kept, features = self._visual_tokens(shown, plan)
        embed = self.get_input_embeddings()
        texts = embed(torch.cat(rows).clamp_min(0).to(embed.weight.device, non_blocking=True)).split(
            [len(row) for row in rows]
        )
        spliced = [
            splice(row, text, label, [features[picture] for picture in pictures])
            for row, text, label, pictures in zip(rows, texts, row_labels, of_row, strict=True)
        ]
        spans = [
            spans_of(row, [(plan.pictures[picture], kept[picture]) for picture in pictures])
            for row, pictures in zip(rows, of_row, strict=True)
        ]
        limit = self._check_length(max(len(row) for row, _ in spliced), truncate)
        left = (padding_side or getattr(self.config, "tokenizer_padding_side", "right")) == "left"
        prompts = pad_rows(spliced, spans, kept, limit, left)
        prompts.pruner = pruner if isinstance(pruner, DecoderPruner) else None
        if attached is not None:
            attached.prompts = prompts
        return prompts

    def _shown(
        self,
        images: Shown,
        image_sizes: Sequence[tuple[int, int]] | None,
        modalities: str | Sequence[str] | None,
    ) -> Visuals | EncodedImages:
        return images if isinstance(images, EncodedImages) else self.vision.visuals(images, image_sizes, modalities)

    def plan(self, shown: Visuals | EncodedImages, pruner: Method | None) -> CallPlan:
        """The counts of a call, known before the tower runs.

        Raises:
            ValueError: the method cannot be used on one of the pictures or videos.
        """
        if isinstance(shown, EncodedImages):
            layouts = tuple(zip(shown.layouts, shown.layouts_with_padding, strict=True))
        else:
            layouts = tuple(self.vision.layouts(shown))
        layers = self.config.num_hidden_layers
        return CallPlan(tuple(plan_picture(pruner, *pair, layers) for pair in layouts), layouts, pruner)

    def asked(
        self,
        plan: CallPlan,
        questions: Sequence[str | None],
        of_row: Sequence[int] | None = None,
        sample_ids: Sequence[int] | None = None,
    ) -> CallPlan:
        """The plan with the questions, embedded for its method: on a GPU the text tower runs beside the next step.

        Args:
            questions: what each row of the batch asks, ``None`` where it could not be read.
            of_row: for each picture its row; ``None`` where every picture has its own, in order.
            sample_ids: for each picture a number that seeds random methods.

        Raises:
            ValueError: the method reads the question, and there is none, or no way to read it.
        """
        return self.questions.ask(plan, questions, of_row, sample_ids)

    def relevance_offer(self) -> Offer:
        """Which sources of relevance can be had here, and why the others cannot."""
        return self.questions.offer()

    @property
    def questions(self) -> QuestionSide:
        """What reads and embeds questions; its tokenizer is the model's, or one that a method was attached with."""
        tokenizer = self.tokenizer
        if tokenizer is None and self.attached_pruner is not None:
            tokenizer = self.attached_pruner.tokenizer
        return QuestionSide(self.vision, self.get_input_embeddings(), tokenizer, self.announcer)

    @property
    def announcer(self) -> Announcer:
        """Tells once where the question is read."""
        return self.__dict__.setdefault("_announcer", Announcer())

    def _visual_tokens(self, shown: Visuals | EncodedImages, plan: CallPlan) -> tuple[list[KeptTokens], list[Tensor]]:
        """For each picture and video what is kept of it, and its tokens (t, d).

        Pictures go through the tower and the selection together, and so do videos, whose views have fewer tokens.
        """
        vision, is_encoded = self.vision, isinstance(shown, EncodedImages)
        kept: dict[int, KeptTokens] = {}
        tokens: dict[int, Tensor] = {}
        for group in [list(range(len(shown)))] if is_encoded else shown.groups():
            encoded = shown
            if not is_encoded:
                encoded = vision.encode(shown.pick(group), [plan.layouts[number] for number in group])
            # Script: choose the visual tokens that are kept, by the question of the row that a picture is in
            chosen = select_tokens(vision, plan, encoded, group)
            kept |= zip(group, chosen, strict=True)
            tokens |= zip(group, vision.gather(encoded, chosen), strict=True)
        return [kept[i] for i in range(len(shown))], [tokens[i] for i in range(len(shown))]

    def check_prompt(
        self,
        input_ids: Tensor,
        images: Shown,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        pruner: Method | None = None,
        modalities: str | Sequence[str] | None = None,
    ) -> None:
        """Raise ValueError if a prompt (1, L) and its images do not match or exceed the context, before any work."""
        match_images([int((input_ids == IMAGE_TOKEN_INDEX).sum())], len(images))
        shown = self._shown(images, image_sizes, modalities)
        if not isinstance(shown, EncodedImages):
            shown = shown.in_prompts([range(len(shown))])
        pictures = self.plan(shown, pruner).pictures
        visual = sum(picture.count for picture in pictures)
        self._check_length(input_ids.shape[1] + visual - len(pictures), truncate=False)

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
        images: Shown | None,
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

    # --- attaching -------------------------------------------------------------------------------------------------

    def attach_pruner(
        self,
        method: Method,
        processor: Any = None,
        *,
        query: str | Sequence[str] | None = None,
        **options: Any,
    ) -> AttachedPruner:
        """Prune with ``method`` in every call that brings no ``pruner=`` of its own, until the handle's ``remove()``.

        Args:
            processor: a tokenizer, or a processor that holds one; read only where the model has no tokenizer.
            query: the question for all calls; a call's own ``query=`` wins.

        Raises:
            TypeError: no method, or an option that this host does not have.
            ValueError: the method cannot be used with this model.
            RuntimeError: a pruner is attached to this model already.
        """
        if not isinstance(method, Method):
            raise TypeError(f"only a pruning method can be attached (llava.pruning.get_pruner), got {method!r}")
        if options:
            raise TypeError(
                f"attaching to a LLaVA checkpoint in the original format takes processor and query, got "
                f"{', '.join(options)}; where a joint space lies is said when it is loaded (joint_space_path)"
            )
        if self.attached_pruner is not None:
            raise RuntimeError("a pruner is attached to this model already: remove it first (its handle's remove())")
        if isinstance(method, DecoderPruner):
            check_host(self.get_model())
        handle = AttachedPruner(self, method, getattr(processor, "tokenizer", processor), query)
        self.attached_pruner = handle
        try:
            settle(method, self.relevance_offer())
        except ValueError:
            handle.remove()
            raise
        return handle


def spans_of(ids: Tensor, pictures: Sequence[tuple[PicturePlan, KeptTokens]]) -> list[PictureSpan]:
    """Where the pictures of a row (L,) are once they are spliced in."""
    spans, shift = [], 0
    for place, (plan, kept) in zip((ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist(), pictures, strict=True):
        count = len(kept.sequence)
        spans.append(PictureSpan(place + shift, count, min(plan.target, count), plan.choosable))
        shift += count - 1
    return spans
