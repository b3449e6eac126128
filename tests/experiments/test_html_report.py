"""The report's page: well formed, alone in the world, and every number on it."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from avalanche_ext.evaluation.tables import table_cells
from avalanche_ext.experiments.html_report import page
from avalanche_ext.experiments.page_parts import bars
from avalanche_ext.experiments.run_folder import read_run, with_all_metrics
from avalanche_ext.experiments.svg_charts import (
    PALETTE,
    Series,
    color_of,
    column_chart,
    heat_map,
    line_chart,
    luminance,
    text_on,
)
from tests.experiments.run_folders import SYSTEMS, published, write_run

NAIVE, ER, MAIN = SYSTEMS
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps attributes, texts and the tables' rows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts, self.rows = [], [], [], []
        self.titles, self.counts, self.style = [], {}, ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag == "tr":
            self.rows.append([])
        if tag in {"th", "td"}:
            self.rows[-1].append("")
        if tag == "title":
            self.titles.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
            return
        if "title" in self.open:
            self.titles[-1] += data
        elif {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data.replace("\xa0", " ")
        self.texts.append(data)


def made(tmp_path, **kwargs):
    write_run(tmp_path, **kwargs)
    return read_run(tmp_path)


HELD = {
    MAIN: {"published": [published(0.5, 0.2), published(0.01, None, "forgetting", "Fig. <3>")]},
    ER: {"published": [published(0.9, 0.01)], "epochs": 2, "source": '<script>"&'},
}


def test_the_page_holds_every_cell_of_the_table_and_of_all_metrics(tmp_path):
    run = made(tmp_path, settings=HELD)
    read = Page(page(run))
    cells = table_cells(run.rows)
    assert "verdict" in cells[0]
    assert {"within", "other protocol", "above"} & set(cells[2] + cells[3])
    for row in cells:
        assert row in read.rows
    more = next(r for r in read.rows if "BWT (GEM) %" in r)
    values = with_all_metrics(run)
    line = read.rows[read.rows.index(more) + 1]
    mean = values[0]["backward_transfer_gem"]["mean"]
    assert line[more.index("BWT (GEM) %")].startswith(f"{100 * mean:.1f} ± ")
    assert line[more.index("parameters")] == "17,610"
    assert line[more.index("FLOPs per sample")] == "34,800"


def test_heat_maps_tell_mean_and_deviation_of_every_cell(tmp_path):
    run = made(tmp_path)
    read = Page(page(run))
    for row in run.rows:
        a = np.array(row["accuracy_matrices"])
        for i in range(4):
            for j in range(4):
                values = f"{100 * a[:, i, j].mean():.1f} ± {100 * a[:, i, j].std(ddof=1):.1f} %"
                assert f"trained up to {i + 1}, test experience {j + 1}: {values}" in read.titles
    assert page(run).count('<g class="ahead">') == 3 * 6


def test_curves_tell_what_was_seen_first_and_just_trained(tmp_path):
    run = made(tmp_path)
    read = Page(page(run))
    a = np.array(run.rows[1]["accuracy_matrices"])
    for values in (
        [a[:, i, : i + 1].mean(axis=1) for i in range(4)],
        [a[:, i, 0] for i in range(4)],
        [a[:, i, i] for i in range(4)],
    ):
        for i, seeds in enumerate(values):
            told = f"{100 * seeds.mean():.1f} % ± {100 * seeds.std(ddof=1):.1f} %"
            assert f"ER, after {i + 1}: {told}" in read.titles
        printed = [f"{100 * seeds.mean():.1f}" for seeds in values]
        assert ["ER", *printed] in read.rows


def test_classes_times_and_memory_are_drawn_where_they_are_on_record(tmp_path):
    run = made(tmp_path)
    read = Page(page(run))
    classes = np.array([r["per_class_accuracy"][3] for r in run.results[MAIN]])
    assert f"class 3: {100 * classes.mean():.1f} ± {100 * classes.std(ddof=1):.1f} %" in read.titles
    assert not any(t.startswith("class 0:") for t in read.titles)  # no sample of it
    times = np.array([r["seconds_per_experience"][2] for r in run.results[MAIN]])
    assert f"DRL_BER, after 3: {times.mean():.3g} s ± {times.std(ddof=1):.3g} s" in read.titles
    for text in ("5.0 MiB", "2.0 KiB", "34.8 kFLOP", "17,610", "1,000"):
        assert text in read.texts
    assert "Peak device memory" not in read.texts


def test_optional_records_may_be_absent(tmp_path):
    run = made(tmp_path, results=False)
    text = page(run)
    read = Page(text)
    assert "Classes at the end" not in read.texts
    assert "Training time per experience" not in read.texts
    assert "Peak memory" not in read.texts
    assert "Training time" in read.texts
    for row in table_cells(run.rows):
        assert row in read.rows


def test_the_page_needs_nothing_else(tmp_path):
    text = page(made(tmp_path, settings=HELD))
    read = Page(text)
    assert not {name for _, name, _ in read.attributes} & {
        "src",
        "href",
        "srcset",
        "data",
        "action",
    }
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(read.counts)
    assert not re.search(r"url\(|@import|https?://|//[a-z]", text)
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]


def test_what_the_records_say_cannot_become_markup(tmp_path):
    read = Page(page(made(tmp_path, settings=HELD)))
    assert "script" not in read.counts
    assert any('<script>"&' in text for text in read.texts)
    assert any("Fig. <3>" in text for text in read.texts)


def test_charts_are_named_for_who_does_not_see_them(tmp_path):
    run = made(tmp_path)
    read = Page(page(run))
    labels = [value for tag, name, value in read.attributes if (tag, name) == ("svg", "aria-label")]
    hidden = [1 for tag, name, _ in read.attributes if (tag, name) == ("svg", "aria-hidden")]
    assert len(labels) + len(hidden) == read.counts["svg"]
    last = np.array(run.rows[2]["accuracy_matrices"]).mean(axis=0)[-1]
    assert (
        "Accuracy matrix of DRL_BER: 4 rows, trained up to experience 1 to 4; 4 columns, test "
        f"experience. Last row: {', '.join(f'{100 * x:.1f}' for x in last)} %."
    ) in labels
    assert ("html", "lang", "en") in read.attributes
    assert sum(1 for a in read.attributes if a[1] == "tabindex") == page(run).count('"scroll"')


def test_the_same_records_give_the_same_bytes(tmp_path):
    run = made(tmp_path)
    assert page(run) == page(read_run(tmp_path))


def test_a_smoke_run_says_so(tmp_path):
    text = page(made(tmp_path, settings={MAIN: {"epochs": 1}}, seeds=(0,)))
    assert "Not the registered protocol of this name. Changed: epochs." in text
    assert "1 seed, so without a deviation" in text
    assert 'class="band"' not in text
    assert "Not the registered" not in page(made(tmp_path / "other"))


@pytest.mark.parametrize(
    "shape",
    [
        {"experiences": 1},
        {"experiences": 6, "columns": 1},
        {"experiences": 60, "classes": 200},
        {"systems": (MAIN,)},
        {"systems": tuple(f"{k}/split_mnist" for k in (
            "naive", "shuffle_replay", "er", "ber", "drl", "drl_er", "gem", "agem", "joint",
            "drl_ber"))},
    ],
)  # fmt: skip
def test_streams_and_tables_of_any_size_make_a_page(shape, tmp_path):
    run = made(tmp_path, **shape)
    read = Page(page(run))
    for row in table_cells(run.rows):
        assert row in read.rows
    one_test = shape.get("columns") == 1
    assert any("one test experience, so" in t for t in read.texts) == one_test
    assert "nan" not in page(run)


def test_a_system_keeps_its_colour_and_marker_in_every_chart(tmp_path):
    text = page(made(tmp_path))
    for name, system in (("NAIVE", 1), ("ER", 2), ("DRL_BER", 0)):
        keys = re.findall(rf'<svg class="key s(\d+)"[^>]*>(?:(?!</svg>).)*</svg>{name}<', text)
        assert len(keys) >= 6
        assert set(keys) == {str(system)}
        assert f'<li class="s{system}"><div class="name"><span>{name}<' in text


def test_triangular_matrices_are_drawn_and_averaged(tmp_path):
    run = made(tmp_path)
    for row in run.rows:
        row["accuracy_matrices"] = [
            [r[: i + 1] for i, r in enumerate(m)] for m in row["accuracy_matrices"]
        ]
    text = page(run)
    assert 'class="ahead"' not in text
    assert "nan" not in text


def test_short_times_keep_their_digits():
    times = [{"mean": 0.0123, "sd": 0.004}, {"mean": 12.34, "sd": None}, None]
    text = bars([("A", 0), ("B", 1), ("C", 2)], times, "s")
    assert re.findall(r"<span>([^<]*)</span></div>", text) == [
        "0.012 ± 0.004 s", "12.3 s", "not on record"
    ]  # fmt: skip
    assert re.findall(r"width:([\d.]+)%", text) == ["0.10", "100.00"]


def number(pattern, text):
    return [float(x) for x in re.findall(pattern, text)]


def test_the_curve_is_where_its_numbers_are():
    chart = line_chart([Series("A", 0, [0.0, 0.5, 1.0], [0.0, 0.25, 0.0])], "x")
    # the axis runs from 44 to 408 and from 216 up to 10
    assert '<path class="line" d="M44.0 216.0L226.0 113.0L408.0 10.0"/>' in chart
    assert 'd="M44.0 216.0L226.0 61.5L408.0 10.0L408.0 10.0L226.0 164.5L44.0 216.0Z"' in chart
    high = line_chart([Series("A", 0, [3.0, 7.0], None)], "x", top=None, tick="{:g}".format)
    wide = line_chart([Series("A", 0, [0.001, 0.0081], None)], "x", top=None, tick="{:g}".format)
    assert 'd="M56.5 ' in wide  # "0.002" is longer than "100"
    assert [t for t in ("0", "2", "4", "6", "8") if f">{t}</text>" in high] == list("02468")


def test_bars_are_as_high_as_their_numbers():
    chart = column_chart([1.0, 0.5, None], [None, 0.25, None], 1, "A")
    assert number(r'<rect class="bar"[^>]*height="([\d.]+)"', chart) == [122.0, 61.0]
    assert re.search(r'class="whisker" d="M[\d.]+ 109.5V48.5"', chart)
    assert ">–</text>" in chart


def test_cells_are_coloured_by_their_number_and_legible():
    chart = heat_map(np.array([[1.0, 0.0], [0.0, 1.0]]), None, "A")
    fills = re.findall(r'fill="rgb(\([^)]*\))"', chart)
    assert fills == [str(color_of(v)) for v in (1.0, 0.0, 0.0, 1.0)]
    assert [color_of(v) for v in (0.0, 0.5, 1.0)] == [(68, 1, 84), (33, 144, 141), (253, 231, 37)]
    assert color_of(-1.0) == color_of(0.0) != color_of(1.0) == color_of(2.0)
    for k in range(101):
        light = luminance(color_of(k / 100))
        text = 1.0 if text_on(color_of(k / 100)) == "#fff" else 0.0
        bright, dark = max(light, text) + 0.05, min(light, text) + 0.05
        assert bright / dark >= 4.5
    # grey levels never turn back, so the map reads without colour
    lights = [luminance(color_of(k / 100)) for k in range(101)]
    assert lights == sorted(lights)


def test_colours_contrast_with_the_page_in_light_and_dark(tmp_path):
    style = Page(page(made(tmp_path))).style
    light, dark = style.split("prefers-color-scheme: dark")
    for part in (light, dark.split("}")[0]):
        color = {k: tuple(int(v[i : i + 2], 16) for i in (1, 3, 5))
                 for k, v in re.findall(r"--(\w+): (#\w{6})", part)}  # fmt: skip

        def contrast(a, b, color=color):
            x, y = sorted((luminance(color[a]), luminance(color[b])))
            return (y + 0.05) / (x + 0.05)

        for k in range(PALETTE):
            assert contrast(f"p{k}", "card") >= 4.5
        for ink in ("ink", "soft"):
            assert min(contrast(ink, "card"), contrast(ink, "bg")) >= 4.5
        assert contrast("ink", "note") >= 4.5


def test_channels_kept_are_drawn_where_the_records_have_them(tmp_path):
    assert "Channels kept" not in page(made(tmp_path / "without"))
    write_run(tmp_path / "with", seeds=(0, 1))
    shares = {0: [{"conv1": 0.25, "layer1.0": 0.5}, {"conv1": 1.0, "layer1.0": 0.75}],
              1: [{"conv1": 0.75, "layer1.0": 0.5}, {"conv1": 1.0, "layer1.0": 0.25}]}  # fmt: skip
    for seed, kept in shares.items():
        path = tmp_path / "with" / f"seed_{seed}" / "result.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "channels_kept": kept}))
    text = page(read_run(tmp_path / "with"))
    parsed = Page(text)
    assert text.count("Channels kept by") == 1  # the main system alone
    assert "columns are conv1, layer1.0" in " ".join(parsed.texts)
    told = [t for t in parsed.titles if t.startswith("extractor")]
    assert told[0] == "extractor 1, conv1: 50.0 ± 35.4 %"
    assert told[3] == "extractor 2, layer1.0: 50.0 ± 35.4 %"
    assert "Means of the rows: 50.0, 75.0 %" in text


def test_samples_and_capacity_of_a_generator_are_shown_where_the_records_have_them(tmp_path):
    write_run(tmp_path)
    assert "What is remembered" not in page(read_run(tmp_path))
    layers = {"layer0": {"used": 1203, "new": 1200, "reused": 3, "free": 77}}
    for seed in (0, 1):
        path = tmp_path / f"seed_{seed}" / "result.json"
        result = json.loads(path.read_text())
        result["generation_per_experience"] = [{}, {}]
        result["capacity"] = [layers, layers]
        path.write_text(json.dumps(result))
        (path.parent / "samples").mkdir()
        for name in ("real", "exp_0", "exp_1", "other"):
            (path.parent / "samples" / f"{name}.png").write_bytes(f"{seed} {name}".encode())
    found = Page(page(read_run(tmp_path)))
    images = [v for tag, name, v in found.attributes if (tag, name) == ("img", "src")]
    contents = [base64.b64decode(v.removeprefix("data:image/png;base64,")) for v in images]
    assert contents == [b"0 real", b"0 exp_0", b"0 exp_1"]  # of the first seed
    said = [v for tag, name, v in found.attributes if (tag, name) == ("img", "alt")]
    assert said == ["samples, real", "samples, after 1", "samples, after 2"]
    assert ["after", "layer0: new", "layer0: reused", "layer0: free"] in found.rows
    assert ["2", "1,200", "3", "77"] in found.rows


@pytest.mark.parametrize(
    ("seeds", "orders", "told"),
    [
        ((0, 1, 2), (), "3 seeds, mean"),
        ((0, 1, 2), (7,), "3 seeds, mean"),
        ((0, 1, 2), (7, 8, 9), "3 class orders, 3 initialisations, mean"),
        ((0,), (), "1 seed, so without"),
    ],
)
def test_the_page_says_what_differs_from_run_to_run(seeds, orders, told, tmp_path):
    run = made(tmp_path, seeds=seeds, settings={MAIN: {"order_seeds": list(orders)}})
    assert told in page(run)
