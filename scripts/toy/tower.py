"""The toy's CLIP: its size, and what makes its patches readable.

At inference LLaVA takes the patch features from the *second-to-last* layer and never runs the last one; the pruner
takes ``visual_projection(post_layernorm(features))`` against the projected text of the whole question. Here the layers
that are read learn to tell what each patch shows, with help of texts that find their patches; the last layer adds
nothing meanwhile. Norm, projections and text tower of this stage are scaffolding: stage 2 (train_joint.py) throws them
away, and relates the tower to text anew by the class token of a new last layer.

A patch is told the shape and the colour that it is part of, and where it is; of a sign it is told its own character
and which in the row that is, never the whole text: reading takes several tokens, as it does in large models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scenes import CHARACTERS, COLOR_NAMES, TEXTS
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from views import GRID, IGNORE, PATCH, SHAPE_CLASSES

THING_CLASSES = SHAPE_CLASSES.index("sign") + 1
LONGEST_TEXT = max(map(len, TEXTS))


def clip_config(vocabulary: int) -> CLIPConfig:
    """128 wide, five vision layers (four are used), two text layers, 64 joint dimensions."""
    text = {
        "vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "projection_dim": 64,
    }  # fmt: skip
    vision = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4,
        "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu", "projection_dim": 64,
    }  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)


def frequencies(width: int) -> Tensor:
    """Of the position embeddings, in radians per patch, for wavelengths from 5 to 125 patches: (width / 4,)."""
    return 1.25 * 0.04 ** torch.linspace(0, 1, width // 4)


def grid_positions(width: int) -> Tensor:
    """Sines and cosines of row and column: (576, width)."""
    phases = torch.arange(GRID)[:, None] * frequencies(width)
    line = torch.cat((phases.sin(), phases.cos()), dim=1)  # (24, width / 2)
    rows, columns = line[:, None].expand(-1, GRID, -1), line[None].expand(GRID, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def column_shift(width: int, columns: int) -> Tensor:
    """The matrix (width, width) that turns a patch's `grid_positions` into those of one ``columns`` further right."""
    angles = columns * frequencies(width)
    cosine, sine = angles.cos().diag(), angles.sin().diag()
    turned = torch.cat((torch.cat((cosine, sine), dim=1), torch.cat((-sine, cosine), dim=1)))
    return torch.block_diag(torch.eye(width // 2), turned)


@torch.no_grad()
def new_clip(vocabulary: int) -> CLIPModel:
    """An untrained tower whose last vision layer is the identity.

    CLIP's own initialisation needs millions of pictures to find out which patches are neighbours. Here positions begin
    as sines and cosines and keys as copies of queries, so that attention is local from the first step on. In two of
    the four heads the keys look one patch to the left and one to the right; after 500 steps 96 % of the shapes on
    held-out pictures were read so, 92 % without.
    """
    clip = CLIPModel(clip_config(vocabulary))
    vision, width = clip.vision_model, clip.config.vision_config.hidden_size
    vision.embeddings.position_embedding.weight[1:] = grid_positions(width)
    shifts = [column_shift(width, columns) for columns in (0, 0, 1, -1)]
    for layer in vision.encoder.layers:
        nn.init.normal_(layer.self_attn.q_proj.weight, std=0.06)
        heads = layer.self_attn.q_proj.weight.chunk(len(shifts))
        layer.self_attn.k_proj.weight.copy_(torch.cat([q @ shift for q, shift in zip(heads, shifts, strict=True)]))
    last = vision.encoder.layers[-1]
    for linear in (last.self_attn.out_proj, last.mlp.fc2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    last.requires_grad_(False)
    return clip


@torch.no_grad()
def whiten_patches(clip: CLIPModel, pixels: Tensor, labels: Tensor) -> None:
    """Begin the patch embedding with the whitened principal components of the patches that show things.

    Brightness varies a thousand times more than the strokes of a digit; whitened, both are as loud as positions.
    pixels (B, 3, 336, 336), labels (B, 5, 576).
    """
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)[labels[:, 1] >= 0]  # (N, 588)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    weight = clip.vision_model.embeddings.patch_embedding.weight
    width = weight.shape[0]
    filters = vectors[:, -width:] / (values[-width:] + 0.02).sqrt()
    weight.copy_(filters.T.reshape(weight.shape))


def vision_features(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """pixels (B, 3, 336, 336) -> features (B, 577, 128): the output of the second-to-last layer, class token first."""
    vision = clip.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in vision.encoder.layers[:-1]:
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


def joint_vision(clip: CLIPModel, features: Tensor) -> Tensor:
    """features (..., 128) -> unit vectors in the joint space (..., 64)."""
    return F.normalize(clip.visual_projection(clip.vision_model.post_layernorm(features)).float(), dim=-1)


def joint_text(clip: CLIPModel, tokens: dict[str, Tensor]) -> Tensor:
    """Tokenised questions -> unit vectors in the joint space (Q, 64)."""
    pooled = clip.text_model(**tokens).pooler_output
    return F.normalize(clip.text_projection(pooled).float(), dim=-1)


class PatchHeads(nn.Module):
    """Linear read-outs of each patch used only in training: what covers it, the character on it, and where it is."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.shape = nn.Linear(width, len(SHAPE_CLASSES))
        self.color = nn.Linear(width, len(COLOR_NAMES))
        self.letter = nn.Linear(width, len(CHARACTERS))
        self.order = nn.Linear(width, LONGEST_TEXT)
        self.place = nn.Linear(width, 2)


@dataclass
class Queries:
    """Q texts of a batch of B views.

    ``tokens`` of the text tower; ``classes`` (Q, 2, 3): up to two descriptors as (shape, colour, text) class numbers,
    -1 = open, -2 in the whole row = no second descriptor; ``views`` (Q,): the view each was asked about.
    """

    tokens: dict[str, Tensor]
    classes: Tensor
    views: Tensor


def descriptor_masks(labels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Where each text's things are: labels (B, 5, 576), classes (Q, 2, 3) -> asked patches (Q, B, 576) bool,
    present (Q, B) bool (every descriptor of the text matched somewhere in the view).
    """
    wanted = classes[:, :, None, :, None]  # (Q, 2, 1, 3, 1)
    agrees = (wanted == labels[None, None, :, :3].long()) | (wanted == -1)
    is_thing = (labels[:, 0] >= 0) & (labels[:, 0] < THING_CLASSES)
    matched = agrees.all(3) & is_thing  # (Q, 2, B, 576)
    used = classes[:, :, 0] != -2
    present = (matched.any(-1) | ~used[..., None]).all(1)
    return (matched & used[:, :, None, None]).any(1), present


def patch_loss(heads: PatchHeads, hidden: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """hidden (B, 576, 128) after the final norm, labels (B, 5, 576) -> loss, and accuracies on labelled patches."""
    line = torch.linspace(-1, 1, GRID)
    places = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(1, -1, 2)
    guess = heads.place(hidden).float()
    place = F.mse_loss(guess, places.expand_as(guess))

    hidden, labels = hidden.flatten(0, 1), labels.transpose(0, 1).flatten(1).long()
    thing = (labels[0] >= 0) & (labels[0] < THING_CLASSES)
    # Half of the patches and more are background; they would drown the objects.
    rest = (labels[0] >= THING_CLASSES) & (torch.rand(thing.shape) < 0.2)
    rows = {
        "shape": (heads.shape, labels[0], thing | rest),
        "color": (heads.color, labels[1], thing),
        "letter": (heads.letter, labels[3], labels[3] != IGNORE),
        "order": (heads.order, labels[4], labels[4] != IGNORE),
    }
    losses, seen = [], {}
    for name, (head, target, chosen) in rows.items():
        logits = head(hidden[chosen]).float()
        losses.append(F.cross_entropy(logits, target[chosen]) if chosen.any() else logits.sum())
        seen[name] = (logits.argmax(-1) == target[chosen]).float().mean().item()
    return sum(losses) + 2 * place, {**seen, "place": place.item()}


def contrastive_loss(
    scale: Tensor, bias: Tensor, patches: Tensor, whole: Tensor, texts: Tensor, queries: Queries, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Texts against pictures: patches (B, 576, 64), whole (B, 64), texts (Q, 64), all unit vectors.

    * find: within its own view, the similarity mass of a text belongs evenly on the patches of what it asks about;
    * tell: over the batch, the best patch of a view says whether the view has what the text asks about;
    * whole: the same with the class token, weakly, so that its attention has a reason to rest on objects.
    """
    similarity = torch.einsum("qe,bne->qbn", texts, patches)
    asked, present = descriptor_masks(labels, queries.classes)
    rows = torch.arange(len(texts))
    own, own_mask = scale * similarity[rows, queries.views], asked[rows, queries.views]
    share = own_mask.float() / own_mask.sum(-1, keepdim=True).clamp(min=1)
    found = own_mask.any(-1)
    find = -(share * own.log_softmax(-1)).sum(-1)[found].mean()

    best = scale * (similarity.amax(-1) - bias)
    target = present.float()
    weight = torch.where(present, (1 - target.mean()) / target.mean().clamp(min=1e-3), torch.ones(()))
    tell = F.binary_cross_entropy_with_logits(best, target, weight=weight.clamp(max=20))
    overall = F.binary_cross_entropy_with_logits(scale * (texts @ whole.T - bias), target, weight=weight.clamp(max=20))
    return find, tell, overall


def relevance_auc(similarity: Tensor, mask: Tensor) -> Tensor:
    """Chance that an asked patch outranks another: similarity, mask (Q, 576) -> (Q,), nan where nothing is asked."""
    order = similarity.argsort(dim=-1)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(1, order.shape[-1] + 1).expand_as(order))
    positives, negatives = mask.sum(-1), (~mask).sum(-1)
    area = (rank * mask).sum(-1) - positives * (positives + 1) / 2
    return torch.where(positives > 0, area / (positives * negatives).clamp(min=1), torch.nan)
