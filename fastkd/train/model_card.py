"""The model card (README.md) of an exported student. It tells what was recorded or measured, and nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from .. import __version__
from ..methods.registry import METHODS
from ..models.language_model import LanguageModel
from ..models.onnx_export import ONNX_FILE
from ..models.student import count_parameters
from ..models.task_model import TaskModel
from ..sealed import read_bytes
from ..tasks.glue import HUB_PATHS
from .evaluate import TITLES, data_name
from .markdown import code_span, escaped, fenced, python_literal, table
from .provenance import source, versions

log = logging.getLogger("fastkd")
CARD_FILE = "README.md"
NOT_RECORDED = "not recorded"
_TEXT = '"Some text."'
_PAIR = '"A question?", "A text that has the answer."'


def read_evaluation(path: Path, student: str) -> dict[str, Any]:
    """A results.json of `fastkd eval` that judges this `student`; any other file is refused by `ValueError`."""
    try:
        content = read_bytes(path)
    except OSError as error:
        raise ValueError(
            f"results: {path}: {error.strerror or error}; give the results.json that `fastkd eval {student} --output_dir DIR` writes."
        ) from error
    try:
        evaluation = json.loads(content)
        judged_name, judged_on = Path(evaluation["models"]["student"]["model_name_or_path"]), data_name(evaluation)
        _evaluation_scores(evaluation), _evaluation_section(evaluation)  # what the card makes of it
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"results {str(path)!r} is no file that `fastkd eval --output_dir` writes: {error!r}.") from error
    if judged_name.resolve() != Path(student).resolve():
        raise ValueError(
            f"results {str(path)!r} judges {judged_name} on {judged_on}, and the card is of {student}. Give "
            f"results of `fastkd eval {student}`."
        )
    return evaluation


def model_card(
    student: LanguageModel | TaskModel,
    name: str,
    *,
    provenance: Mapping[str, Any] | None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    onnx_difference: float | None = None,
) -> str:
    """Write the card of `student`, exported to a folder called `name`.

    Args:
        provenance: what `read_provenance` finds beside the student; without it the card says that it is not recorded.
        evaluations: results of `fastkd eval` (`read_evaluation`).
        onnx_difference: of the ONNX file in the folder, if there is one.

    Names and settings are shown as they are, whatever they hold: none of them is Markdown or HTML. A provenance of another shape is
    told by one warning, and the card then says that it is not recorded.
    """
    try:
        card = _card(student, name, provenance, evaluations, onnx_difference)
    except Exception as error:
        if provenance is None:
            raise
        log.warning("The card of %r does not tell what made the model: its record is of no known shape (%r).", name, error)
        card = _card(student, name, None, evaluations, onnx_difference)
    return card.encode(errors="backslashreplace").decode()  # file names may hold what UTF-8 does not


def _card(
    student: LanguageModel | TaskModel,
    name: str,
    provenance: Mapping[str, Any] | None,
    evaluations: Sequence[Mapping[str, Any]],
    onnx_difference: float | None,
) -> str:
    sections = {
        "Use": _use(student, name, onnx_difference),
        "Origin": _origin(student, provenance),
        "Training": _training(provenance),
        "Results": _results(student, provenance, evaluations),
        "Limits": _limits(student),
        "Versions": _versions(provenance),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    tags = [*_tags(provenance), *(["onnx"] if onnx_difference is not None else [])]
    metadata = _metadata(student, name, tags, provenance, evaluations)
    return f"---\n{metadata}\n---\n\n# {escaped(name)}\n\n{_summary(student, provenance)}\n\n{body}\n"


def _metadata(
    student: LanguageModel | TaskModel,
    name: str,
    tags: list[str],
    provenance: Mapping[str, Any] | None,
    evaluations: Sequence[Mapping[str, Any]],
) -> str:
    """The front matter, as the hub reads it."""
    from huggingface_hub import EvalResult, ModelCardData

    task = _auto_class(student)[1]
    stages = provenance["stages"] if provenance else []
    measured: list[tuple[dict[str, Any], Mapping[str, float]]] = []
    if stages:
        measured.append((_hub_data(_judged_on(stages[-1]["data"])), stages[-1]["scores"]))
    measured += map(_evaluation_scores, evaluations)
    if student.vocab_map is not None:
        measured = []  # of slots, by the teacher's tokenizer: none of it is a figure of the exported model
    # One figure a metric and data: what `fastkd eval` found, where it judged on what the stage had judged on.
    found = {
        (data["dataset_type"], data["dataset_config"], metric): (data, value)
        for data, scores in measured
        for metric, value in scores.items()
    }
    results = [
        EvalResult(task_type=task, metric_type=metric, metric_name=TITLES.get(metric, metric), metric_value=value, **data)
        for (_, _, metric), (data, value) in found.items()
    ]
    known = [stage["data"] for stage in stages]
    on_hub = [data["path"]["hub"] if "path" in data else _benchmark(data) is not None for data in known]
    datasets = [_hub_data(data)["dataset_type"] for data, is_there in zip(known, on_hub, strict=True) if is_there]
    return ModelCardData(
        base_model=_base_model(provenance),
        datasets=_unique(datasets),
        language="en" if any(_benchmark(data) for data in known) else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=tags,
        metrics=_unique(result.metric_type for result in results),
        model_name=name,
        eval_results=results or None,
    ).to_yaml()


def _evaluation_scores(evaluation: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, float]]:
    """What an evaluation judged on, as fields of an `EvalResult`, and the student's scores."""
    data, settings = evaluation["data"], evaluation["settings"]
    place = _evaluated_place(evaluation)
    judged_on = {**data, "path": place, "name": settings.get("name"), "eval_split": data["split"]}
    return _hub_data(judged_on), evaluation["models"]["student"]["scores"]


def _evaluated_place(evaluation: Mapping[str, Any]) -> Any:
    """Where an evaluation's rows are, as `source` tells it."""
    data = evaluation["data"]
    return data["place"] if "place" in data else source(data.get("text") or evaluation["settings"].get("path"))


def _hub_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `EvalResult` that say what was judged on."""
    place, benchmark, name, config = data.get("path"), _benchmark(data), data.get("task"), data.get("name")
    if place is not None and benchmark is None:  # what lies there may be anything, whatever task it is read as
        kind = name = place["name"]
    else:
        kind, config = benchmark or name, str(name).partition("/")[2] or None
    return {"dataset_type": kind, "dataset_name": name, "dataset_config": config, "dataset_split": data.get("eval_split")}


def _judged_on(data: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's data as its scores are of them: those of `eval_path`, where there is one, whose split is not recorded."""
    return {**data, "path": data["eval_path"], "eval_split": None} if "eval_path" in data else {**data}


def _benchmark(data: Mapping[str, Any]) -> str | None:
    """The hub's name of a benchmark's data; None where the rows are not the hub's own."""
    name = HUB_PATHS.get(str(data.get("task")).partition("/")[0])
    return name if data.get("path") in (None, {"name": name, "hub": True}) else None


def _base_model(provenance: Mapping[str, Any] | None) -> str | None:
    """What the student started from, else its teacher, if that is on the hub. One alone: several are taken for a merge."""
    if provenance is None:
        return None
    candidates = (provenance["student"]["from"], provenance["stages"][-1]["teacher"])
    first = next((found for found in candidates if found is not None), None)
    return first["name"] if first is not None and first["hub"] else None


def _tags(provenance: Mapping[str, Any] | None) -> list[str]:
    if provenance is None:
        return ["fastkd"]
    taught = METHODS[provenance["method"]].paper is not None
    return ["fastkd", *(["knowledge-distillation"] if taught else []), provenance["method"]]


def _summary(student: LanguageModel | TaskModel, provenance: Mapping[str, Any] | None) -> str:
    config = student.model.config.get_text_config()
    shape = ", ".join(
        f"{label} {value}"
        for label, key in (("layers", "num_hidden_layers"), ("width", "hidden_size"), ("vocabulary", "vocab_size"))
        if (value := getattr(config, key, None)) is not None
    )
    trained = f", trained by {METHODS[provenance['method']].title}" if provenance else ""
    model = f"`{type(student.model).__name__}` with {count_parameters(student):,} parameters ({shape}){trained}"
    return f"{model}, exported by fastkd {__version__}."


def _auto_class(student: LanguageModel | TaskModel) -> tuple[str, str]:
    """The class of transformers that opens it, and the hub's name for what it does."""
    if isinstance(student, LanguageModel):
        return ("AutoModelForCausalLM", "text-generation") if student.causal else ("AutoModelForMaskedLM", "fill-mask")
    if student.kind == "question_answering":
        return "AutoModelForQuestionAnswering", "question-answering"
    return "AutoModelForSequenceClassification", "text-classification"


def _use(student: LanguageModel | TaskModel, name: str, onnx_difference: float | None) -> str:
    auto, task = _auto_class(student)
    text = _PAIR if task == "question-answering" else _TEXT
    outputs = "model.generate(**inputs, max_new_tokens=20)" if task == "text-generation" else "model(**inputs)"
    opened = fenced(
        "python",
        f"""from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({python_literal(name)})
model = {auto}.from_pretrained({python_literal(name)})
inputs = tokenizer({text}, return_tensors="pt")
outputs = {outputs}""",
    )
    plain = f"With plain transformers; {code_span(name)} stands for where this folder is, here or on the hub.\n\n{opened}"
    if onnx_difference is None:
        return plain
    session = fenced(
        "python",
        f"""import onnxruntime

session = onnxruntime.InferenceSession({python_literal(f"{name}/{ONNX_FILE}")})
inputs = tokenizer({text}, return_tensors="np")
outputs = session.run(None, {{given.name: inputs[given.name] for given in session.get_inputs()}})""",
    )
    return f"""{plain}

`{ONNX_FILE}` is the same model for ONNX Runtime, batch and sequence of any size. On random batches of two shapes it differs from
torch by {onnx_difference:.1e} (2-norm, relative).

{session}"""


def _origin(student: LanguageModel | TaskModel, provenance: Mapping[str, Any] | None) -> str:
    facts = dict.fromkeys(("Student", "Teacher", "Data", "Method", "Paper"), NOT_RECORDED)
    if provenance is not None:
        method, stages = METHODS[provenance["method"]], provenance["stages"]
        start = provenance["student"]["from"]
        facts["Student"] = "new weights" if start is None else f"from {_place(start)}"
        facts["Teacher"] = "; ".join(_unique(_place(stage["teacher"]) for stage in stages if stage["teacher"]) or ["none"])
        facts["Data"] = "; ".join(_unique(_data_name(stage["data"]) for stage in stages) or [])
        facts["Method"] = f"{method.title}: {', '.join(escaped(stage['stage']) for stage in stages)}"
        facts["Paper"] = "none"
        if (paper := method.paper) is not None:
            link = f"[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
            facts["Paper"] = f"{paper.authors}, *{paper.title}*, {paper.venue}, {link}"
    if classes := _class_names(student):
        facts["Classes"] = ", ".join(map(escaped, classes))
    if student.vocab_map is not None:
        kept, whole = student.vocab_map.num_kept, student.vocab_map.vocab_size
        facts["Vocabulary"] = f"{kept:,} tokens of the teacher's {whole:,}"
    return "\n".join(f"- {fact}: {value}" for fact, value in facts.items())


def _class_names(student: LanguageModel | TaskModel) -> list[str]:
    """The classes of a classifier in the order of its outputs; none where they have no names."""
    if not isinstance(student, TaskModel) or student.kind == "question_answering":
        return []
    names = [str(name) for _, name in sorted(student.model.config.id2label.items())]
    return [] if all(name.startswith("LABEL_") for name in names) else names


def _place(place: Mapping[str, Any]) -> str:
    return _link(place["name"]) if place["hub"] else f"{code_span(place['name'])} (a local folder)"


def _data_name(data: Mapping[str, Any]) -> str:
    place, task = data.get("path"), data.get("task") if data["kind"] == "dataset" else None
    if place is None:
        return code_span(str(task))
    name = _link(place["name"], "datasets/") if place["hub"] else code_span(place["name"])
    return name if task is None else f"{name}, read as {code_span(task)}"


def _link(name: str, kind: str = "") -> str:
    """A link to the hub's page of a model, or of another kind of repository."""
    return f"[{escaped(name)}](https://huggingface.co/{kind}{quote(name, errors='backslashreplace')})"


def _training(provenance: Mapping[str, Any] | None) -> str:
    if provenance is None:
        return f"{NOT_RECORDED.capitalize()}."
    stages = provenance["stages"]
    rows = [
        [
            escaped(stage["stage"]),
            escaped(stage["trains"]),
            escaped(stage["steps"]),
            escaped(stage["kept_step"]),
            f"{stage['tokens']:,}",
            f"{stage['seconds']:.1f}",
            f"{stage['peak_memory_mb']:.0f}",
            escaped(stage["device"]) + (f", {stage['processes']} processes" if stage["processes"] > 1 else ""),
        ]
        for stage in stages
    ]
    measured = table(["stage", "trains", "steps", "step kept", "tokens", "seconds", "peak memory, MiB", "on"], rows)
    settings: dict[str, Any] = {"seed": provenance["seed"], "student": provenance["student"]}
    settings["stages"] = {stage["stage"]: {key: stage[key] for key in ("teacher", "data", "options", "training")} for stage in stages}
    shown = yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True, width=120)
    return f"{measured}\n\nSeconds and tokens are of training alone. The settings:\n\n{fenced('yaml', shown.rstrip())}"


def _results(student: LanguageModel | TaskModel, provenance: Mapping[str, Any] | None, evaluations: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    scores = [
        [
            escaped(stage["stage"]),
            escaped(stage["trains"]),
            _data_name(_judged_on(stage["data"])),
            escaped(f"{metric} over {stage['events']}" if metric == "perplexity" and stage.get("events") else metric),
            _shown(value),
        ]
        for stage in (provenance["stages"] if provenance else [])
        for metric, value in stage["scores"].items()
    ]
    if scores:
        caption = "At the end of each stage, on its evaluation split; where the best step is kept, this split has chosen it."
        parts.append(f"{caption}\n\n{table(['stage', 'of the', 'data', 'metric', 'value'], scores)}")
    parts += map(_evaluation_section, evaluations)
    if parts and student.vocab_map is not None:
        caption = (
            "No figures of this folder's own: all were measured with the teacher's tokenizer, before the export. There, a token that "
            "the student does not keep is read as a similar one; the tokenizer of this folder splits such a word into kept tokens."
        )
        parts.insert(0, caption)
    return "\n\n".join(parts) or f"{NOT_RECORDED.capitalize()}."


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _evaluation_section(evaluation: Mapping[str, Any]) -> str:
    """A line on what was judged on, and the scores of every model."""
    models = evaluation["models"]
    metrics = _unique(metric for model in models.values() for metric in model["scores"]) or []
    rows = [
        [escaped(model), *(_shown(judged["scores"].get(metric)) for metric in metrics), f"{judged['parameters']:,}"]
        for model, judged in models.items()
    ]
    head = ["model", *(escaped(TITLES.get(metric, metric)) for metric in metrics), "parameters"]
    return f"{_evaluation_name(evaluation)}\n\n{table(head, rows)}"


def _evaluation_name(evaluation: Mapping[str, Any]) -> str:
    data, used = evaluation["data"], evaluation["versions"]
    judged = f"{data['examples']} examples" if "examples" in data else f"{data['predictions']} {data['predicted']} as {data['events']}"
    place = _evaluated_place(evaluation)
    name = _data_name({"kind": "dataset", "path": place, "task": data.get("task")})
    split = "" if data["split"] is None else f", split {escaped(data['split'])}"
    return f"`fastkd eval` {escaped(used['fastkd'])} on {name}{split}: {escaped(judged)} (torch {escaped(used['torch'])})."


def _limits(student: LanguageModel | TaskModel) -> str:
    limits = ["Nothing beyond the results above has been measured: neither bias, nor safety, nor other domains or languages."]
    if student.vocab_map is not None:
        limits.append(
            "Its tokenizer knows only the kept tokens, with ids of its own: ids of the teacher's tokenizer mean something else to it, "
            "and words that were rare where the vocabulary was counted take more tokens."
        )
    limits.append("No licence is recorded; those of the teacher and of the data may bind.")
    return "\n".join(f"- {limit}" for limit in limits)


def _versions(provenance: Mapping[str, Any] | None) -> str:
    used = versions()
    stages = provenance["stages"] if provenance else []
    rows = [[escaped(stage["stage"]), *(escaped(stage["versions"].get(package, "-")) for package in used)] for stage in stages]
    return table(["", *used], [*rows, ["export", *used.values()]])


def _plain(value: Any) -> Any:
    """Settings as YAML shows them: without those that say nothing, and places by their names."""
    if isinstance(value, Mapping):
        if value.keys() == {"name", "hub"}:
            return value["name"]
        return {key: _plain(inner) for key, inner in value.items() if inner not in (None, {}, [], ())}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _unique(values: Iterable[str]) -> list[str] | None:
    return list(dict.fromkeys(values)) or None
