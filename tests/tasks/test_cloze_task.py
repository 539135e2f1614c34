"""The configuration of a cloze task: every refusal, and how the template is put together."""

import subprocess
import sys

import pytest

from fastkd.tasks.cloze_task import ClozeTask


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "cloze"}, "kind is 'cloze'; it must be one of verbalizer, choices, classification"),
        ({"template": "{premise}"}, r"has \{mask\} 0 times; kind 'verbalizer' needs it exactly once"),
        ({"template": "{mask} {premise} {mask}"}, r"has \{mask\} 2 times"),
        ({"template": "{premise} {mask} {choice}"}, r"has \{choice\} 1 times; .*not at all"),
        ({"template": "true? {mask}"}, "makes every input the same"),
        ({"template": "{premise {mask}"}, "literal brace twice"),
        ({"template": "{premise} } {mask}"}, "cannot be read.*literal brace twice"),
        ({"template": "{} {mask}"}, "no {column} name"),
        ({"template": "{premise!r} {mask}"}, "no {column} name"),
        ({"label_words": ()}, "label_words is .*needs one word a class"),
        ({"label_words": ("yes",)}, "two or more texts"),
        ({"label_words": (True, False)}, "put yes, no and numbers in quotes"),
        ({"label_words": ("yes", " ")}, "none empty"),
        ({"labels": ("a", "b", "c")}, "one entry each a class"),
        ({"labels": ("a", "a")}, "no value may stand there twice"),
        ({"choices": ("a", "b")}, "kind 'verbalizer' got choices;.*other kinds take none"),
        ({"strip": ("premise", "hypotesis")}, "strip names 'hypotesis'; it must name columns of the task: premise"),
        ({"length_penalty": -1.0}, "length_penalty is -1.0"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"max_length": 0}, "max_length is 0"),
        ({"kind": "classification", "template": "{premise}"}, "label_words is .*other kinds take none"),
        ({"kind": "classification", "template": "{premise}", "label_words": ()}, "labels is .*in class order"),
        ({"kind": "choices", "template": "{premise} {choice}", "label_words": ()}, "got no candidates; .*exactly one"),
        (
            {"kind": "choices", "template": "{choice}", "label_words": (), "choices_column": "x", "choices": ("a", "b")},
            "got choices and choices_column",
        ),
    ],
)
def test_bad_tasks_are_refused(changes, message):
    good = {"kind": "verbalizer", "template": "{premise} {mask}", "label_words": ("yes", "no")}
    with pytest.raises(ValueError, match=message):
        ClozeTask(**(good | changes))


def test_lists_become_tuples_and_a_bare_string_is_refused():
    task = ClozeTask(kind="verbalizer", template="{{{premise}}} {mask}", label_words=["yes", "no"])  # type: ignore[arg-type]
    assert task.label_words == ("yes", "no") and hash(task) == hash(task)
    assert task.columns == ("premise",)
    with pytest.raises(TypeError, match="label_words is 'yes'; it must be a list"):
        ClozeTask(kind="verbalizer", template="{premise} {mask}", label_words="yes")  # type: ignore[arg-type]


def test_render_puts_the_values_in_and_says_where():
    task = ClozeTask(kind="choices", template="{{{premise}}} so {choice}, {premise}", choices=("a", "b"))
    text, spans = task.render({"premise": "cat", "choice": "home"})
    assert text == "{cat} so home, cat"
    # The answer takes the space before it along.
    assert [(name, text[start:end]) for name, start, end in spans] == [("premise", "cat"), ("choice", " home"), ("premise", "cat")]
    assert task.slot == "choice" and task.columns == ("premise",)


def test_import_is_the_standard_library_alone():
    program = "import sys, fastkd.tasks.cloze_task; print([m for m in ('torch', 'numpy', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
