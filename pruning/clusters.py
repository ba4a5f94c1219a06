"""Clusters of image tokens whose features are alike: Ward's tree, and two cheaper ways as a comparison.

Ward's tree merges, again and again, the two clusters that add least to the sum of squared distances from
the tokens to the means of their clusters. The cost never falls from one merge to the next, so one tree can be
cut to any number of clusters (Ward 1963). A union is never nearer to a third cluster than the nearer of its
parts was, so clusters that are each other's nearest may merge at once: the tree stays the same (Bruynooghe
1977, Murtagh 1983).
N tokens, d width of what is compared, C clusters that are left.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.select import evenly_spaced, refuse_nan

CHUNK_BYTES = 4 * 2 ** 20               # of the costs that are computed at once
AT_ONCE = 512                           # tokens that are projected at once
ROUNDING = 1e-6                         # of the squares of two tokens, in their squared distance
REMEMBERED = 16                         # trees
MANY = 6                                # clusters that look for their nearest one, for each merge
LLOYD = 3                               # rounds of Lloyd's algorithm

Merges = tuple[Tensor, Tensor, Tensor]  # into, gone and cost, as in Tree


@dataclass
class Tree:
    """All merges, cheapest first: in row m, cluster `gone[m]` became a part of `into[m]` at this `cost`. A
    cluster is called by the number of one of its tokens; each token goes at most once."""
    tokens: int
    into: Tensor                        # [M], N - 1 merges, or fewer if some tokens never merge
    gone: Tensor                        # [M]
    cost: Tensor                        # [M] fp32, rising

    @classmethod
    def of(cls, tokens: int, parts: list[Merges]) -> "Tree":
        """From merges in any order that is possible."""
        into, gone, cost = (torch.cat(part) for part in zip(*parts, strict=True))
        cost, order = cost.clamp(min=0).sort(stable=True)
        return cls(tokens, into[order], gone[order], cost)

    def clusters(self, most: int, height: float) -> int:
        """How many clusters there are after all merges that cost at most `height`, but at most `most`."""
        return min(most, self.tokens - int((self.cost <= height).sum()))

    def cut(self, clusters: int) -> Tensor:
        """The token after which the cluster of each token is called, [N]; more clusters where not all tokens
        may merge."""
        merges = self.tokens - clusters
        parent = torch.arange(self.tokens, device=self.into.device)
        parent[self.gone[:merges]] = self.into[:merges]
        return root(parent)


def ward(x: Tensor, weight: Tensor | None = None) -> Tree:
    """Ward's tree of tokens x [N, d], which count by their `weight` [N] > 0 in means and costs.

    Raises ValueError if x or its squares are not finite.
    """
    x, square = centred(x)
    name = torch.arange(len(x), device=x.device)
    mean, size = x, torch.ones_like(square) if weight is None else weight.float().clone()
    best, near = nearest(mean, size, square, name)
    merges = [(near[:0], near[:0], best[:0])]
    like = (best <= 2 * ROUNDING * size * square).nonzero()[:, 0]
    if len(like):
        first = name.clone()
        first[like] = like[alike(x[like])]
        gone, left = first != name, first == name
        merges.append((first[gone], name[gone], torch.zeros_like(best[gone])))
        mean = torch.zeros_like(x).index_add_(0, first, x * size[:, None])[left]
        size = torch.zeros_like(size).index_add_(0, first, size)[left]
        name, mean = name[left], mean / size[:, None]
        square = mean.square().sum(-1)
        best, near = nearest(mean, size, square, torch.arange(len(name), device=x.device))
    return Tree.of(len(x), merges + mutual(name, mean, size, square, best, near))


def mutual(name: Tensor, mean: Tensor, size: Tensor, square: Tensor, best: Tensor, near: Tensor
           ) -> list[Merges]:
    """All merges of clusters [C] that know which one is nearest, `near`, and what merging with it costs,
    `best`. `square` is as in `nearest`; all but the names are used up.

    Clusters whose nearest one has merged look for a new one: all of them, as long as these are `MANY` for
    each merge so far, else only unions, and those that are nearest to one that knows. So nothing takes long,
    even if one cluster is nearest to all.
    """
    merges, left, credit = [], len(name), 0
    knows = torch.ones_like(near, dtype=torch.bool)
    while left > 1:
        here = torch.arange(len(name), device=name.device)
        one = torch.where(knows, best, torch.inf).argmin()
        near[near[one]] = one                   # also if equal costs go in a circle, by rounding
        a = (knows & knows[near] & (near[near] == here) & (here < near)).nonzero()[:, 0]
        b = near[a]
        merges.append((name[a], name[b], best[a]))
        both = size[a] + size[b]
        mean[a] = (size[a, None] * mean[a] + size[b, None] * mean[b]) / both[:, None]
        size[a] = both
        square[a] = mean[a].square().sum(-1)
        square[b] = torch.inf
        merged = torch.zeros_like(knows)
        merged[a] = merged[b] = True
        knows &= ~(merged | merged[near])
        left -= len(a)
        credit += MANY * len(a)
        if left <= len(name) // 2:
            keep = square.isfinite()
            near = (keep.cumsum(0) - 1)[near]
            name, mean, size, square, best, near, knows, merged = (
                t[keep] for t in (name, mean, size, square, best, near, knows, merged))
        looking = ~knows & square.isfinite()
        if looking.sum() > credit:
            merged[near[knows]] = True
            looking &= merged
        looking = looking.nonzero()[:, 0]
        credit -= len(looking)
        best[looking], near[looking] = nearest(mean, size, square, looking)
        knows[looking] = True
    return merges


class Trees:
    """The latest trees, and what they were made of: the next question about an image asks for the same."""

    def __init__(self):
        self.known: list[tuple[Tensor, Tree]] = []

    def of(self, x: Tensor, weight: Tensor, parts: Tensor) -> Tree:
        """`forest` of these, made now or before."""
        tokens = torch.cat((x, weight[:, None], parts[:, None]), 1)
        for known, tree in self.known:
            if torch.equal(known, tokens):
                return tree
        tree = forest(x, weight, parts)
        self.known = [*self.known[1 - REMEMBERED:], (tokens, tree)]
        return tree


def forest(x: Tensor, weight: Tensor, parts: Tensor) -> Tree:
    """The trees of the tokens in each of the `parts` [N], a number for each token, as one."""
    merges = []
    for part in parts.unique():
        own = (parts == part).nonzero()[:, 0]
        tree = ward(x[own], weight[own])
        merges.append((own[tree.into], own[tree.gone], tree.cost))
    return Tree.of(len(x), merges)


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, d] less its mean in fp32, so that little is lost in the squares, and these, [N].

    Raises ValueError if they are not finite.
    """
    x = x.float() - x.float().mean(0)
    square = x.square().sum(-1)
    refuse_nan(square - square)                 # infinity less itself is NaN
    return x, square


def alike(x: Tensor) -> Tensor:
    """The first of the tokens x [N, d] that equal each one but for rounding, [N]. Their costs are rounding
    alone, and to merge by these one after the other would take as many rounds as there are tokens."""
    square = x.square().sum(-1)
    found = []
    for part in torch.arange(len(x), device=x.device).split(max(1, CHUNK_BYTES // (4 * len(x)))):
        both = square + square[part, None]                                              # [part, N]
        equal = torch.addmm(both, x[part], x.T, alpha=-2) <= ROUNDING * both
        found.append(equal.scatter_(1, part[:, None], True).int().argmax(1))
    return root(torch.cat(found))


def root(parent: Tensor) -> Tensor:
    """The last token that is reached from each one, if `parent` [N] is where one goes from it."""
    while not torch.equal(parent, above := parent[parent]):
        parent = above
    return parent


def nearest(mean: Tensor, size: Tensor, square: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of some clusters, the cost of their cheapest merge and the other cluster: two of [rows]. `square` [C]
    are the squared lengths of the means, or infinity for clusters that are gone.

    cost = size A · size B / (size A + size B) · |mean A - mean B|²
    """
    found = []
    for part in rows.split(max(1, CHUNK_BYTES // (4 * len(mean)))):
        cost = torch.addmm(square, mean[part], mean.T, alpha=-2)                        # [part, C]
        cost += square[part, None]
        cost *= size / (size + size[part, None])
        cost.scatter_(1, part[:, None], torch.inf)
        found.append(cost.min(1))
    best, near = (torch.cat(part) for part in zip(*found, strict=True))
    return best * size[rows], near


def project(x: Tensor, width: int) -> Tensor:
    """x [N, d] in fp32, in a random projection to `width` dimensions, the same each time, if it is wider.

    Distances are kept on average (Johnson and Lindenstrauss 1984). With 0 it stays as it is.
    """
    if not 0 < width < x.shape[1]:
        return x.float()
    matrix = torch.randn(x.shape[1], width, generator=torch.Generator().manual_seed(0)) * width ** -0.5
    return torch.cat([part.float() @ matrix.to(x.device) for part in x.split(AT_ONCE)])


# ----- without a tree


def spaced(x: Tensor, clusters: int) -> Tensor:
    """Every n-th token stays, and each of the others x [N, d] goes to the nearest of these, [N]."""
    x, _ = centred(x)
    rank = torch.arange(len(x), device=x.device)
    centres = evenly_spaced(rank, clusters, len(x)).nonzero()[:, 0]
    owner = centres[closest(x, x[centres])]
    owner[centres] = centres                    # equal tokens may be nearer to another one
    return owner


def k_centre(x: Tensor, clusters: int) -> Tensor:
    """The tokens x [N, d] that are farthest from those before, then rounds of Lloyd's algorithm: the number
    of one token of its cluster for each, [N]. A cluster that loses all its tokens is left out."""
    x, square = centred(x)
    centres = [square.argmin()]
    distance = torch.full_like(x[:, 0], torch.inf)
    for _ in range(clusters - 1):
        distance = torch.minimum(distance, (x - x[centres[-1]]).square().sum(-1))
        centres.append(distance.argmax())
    mean = x[torch.stack(centres)]
    for _ in range(LLOYD):
        group = closest(x, mean)
        count = torch.bincount(group, minlength=clusters)[:, None]
        mean = torch.where(count > 0, torch.zeros_like(mean).index_add_(0, group, x) / count, mean)
    group = closest(x, mean)
    return least(torch.arange(len(x), device=x.device), group)


def closest(x: Tensor, centres: Tensor) -> Tensor:
    """The nearest of the centres [C, d] to each token x [N, d]: [N]."""
    return torch.addmm(centres.square().sum(-1), x, centres.T, alpha=-2).argmin(1)


def central(x: Tensor, owner: Tensor) -> Tensor:
    """The same clusters, called after the token that is nearest to the mean: `owner` [N] -> [N]."""
    here = torch.arange(len(x), device=x.device)
    count = torch.bincount(owner, minlength=len(x)).clamp(min=1)[:, None]
    mean = torch.zeros_like(x).index_add_(0, owner, x) / count
    distance = (x - mean[owner]).square().sum(-1)
    return least(torch.where(distance == least(distance, owner), here, len(x)), owner)


def least(values: Tensor, group: Tensor) -> Tensor:
    """The least of the values [N] in the group of each token, a number below N: [N]."""
    return torch.zeros_like(values).scatter_reduce_(0, group, values, "amin", include_self=False)[group]
