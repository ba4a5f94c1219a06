"""What the tests of evaluate.py share: a small sweep, a pruning method, and how the command is run."""
from collections.abc import Callable

import evaluate

SWEEP = ["--questions", "12", "--prune", "random,downsample", "--keep", "0.5,0.1", "--set", "random.seed=3"]
ROWS = [["none", 1.0], ["random", 0.5], ["random", 0.1], ["downsample", 0.5], ["downsample", 0.1]]
MINE = """from dataclasses import dataclass
from pruning import Pruner
@dataclass
class Mine(Pruner):
    "Mine."
    option: int = 1
    name = "own"
"""


def evaluate_command(monkeypatch, capsys) -> Callable:
    """The command with these arguments: what it prints on stdout and stderr."""
    def command(*argv):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, argv)])
        evaluate.main()
        return capsys.readouterr()
    return command


def timeless(figures):
    times = "prefill_ms", "decode_ms"
    rows = [{key: value for key, value in row.items() if key not in times} for row in figures["rows"]]
    return {**figures, "rows": rows}
