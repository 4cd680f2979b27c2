"""Relevance in the decoder's own space: two distributions over a view's tokens, averaged.

Visual tokens H (n, d) and the question's words E (t, d) are compared exactly as the decoder receives them, by two
witnesses. *Words*: where the cosine of each word with the tokens stands out. *q.k*: what the decoder's first softmax
attention looks up, each head with its own queries and keys, without rotary embedding. Either alone can be at chance
where the other is not; their average was not on either of the two beds that this project measured::

    c[i, :]    = cos(E_i, H_j), each row less its mean over j, divided by its standard deviation over j
    w[i, :]    = softmax over j of c[i, :]
    g[i]       = log n - entropy of w[i, :]                       a word that points nowhere says little
    p_words[j] = sum over i of g[i] w[i, j] / sum over i of g[i]  (plain mean where all g are 0)
    s[h, i, j] = q[i, h] . k[j, h // groups] * scaling
    a[h, i, :] = softmax over j of s[h, i, :]                     a head's offset cancels, its scale stays
    p_qk[j]    = mean over h of max over i of a[h, i, j], divided by its sum
    p          = (p_words + p_qk) / 2
    r_j        = log(1 + n p_j)                                   0 where nothing points, log 2 at uniform

Conventions as in `llava.pruning.functional`: ``B`` views that do not see each other, ``n`` tokens each, ``valid``
(B, n) False where a token takes no part; n in the formulas counts the others. Half precision is computed in float32
(float64 stays). Nothing is ever NaN: a token or a word whose values are not finite is looked at by nobody and says
nothing, and where no word and no head is left, all tokens are alike.

q.k on multimodal decoders: HAWK (arXiv 2604.07812), which weighs heads by a calibration: see `heads.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.functional import cosine_similarity, without_autocast, working_dtype

SMALLEST_SPREAD = 1e-6  # of cosines; below it float32 shows its own rounding
LARGEST_BLOCK = 1 << 24  # scores (B, heads, t, n) that are held at a time


@without_autocast()
def word_distribution(
    words: Tensor, tokens: Tensor, word_mask: Tensor | None = None, valid: Tensor | None = None, weigh: bool = True
) -> Tensor:
    """p_words: where the words stand out among the tokens.

    Args:
        words: (B or 1, t, d) input embeddings E of the question's words, any floating dtype.
        tokens: (B, n, d) visual tokens H as the decoder receives them.
        word_mask: (B or 1, t) bool, False at padding.
        valid: (B, n) bool, False at tokens that take no part.
        weigh: weigh each word by what it tells, g; False takes the plain mean over words.

    Returns:
        (B, n), sums to 1 over the valid tokens of each view that has any, 0 elsewhere.
    """
    cosines = cosine_similarity(tokens, words).mT.contiguous()  # (B, t, n)
    shown = torch.ones_like(tokens[..., 0], dtype=torch.bool) if valid is None else valid
    shown = shown[:, None]  # (B, 1, n)
    count = shown.sum(-1, keepdim=True)
    centred = (cosines - (cosines * shown).sum(-1, keepdim=True) / count.clamp(min=1)) * shown
    spread = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    flat = spread < SMALLEST_SPREAD
    standardised = torch.where(flat, 0.0, centred / spread.masked_fill(flat, 1.0))
    rows = standardised.masked_fill(~shown, -torch.inf).softmax(-1).nan_to_num(nan=0.0)  # nan: no valid token
    weights = torch.ones_like(rows[..., 0])
    if weigh:
        entropy = torch.special.entr(rows).sum(-1)
        told = (count[..., 0].clamp(min=1).log() - entropy).clamp(min=0.0).masked_fill(flat[..., 0], 0.0)
        told = told if word_mask is None else told * word_mask
        weights = torch.where(told.sum(-1, keepdim=True) > 0, told, 1.0)
    if word_mask is not None:
        weights = weights * word_mask
    return as_distribution((weights[..., None] * rows).sum(1), valid)


def attention_distribution(
    queries: Tensor,
    keys: Tensor,
    scaling: float | None = None,
    word_mask: Tensor | None = None,
    valid: Tensor | None = None,
    head_weights: Tensor | None = None,
) -> Tensor:
    """p_qk: where the heads of an attention look from the words. Arguments as of `attention_mass`.

    Returns:
        (B, n), sums to 1 over the valid tokens of each view that has any, 0 elsewhere.
    """
    return as_distribution(attention_mass(queries, keys, scaling, word_mask, valid, head_weights), valid)


@without_autocast()
def attention_mass(
    queries: Tensor,
    keys: Tensor,
    scaling: float | None = None,
    word_mask: Tensor | None = None,
    valid: Tensor | None = None,
    head_weights: Tensor | None = None,
) -> Tensor:
    """p_qk before it is made a distribution: the sum over heads of the maximum over words of a[h, i, j].

    Under tensor parallelism a rank gives its own heads; the sum of all ranks' masses, given to `as_distribution`,
    is what one process with all heads gets. No count of heads is needed: it cancels.

    Args:
        queries: (B or 1, t, h, d_h) of the words, without rotary embedding, any floating dtype.
        keys: (B, n, k, d_h) of the tokens; head i reads key head i // (h // k).
        scaling: of the products; ``None`` takes ``d_h ** -0.5``.
        word_mask: (B or 1, t) bool, False at padding.
        valid: (B, n) bool, False at tokens that take no part.
        head_weights: (h,) of the heads that are given, at least 0; ``None`` weighs all alike.

    Returns:
        (B, n), 0 at tokens that take no part.
    """
    views, n, groups, _ = keys.shape
    per_group, words = queries.shape[2] // groups, queries.shape[1]
    mass = keys.new_zeros(views, n, dtype=working_dtype(keys.dtype))
    at_once = max(1, LARGEST_BLOCK // max(views * per_group * words * n, 1))
    for start in range(0, groups, at_once):
        own_keys, own_heads = slice(start, start + at_once), slice(start * per_group, (start + at_once) * per_group)
        maps = head_maps(queries[:, :, own_heads], keys[:, :, own_keys], scaling, word_mask, valid)
        weights = 1.0 if head_weights is None else head_weights[own_heads].to(maps)[:, None]
        mass += (maps * weights).sum(1)
    return mass


def head_maps(
    queries: Tensor,
    keys: Tensor,
    scaling: float | None = None,
    word_mask: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Where each head looks from the words: the maximum over words of a[h, i, j]. Arguments as of `attention_mass`.

    Returns:
        (B, h, n), 0 at tokens that take no part.
    """
    views, n, groups, width = keys.shape
    dtype = working_dtype(keys.dtype)
    by_group = queries.to(dtype).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # (B or 1, k, h / k, t, d_h)
    keys = keys.to(dtype).permute(0, 2, 3, 1)  # (B, k, d_h, n)
    scores = (by_group.flatten(2, 3) @ keys) * (width**-0.5 if scaling is None else scaling)
    scores = scores.unflatten(2, by_group.shape[2:4])  # (B, k, h / k, t, n)
    scores.masked_fill_(~scores.isfinite(), -torch.inf)
    if valid is not None:
        scores.masked_fill_(~valid[:, None, None, None], -torch.inf)
    rows = scores.softmax(-1).nan_to_num_(nan=0.0)  # nan: nothing finite to look at
    if word_mask is not None:
        rows.masked_fill_(~word_mask[:, None, None, :, None], 0.0)
    rows = rows.flatten(1, 2)
    return rows.amax(-2) if rows.shape[-2] else rows.new_zeros(views, rows.shape[1], n)


def as_distribution(mass: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B, n) masses divided by their sum; a view without mass becomes all equal over its valid tokens."""
    shown = torch.ones_like(mass) if valid is None else valid.to(mass.dtype)
    total = mass.sum(-1, keepdim=True)
    some = total > 0
    uniform = shown / shown.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(some, mass / total.masked_fill(~some, 1.0), uniform)


def language_relevance(p_words: Tensor | None, p_qk: Tensor | None, valid: Tensor | None = None) -> Tensor:
    """r = log(1 + n p) with p the average of the distributions that are given, each (B, n).

    Args:
        p_words, p_qk: `word_distribution`, `attention_distribution`; one of them may be ``None``.
        valid: (B, n) bool, False at tokens that take no part; n counts the others.

    Returns:
        (B, n) raw relevance, log 2 at uniform, 0 where nothing points and at tokens that take no part.
    """
    given = [p for p in (p_words, p_qk) if p is not None]
    if not given:
        raise ValueError("language_relevance needs p_words, p_qk or both")
    p = given[0] if len(given) == 1 else (given[0] + given[1].to(given[0].device)) / 2
    count = p.shape[-1] if valid is None else valid.sum(-1, keepdim=True)
    relevance = torch.log1p(count * p)
    return relevance if valid is None else relevance.masked_fill(~valid, 0.0)


def unit_products(
    queries: Tensor,
    keys: Tensor,
    word_mask: Tensor | None = None,
    valid: Tensor | None = None,
    head_weights: Tensor | None = None,
) -> Tensor:
    """HAWK's score (arXiv 2604.07812): products of the words' mean query with the keys, each head's of length 1::

        u[h, j] = mean over words i of q[i, h] . k[j, h // groups]
        r_j     = sum over h of w_h u[h, j] / sqrt(sum over j of u[h, j]^2)

    The scaling of the products cancels. Ranks that share the heads add up their scores. Arguments as of
    `attention_mass`.

    Returns:
        (B, n) raw relevance, 0 at tokens that take no part or are not finite.
    """
    groups = keys.shape[2]
    dtype = working_dtype(keys.dtype)
    queries = queries.to(dtype).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if word_mask is not None:
        queries = queries * word_mask[:, :, None, None]
    query = queries.mean(1).unflatten(1, (groups, -1))  # (B or 1, k, h / k, d_h); the number of words cancels
    products = (query @ keys.to(dtype).permute(0, 2, 3, 1)).flatten(1, 2)  # (B, h, n)
    products = products.masked_fill(~products.isfinite(), 0.0)
    if valid is not None:
        products = products * valid[:, None]
    norm = torch.linalg.vector_norm(products, dim=-1, keepdim=True)
    products = products / torch.where(norm > 0, norm, 1.0)
    return products.sum(1) if head_weights is None else (products * head_weights.to(products)[:, None]).sum(1)


def multiply_adds(
    n: int, t: int, d: int, d_q: int, d_kv: int, words: bool = True, qk: bool = True, fused: bool = False
) -> int:
    """Multiply-adds of this source for one prompt: n visual tokens, t words, width d, query and key widths d_q, d_kv.

    At most: `FirstAttention.compared` takes few words back through a plain projection, which is less.

    Args:
        words, qk: which of the two witnesses is computed.
        fused: queries, keys and values come out of one projection, so that all of it is computed.

    Softmaxes, norms and standardising, of the order of t n per head, are not multiply-adds of a product.
    """
    whole = d_q + 2 * d_kv
    products = n * d * (whole if fused else d_kv) + t * d * (whole if fused else d_q) + t * n * d_q
    return qk * products + words * t * n * d
