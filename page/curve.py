"""The Curve tab: accuracy against image tokens kept, from the files of evaluate.py, as one wishes to see it.

    setting, methods, kinds of question ─► page/results.py ─► points ─► chart, table

`chart` is a Vega-Lite specification: gradio's page draws it with what it brings along, and loads nothing. The
axes are those of `evaluation/plot.py`, logarithmic in tokens kept and in wrong answers.

Elements that tests and styles may rely on (`elem_id`): curve-setting, curve-methods, curve-kinds, curve-note,
curve-plot, curve-table.
"""
import json
from pathlib import Path

from cli.terminal import size
from evaluation.plot import ACCURACIES, COLOURS, KEPT, LEAST_KEPT, percent, wrong
from page.results import FOLDER, Point, Results, files, read

FIRST = 6                           # methods that are shown before anything is chosen
MARKS = "circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"
DASHES = [1, 0], [6, 3], [6, 2, 2, 2], [2, 2], [8, 2, 2, 2, 2, 2]
PALETTE = (*COLOURS[:-1], "#8f8f8f")            # without black, which a dark page would hide
INK = "#80858d"                     # of axes and words: can be read on white and on black
STYLE = "<style>#curve-plot .vega-embed {width: 100%}</style>"     # the drawing is as wide as there is room
BUNDLED = "tiny", "guide", "seed1"
HEAD = ["method", "keep", "kept, %", "accuracy, %", "95 % interval", "questions", "image KV, all kinds"]


# ----- what is drawn


def chart(found: list[Point], methods: list[str]) -> dict:
    """A Vega-Lite specification. `methods` are all that might be drawn: each keeps its colour."""
    full, *others = found
    values = [{"method": point.method, "keep": point.keep, "kept": 100 * max(LEAST_KEPT, point.kept),
               "wrong": wrong(point.accuracy), "low": wrong(point.low), "high": wrong(point.high),
               "accuracy": f"{percent(point.accuracy)} %",
               "interval": f"{percent(point.low)} to {percent(point.high)} %"} for point in others]
    shown = list(dict.fromkeys(point.method for point in others))
    least = min([50.0, *(value["kept"] for value in values)]) * 0.85
    x = {"field": "kept", "type": "quantitative", "title": "image tokens kept",
         "scale": {"type": "log", "base": 2, "domain": [least, 110], "nice": False},
         "axis": {"values": [100 * tick for tick in KEPT if 100 * tick >= least],
                  "labelExpr": "format(datum.value, '~g') + ' %'"}}
    y = {"field": "wrong", "type": "quantitative", "title": "accuracy, with 95 % interval",
         "scale": {"type": "log", "reverse": True, "nice": False},
         "axis": {"values": [100 - tick for tick in ACCURACIES],
                  "labelExpr": "format(100 - datum.value, '~g') + ' %'"}}
    return {"$schema": "https://vega.github.io/schema/vega-lite/v5.json",
            "width": "container", "height": 420, "background": None,
            "autosize": {"type": "fit-x", "contains": "padding"},
            "padding": {"left": 5, "top": 5, "right": 20, "bottom": 5},         # the last tick is 100 %
            "usermeta": {"embedOptions": {"actions": False}},       # none of a menu that leads to the network
            "config": config(), "data": {"values": values},
            "layer": [rule(full, y), band(x, y, methods, shown), lines(x, y, methods, shown)]}


def config() -> dict:
    words = {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"}
    return {"axis": {**words, "gridColor": INK, "gridOpacity": 0.25, "domainColor": INK, "tickColor": INK},
            "legend": {**words, "orient": "bottom", "columns": 2, "labelLimit": 220, "symbolSize": 90},
            "view": {"stroke": None}}


def rule(full: Point, y: dict) -> dict:
    """The full model, across."""
    value = {"wrong": wrong(full.accuracy), "words": f"full model {percent(full.accuracy)} %"}
    words = {"type": "text", "color": INK, "align": "left", "dy": 9}
    return {"data": {"values": [value]}, "encoding": {"y": y},
            "layer": [{"mark": {"type": "rule", "color": INK, "strokeWidth": 1.5}},
                      {"mark": words, "encoding": {"x": {"value": 5}, "text": {"field": "words"}}}]}


def band(x: dict, y: dict, methods: list[str], shown: list[str]) -> dict:
    """The interval of every point, as a line up and down."""
    return {"mark": {"type": "rule", "strokeWidth": 2.5, "opacity": 0.45},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"},
                         "color": coded(methods, shown, list(PALETTE)), "opacity": faded(0.45)}}


def lines(x: dict, y: dict, methods: list[str], shown: list[str]) -> dict:
    """A line with a mark at each point. A click on the legend leaves one method, and pales the others."""
    names = {"method": "method", "keep": "--keep", "kept": "kept, %", "accuracy": "accuracy",
             "interval": "95 % interval"}
    tooltip = [{"field": field, "title": title, **({"format": ".3~g"} if field == "kept" else {})}
               for field, title in names.items()]
    click = {"name": "shown", "select": {"type": "point", "fields": ["method"]}, "bind": "legend"}
    return {"params": [click],
            "mark": {"type": "line", "point": {"filled": True, "size": 60}},
            "encoding": {"x": x, "y": y, "order": {"field": "kept", "type": "quantitative"},
                         "color": coded(methods, shown, list(PALETTE)),
                         "shape": coded(methods, shown, list(MARKS)),
                         "strokeDash": coded(methods, shown, list(DASHES)),
                         "opacity": faded(1), "tooltip": tooltip}}


def coded(methods: list[str], shown: list[str], cycle: list) -> dict:
    """Each method has a colour, a mark or a kind of line of its own, as long as there are enough."""
    taken = [cycle[i % len(cycle)] for i in range(len(methods))]
    return {"field": "method", "type": "nominal", "scale": {"domain": methods, "range": taken},
            "legend": {"title": "a click leaves one method", "values": shown}}


def faded(opacity: float) -> dict:
    return {"condition": {"param": "shown", "value": opacity}, "value": 0.08}


def table(found: list[Point]) -> list[list[str | float | int]]:
    """The lines below HEAD. Shares are numbers, so that a click sorts them."""
    return [[point.method if i else "full model", "" if point.keep is None else point.keep,
             round(100 * point.kept, 1), round(100 * point.accuracy, 1),
             f"{percent(point.low)} to {percent(point.high)}", point.questions, size(point.image_kv_bytes)]
            for i, point in enumerate(found)]


def note(results: Results, paths: list[Path]) -> str:
    """What was asked, and of whom, in Markdown."""
    settings = results.settings
    blurred = f", images blurred by {settings['blur']:g} pixels" if settings.get("blur") else ""
    names = ", ".join(f"`evaluation/results/{path.name}`" for path in paths)
    bundled = ""
    if settings["model"].removeprefix("weights/") in BUNDLED:
        bundled = " This checkpoint knows drawn shapes: none of these figures is of the official weights."
    return (f"`{settings['model']}`, {settings['questions']:,} questions about "
            f"{settings.get('split', 'test')} scenes{blurred}: {names}.{bundled}")


# ----- the tab


def curve_tab():
    """Build the tab inside the current `gr.Tab`."""
    import gradio as gr
    known = list(files())
    if not known:
        gr.Markdown(f"No results are in {FOLDER}: `python evaluate.py --prune P --json FILE` makes them.")
        return
    setting = gr.Dropdown(known, label="Setting", elem_id="curve-setting")
    methods = gr.Dropdown([], multiselect=True, label="Methods", elem_id="curve-methods")
    kinds = gr.CheckboxGroup([], label="Kinds of question", elem_id="curve-kinds")
    plot = gr.Plot(show_label=False, elem_id="curve-plot")
    words = gr.Markdown(elem_id="curve-note")
    rows = gr.Dataframe(headers=HEAD, interactive=False, show_label=False, elem_id="curve-table")
    gr.HTML(STYLE, padding=False)
    gr.on(None, choose, setting, [methods, kinds, words, plot, rows])       # also when the page is opened
    gr.on([methods.input, kinds.input], show, [setting, methods, kinds], [plot, rows],
          trigger_mode="always_last")           # who clicks fast waits for the last click only


def choose(setting: str) -> tuple:
    """Another setting: its methods, kinds and note, and the first methods drawn."""
    import gradio as gr
    paths = files()[setting]
    try:
        results = read(*paths)
    except ValueError as error:
        gr.Warning(str(error), title="No curve")
        return gr.Dropdown([], value=[]), gr.CheckboxGroup([], value=[]), "", None, []
    without_variants = [label for label in results.methods if " " not in label]
    first = (without_variants or results.methods)[:FIRST]
    return (gr.Dropdown(results.methods, value=first), gr.CheckboxGroup(results.asked, value=results.asked),
            note(results, paths), *show(setting, first, results.asked))


def show(setting: str, methods: list[str], kinds: list[str]) -> tuple:
    """Chart and table of what is chosen; nothing, and words why, where nothing can be drawn of it."""
    import gradio as gr
    from gradio.components.plot import PlotData
    try:
        results = read(*files()[setting])
        found = results.points(methods, kinds)
    except ValueError as error:
        gr.Warning(str(error), title="No curve")
        return None, []
    return PlotData(type="altair", plot=json.dumps(chart(found, results.methods))), table(found)
