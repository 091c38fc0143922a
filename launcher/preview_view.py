"""How a preview of views appears: contexts with the privileged part marked, then tokens and positions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from launcher.preview import Preview, Response, Seen, ViewPreview

OPEN, CLOSE = "⟦", "⟧"
PRIVILEGED, FAINT = "bold magenta", "dim"
CONTEXT_TAIL = 4  # context tokens shown before a response
RESPONSE_HEAD = 48  # response tokens shown


def render(found: Preview, tokenizer: Any, *, everything: bool) -> RenderableType:
    """The whole preview.

    Args:
        everything: every token, instead of the end of a context and the beginning of a response.
    """
    parts: list[RenderableType] = [_header(found)]
    parts += [_panel(view, found, tokenizer, everything=everything) for view in found.views]
    if not found.views:
        parts.append(Text("The objective asks no teacher: there is no view.", style="yellow"))
    if not found.responses:
        parts.append(
            Text("Without a response there are no positions: give one with --response.", style=FAINT)
        )
    return Group(*parts)


def _header(found: Preview) -> RenderableType:
    tag = f", tag {found.tag!r}" if found.tag else ""
    title = Text.assemble((f"{found.run}, example {found.number}", "bold"), (f"  {found.place}{tag}", FAINT))
    parts: list[Text] = [title, Text.assemble(("prompt   ", FAINT), found.prompt.text)]
    if found.guide is not None:
        under = f"{found.guided} of a group under [sampling] context: "
        parts.append(Text.assemble(("sampled  ", FAINT), under, found.guide.text))
    for place, response in enumerate(found.responses):
        reward = "" if response.reward is None else f"  reward {response.reward:g}"
        parts.append(Text.assemble((f"response {place} ", FAINT), response.text, (reward, FAINT)))
    return Group(*parts)


def _panel(view: ViewPreview, found: Preview, tokenizer: Any, *, everything: bool) -> RenderableType:
    who = Text.assemble(
        ("scored by ", FAINT), (view.teacher, "bold"), (f"  {view.weights}", FAINT),
        ("\nasked for ", FAINT), view.signal, ("   coefficient ", FAINT), f"{view.coefficient:g}",
    )  # fmt: skip
    parts: list[RenderableType] = [who]
    for seen in view.seen:
        responses = found.responses if seen.response is None else found.responses[seen.response :]
        parts += [Text(), _which_template(view, seen, found), _marked(seen, tokenizer)]
        if responses:
            parts.append(_tokens(seen, responses[0], found.trained, tokenizer, everything=everything))
    return Panel(
        Group(*parts), title=Text(f"view {view.name}", style="bold"), title_align="left", box=box.ROUNDED
    )


def _which_template(view: ViewPreview, seen: Seen, found: Preview) -> Text:
    whose = "" if seen.response is None else f"before response {seen.response}: "
    if seen.response is None and len(found.responses) > 1:
        whose = f"before all {len(found.responses)} responses: "
    lines = [
        f"template {number + 1} of {len(view.templates)} lacks {', '.join(f'{{{name}}}' for name in names)}"
        for number, names in enumerate(seen.context.lacking)
    ]
    if seen.context.template is not None:
        used = f"template {seen.context.template + 1} of {len(view.templates)}"
        return Text.assemble((whose + used, "bold green"), (_after(lines), FAINT))
    if not view.templates:
        return Text(whose + "the student's own prompt", style="bold green")
    if seen.refused:
        return Text.assemble((whose + "refused, the run would stop here", "bold red"), (_after(lines), FAINT))
    return Text.assemble(
        (whose + "the student's own prompt, not marked", "bold yellow"), (_after(lines), FAINT)
    )


def _after(lines: Sequence[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def _marked(seen: Seen, tokenizer: Any) -> Text:
    """The decoded context, what the student does not see between marks."""
    text = Text()
    pieces = groupby(zip(seen.context.prompt.ids.tolist(), seen.privileged, strict=True), key=lambda p: p[1])
    for privileged, pairs in pieces:
        words = tokenizer.decode([token for token, _ in pairs])
        text.append(f"{OPEN}{words}{CLOSE}" if privileged else words, style=PRIVILEGED if privileged else "")
    return text


def _tokens(
    seen: Seen, response: Response, trained: tuple[int, int | None], tokenizer: Any, *, everything: bool
) -> Table:
    """Index, token, and what becomes of it: context is seen, a response token is scored at its position."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("index", justify="right")
    table.add_column("id", justify="right", style=FAINT)
    table.add_column("token")
    table.add_column("position", justify="right")
    table.add_column("")
    context = seen.context.prompt.ids.tolist()
    first = 0 if everything else max(0, len(context) - CONTEXT_TAIL)
    if first:
        table.add_row(f"0–{first - 1}", "", f"… {first} tokens", "", "context, not scored", style=FAINT)
    for index in range(first, len(context)):
        what = Text("privileged, not scored", style=PRIVILEGED)
        if not seen.privileged[index]:
            what = Text("context, not scored", style=FAINT)
        table.add_row(str(index), str(context[index]), _token(tokenizer, context[index]), "", what)
    ids = response.ids.tolist()
    shown = ids if everything else ids[:RESPONSE_HEAD]
    for t, token in enumerate(shown):
        chosen = trained[0] <= t and (trained[1] is None or t < trained[1])
        table.add_row(
            str(len(context) + t), str(token), _token(tokenizer, token), str(t),
            Text("scored" if chosen else "scored, not trained on", style="green" if chosen else "yellow"),
        )  # fmt: skip
    if len(shown) < len(ids):
        table.add_row("", "", f"… {len(ids) - len(shown)} more", "", "scored (--all shows them)", style=FAINT)
    return table


def _token(tokenizer: Any, token: int) -> Text:
    return Text(repr(tokenizer.decode([token])))
