"""Clusters in plain loops and float64, as the textbooks have them.

Tokens are lists of numbers; a cluster is a frozenset of indices of tokens.
"""
import math

from torch import Tensor

Points = list[list[float]]


def partition(owner: Tensor) -> set[frozenset[int]]:
    """The clusters in which tokens have the same owner [N]."""
    owner = owner.tolist()
    return {frozenset(i for i, other in enumerate(owner) if other == name) for name in set(owner)}


def squared(a: list[float], b: list[float]) -> float:
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def mean_of(cluster: frozenset[int], x: Points, weight: list[float]) -> tuple[list[float], float]:
    """The weighted mean of a cluster, and how much it weighs."""
    size = sum(weight[i] for i in cluster)
    return [sum(weight[i] * x[i][c] for i in cluster) / size for c in range(len(x[0]))], size


def spread(cluster: frozenset[int], x: Points, weight: list[float]) -> float:
    """The weighted sum of squared distances to the mean."""
    mean, _ = mean_of(cluster, x, weight)
    return sum(weight[i] * squared(x[i], mean) for i in cluster)


def merge_cost(a: frozenset[int], b: frozenset[int], x: Points, weight: list[float]) -> float:
    """By how much the sum of squared distances to the means grows if these two become one."""
    return spread(a | b, x, weight) - spread(a, x, weight) - spread(b, x, weight)


def least_cost(clusters: set[frozenset[int]], x: Points, weight: list[float]) -> float:
    """Of all pairs."""
    return min(merge_cost(a, b, x, weight) for a in clusters for b in clusters if a != b)


def ward_by_hand(x: Points, weight: list[float]) -> list[tuple[float, set[frozenset[int]]]]:
    """After each merge what it cost, and the clusters: all pairs are tried, and the cheapest one merges."""
    known = [(frozenset([i]), *mean_of(frozenset([i]), x, weight)) for i in range(len(x))]
    steps = []
    while len(known) > 1:
        best = math.inf, None, None
        for i, (_, mean, size) in enumerate(known):
            for j, (_, other, more) in enumerate(known[:i]):
                best = min(best, (size * more / (size + more) * squared(mean, other), j, i))
        cost, j, i = best
        union = known[i][0] | known[j][0]
        known = [c for k, c in enumerate(known) if k not in (i, j)] + [(union, *mean_of(union, x, weight))]
        steps.append((cost, {cluster for cluster, _, _ in known}))
    return steps


def nearest_of(point: list[float], centres: Points) -> int:
    """The first of the nearest ones."""
    return min(range(len(centres)), key=lambda c: squared(point, centres[c]))


def k_centre_by_hand(x: Points, clusters: int, rounds: int) -> set[frozenset[int]]:
    """First the token nearest to the mean, then the ones farthest from those before; Lloyd's algorithm."""
    everything, ones = frozenset(range(len(x))), [1.0] * len(x)
    centres = [x[nearest_of(mean_of(everything, x, ones)[0], x)]]
    while len(centres) < clusters:
        centres.append(max(x, key=lambda point: min(squared(point, centre) for centre in centres)))
    for _ in range(rounds):
        group = [nearest_of(point, centres) for point in x]
        for c in range(clusters):
            members = frozenset(i for i in everything if group[i] == c)
            centres[c] = mean_of(members, x, ones)[0] if members else centres[c]
    group = [nearest_of(point, centres) for point in x]
    return {frozenset(i for i in everything if group[i] == c) for c in set(group)}
