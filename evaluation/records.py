"""What records and figures look like: files that are read again may have been damaged or edited."""
import json

from scenes.questions import KINDS

LISTS = {"right": bool, "wrong_yes": bool, "early": bool, "kept": float}        # an entry for each question
NUMBERS = "image_kv_bytes", "image_kv_stored", "prefill_ms", "decode_ms", "steps"
FIGURES = "kept", "accuracy", "low", "high", "image_kv_bytes", "prefill_ms", "decode_ms"
SIMILARITIES = "cosine", "top10_overlap"


def is_record(record: dict, questions: int, rows: int, layers: int | None) -> bool:
    """Whether it is what `evaluate.examine` returns; `layers` is None where layers are not compared."""
    if not isinstance(record.get("rows"), list) or len(record["rows"]) != rows:
        return False
    for row in record["rows"]:
        if not isinstance(row, dict) or not all(is_number(row.get(name), 0) for name in NUMBERS):
            return False
        for name, kind in LISTS.items():
            values = row.get(name)
            if not isinstance(values, list) or len(values) != questions:
                return False
            if not all(is_number(value, 0) if kind is float else type(value) is kind for value in values):
                return False
    similarity = record.get("layer_similarity")
    return similarity is None if layers is None else are_matrices(similarity, layers)


def are_figures(made: dict) -> bool:
    """Whether they have all that `plot.table` and `plot.plot` read, in one row for each of the settings."""
    rows = made.get("rows")
    settings = made["settings"]
    if any(made.get(name) != settings[name] for name in ("model", "questions")):
        return False
    if made.get("split", "test") != settings.get("split", "test"):      # files of before there were splits
        return False
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return False
    asked = [[row.get("method"), row.get("keep"), row.get("options")] for row in rows]
    if json.dumps(asked) != json.dumps(settings["rows"]):
        return False
    for row in rows:
        numbers = [row.get(name) for name in FIGURES]
        by_kind = row.get("accuracy_by_kind")
        if not isinstance(by_kind, dict) or by_kind.keys() != set(KINDS) or "wrong_yes" not in row:
            return False
        shares = [share for share in (*by_kind.values(), row["wrong_yes"]) if share is not None]
        if not all(is_number(number) for number in (*numbers, *shares)):
            return False
    similarity = made.get("layer_similarity")
    if similarity is None:
        return len(rows) == 1               # layers are compared wherever methods are
    return are_matrices(similarity, None)


def are_comparable(made: object) -> bool:
    """Whether they are figures of several methods, with what `compare` reads of each row beside that."""
    settings = made.get("settings") if isinstance(made, dict) else None
    if not isinstance(settings, dict) or not {"model", "questions", "rows"} <= settings.keys():
        return False
    if not are_figures(made) or len(made["rows"]) < 2:
        return False
    return all(isinstance(row["method"], str) and isinstance(row["options"], dict)
               and isinstance(row.get("right"), str) and {*row["right"]} <= {*"01 "} for row in made["rows"])


def are_matrices(similarity: object, layers: int | None) -> bool:
    """Whether it is what `layers.layer_similarity` returns, of so many layers, or of any number."""
    if not isinstance(similarity, dict) or similarity.keys() != set(SIMILARITIES):
        return False
    for matrix in similarity.values():
        if not isinstance(matrix, list) or layers is not None and len(matrix) != layers:
            return False
        for line in matrix:
            if not isinstance(line, list) or len(line) != len(matrix) or not all(map(is_number, line)):
                return False
    return True


def is_number(value: object, low: float = -1e18, high: float = 1e18) -> bool:
    """Whether it is a number, not true or false, not NaN, and not beyond these."""
    return type(value) in (int, float) and low <= value <= high
