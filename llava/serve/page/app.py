"""The page in Gradio: what stands where, and what happens at each button. All work is in user.py and the viewer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from llava.pruning import list_pruners
from llava.serve.flags import DEFAULT_METHOD, FULL
from llava.serve.page import pieces
from llava.serve.page.user import Bundled, Replaced, User, address_of, read_address, told_error
from llava.serve.status import Stopped
from llava.serve.viewer.desk import Room
from llava.serve.viewer.html import document, fragment
from llava.serve.viewer.look import MOST_LOOKS
from llava.serve.viewer.setting import Option, Setting, options_of, parse_entry

COUNT, AUTO, ALL = "a count", "auto", "all"
METHODS, QUESTIONS, BUDGETS = "methods", "questions", "budgets"
FORGOTTEN = "this tab was forgotten, as others were opened since: load the page again"
NO_PICTURE = "this address names no picture, as own ones are in none: choose or open one, then ask"
NOTHING_YET = (
    "Ask, and what was kept stands here; Compare puts two to six methods, questions or budgets beside each other."
)
MOST_UNKNOWN = 576  # of the slider, where there is no picture yet
MOST_TABS = 64  # whose pictures are held
SEND = "window.sendPicture = (message) => trigger('input', message);"  # for page.js
SAVE = """(text) => { if (!text) return; const link = document.createElement("a");
link.href = URL.createObjectURL(new Blob([text], {type: "text/html"})); link.download = "kept-tokens.html";
link.click(); }"""
TO_ADDRESS = """(address) => { if (!address) return address;
history.replaceState(null, "", address); return location.href; }"""


@dataclass(frozen=True)
class Page:
    """What the page is made of.

    Args:
        offered: bundled pictures and videos by name.
        questions: examples.
        most_bytes: of an upload.
    """

    room: Room
    offered: dict[str, Bundled]
    questions: Sequence[str]
    most_bytes: int

    def __post_init__(self):
        object.__setattr__(self, "numbers", itertools.count())

    # --- what happens ----------------------------------------------------------------------------------------------

    def begin(self, request: gr.Request) -> tuple[Any, ...]:
        """A tab opens: a desk of its own, with what the address asks for on it."""
        user, message, settings, shown = User(self.room.desk()), "", [], ""
        first, name = next(iter(self.offered), None), None
        try:
            name, settings = read_address(str(request.query_params))
            if settings and name is None:
                message = pieces.note(NO_PICTURE)
            elif name is not None:
                shown = self._preview(user, user.choose(self.offered, name))
        except Exception as error:
            settings, name, message = [], None, pieces.error(told_error(error))
        if first is not None and name is None and not settings:
            shown = self._preview(user, user.choose(self.offered, first))
        setting = (
            settings[0] if settings else Setting(self.questions[0] if self.questions else "What is this?", keep="16")
        )
        kind = {FULL: ALL}.get(setting.keep, COUNT if setting.keep.isdigit() else AUTO)
        count = int(setting.keep) if kind == COUNT else 16
        most = user.desk.tokens_of_view() or MOST_UNKNOWN
        slider = gr.Slider(maximum=most, value=min(count, most))
        rule = setting.keep if kind == AUTO else "auto"
        fields = (setting.question, setting.method, kind, slider, rule, " ".join(setting.options), setting.method)
        pending = settings if user.bundled else []
        return user, pending, shown, message, *fields

    def receive(self, user: User | None, event: gr.EventData) -> tuple[Any, str, Any]:
        """A picture was chosen, opened, pasted or taken."""
        if user is None:
            return gr.skip(), pieces.error(FORGOTTEN), gr.skip()
        try:
            picture = user.take(event._data, self.offered, self.most_bytes, self.room.options.num_frames)
        except Exception as error:
            return gr.skip() if user.desk.name else "", pieces.error(told_error(error)), gr.skip()
        slider = gr.Slider(maximum=user.desk.tokens_of_view() or MOST_UNKNOWN)
        return self._preview(user, picture), pieces.note("ready for a question"), slider

    def _preview(self, user: User, picture: Any) -> str:
        return pieces.preview(picture, user.desk.name, user.desk.shown)

    def ask(
        self, user: User, question: str, method: str, kind: str, count: float, rule: str, options: str
    ) -> Iterator[Any]:
        """One look."""
        try:
            keep = {COUNT: str(int(count)), AUTO: rule, ALL: FULL}[kind]
            settings = [Setting(question.strip(), method, keep, tuple(options.split()))]
        except Exception as error:
            yield pieces.error(told_error(error)), gr.skip(), gr.skip()
            return
        yield from self.show(user, settings)

    def compare(
        self,
        user: User,
        what: str,
        methods: Sequence[str],
        questions: str,
        budgets: str,
        question: str,
        method: str,
        kind: str,
        count: float,
        rule: str,
        options: str,
    ) -> Iterator[Any]:
        """Two to six looks beside each other."""
        try:
            keep, own = {COUNT: str(int(count)), AUTO: rule, ALL: FULL}[kind], tuple(options.split())
            if what == METHODS:
                entries = map(parse_entry, methods)
                settings = [Setting(question.strip(), name, keep, given) for name, given in entries]
            elif what == QUESTIONS:
                lines = filter(None, map(str.strip, questions.splitlines()))
                settings = [Setting(line, method, keep, own) for line in lines]
            else:
                settings = [Setting(question.strip(), method, budget, own) for budget in budgets.split()]
            if not 2 <= len(settings) <= MOST_LOOKS:
                raise ValueError(f"two to {MOST_LOOKS} {what} stand beside each other, got {len(settings)}")
        except Exception as error:
            yield pieces.error(told_error(error)), gr.skip(), gr.skip()
            return
        yield from self.show(user, settings)

    def show(self, user: User | None, settings: Sequence[Setting]) -> Iterator[Any]:
        """Make looks, telling how it goes: what is told, the result, the address that shows the same."""
        if user is None:
            yield pieces.error(FORGOTTEN), gr.skip(), gr.skip()
            return
        if not settings:
            yield gr.skip(), gr.skip(), gr.skip()
            return
        shown = 0
        try:
            for progress in user.work(settings):
                result: Any = gr.skip()
                if len(progress.done) > shown:
                    shown = len(progress.done)
                    result = self._fragment(user)
                yield pieces.told(progress), result, gr.skip()
        except Replaced:
            return
        except Stopped:
            yield pieces.note("stopped"), gr.skip(), gr.skip()
            return
        except Exception as error:
            yield pieces.error(told_error(error)), gr.skip(), gr.skip()
            return
        looks = user.comparison.looks
        end = "stopped" if looks[-1].stopped else "done"
        yield pieces.note(end), self._fragment(user), address_of(settings, user.bundled)

    def _fragment(self, user: User) -> str:
        return fragment(user.comparison, f"look{next(self.numbers)}")

    def stop(self, user: User | None) -> None:
        forget(user)

    def save(self, user: User | None) -> str:
        """What is shown, as an HTML file."""
        if user is None or user.comparison is None:
            return ""
        setting = user.comparison.looks[0].setting
        return document("Which visual tokens were kept", [(setting.question, user.comparison)])

    # --- what stands where -----------------------------------------------------------------------------------------

    def blocks(self) -> gr.Blocks:
        with gr.Blocks(title="Script: which visual tokens are kept", analytics_enabled=False) as blocks:
            user = gr.State(None, delete_callback=forget)
            pending = gr.State([])
            gr.HTML(
                f"<h1>Which visual tokens are kept for a question?</h1><p>{self.room.session.model_line()}</p>",
                padding=False,
            )
            document_text = gr.Textbox(visible="hidden", label="document")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    box = gr.HTML(
                        pieces.picture_box(self.offered.values(), self.most_bytes), js_on_load=SEND, padding=False
                    )
                    preview = gr.HTML(elem_id="preview", padding=False)
                    question = gr.Textbox(label="Question", lines=1, max_lines=3, elem_id="question")
                    with gr.Row():
                        examples = [gr.Button(text, size="sm", min_width=80) for text in self.questions]
                    with gr.Row():
                        ask = gr.Button("Ask", variant="primary", elem_id="ask")
                        stop = gr.Button("Stop", variant="stop", elem_id="stop")
                    method = gr.Dropdown(list_pruners(), value=DEFAULT_METHOD, label="Method", elem_id="method")
                    kind = gr.Radio([COUNT, AUTO, ALL], value=COUNT, label="Visual tokens kept of each view")
                    count = gr.Slider(1, 576, value=16, step=1, label="Count", elem_id="count")
                    rule = gr.Textbox("auto", label="Rule of auto, such as auto:0.9", visible=False)
                    with gr.Accordion("Options of the method", open=False) as part:
                        options = gr.Textbox(label="As on the command line: key=value", elem_id="options")
                        method_of_form = gr.State(DEFAULT_METHOD)
                        option_form(part, method_of_form, options)
                    with gr.Accordion("Compare", open=False, elem_id="compare-part"):
                        what = gr.Radio([METHODS, QUESTIONS, BUDGETS], value=METHODS, label="Beside each other")
                        methods = gr.Dropdown(
                            list_pruners(),
                            value=["script", "divprune", "trim", "random"],
                            multiselect=True,
                            max_choices=MOST_LOOKS,
                            allow_custom_value=True,
                            label="Methods, with options if you like: script tau=0.3",
                        )
                        questions = gr.Textbox(
                            "\n".join(self.questions[:2]), lines=3, label="Questions, one a line", visible=False
                        )
                        budgets = gr.Textbox("4 16 64 full", label="Budgets", visible=False)
                        compare = gr.Button("Compare", variant="primary", elem_id="compare")
                with gr.Column(scale=5, min_width=320):
                    live = gr.HTML(elem_id="live", padding=False)
                    result = gr.HTML(pieces.note(NOTHING_YET), elem_id="result", padding=False)
                    address = gr.Textbox(
                        label="Link to these settings (own pictures are not in it)",
                        elem_id="address",
                        interactive=False,
                        buttons=["copy"],
                    )
                    save = gr.Button("Save as an HTML file", size="sm", elem_id="save")
            setting = [question, method, kind, count, rule, options]
            shown = [live, result, address]
            quick = {"show_progress": "hidden"}
            run = {**quick, "concurrency_limit": None, "trigger_mode": "multiple"}  # the room has the queue

            opened = blocks.load(self.begin, None, [user, pending, preview, live, *setting, method_of_form], **quick)
            opened.then(self.show, [user, pending], shown, **run)
            box.input(self.receive, user, [preview, live, count], **quick)
            asked = [
                ask.click(self.ask, [user, *setting], shown, **run),
                question.submit(self.ask, [user, *setting], shown, **run),
                count.release(self.ask, [user, *setting], shown, **run),
                compare.click(self.compare, [user, what, methods, questions, budgets, *setting], shown, **run),
            ]
            for event in asked:
                event.then(None, address, address, js=TO_ADDRESS)
            stop.click(self.stop, user, None, queue=False, **quick)
            save.click(self.save, user, document_text, **quick).then(None, document_text, None, js=SAVE)
            for button, text in zip(examples, self.questions, strict=True):
                button.click(lambda text=text: text, None, question, **quick)
            kind.change(
                lambda kind: (gr.Slider(visible=kind == COUNT), gr.Textbox(visible=kind == AUTO)),
                kind,
                [count, rule],
                **quick,
            )
            what.change(
                lambda what: (
                    gr.Dropdown(visible=what == METHODS),
                    gr.Textbox(visible=what == QUESTIONS),
                    gr.Textbox(visible=what == BUDGETS),
                ),
                what,
                [methods, questions, budgets],
                **quick,
            )
            method.input(lambda name: ("", name), method, [options, method_of_form], **quick)
        return blocks


def option_form(part: gr.Accordion, method: gr.State, options: gr.Textbox) -> None:
    """A field for each option of the method, made when the part is opened; changes are written to ``options``."""

    @gr.render(inputs=[method, options], triggers=[part.expand, method.change])
    def form(name: str, text: str) -> None:
        given = dict(one.partition("=")[::2] for one in text.split())
        for option in options_of(name):
            field = option_field(option, given.get(option.name, option.default))

            def write(value: Any, text: str, option: Option = option) -> str:
                return with_option(text, option, value)

            field.input(write, [field, options], options, show_progress="hidden")


def option_field(option: Option, value: str) -> Any:
    """The field of one option, with its value as it is written."""
    common = {"label": option.name, "info": option.help, "interactive": True}
    if option.kind == "choice":
        return gr.Dropdown(list(option.choices), value=value if value in option.choices else option.default, **common)
    if option.kind == "switch":
        return gr.Checkbox(value=value.lower() == "true", **common)
    return gr.Textbox(value=value, **common)


def with_option(text: str, option: Option, value: Any) -> str:
    """Options as they are written, with one of them changed; its default is not written."""
    others = [one for one in text.split() if one.partition("=")[0] != option.name]
    value = str(value).lower() if isinstance(value, bool) else str(value).strip()
    return " ".join(others if value in ("", option.default) else [*others, f"{option.name}={value}"])


def forget(user: User | None) -> None:
    """Whatever runs for a tab ends."""
    if user is not None:
        user.stop.set()
