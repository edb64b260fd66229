"""How examples look on a terminal and on a pipe."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from forge.cli import display
from forge.cli.data_view import show_examples
from forge.plan.data_view import ShownExample, Span

CHAT = ShownExample(
    index=1202,
    split="held_out",
    num_tokens=34,
    num_targets=4,
    spans=(
        Span(text="<|im_start|>", has_loss=False, kind="special"),
        Span(text="user\nWhat does <|im_end|> mean?\t\x1b[31m\u202ered", has_loss=False),
        Span(text="<|im_end|>", has_loss=False, kind="special"),
        Span(text="\n", has_loss=False),
        Span(text="It ends a turn.\n\nAlways.", has_loss=True),
        Span(text="<|im_end|>", has_loss=True, kind="special"),
    ),
)
MASKED = ShownExample(
    index=0,
    split="train",
    num_tokens=3,
    num_targets=1,
    spans=(Span(text="the ", has_loss=False), Span(text="[MASK]", has_loss=True, kind="special", target="capital")),
    arrays={"score": "0.5 at every position"},
)


def drawn(*examples: ShownExample, width: int = 80, is_terminal: bool = False, is_whole: bool = False) -> str:
    console = display.HarmlessConsole(
        file=io.StringIO(),
        width=width,
        force_terminal=is_terminal,
        color_system="truecolor" if is_terminal else None,
        soft_wrap=not is_terminal,
        highlight=False,
        markup=False,
        emoji=False,
    )
    show_examples(examples, console=console, is_whole=is_whole)
    assert isinstance(console, Console) and isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_show_examples__pipe__marks_every_line_that_carries_loss() -> None:
    lines = drawn(CHAT).splitlines()
    assert lines[3:] == [
        "example 1,202 (held out): 34 tokens, 4 with loss",
        "     │ ⟦<|im_start|>⟧user↵",
        "     │ What does <|im_end|> mean?⇥�[31m�red⟦<|im_end|>⟧↵",
        "loss │ It ends a turn.↵",
        "loss │ ↵",
        "loss │ Always.⟦<|im_end|>⟧",
    ]


def test_show_examples__terminal__has_the_same_marks_and_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = drawn(CHAT, is_terminal=True)
    assert text.count("\x1b[32mloss │ ") == 3
    assert "\x1b[35m<|im_end|>\x1b[0m" in text  # the special token, not the text that spells it
    assert "What does <|im_end|> mean" in text
    assert "\x1b[31m" not in text and "\u202e" not in text


@pytest.mark.parametrize("width", [30, 60, 80])
def test_show_examples__narrow_terminal__breaks_lines_under_their_mark(width: int) -> None:
    long = Span(text="wide 漢字 text " * 30, has_loss=True)
    example = ShownExample(index=1, split="train", num_tokens=9, num_targets=9, spans=(long,))
    lines = drawn(example, width=width, is_terminal=True).splitlines()
    plain = [line.replace("\x1b[32m", "").replace("\x1b[0m", "") for line in lines if "│" in line]
    assert len(plain) > 3 and all(line.startswith("loss │ ") and cell_len(line) <= width for line in plain)
    assert "".join(line.removeprefix("loss │ ") for line in plain) == long.text


def test_show_examples__target__stands_behind_its_position() -> None:
    text = drawn(MASKED)
    assert "loss │ the «⟦[MASK]⟧ → capital»" in text
    assert "score: 0.5 at every position" in text


def test_show_examples__hundreds_of_lines__are_shortened_unless_all_are_asked_for() -> None:
    span = Span(text="\n".join(f"line {i}" for i in range(300)), has_loss=False)
    example = ShownExample(index=1, split="train", num_tokens=9, num_targets=9, spans=(span,))
    short = drawn(example)
    assert "… 294 more lines …" in short and "line 299" in short and "line 150" not in short
    assert "line 150" in drawn(example, is_whole=True)


def test_show_examples__secret_of_the_environment__is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPPLIER_API_KEY", "sk-4711-abcdefgh")
    span = Span(text="the key is sk-4711-abcdefgh.", has_loss=False)
    example = ShownExample(index=1, split="train", num_tokens=9, num_targets=9, spans=(span,))
    assert "4711" not in drawn(example) and "***" in drawn(example)


def test_show_examples__loss_at_every_few_tokens__keeps_lines_whole() -> None:
    words = [Span(text=f"word {i} ", has_loss=i % 2 == 0) for i in range(60)]
    example = ShownExample(index=1, split="train", num_tokens=9, num_targets=9, spans=tuple(words))
    assert drawn(example).splitlines()[-1].startswith("loss │ «word 0 »word 1 «word 2 »word 3 ")


def test_show_examples__parts__have_a_line_of_their_own() -> None:
    spans = [Span(text="same", has_loss=False, part="chosen")]
    spans += [Span(text=text, has_loss=True, part=part) for text, part in (("good", "chosen"), ("bad", "rejected"))]
    example = ShownExample(index=1, split="train", num_tokens=9, num_targets=9, spans=tuple(spans))
    assert drawn(example).splitlines()[4:] == [
        "     │ [chosen]",
        "     │ same",
        "loss │ good",
        "     │ [rejected]",
        "loss │ bad",
    ]
