"""The formulas of TopV (arXiv 2503.18278) as we read them, in plain loops: cost, transport and choice."""
import math

from pruning.methods.topv import TopV


def distance(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def stretched(x: list[list[float]]) -> list[list[float]]:
    low, high = min(map(min, x)), max(map(max, x))
    return [[(v - low) / (high - low) if high > low else 0.0 for v in row] for row in x]


def slow_cost(options: TopV, source, target, spots, centre) -> list[list[float]]:
    """One source, one target and one term after the other; spots are x and y."""
    n, sigma = len(spots), options.sigma * math.sqrt(len(spots)) / 24
    F = stretched([[distance(s, t) for t in target] for s in source])
    S = stretched([[1 - math.exp(-distance(a, b) / (2 * sigma ** 2)) for b in spots] for a in spots])
    E = stretched([[math.sqrt(distance(a, centre))] for a in spots])
    return [[options.alpha * F[i][j] + options.beta * S[i][j] + options.gamma * E[i][0] for j in range(n)]
            for i in range(n)]


def slow_importance(cost: list[list[float]], kappa: float, iterations: int, epsilon: float) -> list[float]:
    """Row sums of the plan, with both shares 1 / n written out."""
    n = range(len(cost))
    share, K = 1 / len(cost), [[math.exp(-c / epsilon) for c in row] for row in cost]
    a, b = [1.0 for _ in n], [1.0 for _ in n]
    for _ in range(iterations):
        a = [(share / sum(K[i][j] * b[j] for j in n)) ** kappa for i in n]
        b = [share / sum(K[i][j] * a[i] for i in n) for j in n]
    return [sum(a[i] * K[i][j] * b[j] for j in n) for i in n]


def slow_pick(importance: list[float], n: int, stride: int) -> list[int]:
    """The most of the best that leave room for every `stride`-th of the others, found by trying."""
    order = sorted(range(len(importance)), key=lambda i: (-importance[i], i))
    for best in range(n, 0, -1):
        recovered = sorted(order[best:])[::stride] if stride else []
        if best + len(recovered) == n:
            return sorted(order[:best] + recovered)
    return sorted(order[:n])
