"""Inputs that hold every field any method before the decoder reads."""

import dataclasses

import torch

from llava.pruning import PruningInputs, list_pruners, pruner_class

TOKENS = 49


BEFORE_DECODER = [name for name in list_pruners() if pruner_class(name).place != "decoder"]


def inputs_for(name, **options):
    """`make_inputs`, with scores of a caller for a method that reads nothing else of the question.

    Others would take them instead of what they compare themselves.
    """
    inputs = make_inputs(**options)
    if "relevance" not in pruner_class(name)().needs:
        return inputs
    return dataclasses.replace(inputs, relevance=inputs.features[..., 0].float())


def make_inputs(seed=0, views=3, tokens=TOKENS, kind="iid", valid=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    features, image = draw(views, tokens, 24), draw(views, tokens, 10)
    side = max(int(tokens**0.5), 1)
    if kind == "duplicated":
        features[:, tokens // 2 :] = features[:, : tokens - tokens // 2].clone()
    elif kind == "zero":
        features[:, ::2], image[:, ::3] = 0, 0
    elif kind == "constant":
        features[:], image[:] = features[:, :1].clone(), image[:, :1].clone()
    elif kind == "not finite":
        features[:, 5], image[:, 7] = torch.inf, torch.nan
    return PruningInputs(
        features,
        encoder_features=draw(views, tokens, 12),
        image_embeds=image,
        text_embeds=draw(views, 2, 10),
        query_embeds=draw(views, 4, 24),
        valid=valid,
        class_attention=draw(views, 3, tokens).float().softmax(-1),
        mean_attention=draw(views, 3, tokens).float().softmax(-1),
        key_metric=draw(views, tokens, 6),
        class_features=draw(views, 12),
        pixels=draw(views, 3, 2 * side, 2 * side),
        encode=encode_patches,
        pictures=torch.arange(views),
        view_ids=torch.arange(views) + 7,
    )


def encode_patches(pixels):
    """A tower and projector of patches of 2 x 2 pixels: (V, 3, 2 h, 2 w) -> (V, h w, 24)."""
    return torch.nn.functional.avg_pool2d(pixels.float(), 2).flatten(2).mT.repeat(1, 1, 8).to(pixels.dtype)
