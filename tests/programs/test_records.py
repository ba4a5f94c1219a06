"""Files of an evaluation that were damaged or edited are refused in one line; names are never formulas."""
import copy
import json

import pytest
from good_files import EXAM, GATES, RECORDS, SETTINGS

from evaluation.plot import plot, table
from evaluation.scoring import figures
from evaluation.store import Store


@pytest.fixture
def made() -> dict:
    """Figures of two rows, as a file holds them."""
    return json.loads(json.dumps(figures(SETTINGS, EXAM, RECORDS, GATES)))


def test_figures_are_read_as_they_were_written(made, tmp_path):
    store = Store(tmp_path / "out.json", SETTINGS)
    store.finish(made)
    assert store.finished() == made
    assert "random" in table(made)


@pytest.mark.parametrize("damage", [
    lambda made: made["rows"][0].pop("wrong_yes"),
    lambda made: made["rows"].pop(),
    lambda made: made["rows"].append(copy.deepcopy(made["rows"][1])),
    lambda made: made["rows"].reverse(),
    lambda made: made["rows"][1].update(keep=[0.5]),
    lambda made: made["rows"][1].update(method="none"),
    lambda made: made["rows"][1].update(options={"seed": 4}),
    lambda made: made.pop("layer_similarity"),
    lambda made: made.update(layer_similarity=None),
    lambda made: made.update(model="another"),
    lambda made: made.update(questions=7),
    lambda made: made.update(split="validation"),
    lambda made: made.update(rows={}),
])
def test_figures_that_are_not_those_of_the_settings_are_refused(made, tmp_path, damage):
    damage(made)
    store = Store(tmp_path / "out.json", SETTINGS)
    store.finish(made)
    with pytest.raises(ValueError, match="out.json: the figures are damaged; delete this file") as error:
        store.finished()
    assert str(error.value).isprintable()


def test_names_with_dollar_signs_are_drawn_as_they_are(made, tmp_path):
    made["model"] = "a$\\frac{$b"
    made["rows"][1]["method"] = "x$^$"
    made["rows"][1]["options"] = {"guide": "$\\z$"}
    plot(made, tmp_path / "out.svg")
    assert b"<svg" in (tmp_path / "out.svg").read_bytes()
