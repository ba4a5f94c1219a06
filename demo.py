"""The page where people see what the model looks at, what is kept and what it costs: `python demo.py`.

    browser ── 127.0.0.1 ─► gradio's queue, one question at a time ─► page/desk.py ─► Assistant

Each tab is built by its module of page/. Nothing is loaded from the network, and nobody outside this machine
can see the page.
"""
from cli import program

program.begin(__name__)

import argparse
import os
import socket
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING

from cli.options import Parser, add_model_options, model_options, say_how, whole_number
from cli.program import say
from generate import Assistant
from page.answers import STYLE
from page.desk import Desk
from weights.image_source import MOST_FETCHED

if TYPE_CHECKING:
    import gradio as gr

HOST = "127.0.0.1"
PORT = 7860
MISSING = "the page needs gradio, which is not installed: pip install -e '.[demo]'"
EXAMPLES = ("python demo.py", "python demo.py --quantize int8 --port 8000")
TITLE = "trimmed-llama"
HEAD = """# trimmed-llama
Ask `{name}` about an image, and see what is left of the answer with fewer image tokens.{toy}"""
TOY = " It is a toy, which knows only drawn shapes; `--model` has the page ask another checkpoint."
CACHE = 600, 3600       # seconds: how often old files of visitors are deleted, and how old they are


def arguments() -> argparse.Namespace:
    parser = Parser("python demo.py", "A page in the browser: ask about images, and see what pruning does.",
                    "[options]", EXAMPLES)
    add_model_options(parser)
    parser.section("the page")
    parser.add_argument("--port", type=whole_number, default=PORT, metavar="N",
                        help=f"of {HOST}, where the page is; default {PORT}, 0: any that is free")
    return parser.parse_args()


def show(args: argparse.Namespace):
    """Serve the page until Ctrl-C."""
    stay_offline()
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError(MISSING) from None
    port = free_port(args.port)
    assistant = Assistant(args.model, **model_options(args))
    say_how(assistant.model, args, assistant.adapters)
    with TemporaryDirectory(prefix=TITLE, ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder      # what visitors upload leaves with the page
        serve(Desk(assistant, args.model), port)


def serve(desk: Desk, port: int):
    """Returns only by an exception: Ctrl-C is one."""
    made = page(desk)
    made.launch(server_name=HOST, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
                max_file_size=MOST_FETCHED, footer_links=[], run_history=False, ssr_mode=False, pwa=False,
                mcp_server=False, enable_monitoring=False, css=STYLE, theme=theme())
    say(f"the page is at http://{HOST}:{port} (Ctrl-C ends it)")
    Event().wait()


def page(desk: Desk) -> "gr.Blocks":
    """The tabs, each built by its module. A builder gets the desk and the visitor's `state`; all but that of
    Ask return what is done whenever their tab is opened: a function of the Asked in `state` (None before the
    first answer), and the components that it fills."""
    import gradio as gr  # here and in the modules of the tabs, because only this program needs it

    from page.ask import MODEL, ask_tab
    from page.curve import curve_tab
    from page.learn import learn_tab
    from page.see import see_tab

    others = {"See": see_tab, "Learn": learn_tab}       # name: builder

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=CACHE) as made:
        gr.Markdown(HEAD.format(name=desk.name, toy=TOY if desk.name == "tiny" else ""))
        state = gr.State()                      # of each visitor: the Asked of the last answer
        with gr.Tab("Ask", id="ask"):
            ask_tab(desk, state)
        for name, build in others.items():
            with gr.Tab(name, id=name.lower()) as tab:
                show, components = build(desk, state)
            tab.select(show, state, components, concurrency_limit=1, concurrency_id=MODEL)
        with gr.Tab("Curve", id="curve"):
            curve_tab()
    return made


def theme() -> "gr.themes.Base":
    """Fonts of the visitor's own computer: those that gradio brings lack letters. Darker small print."""
    import gradio as gr

    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    return gr.themes.Default(primary_hue="blue", **fonts).set(
        body_text_color_subdued="*neutral_500", button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700")


def stay_offline():
    """Before gradio is imported: it asks nobody anything, and finds its own page past a proxy."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in "NO_PROXY", "no_proxy":
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST]))


def free_port(port: int) -> int:
    """The port, or any free one for 0. Raises ValueError for one that is taken or none."""
    if not 0 <= port < 2 ** 16:
        raise ValueError(f"--port is {port}, but must be a number from 1 to {2 ** 16 - 1}, or 0 for any")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(f"--port {port}: cannot be used ({error.strerror}); is another page open there? "
                             "Give another one, or 0 for any that is free") from None
        return probe.getsockname()[1]


def main():
    program.run(show, arguments)


if __name__ == "__main__":
    main()
