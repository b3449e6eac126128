"""``avalanche-ext report``: every form, several folders, clear refusals."""

from __future__ import annotations

import csv

import pytest

from avalanche_ext.cli.main import main
from avalanche_ext.evaluation.tables import table_cells
from avalanche_ext.experiments.run_folder import read_run, with_all_metrics
from tests.experiments.run_folders import SYSTEMS, VERSIONS, published, write_run

MAIN = SYSTEMS[-1]


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "a", settings={MAIN: {"published": [published(0.5, 0.3)]}})
    return tmp_path / "a"


def printed(capsys, *words):
    code = main(["report", *map(str, words)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_by_default_it_prints_the_table_and_writes_every_file(folder, capsys):
    code, out, _ = printed(capsys, folder)
    assert code == 0
    for row in table_cells(read_run(folder).rows):
        assert all(cell in out for cell in row)
    assert "DRL_BER, published accuracy %: Table 2" in out
    files = [folder / "report.md", folder / "report.html"]
    files += [folder / f"accuracy_matrix_{s.replace('/', '__')}.png" for s in SYSTEMS]
    assert out.splitlines()[-5:] == [str(f) for f in files]
    assert all(f.stat().st_size > 300 for f in files)
    assert "Verdict: whether" in files[0].read_text("utf-8")


@pytest.mark.parametrize("form", ["markdown", "latex", "csv"])
def test_a_table_to_pipe_is_printed_alone_and_nothing_is_written(form, folder, capsys):
    before = sorted(folder.rglob("*"))
    code, out, err = printed(capsys, folder, "--format", form)
    assert (code, err) == (0, "")
    assert sorted(folder.rglob("*")) == before
    rows = read_run(folder).rows
    if form == "csv":
        full = with_all_metrics(read_run(folder))
        for line, row in zip(csv.DictReader(out.splitlines()), full, strict=True):
            for field in ("average_accuracy", "backward_transfer_expandable_der"):
                assert float(line[f"{field}_mean"]) == row[field]["mean"]
    else:
        assert f"{100 * rows[0]['forgetting']['mean']:.1f}" in out


def test_html_writes_the_page(folder, capsys):
    code, out, _ = printed(capsys, folder, "--format", "html")
    assert (code, out.strip()) == (0, str(folder / "report.html"))
    text = (folder / "report.html").read_text("utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert not (folder / "report.md").exists()


def test_runs_of_one_protocol_share_a_table(folder, tmp_path, capsys):
    write_run(tmp_path / "b", systems=("ber/split_digits",), seeds=(0, 1))
    code, out, _ = printed(capsys, folder, tmp_path / "b", "--format", "markdown")
    assert code == 0
    assert "DRL_BER, published accuracy %: Table 2" in out
    assert [line.split(" | ")[0][2:] for line in out.splitlines()[2:6]] == [
        "NAIVE", "ER", "DRL_BER", "BER"
    ]  # fmt: skip
    assert not (tmp_path / "b" / "report.md").exists()


def test_times_of_different_devices_do_not_share_a_table(folder, tmp_path, capsys):
    write_run(tmp_path / "b", systems=("ber/split_digits",), device="cuda")
    _, out, _ = printed(capsys, folder, tmp_path / "b")
    assert "accuracy %" in out
    assert "train s" not in out
    assert any(line.startswith("BER ") for line in out.splitlines())


@pytest.mark.parametrize(
    ("change", "versions", "field"),
    [
        ({"epochs": 3}, VERSIONS, "epochs is 10 for"),
        ({"mem": 60}, VERSIONS, "mem is 50 for"),
        ({}, {**VERSIONS, "torch": "3.0"}, "versions.torch is 2.9 for"),
    ],
)
def test_runs_of_unequal_protocol_are_refused(change, versions, field, folder, tmp_path, capsys):
    name = "ber/split_digits"
    write_run(tmp_path / "b", systems=(name,), settings={name: change}, versions=versions)
    code, out, err = printed(capsys, folder, tmp_path / "b")
    assert (code, out) == (2, "")
    assert "unequal protocol" in err
    assert field in err


def test_a_method_may_have_settings_of_its_own(folder, tmp_path, capsys):
    name = "ber/split_digits"
    write_run(tmp_path / "b", systems=(name,), settings={name: {"lam": 0.5, "max_groups": 2}})
    assert printed(capsys, folder, tmp_path / "b")[0] == 0


def test_a_folder_without_a_run_is_one_clear_line(tmp_path, capsys):
    code, out, err = printed(capsys, tmp_path)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "no finished run" in err
