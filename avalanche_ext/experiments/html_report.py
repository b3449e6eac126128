"""One run as one page: a file of HTML that needs no other, and no network.

Everything on it follows from the records of the run folder; the same records give the same bytes.
Of ``result.json`` it uses, where they are there, ``per_class_accuracy`` (one share per class after
the last experience, ``null`` where no sample was tested), ``seconds_per_experience``,
``peak_rss_bytes``, ``peak_device_bytes`` and ``flops_per_sample``; a chart whose numbers some seed
lacks is left out. Pictures of samples come from the ``samples`` folder of the first seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from avalanche_ext.evaluation.accuracy_matrix import filled, seen_accuracies
from avalanche_ext.evaluation.comparison import VERDICTS
from avalanche_ext.evaluation.tables import (
    OPTIONAL_COLUMNS,
    footnotes,
    formatted,
    measured_fields,
    table_cells,
)
from avalanche_ext.experiments.page_parts import (
    bars,
    details,
    figure,
    settings_table,
    strips,
    table,
)
from avalanche_ext.experiments.run_folder import Run, changed_settings, with_all_metrics
from avalanche_ext.experiments.svg_charts import (
    PALETTE,
    Series,
    channel_map,
    color_of,
    column_chart,
    heat_map,
    key,
    line_chart,
)

__all__ = ["page"]

_PLAIN = ("title", "recipe", "seeds", "accuracy_matrices")


def page(run: Run) -> str:
    """The page as text."""
    style = resources.files("avalanche_ext.experiments").joinpath("report_style.css")
    sections = [
        _results,
        _curves,
        _matrices,
        _classes,
        _samples,
        _channels,
        _capacity,
        _costs,
        _protocol,
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(run.recipe)}</title>",
            f"<style>{style.read_text('utf-8')}</style></head><body>",
            _header(run),
            "<main>",
            *(section(run) for section in sections),
            "</main>",
            "<footer>Made from the records in this folder: summary.json, recipe.json and "
            "seed_*/result.json.</footer>",
            "</body></html>",
            "",
        ]
    )


def _system(run: Run, k: int) -> int:
    """The main system is number 0, whatever stands beside it."""
    return (k + 1) % len(run.rows)


def _is_main(run: Run, k: int) -> bool:
    return k == len(run.rows) - 1


def _name(run: Run, k: int) -> str:
    return key(_system(run, k)) + escape(run.rows[k]["title"])


def _header(run: Run) -> str:
    main, seeds = run.rows[-1], run.rows[-1]["seeds"]
    tiles = []
    for field, text in (
        ("average_accuracy", "accuracy at the end"),
        ("average_incremental_accuracy", "average incremental accuracy"),
        ("forgetting", "forgetting"),
    ):
        value = main.get(field)
        if value is not None:
            shown = formatted(value["mean"], 100, 1)
            spread = "" if value["sd"] is None else f" ± {formatted(value['sd'], 100, 1)}"
            tiles.append(f"<li><b>{shown}{spread} %</b><span>{text}</span></li>")
    settings = run.settings.get(run.recipe, {})
    orders, starts = (len({*settings.get(field, ())}) for field in ("order_seeds", "seeds"))
    runs = f"{seeds} seeds" if orders < 2 else f"{orders} class orders, {starts} " + (
        "initialisation" if starts == 1 else "initialisations"
    )  # fmt: skip
    over = f"{runs}, mean ± sample standard deviation"
    if seeds == 1:
        over = "1 seed, so without a deviation"
    changed = changed_settings(run.settings[run.recipe]) if run.recipe in run.settings else []
    note = (
        f'<p class="note">Not the registered protocol of this name. Changed: '
        f"{escape(', '.join(changed))}.</p>"
        if changed
        else ""
    )
    systems = "1 system" if len(run.rows) == 1 else f"{len(run.rows)} systems"
    return (
        f'<header><h1>{escape(run.recipe)}</h1><p class="facts">{systems}, {over}, on '
        f"{escape(run.device)}. Numbers of {escape(main['title'])}:</p>"
        f'<ul class="tiles">{"".join(tiles)}</ul>{note}</header>'
    )


def _results(run: Run) -> str:
    cells = table_cells(run.rows)
    names = [_name(run, k) for k in range(len(run.rows))]
    notes = "".join(f"<li>{escape(note)}</li>" for note in footnotes(run.rows))
    more = [
        {k: v for k, v in row.items() if k in _PLAIN or k in {c[0] for c in OPTIONAL_COLUMNS}}
        for row in with_all_metrics(run)
    ]
    other = table_cells(more)
    for line, row in zip(other, [{"parameters": "parameters"}, *run.rows], strict=True):
        size = row.get("parameters")
        line.append(size if isinstance(size, str) else "" if size is None else f"{size:,}")
    return (
        "<section><h2>Results</h2>"
        + table(cells, names, "Results", _verdict)
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + details(
            "More metrics",
            "<p>BWT and FWT are backward and forward transfer; GEM's and ExpandableDER's "
            "definitions differ.</p>" + table(other, names, "More metrics"),
        )
        + "</section>"
    )


def _verdict(text: str) -> str:
    if text not in VERDICTS:
        return escape(text)
    return f'<span class="verdict {text.split()[0]}">{text}</span>'


def _series(run: Run, values: Sequence[Sequence[Sequence[float]]]) -> list[Series]:
    """A curve per system from its seeds' curves."""
    made = []
    for k, seeds in enumerate(values):
        a = np.asarray(seeds, dtype=np.float64)
        sd = a.std(axis=0, ddof=1).tolist() if len(a) > 1 else None
        title = run.rows[k]["title"]
        made.append(Series(title, _system(run, k), a.mean(axis=0).tolist(), sd, _is_main(run, k)))
    return made


def _curves(run: Run) -> str:
    matrices = [row["accuracy_matrices"] for row in run.rows]
    single = len(matrices[0][0][0]) == 1 and len(matrices[0][0]) > 1
    charts: list[tuple[str, str, Callable[[Any], list[float]]]] = [
        ("All seen so far", "test accuracy %, mean over the experiences seen", seen_accuracies)
    ]
    if single:
        charts = [("Test accuracy", "%, on the one test experience", seen_accuracies)]
    elif len(matrices[0][0]) > 1:
        charts += [
            ("The first experience", "its test accuracy %", lambda m: [row[0] for row in m]),
            (
                "The experience just trained",
                "its test accuracy %",
                lambda m: [row[i] for i, row in enumerate(m)],
            ),
        ]
    figures, tables = [], []
    for title, text, values in charts:
        curves = _series(run, [[values(m) for m in seeds] for seeds in matrices])
        figures.append(figure(title, text, line_chart(curves, title)))
        tables.append(f"<p>{title}, {text}</p>" + _curve_table(run, curves))
    legend = "".join(f"<li>{_name(run, k)}</li>" for k in range(len(run.rows)))
    return (
        f"<section><h2>Along training</h2><p>{_over(run, 'Lines', 'bands')}</p>"
        f'<ul class="legend">{legend}</ul><div class="grid-of-charts">{"".join(figures)}</div>'
        f"{details('The same in numbers', ''.join(tables))}</section>"
    )


def _over(run: Run, means: str, spreads: str) -> str:
    seeds = run.rows[-1]["seeds"]
    if seeds == 1:
        return f"{means} are those of the only seed."
    return f"{means} are means over {seeds} seeds, {spreads} ± one sample deviation."


def _curve_table(run: Run, curves: Sequence[Series]) -> str:
    head = ["after experience", *(str(k + 1) for k in range(len(curves[0].mean)))]
    body = [["", *(formatted(m, 100, 1) for m in one.mean)] for one in curves]
    names = [_name(run, k) for k in range(len(curves))]
    return table([head, *body], names, "Curves in numbers")


def _matrices(run: Run) -> str:
    shape = np.shape(run.rows[0]["accuracy_matrices"][0][-1])[0]
    if shape == 1 and len(run.rows[0]["accuracy_matrices"][0]) > 1:
        return (
            "<section><h2>Accuracy matrices</h2><p>The stream has one test experience, so there "
            "is one curve instead of a matrix, above.</p></section>"
        )
    figures = []
    for k, row in enumerate(run.rows):
        a = np.array([filled(m) for m in row["accuracy_matrices"]])
        sd = a.std(axis=0, ddof=1) if len(a) > 1 else None
        figures.append(figure(_name(run, k), "", heat_map(a.mean(axis=0), sd, row["title"])))
    stops = ", ".join(f"rgb{color_of(k / 8)}" for k in range(9))
    ramp = f'<i style="background:linear-gradient(90deg, {stops})"></i>'
    return (
        "<section><h2>Accuracy matrices</h2><p>Test accuracy %. Each row is one point of "
        "training; what it had not trained on yet is faint. "
        f"{_over(run, 'Numbers', 'tooltips add')}</p>"
        f'<div class="ramp" aria-hidden="true">0 %{ramp}100 %</div>'
        f'<div class="grid-of-charts">{"".join(figures)}</div></section>'
    )


def _classes(run: Run) -> str:
    figures = []
    for k, row in enumerate(run.rows):
        seeds = [r.get("per_class_accuracy") for r in run.results[row["recipe"]]]
        if not seeds or None in seeds:
            continue
        by_class = [[x for x in values if x is not None] for values in zip(*seeds, strict=True)]
        mean = [float(np.mean(v)) if v else None for v in by_class]
        sd = [float(np.std(v, ddof=1)) if len(v) > 1 else None for v in by_class]
        chart = column_chart(mean, sd, _system(run, k), row["title"])
        figures.append(figure(_name(run, k), "", chart))
    if not figures:
        return ""
    return (
        "<section><h2>Classes at the end</h2><p>Test accuracy % of each class after the last "
        f"experience. {_over(run, 'Bars', 'thin lines')}</p>"
        f'<div class="grid-of-charts">{"".join(figures)}</div></section>'
    )


def _samples(run: Run) -> str:
    figures = []
    for k, row in enumerate(run.rows):
        pictures = [
            ("real" if name == "real" else f"after {int(name.removeprefix('exp_')) + 1}", png)
            for name, png in run.samples.get(row["recipe"], [])
        ]
        if pictures:
            figures.append(figure(_name(run, k), "", strips(pictures)))
    if not figures:
        return ""
    return (
        "<section><h2>What is remembered</h2><p>Samples of the generator after each experience, "
        "from the same noise each time: what changes from row to row is what was forgotten. Of "
        f'the first seed.</p><div class="wide-charts">{"".join(figures)}</div></section>'
    )


def _channels(run: Run) -> str:
    figures = []
    for k, row in enumerate(run.rows):
        seeds: list[Any] = [r.get("channels_kept") for r in run.results[row["recipe"]]]
        if not seeds or None in seeds:
            continue
        layers = list(seeds[0][0])
        a = np.array([[list(shares.values()) for shares in kept] for kept in seeds])
        sd = a.std(axis=0, ddof=1) if len(a) > 1 else None
        text = "columns are " + ", ".join(layers)
        chart = channel_map(a.mean(axis=0), sd, layers, row["title"])
        figures.append(figure(_name(run, k), text, chart))
    if not figures:
        return ""
    return (
        "<section><h2>Channels kept</h2><p>Share of its channels in % that each extractor has "
        "after its masks were made hard and closed channels removed. "
        f'{_over(run, "Numbers", "tooltips add")}</p><div class="grid-of-charts">'
        f"{''.join(figures)}</div></section>"
    )


def _capacity(run: Run) -> str:
    figures = []
    for k, row in enumerate(run.rows):
        taken = [r["capacity"] for r in run.results[row["recipe"]] if r.get("capacity")][:1]
        if not taken:
            continue
        head = ["after", *(f"{layer}: {kind}" for layer in taken[0][0] for kind in _TAKEN)]
        cells = [
            [str(i + 1), *(f"{gates[kind]:,}" for gates in layers.values() for kind in _TAKEN)]
            for i, layers in enumerate(taken[0])
        ]
        body = table([head, *cells], [line[0] for line in cells], row["title"])
        figures.append(figure(_name(run, k), "", body))
    if not figures:
        return ""
    return (
        "<section><h2>Capacity of the generator</h2><p>Gates of each layer that an experience was "
        "the first to use, that it shares with earlier ones, and that are free. Of the first "
        f'seed.</p><div class="wide-charts">{"".join(figures)}</div></section>'
    )


_TAKEN = ("new", "reused", "free")


def _costs(run: Run) -> str:
    rows = [{**measured_fields(run.results[r["recipe"]]), **r} for r in run.rows]
    figures = []
    for field, title, unit, text in _COSTS:
        values = [row.get(field) for row in rows]
        if all(value is None for value in values):
            continue
        shown = [v if v is None or isinstance(v, dict) else {"mean": v, "sd": None} for v in values]
        names = [(row["title"], _system(run, k) % PALETTE) for k, row in enumerate(rows)]
        figures.append(figure(title, text, bars(names, shown, unit)))
    per_experience: list[list[Any]] = [
        [r.get("seconds_per_experience") for r in run.results[row["recipe"]]] for row in run.rows
    ]
    if all(seeds and None not in seeds for seeds in per_experience):
        chart = line_chart(
            _series(run, per_experience),
            "Seconds of training per experience",
            top=None,
            number=lambda x: f"{x:.3g} s",
            tick=lambda x: f"{x:.3g}",
        )
        figures.insert(1, figure("Training time per experience", "seconds", chart))
    return (
        f"<section><h2>Time and memory</h2><p>On {escape(run.device)}; evaluation is not part of "
        f'the time.</p><div class="grid-of-charts">{"".join(figures)}</div></section>'
    )


_COSTS = (
    ("seconds", "Training time", "s", "of the whole stream"),
    ("bytes_remembered", "Memory", "B", "exemplars and what else is kept from the past"),
    ("parameters", "Parameters", "", "of the network, after the last experience"),
    ("parameters_mean", "Parameters, mean", "", "over the experiences, each after its training"),
    ("samples_trained", "Samples trained on", "", "in all steps, replayed ones included"),
    ("flops_per_sample", "Operations per sample", "FLOP",
     "to classify one sample; a multiply-add is 2"),
    ("peak_rss_bytes", "Peak memory", "B",
     "resident, of the process so far: a later system includes an earlier one"),
    ("peak_device_bytes", "Peak device memory", "B", "largest allocation so far"),
)  # fmt: skip


def _protocol(run: Run) -> str:
    order = [row["recipe"] for row in run.rows if row["recipe"] in run.settings]
    titles = {row["recipe"]: row["title"] for row in run.rows}
    recorded = [(titles[name], run.settings[name]) for name in reversed(order)]
    versions = "".join(
        f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>'
        for k, v in {**run.versions, "device": run.device}.items()
    )
    missing = [row["title"] for row in run.rows if row["recipe"] not in run.settings]
    note = f"<p>No recipe on record for {escape(', '.join(missing))}.</p>" if missing else ""
    return (
        f"<section><h2>Protocol</h2>{settings_table(recorded) if recorded else ''}{note}"
        f"<h2>Versions</h2>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Versions">'
        f'<table class="settings"><tbody>{versions}</tbody></table></div></section>'
    )
