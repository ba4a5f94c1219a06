"""The figures of the paper: Lee et al. 2025, arXiv 2504.00557, Tables 1 and 3.

A cell is the score, and the per cent of image tokens that remained, as the paper has it in brackets; None
where it has none. Scores: SEED-img and MMVP in per cent, MME in points, LLaVA-Bench against the reference.
"""
SEED, MME, COGNITION, PERCEPTION, MMVP, LLAVA = COLUMNS = (
    "SEED-img", "MME", "MME-cog", "MME-per", "MMVP", "LLaVA-Bench")

Cell = tuple[float | None, float | None]
PERCENT = {SEED: 0, MME: 1, COGNITION: 1, PERCEPTION: 1, MMVP: 2, LLAVA: 3}     # which of a row's percentages


def row(scores: tuple, percent: tuple | None = None) -> dict[str, Cell]:
    """A row, of scores in the order of COLUMNS, and percentages for SEED-img, MME, MMVP and LLaVA-Bench."""
    return {column: (score, None if percent is None else percent[PERCENT[column]])
            for column, score in zip(COLUMNS, scores, strict=True)}


# By size of the model and K; None: nothing pruned.
TABLE_1 = {
    ("11B", None): row((72.6, 1685.9, 307.1, 1378.7, 46.7, 88.3)),
    ("11B", 0.25): row((72.3, 1687.3, 312.5, 1374.8, 47.3, 88.1), (61.5, 65.1, 61.9, 72.7)),
    ("11B", 0.20): row((72.1, 1682.8, 307.9, 1374.9, 47.3, 87.3), (51.7, 53.7, 46.7, 61.6)),
    ("11B", 0.15): row((71.4, 1669.1, 305.7, 1363.4, 45.3, 88.3), (40.7, 41.6, 37.2, 49.1)),
    ("11B", 0.10): row((69.8, 1675.8, 297.86, 1378.0, 39.3, 84.9), (28.2, 28.9, 26.7, 35.3)),
    ("11B", 0.05): row((62.3, 1586.1, 297.5, 1288.6, 33.0, 83.5), (14.2, 15.5, 14.2, 20.5)),
    ("90B", None): row((76.3, 2029.2, 423.9, 1605.3, 56.7, 92.0)),
    ("90B", 0.25): row((75.9, 2034.2, 444.6, 1589.6, 54.7, 93.9), (74.2, 71.6, 71.3, 75.2)),
    ("90B", 0.15): row((75.4, 2065.2, 423.9, 1641.3, 56.6, 92.2), (51.0, 48.4, 45.7, 52.4)),
}
# 11B, half of the tokens kept. The paper's own row is made of those of Table 1: its K is chosen for each
# benchmark, so that less than half is kept. Spatial's SEED-img is 71 and decimals that are lost in our text.
TABLE_3 = {
    "random": row((67.0, 1537.1, None, None, 44.7, 83.2), (50.0,) * 4),
    "spatial": row((None, 1627.7, None, None, 46.0, 85.9), (50.0,) * 4),
}
