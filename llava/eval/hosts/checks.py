"""What is asked of a class with a pruner attached, on a tiny random instance of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava.eval.hosts.pictures import Prompts, prompts_for
from llava.eval.hosts.tiny import IMAGE, VOCABULARY, build, small_config
from llava.integrations import onevision_1_5
from llava.integrations.transformers import UnsupportedModelError
from llava.integrations.transformers.host import find_host
from llava.integrations.transformers.joint_space import TOWERS
from llava.pruning import get_pruner

NEW = 5  # tokens of an answer
KEEP, ALL = 3, 500  # tokens of a view
QUESTION = "w7 w8"
OF_THE_CALL = {"attention_mask", "position_ids", "past_key_values", "cache_position", "use_cache"}


@dataclass
class Outcome:
    """What became of a class.

    Args:
        status: "works", "refused" when attaching, "unbuilt" here, or "broken": attached, and failed a check.
        reason: why, for all but the first.
        views: of each of the three pictures.
        token: what a visual token is.
        relevance: the source that "auto" takes for the question, without ``clip=`` or ``siglip=``.
        deep: visual features that enter the language model elsewhere than in its embeddings.
        gradients: whether a loss reaches the vision side through kept tokens.
        failed: checks that failed, with what came.
        notes: what the unpruned class itself does otherwise than others.
    """

    model_type: str
    name: str
    status: str
    reason: str = ""
    views: str = ""
    token: str = ""
    relevance: str = ""
    deep: str = ""
    gradients: str = ""
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def word_tokenizer() -> Any:
    """A tokenizer whose tokens are the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3", pad_token="w0")


def check_class(model_type: str, name: str) -> Outcome:
    """Build a tiny instance of a class, attach pruners to it, and check what comes of it."""
    try:
        model = build(class_called(name), small_config(model_type))
    except Exception as error:
        return Outcome(model_type, name, "unbuilt", f"no tiny instance: {told(error)}")
    try:
        find_host(model)
    except UnsupportedModelError as error:
        return Outcome(model_type, name, "refused", error.reason)
    try:
        prompts = prompts_for(model)
        with torch.no_grad():
            model(**prompts.batch())
    except Exception as error:
        return Outcome(model_type, name, "unbuilt", f"unpruned, it does not run here: {told(error)}")
    return Checks(model_type, name, model, prompts).outcome()


def class_called(name: str) -> type[nn.Module]:
    """A class of the library, or one of ours of its kind."""
    import transformers

    return getattr(onevision_1_5 if hasattr(onevision_1_5, name) else transformers, name)


def told(error: BaseException) -> str:
    """An error in one line."""
    text = error.reason if isinstance(error, UnsupportedModelError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"


class Checks:
    """The checks of one class; each method named ``check_...`` returns what is wrong, or ``None``."""

    def __init__(self, model_type: str, name: str, model: nn.Module, prompts: Prompts) -> None:
        self.model, self.prompts = model, prompts
        self.host = find_host(model)
        self.result = Outcome(model_type, name, "works")

    def outcome(self) -> Outcome:
        self.unpruned = self._answers(self.prompts.batch())
        checks: Sequence[tuple[str, Callable[[], str | None]]] = (
            ("keeping everything is the unpruned model", self.check_everything_kept),
            ("the cache holds text and kept tokens", self.check_cache),
            ("with and without a cache the answers are equal", self.check_uncached),
            ("a row alone is the row in its batch", self.check_alone),
            ("all planes are gathered by one list", self.check_planes),
            ("the question is read", self.check_relevance),
            ("means are made on all planes, other made tokens refused", self.check_made),
            ("a loss reaches as far as unpruned", self.check_gradients),
        )
        for title, check in checks:
            try:
                problem = check()
            except Exception as error:
                problem = told(error)
            if problem is not None:
                self.result.failed.append(f"{title}: {problem}")
        if self.result.failed:
            self.result.status, self.result.reason = "broken", self.result.failed[0]
        return self.result

    # --- calls -----------------------------------------------------------------------------------------------------

    def _generate(self, arguments: dict[str, Tensor], **options: Any) -> Any:
        with torch.no_grad():
            return self.model.generate(**arguments, max_new_tokens=NEW, do_sample=False, **options)

    def _answers(self, arguments: dict[str, Tensor], **options: Any) -> Tensor:
        return self._generate(arguments, **options)[:, arguments["input_ids"].shape[1] :]

    def _logits(self, arguments: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return self.model(**arguments).logits

    def _pruned(self, keep: int = KEEP, method: str = "divprune", **options: Any) -> Any:
        return get_pruner(method, keep_tokens=keep)(self.model, **options)

    @contextmanager
    def _door(self) -> Iterator[dict[str, Any]]:
        """What the language model is last called with inside the block; a capture (capture.py) comes before that."""
        seen: dict[str, Any] = {}

        def look(_: nn.Module, __: tuple, named: dict[str, Any]) -> None:
            seen.clear()
            seen.update(named)

        hook = self.host.language_model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield seen
        finally:
            hook.remove()

    # --- checks ----------------------------------------------------------------------------------------------------

    def check_everything_kept(self) -> str | None:
        arguments = self.prompts.batch()
        real = arguments["attention_mask"].bool()
        expected = self._logits(arguments)
        with self._pruned(ALL):
            found, answers = self._logits(self.prompts.batch()), self._answers(self.prompts.batch())
        if found.shape != expected.shape:
            return f"logits {tuple(found.shape)}, unpruned {tuple(expected.shape)}"
        if not torch.equal(found[real], expected[real]):
            return f"logits differ by up to {float((found[real] - expected[real]).abs().max()):.1e}"
        return None if torch.equal(answers, self.unpruned) else "other answers"

    def check_cache(self) -> str | None:
        arguments = self.prompts.batch()
        length = arguments["attention_mask"].sum(-1)
        with self._pruned() as handle:
            output = self._generate(arguments, return_dict_in_generate=True)
            kept = list(handle.kept)
        if len(kept) != 3:
            return f"{len(kept)} pictures were found of 3"
        for one in kept:
            if any(
                count != min(KEEP, size) for count, size in zip(one.per_view, one.picture.view_sizes(), strict=True)
            ):
                return f"{one.per_view} tokens kept of views of {one.picture.view_sizes()}"
            length[one.picture.row] -= len(one.picture.columns) - int(one.kept.sum())
        self._describe(kept)
        if all(one.kept.all() for one in kept):
            return "nothing was dropped"
        held, wanted = int(output.past_key_values.get_seq_length()), int(length.max()) + NEW - 1
        return None if held == wanted else f"{held} tokens, expected {wanted}"

    def check_uncached(self) -> str | None:
        try:
            unpruned = self._answers(self.prompts.batch(), use_cache=False)
        except Exception as error:
            self.result.notes.append(f"unpruned, it does not run without a cache ({type(error).__name__})")
            return None
        with self._pruned():
            cached = self._answers(self.prompts.batch())
            uncached = self._answers(self.prompts.batch(), use_cache=False)
        if torch.equal(cached, uncached):
            return None
        if not torch.equal(unpruned, self.unpruned):
            self.result.notes.append("unpruned, too, it answers otherwise without a cache")
            return None
        return f"{cached.tolist()} and {uncached.tolist()}"

    def check_alone(self) -> str | None:
        with self._pruned():
            together = self._answers(self.prompts.batch())
            alone = torch.cat([self._answers(self.prompts.single(row)) for row in (0, 1)])
        if torch.equal(alone, together):
            return None
        unpruned = torch.cat([self._answers(self.prompts.single(row)) for row in (0, 1)])
        if not torch.equal(unpruned, self.unpruned):
            self.result.notes.append("unpruned, too, a row alone is answered otherwise than in its batch")
            return None
        return f"{alone.tolist()}, in the batch {together.tolist()}"

    def check_planes(self) -> str | None:
        arguments = self.prompts.single(1)
        visual = arguments["input_ids"][0] == IMAGE
        with self._door() as whole:
            self._logits(arguments)
        with self._pruned() as handle, self._door() as short:
            self._logits(self.prompts.single(1))
        stays = torch.ones_like(visual)
        for one in handle.kept:
            stays[one.picture.columns] = one.kept
        deep = []
        for name, before in whole.items():
            if name in OF_THE_CALL or before is None:
                continue
            planes = before if isinstance(before, (list, tuple)) else [before]
            found = short.get(name)
            found = found if isinstance(found, (list, tuple)) else [found]
            if not all(isinstance(plane, Tensor) and plane.ndim > 1 for plane in planes):
                continue
            for plane, own in itertools.zip_longest(planes, found):
                if plane.shape[:2] == (1, len(visual)):
                    expected = plane[:, stays]
                elif len(plane) == int(visual.sum()):
                    expected = plane[stays[visual]]
                else:
                    return f"{name} {tuple(plane.shape)} is neither of all tokens nor of the visual ones"
                if own is None or not torch.equal(expected, own):
                    return f"{name} is not that of the kept tokens"
            if name not in ("inputs_embeds", "visual_pos_masks", "input_ids"):
                deep.append(f"`{name}`")
        self.result.deep = ", ".join(deep)
        return self._mask_problem(whole.get("attention_mask"), short.get("attention_mask"), stays)

    def _mask_problem(self, whole: Any, short: Any, stays: Tensor) -> str | None:
        """Who sees whom among the kept tokens must be as before; windows, which count tokens, are left out."""
        whole, short = (mask.get("full_attention") if isinstance(mask, dict) else mask for mask in (whole, short))
        if not all(isinstance(mask, Tensor) and mask.ndim == 4 for mask in (whole, short)):
            return None
        if not torch.equal(whole[:, :, stays][:, :, :, stays], short):
            return "the attention mask is not that of the kept tokens"
        return None

    def check_relevance(self) -> str | None:
        with self._pruned(method="script", processor=word_tokenizer()) as handle:
            self._generate(self.prompts.batch() | {"query": QUESTION})
            choice = handle.relevance
            scored = all(one.scores is not None or one.kept.all() for one in handle.kept)
        self.result.relevance = f"`{choice.source}`"
        if choice.source == "language" and "embeddings alone" in choice.reason:
            self.result.relevance += ", words alone"
        if self._may_stand_in_a_joint_space():
            self.result.relevance = f"`clip` if named or known, else {self.result.relevance}"
        return None if scored else "a picture has no relevance"

    def _may_stand_in_a_joint_space(self) -> bool:
        """Whether a token is one patch of a CLIP or SigLIP, handed to the projector by one layer."""
        config = self.model.config
        tower = getattr(getattr(config, "vision_config", None), "model_type", None)
        one_layer = not isinstance(getattr(config, "vision_feature_layer", None), (list, tuple))
        has_projector = hasattr(self.host.base, "multi_modal_projector")
        return tower in TOWERS.values() and one_layer and has_projector and self.result.token == "a patch"

    def check_made(self) -> str | None:
        """A mean of tokens is the same mean in deeper features; a token of another kind has none, and is refused."""
        if "deepstack" not in self.result.deep:
            return None
        try:
            get_pruner("visionzip", keep_tokens=KEEP).attach(self.model).remove()
        except ValueError as error:
            if "makes tokens" not in str(error):
                return told(error)
        else:
            return "a method whose tokens are no means attaches"
        with self._door() as whole:
            self._logits(self.prompts.single(1))
        method = get_pruner("restore", keep_tokens=KEEP, method="divprune")
        with method(self.model) as handle, self._door() as short:
            self._logits(self.prompts.single(1))
        stays = whole["visual_pos_masks"].new_zeros(whole["visual_pos_masks"].shape[1:])
        for one in handle.kept:
            stays[one.picture.columns] = one.kept
        for plane, found in zip(whole["deepstack_visual_embeds"], short["deepstack_visual_embeds"], strict=True):
            dense = plane.new_zeros(len(stays), plane.shape[-1])
            dense[whole["visual_pos_masks"][0]] = plane
            expected = dense.clone()
            for made in (made for one in handle.kept for made in one.made):
                groups = [(row > 0).nonzero().flatten() for row in made.weights]
                means = [dense[made.among[group]].mean(0) for group in groups]
                expected[made.columns] = torch.stack([*dense[made.kept], *means])
            if not torch.allclose(found, expected[stays], rtol=1e-5, atol=1e-5):
                return f"deep features are not the means, by up to {float((found - expected[stays]).abs().max()):.1e}"
        return None

    def check_gradients(self) -> str | None:
        self.model.requires_grad_(True)
        try:
            unpruned = self._reach()
            with self._pruned():
                pruned = self._reach()
        finally:
            self.model.requires_grad_(False)
        self.result.gradients = "as unpruned" if unpruned[1] else "none unpruned"
        return None if unpruned == pruned else f"(language model, vision side) {pruned}, unpruned {unpruned}"

    def _reach(self) -> tuple[bool, bool]:
        """Whether a loss reaches the language model and the vision side."""
        arguments = self.prompts.single(0)
        labels = arguments["input_ids"].masked_fill(arguments["input_ids"] == IMAGE, -100)
        self.model.zero_grad()
        self.model(**arguments, labels=labels).loss.backward()
        language = {id(parameter) for parameter in self.host.language_model.parameters()}
        reached = [False, False]
        for parameter in self.host.base.parameters():
            if parameter.grad is not None and bool(parameter.grad.any()):
                reached[id(parameter) not in language] = True
        return reached[0], reached[1]

    # --- what the table says ---------------------------------------------------------------------------------------

    def _describe(self, kept: Sequence[Any]) -> None:
        views = sorted({one.picture.count for one in kept})
        separators = any(one.picture.views.eq(-1).any() for one in kept)
        tiled = self.prompts.pictures.form == "tiles"
        self.result.views = ("overview and tiles" if tiled else "picture") + (", newlines apart" if separators else "")
        if views != [1] and not tiled:
            self.result.views = f"{views} views"
        patches, counts = self.prompts.pictures.patches, self.prompts.counts
        config = self.model.config
        projector = getattr(self.host.base, "multi_modal_projector", nn.Identity())
        if hasattr(config, "perceiver_config") or any(name == "query" for name, _ in projector.named_parameters()):
            self.result.token = "a query of a resampler"
        elif patches is None:
            self.result.token = "a patch"
        else:
            ratios = {patch / count for patch, count in zip(patches, counts, strict=True)}
            ratio = ratios.pop()
            if ratios or ratio != int(ratio):
                self.result.token = "patches, and marks between them"
            else:
                self.result.token = "a patch" if ratio == 1 else f"{int(ratio)} patches"
