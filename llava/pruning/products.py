"""Inner products and cosines of tokens, and the dtypes in which they are computed; conventions as in functional.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from llava.pruning import kernels

COLUMN_BLOCK = 512  # columns of half-precision features that are widened at a time
STRIPS = 6  # of a symmetric product; more of them hardly save any more work
STRIP_ROWS = 56  # of a strip at least: BLAS multiplies thin matrices slowly, and the thinnest in another order


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return dtype if dtype == torch.float64 else torch.float32


@contextmanager
def without_autocast() -> Iterator[None]:
    """Products in the dtypes of their factors, also where the caller works under `torch.autocast`."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def cosine_similarity(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """Cosine of every row with every other row.

    The product is scaled, not the rows: a unit copy of all features would outweigh the similarity itself.

    Args:
        rows: (B, n, d), any floating dtype.
        others: (B or 1, q, d); ``None`` compares ``rows`` with itself.

    Returns:
        (B, n, q) float32 (float64 for float64 input). Compared with itself the diagonal is exactly 1, or 0 for a
        row without a direction.
    """
    if others is None:
        similarity = self_products(rows)
        if kernels.usable(similarity):
            return kernels.fused_scores().scale_to_cosines(similarity)
        scale = inverse_norm(similarity.diagonal(dim1=-2, dim2=-1))
        similarity.mul_(scale[:, :, None]).mul_(scale[:, None, :])
        similarity.diagonal(dim1=-2, dim2=-1).copy_(scale > 0)
    else:
        others = others.expand(rows.shape[0], -1, -1)
        similarity = inner_products(rows, others)
        for side, view in ((rows, similarity), (others, similarity.mT)):
            norm = torch.linalg.vector_norm(side, dim=-1, dtype=similarity.dtype)
            view.mul_(inverse_norm(norm.square())[:, :, None])
    return similarity.nan_to_num_(nan=0.0)  # infinity times zero, at rows without a direction


def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """(B, n, d) and (B, q, d) -> (B, n, q); half precision is multiplied and summed in float32."""
    dtype = working_dtype(rows.dtype)
    if rows.dtype == others.dtype == dtype:
        return rows @ others.mT
    if kernels.multiplies_half_precision(rows, others):
        return torch.bmm(rows, others.mT, out_dtype=dtype)
    product = rows.new_zeros(rows.shape[0], rows.shape[1], others.shape[1], dtype=dtype)
    for left, right in zip(rows.split(COLUMN_BLOCK, -1), others.split(COLUMN_BLOCK, -1), strict=True):
        product.baddbmm_(left.to(dtype), right.to(dtype).mT)
    return product


def self_products(rows: Tensor) -> Tensor:
    """Inner products of rows (B, n, d) with each other: (B, n, n), on a CPU little more than half of them multiplied.

    Strips of rows times the rows from there on, mirrored: 7/12 of the products with six strips. A strip is multiplied
    as the whole would be, number by number in the same order, so that equal rows still have equal products. In float64
    BLAS does not promise that even of the whole, which then stays whole.
    """
    n, dtype = rows.shape[1], working_dtype(rows.dtype)
    strips = min(n // STRIP_ROWS, STRIPS)
    if strips < 2 or rows.device.type != "cpu" or dtype == torch.float64:
        return inner_products(rows, rows)
    parts = [slice(number * n // strips, (number + 1) * n // strips) for number in range(strips)]
    if rows.dtype == dtype:
        products: Iterable[Tensor] = (rows[:, part] @ rows[:, part.start :].mT for part in parts)
    else:
        products = [rows.new_zeros(len(rows), part.stop - part.start, n - part.start, dtype=dtype) for part in parts]
        for block in rows.split(COLUMN_BLOCK, -1):
            wide = block.to(dtype)
            for strip, part in zip(products, parts, strict=True):
                strip.baddbmm_(wide[:, part], wide[:, part.start :].mT)
    product = rows.new_empty(rows.shape[0], n, n, dtype=dtype)
    for strip, part in zip(products, parts, strict=True):
        product[:, part, part.start :] = strip
        product[:, part.stop :, part] = strip[:, :, part.stop - part.start :].mT
    return product


def inverse_norm(square: Tensor) -> Tensor:
    """1 / norm from squared norms; 0 for rows without a direction."""
    limits = torch.finfo(square.dtype)
    directed = (square >= limits.tiny) & (square <= limits.max)
    return torch.where(directed, square, 1.0).rsqrt() * directed
