"""Tables and plots from the JSON files alone: docs/benchmarks.md, docs/img/*.png and the table between two comments of the README.

What no file holds reads "not measured". `fastkd bench report` writes them all, or nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.store import write_bytes_atomic

from . import CLAIMS
from .claim import RESULTS

Record = Mapping[str, Any]
Rows = list[list[str]]

SECTIONS = {
    **CLAIMS,
    "train_throughput": "fastkd's driver is 1.5 times as fast as transformers' Trainer with eager losses, in half of its memory.",
}
"""What is claimed, by the name of the module that measures it; `fastkd bench` runs all but the last, which is a program of its own."""
NOT_MEASURED = "not measured"
BEGIN, END = "<!-- benchmarks: written by `fastkd bench report` -->", "<!-- end of benchmarks -->"
DEVICES = {"cpu": "CPU", "cuda": "NVIDIA GPU"}
README_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
HEAD = """# Benchmarks

Written by `fastkd bench report` from `benchmarks/results/*.json`. `make bench-cpu`, or `fastkd bench --device cuda`, measures again;
`make bench-gpu` checks and times every GPU backend in eight minutes, into a file of its own. Times are medians of interleaved rounds,
with the quartiles in the JSON; "x GEMMs" is the ratio to the dense products alone, measured in the same rounds. Peaks are above inputs
and gradients. Errors are relative L2 errors against float64.
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastkd bench report", description="Draw tables and plots from the JSON files alone.")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder of the JSON files (default: {RESULTS})")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of benchmarks.md and img/ (default: docs)")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="file whose table is rewritten (default: README.md)")
    known = parser.parse_args(argv)
    try:
        for path in write_report(known.results, known.docs, known.readme):
            print(path)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(results: Path, docs: Path, readme: Path) -> list[Path]:
    from .plots import PLOTS

    records = read_records(results)
    new_readme = with_table(readme.read_text(encoding="utf-8"), readme_table(records["linear_kl"]), readme)
    images = {f"{record['file']}.png": PLOTS[claim](record) for claim, found in records.items() if claim in PLOTS for record in found}
    (docs / "img").mkdir(parents=True, exist_ok=True)
    written = {docs / "img" / name: png for name, png in images.items()}
    written[docs / "benchmarks.md"] = page(records, set(images)).encode()
    written[readme] = new_readme.encode()
    for path, content in written.items():
        write_bytes_atomic(path, content)
    return list(written)


def read_records(results: Path) -> dict[str, list[Record]]:
    """Every claim's records, CPU first."""
    records: dict[str, list[Record]] = {}
    for claim in SECTIONS:
        found = [{"file": path.stem, **json.loads(path.read_text(encoding="utf-8"))} for path in results.glob(f"{claim}_*.json")]
        for record in found:
            if record.get("claim") != claim or record.get("smoke"):
                raise ValueError(
                    f"{results / record['file']}.json is not a measurement by this version's benchmark of {claim}"
                    f"{' but a smoke run' if record.get('smoke') else ''}; measure again or delete it."
                )
        records[claim] = sorted(found, key=lambda record: (record["device"] != "cpu", record["file"]))
    return records


def page(records: Mapping[str, Sequence[Record]], images: set[str]) -> str:
    parts = [HEAD]
    for claim, sentence in SECTIONS.items():
        parts.append(f"## {claim}\n\n{sentence}\n")
        for device, title in DEVICES.items():
            found = [record for record in records[claim] if record["device"] == device]
            if not found:
                parts.append(f"### {title}\n\n{NOT_MEASURED}.\n")
            for record in found:
                parts += [f"### {title}\n", f"{environment(record)}; {sizes(record)}", TABLES[claim](record)]
                image = f"{record['file']}.png"
                if image in images:
                    parts.append(f"![{claim}, {title}](img/{image})\n")
    return "\n".join(parts)


def environment(record: Record) -> str:
    stamp = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    threads = f", {stamp['threads']} threads" if record["device"] == "cpu" else ""
    return f"{stamp['device']}{threads}, Python {stamp['python']}, {versions}, commit {stamp['commit']}, {stamp['time'][:10]}"


def sizes(record: Record) -> str:
    named = {**record.get("shape", {}), **({"dtype": record["dtype"]} if "dtype" in record else {}), "rounds": record["repeats"]}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in named.items()) + ".\n"


def markdown(head: Sequence[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: float | None, form: str = ".3g") -> str:
    return NOT_MEASURED if value is None else format(value, form)


def megabytes(value: float | None) -> str:
    return cell(None if value is None else value / 1e6, ".0f")


def _linear_kl(record: Record) -> str:
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in record["results"]):
        rows = [row for row in record["results"] if row["dtype"] == dtype]
        errors = next(row["gradient_error"] for row in rows if row["gradient_error"])
        head = [dtype, "seconds", "x GEMMs", "peak MB", *(f"error at {error['kl']:.0e} nats" for error in errors)]
        body = [
            [
                row["implementation"],
                cell(row["seconds"]["median"]),
                cell(row["ratio_to_gemms"], ".2f"),
                megabytes(row["peak_bytes"]),
                *(_worst(row["gradient_error"]) or ["" if row["implementation"].startswith("GEMMs") else NOT_MEASURED] * len(errors)),
            ]
            for row in rows
        ]
        body += [[f"{name} ({reason})", *[NOT_MEASURED] * (len(head) - 1)] for name, reason in record["left_out"].items()]
        parts.append(markdown(head, body))
    return "\n".join(parts)


def _worst(errors: Sequence[Mapping[str, float]] | None) -> list[str]:
    """The larger of both gradients' errors at every divergence."""
    return [cell(max(error["student"], error["head"]), ".1e") for error in errors or ()]


def _masked(record: Record) -> str:
    rows = [[x["implementation"], cell(x["seconds"]["median"]), cell(x["ratio_to_unmasked"], ".2f")] for x in record["results"]]
    return markdown(["", "seconds", "x unmasked"], rows)


def _scaling(record: Record) -> str:
    rows = [
        [str(x["tokens"]), cell(x["seconds"]["median"]), cell(x["microseconds_per_token"]), megabytes(x["peak_bytes"])]
        for x in record["results"]
    ]
    large = record["large_vocabulary"]
    size = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in large["shape"].items())
    table = markdown(["tokens", "seconds", "us a token", "peak MB"], rows)
    return f"{table}\n{size}: peak {megabytes(large['peak_bytes'])} MB.\n"


def _row_kernel(record: Record) -> str:
    rows = [
        [
            x["divergence"],
            x["backend"],
            cell(x["nanoseconds_per_element"]),
            str(x["accesses_per_element"]),
            cell(x["bytes_per_second"] / 1e9),
            cell(x["share_of_copy"], ".2f"),
        ]
        for x in record["results"]
    ]
    table = markdown(["divergence", "backend", "ns an element", "accesses an element", "GB/s", "of a copy's bandwidth"], rows)
    return f"{table}\nA copy: {record['copy']['bytes_per_second'] / 1e9:.3g} GB/s.\n"


def _accuracy(record: Record) -> str:
    rows = [
        [
            x["dtype"],
            cell(x["kl"], ".1e"),
            x["implementation"],
            cell(x["value"], ".1e"),
            cell(x["student"], ".1e"),
            cell(x["head"], ".1e"),
        ]
        for x in record["results"]
    ]
    return markdown(["dtype", "nats", "implementation", "loss", "gradient of hidden states", "gradient of head"], rows)


def _relation_kl(record: Record) -> str:
    counts = dict.fromkeys(row["targets"] for row in record["results"])
    return "\n".join(
        _beside_eager(f"targets: {count}", [row for row in record["results"] if row["targets"] == count], record["left_out"])
        for count in counts
    )


def _projected_mse(record: Record) -> str:
    return _beside_eager("", record["results"], record["left_out"])


def _beside_eager(title: str, results: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]) -> str:
    eager_peak = next((row["peak_bytes"] for row in results if row["implementation"] == "eager"), None)
    names = next(list(row["errors"]) for row in results if row["errors"])
    head = [title, "seconds", "x GEMMs", "x eager", "peak MB", "of eager's peak", *(f"error, {name}" for name in names)]
    body = [
        [
            row["implementation"],
            cell(row["seconds"]["median"]),
            cell(row["ratio_to_gemms"], ".2f"),
            cell(row["ratio_to_eager"], ".2f"),
            megabytes(row["peak_bytes"]),
            cell(row["peak_bytes"] / eager_peak if eager_peak else None, ".3f"),
            *(cell(row["errors"][name], ".1e") if row["errors"] else "" for name in names),
        ]
        for row in results
    ]
    body += [[f"{name} ({reason})", *[NOT_MEASURED] * (len(head) - 1)] for name, reason in left_out.items()]
    return markdown(head, body)


def _grad_filter(record: Record) -> str:
    rows = [["GEMMs alone", "", cell(record["floor"]["median"]), "1.00", *[""] * 4]]
    rows.append(
        ["unfiltered", "", cell(record["unfiltered"]["median"]), cell(record["unfiltered"]["ratio_to_gemms"], ".2f"), *[""] * 4]
    )
    rows += [
        [
            cell(x["threshold"], ".2e"),
            cell(x["columns_kept"], ".1%"),
            cell(x["seconds"]["median"]),
            cell(x["ratio_to_gemms"], ".2f"),
            cell(x["dropped_mass"], ".1e"),
            f"{x['student_cosine']:.6f} / {x['head_cosine']:.6f}",
            cell(x["student_error"], ".1e"),
            cell(x["head_error"], ".1e"),
        ]
        for x in record["results"]
    ]
    head = ["threshold", "columns kept", "seconds", "x GEMMs", "mass dropped", "cosine (hidden / head)", "error, hidden", "error, head"]
    return markdown(head, rows)


def _train_throughput(record: Record) -> str:
    head = ["", "by", "tokens/s", "x", "peak MB", "x", "above, MB", "x", "last loss", "difference"]
    rows = []
    for result in record["results"]:
        compared = [cell(result[name], form) for name, form in (("speedup", ".2f"), ("peak_ratio", ".2f"), ("peak_ratio_above", ".2f"))]
        for side in result["sides"]:
            first = side is result["sides"][0]
            speed, peak, above = compared if first else [""] * 3
            title, difference = (result["title"], cell(result["loss_difference"], ".1e")) if first else ("", "")
            measured = [cell(side["tokens_per_second"], ".0f"), speed, megabytes(side["peak_bytes"]), peak]
            measured += [megabytes(side["peak_bytes_above"]), above, cell(side["losses"][-1], ".5g")]
            rows.append([title, side["implementation"], *measured, difference])
    profile = record["profile"]
    shares = [
        [name, cell(1e3 * section["seconds_per_step"], ".1f"), cell(100 * section["share"], ".1f")]
        for name, section in profile["sections"].items()
    ]
    return f"""{markdown(head, rows)}
Each side begins from the same weights and takes the same steps in a fresh process; Trainer is given the order of fastkd's batches,
which share rows of similar length. The authors' loops are rewritten after their code, and fastkd has the preset that computes the same.
Tokens are counted without pads. "above" is the peak over what the process held before its first step; x is fastkd over the other;
difference is the largest relative one between the losses of a step.

Where fastkd's time goes in case `{profile["case"]}`, by `profile_steps` over {profile["steps"]} steps; the matrix products are the
head's four:

{markdown(["section of a step", "ms", "% of a step"], shares)}"""


TABLES: dict[str, Callable[[Record], str]] = {
    "linear_kl": _linear_kl,
    "masked": _masked,
    "scaling": _scaling,
    "row_kernel": _row_kernel,
    "accuracy": _accuracy,
    "relation_kl": _relation_kl,
    "projected_mse": _projected_mse,
    "grad_filter": _grad_filter,
    "train_throughput": _train_throughput,
}


def readme_table(records: Sequence[Record]) -> str:
    """One line an implementation, and for every device, in the dtype that it is for, three columns."""
    columns: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    for record in records:
        dtype = README_DTYPES[record["device"]]
        name = "CPU" if record["device"] == "cpu" else record["environment"]["device"]
        columns[f"{name}, {dtype}"] = {row["implementation"]: row for row in record["results"] if row["dtype"] == dtype}
    if not any(record["device"] == "cuda" for record in records):
        columns[DEVICES["cuda"]] = {}
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    head = ["forward and backward", *(title for name, rows in columns.items() for title in _titles(name, rows))]
    body = [[name, *(cell for rows in columns.values() for cell in _cells(rows, name))] for name in names]
    lines = [f"{environment(record)}; {sizes(record)}" for record in records]
    return markdown(head, body or [[NOT_MEASURED] * len(head)]) + "".join(f"\n{line}" for line in lines)


def _titles(name: str, rows: Mapping[str, Any]) -> list[str]:
    return [f"{name}: x GEMMs alone", "peak MB", "gradient error"] if rows else [name]


def _cells(rows: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """What a device's rows say of an implementation, below `_titles`: the error is that at the smallest KL."""
    if name not in rows:
        return [NOT_MEASURED] * len(_titles("", rows))
    row = rows[name]
    peak = NOT_MEASURED if row["peak_bytes"] is None else megabytes(row["peak_bytes"])
    return [f"{row['ratio_to_gemms']:.2f}", peak, *(_worst(row["gradient_error"])[:1] or [""])]


def with_table(text: str, table: str, path: Path) -> str:
    """`text` with `table` between the two comments."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the two lines {BEGIN} and {END}, between which the table goes; add them.")
    return f"{before}{begin}\n{table}{end}{after}"


if __name__ == "__main__":
    sys.exit(main())
