"""The greedy MAP order of very many tokens: most of them may never be looked at, and the rest in large products.

A token's variance only falls. One whose r_i^2 lies below the smallest variance that was chosen could never have been
chosen (**screening**): tokens wait in order of r_i^2, and a group of them is looked at once its largest r_i^2 may
count. What they missed is then made up for, which costs no more than if they had been there from the start.

Choices are made in rounds. The `POOL` tokens with the largest variances have a small kernel of their own, in which
the greedy loop runs as long as its largest variance is above the largest outside: those outside can only have fallen
since. The tokens chosen in a round are then taken into account everywhere else by a few products of matrices. The
order is that of the plain loop, up to rounding where two variances are as close as that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.pruning.functional import inner_products, inverse_norm

ROWS = 256  # rows of similarities that are looked at together
POOL = 256  # tokens among which a round chooses
GROUP = 1024  # waiting tokens that are looked at together, at least
KEY = 64  # columns by which tokens with the same features are found


@dataclass(frozen=True)
class Round:
    """b choices that follow ``start`` others.

    Args:
        tokens: (b,) int64, in order of selection.
        before: (b, start) entries of the earlier vectors e at these tokens.
        own: (b, b) lower triangle: entries of their own vectors, and sqrt(v_j + epsilon) on the diagonal.
    """

    tokens: Tensor
    start: int
    before: Tensor
    own: Tensor

    def then(self, later: Round) -> Round:
        """Both as one round."""
        left = torch.cat([self.own, later.before[:, self.start :]])
        right = torch.cat([self.own.new_zeros(len(self.own), len(later.own)), later.own])
        before = torch.cat([self.before, later.before[:, : self.start]])
        return Round(torch.cat([self.tokens, later.tokens]), self.start, before, torch.cat([left, right], dim=1))


class Columns:
    """The M tokens that are looked at, of the most that may be, and what the choices so far have left of them.

    L = diag(r) S diag(r) of features (n, d) is never built: only the parts asked for are computed.

    Args:
        features: (n, d), any floating dtype.
        weight: (n,) r.
        most: tokens for which there must be room.
    """

    def __init__(self, features: Tensor, weight: Tensor, most: int) -> None:
        self.source, self.weight = features, weight
        norm = torch.linalg.vector_norm(features, dim=-1, dtype=weight.dtype)
        self.inverse_norm = inverse_norm(norm.square())  # (n,)
        self.tokens = torch.empty(0, dtype=torch.int64, device=features.device)  # (M,), in any order
        self.variance = weight.new_empty(0)  # (M,) v, -inf once chosen
        self.features = weight.new_empty(most, features.shape[1])  # theirs: the first M rows
        self.basis: list[Tensor] = []  # blocks (most, ROWS) of entries of the vectors e, a column for each choice

    def by_variance(self) -> Tensor:
        """Places (M,) by descending variance, then token."""
        by_token = self.tokens.argsort()
        return by_token[self.variance[by_token].sort(descending=True, stable=True).indices]

    def rows(self, tokens: Tensor, features: Tensor, columns: slice) -> Tensor:
        """L (q, M') of tokens (q,) and their features (q, d) at some of the columns, but for the diagonal of L."""
        own = self.tokens[columns]
        product = inner_products(features[None], self.features[columns][None])[0]
        product.mul_(self.inverse_norm[tokens, None]).mul_(self.inverse_norm[own]).nan_to_num_(nan=0.0)
        return product.mul_(self.weight[tokens, None]).mul_(self.weight[own])

    def take_into_account(self, chosen: Round, columns: slice) -> None:
        """Eq. 11 for the choices of a round: e_i = (L_ji - <u_j, u_i>) / sqrt(v_j + epsilon), v_i falls by e_i^2."""
        number, first = divmod(chosen.start, ROWS)
        if number == len(self.basis):
            self.basis.append(self.features.new_empty(len(self.features), ROWS))
        rows = self.rows(chosen.tokens, self.source[chosen.tokens].to(self.weight.dtype), columns)
        for part, block in zip(chosen.before.split(ROWS, dim=1), self.basis, strict=False):
            rows.addmm_(part, block[columns, : part.shape[1]].mT, alpha=-1)
        rows = torch.linalg.solve_triangular(chosen.own, rows, upper=False)
        self.basis[number][columns, first : first + len(rows)] = rows.mT
        variance = self.variance[columns]
        for row in rows:
            variance.addcmul_(row, row, value=-1)

    def add(self, tokens: Tensor, variance: Tensor, rounds: list[Round]) -> None:
        """Look at more tokens (q,), of variances (q,) before any choice; earlier rounds are taken into account."""
        before, after = len(self.tokens), len(self.tokens) + len(tokens)
        self.features[before:after] = self.source[tokens]
        self.tokens, self.variance = torch.cat([self.tokens, tokens]), torch.cat([self.variance, variance])
        for earlier in rounds:
            self.take_into_account(earlier, slice(before, after))

    def drop_all_but(self, places: Tensor) -> None:
        """Look no more at columns that cannot be chosen any more."""
        self.tokens, self.variance = self.tokens[places], self.variance[places]
        for rows in (self.features, *self.basis):
            rows[: len(places)] = rows[places]

    def residual(self, places: Tensor) -> Tensor:
        """What the choices so far have left of L among some columns (q,): (q, q), but for its diagonal."""
        own = self.features[places]
        product = inner_products(own[None], own[None])[0]
        tokens = self.tokens[places]
        scale, weight = self.inverse_norm[tokens], self.weight[tokens]
        product.mul_(scale[:, None]).mul_(scale).nan_to_num_(nan=0.0).mul_(weight[:, None]).mul_(weight)
        return product

    def entries(self, places: Tensor, steps: int) -> Tensor:
        """Of the first ``steps`` vectors e at some columns: (q,) -> (q, steps)."""
        none = self.features.new_empty(len(places), 0)
        return torch.cat([none, *(block[places] for block in self.basis)], dim=1)[:, :steps]


class Screened:
    """A greedy order as far as it has come.

    Args:
        features: (n, d).
        weight: (n,) r.
        bound: (n,) r_i^2 S_ii, -inf for tokens that may not be chosen.
        epsilon: as in `functional.greedy_map`.
    """

    def __init__(self, features: Tensor, weight: Tensor, bound: Tensor, epsilon: float) -> None:
        self.bound, self.epsilon = bound.masked_fill(~(bound > epsilon), -torch.inf), epsilon  # NaN as well
        self.waiting = self.bound.argsort(descending=True, stable=True)[: int((bound > epsilon).sum())]
        self.columns = Columns(features, weight, len(self.waiting))
        self.rounds: list[Round] = []  # joined as far as they lie in one block of ROWS choices
        self.steps = 0

    def next_round(self, most: int, member: list[bool] | None) -> list[int]:
        """The next tokens in order, until ``most`` of them are members; none where the rank is used up."""
        columns = self.columns
        by_variance = self._look_at_enough()
        pool = by_variance[:POOL]
        pool = pool[columns.tokens[pool].argsort()]
        before = columns.entries(pool, self.steps)
        chosen, vectors, largest = self._choose(pool, before, self._outside(by_variance), most, member)
        if not chosen:
            return []
        own = vectors[:, chosen].mT.tril(-1)
        own.diagonal().copy_((largest + self.epsilon).sqrt())
        places = pool[chosen]
        found = Round(columns.tokens[places], self.steps, before[chosen], own)
        columns.take_into_account(found, slice(0, len(columns.tokens)))
        columns.variance[places] = -torch.inf
        self.rounds.append(self.rounds.pop().then(found) if self.steps % ROWS else found)
        self.steps += len(chosen)
        alive = (columns.variance > self.epsilon).nonzero().flatten()
        if len(alive) < 3 * len(columns.tokens) // 4:
            columns.drop_all_but(alive)
        return found.tokens.tolist()

    def _look_at_enough(self) -> Tensor:
        """Places of the columns by descending variance, where no token that waits belongs into the pool."""
        while True:
            order = self.columns.by_variance()
            full = len(order) >= POOL
            if not len(self.waiting) or (
                full and self.bound[self.waiting[0]] < self.columns.variance[order[POOL - 1]]
            ):
                return order
            size = max(GROUP, len(order) // 4)
            tokens, self.waiting = self.waiting[:size], self.waiting[size:]
            self.columns.add(tokens, self.bound[tokens], self.rounds)

    def _outside(self, by_variance: Tensor) -> tuple[float, int]:
        """The largest variance outside of the pool, or what it was, and minus the lowest token that has it."""
        outside = [(-torch.inf, 0)]
        for tokens, variances in (
            (self.columns.tokens[by_variance[POOL:][:1]], self.columns.variance[by_variance[POOL:][:1]]),
            (self.waiting[:1], self.bound[self.waiting[:1]]),
        ):
            outside += [(value, -token) for value, token in zip(variances.tolist(), tokens.tolist(), strict=True)]
        return max(outside)

    def _choose(
        self, pool: Tensor, before: Tensor, outside: tuple[float, int], most: int, member: list[bool] | None
    ) -> tuple[list[int], Tensor, Tensor]:
        """The greedy loop within the pool: b places in it, their vectors e (b, POOL), their variances (b,)."""
        kernel = self.columns.residual(pool).addmm_(before, before.mT, alpha=-1)
        numbers, variance = self.columns.tokens[pool].tolist(), self.columns.variance[pool]
        room = ROWS - self.steps % ROWS
        vectors, largest = kernel.new_empty(room, len(pool)), kernel.new_empty(room)
        chosen: list[int] = []
        while len(chosen) < room and most > 0 and numbers:
            value, place = variance.max(dim=0)  # the lowest index among equals
            v, j = float(value), int(place)
            if not v > self.epsilon or (v, -numbers[j]) < outside:
                break
            e = torch.div(kernel[j], (value + self.epsilon).sqrt(), out=vectors[len(chosen)])
            largest[len(chosen)] = value
            kernel.addr_(e, e, alpha=-1)
            variance.addcmul_(e, e, value=-1)
            variance[j] = -torch.inf
            chosen.append(j)
            most -= 1 if member is None else int(member[numbers[j]])
        return chosen, vectors[: len(chosen)], largest[: len(chosen)]


def repeats(features: Tensor, bound: Tensor) -> Tensor:
    """(n,) bool, tokens whose features (n, d) another has: of a larger ``bound`` (n,), or as large and before them.

    They can be chosen neither before that one nor after it, when their variance is below epsilon; left out, they
    cannot be mistaken for it where rounding tells equal columns of a product apart.
    """
    some = features[:, :: max(1, features.shape[1] // KEY)].contiguous()
    bits = some.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[features.element_size()]).long()
    factors = torch.randint(2**62, bits.shape[1:], generator=torch.Generator().manual_seed(0)).to(bits.device)
    keys = (bits * factors).sum(-1)  # of integers: no rounding
    number = torch.unique(keys, return_inverse=True)[1]
    order = bound.argsort(descending=True, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    first = order[torch.full_like(order, len(order)).scatter_reduce_(0, number, place, reduce="amin")[number]]
    found = (first != torch.arange(len(order), device=order.device)).nonzero().flatten()
    for part in found.split(ROWS):  # equal keys may be of features that differ elsewhere
        first[part] = torch.where((features[part] == features[first[part]]).all(-1), first[part], part)
    return first != torch.arange(len(order), device=order.device)


def screened_order(
    features: Tensor, k: int, weight: Tensor, bound: Tensor, member: Tensor | None, epsilon: float
) -> list[int]:
    """Tokens of features (n, d) in greedy MAP order of diag(r) S diag(r), until k of them are members.

    Args:
        weight: (n,) r, float32 or float64.
        bound: (n,) r_i^2 S_ii; -inf for tokens that may not be chosen.
        member: (n,) bool; ``None`` means all.

    Returns:
        Fewer than k members where the rank is used up.
    """
    bound = bound.masked_fill(repeats(features, bound), -torch.inf)
    state = Screened(features, weight, bound, epsilon)
    is_member = None if member is None else member.tolist()
    order: list[int] = []
    missing = k
    while missing > 0:
        found = state.next_round(missing, is_member)
        if not found:
            break
        order += found
        missing -= len(found) if is_member is None else sum(is_member[token] for token in found)
    return order
