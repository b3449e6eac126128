"""The command line, end to end on few images."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avalanche_ext.catalog import CATALOG
from avalanche_ext.cli.main import main
from avalanche_ext.evaluation.accuracy_matrix import average_accuracy, forgetting


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the main job, on few images."""
    out = tmp_path_factory.mktemp("run") / "main"
    command = ["run", "drl_ber/split_digits", "--smoke", "--seeds", "0", "1", "--out", str(out)]
    assert main(command) == 0
    return out, command


def test_list_shows_every_key_and_recipe(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for key, card in CATALOG.items():
        assert key in shown
        assert all(r.name in shown for r in card.recipes)


def test_card_prints_the_card(capsys):
    assert main(["card", "ber"]) == 0
    shown = capsys.readouterr().out
    assert "Alg. 1" in shown
    assert "max_groups" in shown


def test_a_run_writes_the_folder_that_the_architecture_fixes(finished):
    out, _ = finished
    assert json.loads((out / "recipe.json").read_text())["name"] == "drl_ber/split_digits"
    for home in (
        out,
        out / "baselines" / "naive__split_digits",
        out / "baselines" / "er__split_digits",
    ):
        for seed in (0, 1):
            folder = home / f"seed_{seed}"
            result = json.loads((folder / "result.json").read_text())
            assert {
                "recipe", "seed", "accuracy_matrix", "average_accuracy", "forgetting", "seconds",
                "average_incremental_accuracy", "parameters", "bytes_remembered", "versions",
                "device",
            } <= set(result)  # fmt: skip
            assert result["seed"] == seed
            assert result["average_accuracy"] == average_accuracy(result["accuracy_matrix"])
            assert result["forgetting"] == forgetting(result["accuracy_matrix"])
            assert result["parameters"] == 64 * 100 + 100 + 100 * 100 + 100 + 100 * 10 + 10
            assert (folder / "accuracy_matrix.png").stat().st_size > 1000
            events = [json.loads(line) for line in (folder / "events.jsonl").open()]
            last = [e for e in events if e.get("metric", "").endswith("test_stream/Task000")][-1]
            assert last["metric"].startswith("Top1_Acc_Stream")
            board = EventAccumulator(str(folder / "tensorboard")).Reload()
            assert "accuracy_matrix" in board.Tags()["images"]
            scalars = board.Tags()["scalars"]
            assert any(name.startswith("Top1_Acc_Stream") for name in scalars)
            drl = [name for name in scalars if name.startswith("DRL_L_DR")]
            assert bool(drl) == (home == out)


def test_rows_are_after_training_and_columns_are_what_is_tested(finished):
    out, _ = finished
    naive = out / "baselines" / "naive__split_digits" / "seed_0" / "result.json"
    matrix = json.loads(naive.read_text())["accuracy_matrix"]
    for i, row in enumerate(matrix):  # something of what it has just seen, nothing of what is ahead
        assert row[i] > 0
        assert row[i + 1 :] == [0.0] * (len(matrix) - 1 - i)


def test_the_summary_follows_from_the_results(finished):
    out, _ = finished
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [r["title"] for r in rows] == ["Naive", "ER", "DRL+BER"]
    results = [json.loads((out / f"seed_{s}" / "result.json").read_text()) for s in (0, 1)]
    values = [r["average_accuracy"] for r in results]
    assert rows[2]["average_accuracy"]["values"] == values
    assert rows[2]["average_accuracy"]["mean"] == pytest.approx(sum(values) / 2)


def test_the_same_command_on_a_finished_run_says_so_and_changes_nothing(finished, capsys):
    out, command = finished
    before = (out / "seed_0" / "result.json").stat().st_mtime_ns
    assert main(command) == 0
    assert "finished" in capsys.readouterr().out
    assert (out / "seed_0" / "result.json").stat().st_mtime_ns == before


def test_an_unfinished_run_is_finished_and_the_rest_is_kept(finished, tmp_path):
    out, command = finished
    kept = (out / "seed_0" / "result.json").read_text()
    lost = json.loads((out / "seed_1" / "result.json").read_text())
    (out / "seed_1" / "result.json").unlink()
    assert main(command) == 0
    assert (out / "seed_0" / "result.json").read_text() == kept
    again = json.loads((out / "seed_1" / "result.json").read_text())
    assert again["accuracy_matrix"] == lost["accuracy_matrix"]


def test_report_prints_the_table_from_the_records(finished, capsys):
    out, _ = finished
    assert main(["report", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "DRL+BER" in shown
    assert (out / "report.md").read_text().startswith("| method | seeds |")
    assert (out / "accuracy_matrix_drl_ber__split_digits.png").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "drl_ber/split_digit"], "drl_ber/split_digits"),
        (["run", "er/split_digits", "--set", "lamb=1"], "Close: lam"),
        (["run", "er/split_digits", "--set", "lam"], "FIELD=VALUE"),
        (["run", "er/split_digits", "--device", "abacus"], "--device 'abacus'"),
        (["card", "drl_bear"], "drl_ber"),
        (["report", "nowhere"], "no finished run"),
        (["run", "ber/split_digits", "--smoke", "--set", "mem=1", "--out", "OUT"], "mem=1 in"),
        (["run", "drl/split_digits", "--smoke", "--set", "layers=convs", "--out", "OUT"], "convs"),
    ],
)  # fmt: skip
def test_a_mistake_gives_one_clear_line(command, message, capsys, tmp_path):
    command = [str(tmp_path / "out") if word == "OUT" else word for word in command]
    assert main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("avalanche-ext: ")
    assert message in lines[-1]


@pytest.mark.parametrize(
    ("setting", "message"), [("lam=-1", "finite lam >= 0"), ("mode=foo", "mode"), ("mem=-5", "mem")]
)
def test_a_mistake_of_the_last_method_is_told_before_the_first_is_run(
    setting, message, capsys, tmp_path
):
    out = tmp_path / "out"
    assert main(["run", "drl_ber/split_digits", "--set", setting, "--out", str(out)]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert "accuracy" not in told.out
    assert not out.exists()


def test_only_rows_with_a_mode_are_named_after_it(tmp_path, capsys):
    command = ["run", "drl_ber/split_digits", "--smoke", "--seeds", "0", "--set", "mode=balanced"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert [r["title"] for r in rows] == ["Naive", "ER", "DRL+BER balanced"]


def test_two_processes_do_not_share_a_folder(finished, capsys):
    out, command = finished
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'w'); "
         "fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)",
         str(out / "running")], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        before = sorted(out.rglob("*"))
        assert main([*command, "--overwrite"]) == 2
        assert "another process is running in" in capsys.readouterr().err
        assert sorted(out.rglob("*")) == before
    finally:
        holder.kill()
        holder.wait()
    assert main(command) == 0  # what a process that was killed leaves behind is no lock
    assert not (out / "running").exists()


def test_seeds_that_the_table_leaves_out_are_named(tmp_path, capsys):
    command = ["run", "naive/split_digits", "--smoke", "--out", str(tmp_path), "--seeds"]
    assert main([*command, "0"]) == 0
    assert "leaves out" not in capsys.readouterr().out
    assert main([*command, "1"]) == 0
    assert "seed_0, which this table leaves out" in capsys.readouterr().out


def test_a_result_that_is_none_is_named(tmp_path, capsys):
    command = ["run", "naive/split_digits", "--smoke", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    (tmp_path / "seed_0" / "result.json").write_text("{}")
    (tmp_path / "summary.json").unlink()
    assert main(command) == 2
    assert "seed_0/result.json is no result of a run" in capsys.readouterr().err


def test_a_place_where_nothing_can_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = ["run", "naive/split_digits", "--smoke", "--out", str(tmp_path / "file" / "run")]
    assert main(command) == 2
    assert "file/run" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_folder_of_other_files_is_never_touched(more, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    command = ["run", "naive/split_digits", "--smoke", "--out", str(tmp_path), *more]
    assert main(command) == 2
    assert "holds files, but no run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_runs_anew(tmp_path):
    command = ["run", "naive/split_digits", "--smoke", "--out", str(tmp_path)]
    assert main(command) == 0
    (tmp_path / "seed_0" / "result.json").write_text("spoilt")
    assert main([*command, "--overwrite"]) == 0
    assert json.loads((tmp_path / "seed_0" / "result.json").read_text())["seed"] == 0


def test_other_settings_do_not_overwrite_a_run(finished, capsys):
    _, command = finished
    assert main([*command, "--set", "lam=0.5"]) == 2
    assert "lam differ" in capsys.readouterr().err


def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(tmp_path, capsys):
    import yaml

    from avalanche_ext.recipes import find_recipe

    out = tmp_path / "run"
    command = ["run", "drl_ber/split_digits", "--set", "lr=0.05", "--seeds", "4", "--dry-run"]
    assert main([*command, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert not out.exists()
    assert f"naive/split_digits: 1 runs, 0 of them finished, in {out}/baselines" in shown
    path = tmp_path / "resolved.yaml"
    path.write_text(shown[shown.index("\nname: ") :])
    assert yaml.safe_load(path.read_text())["lr"] == 0.05
    again = find_recipe(str(path))
    assert (again.lr, again.seeds) == (0.05, (4,))


def test_a_recipe_file_runs_like_its_command_line(finished, tmp_path):
    out, _ = finished
    path = tmp_path / "mine.yaml"
    path.write_text("like: drl_ber/split_digits\nlam: 1e-2\n")
    for name, words in (
        ("file", [str(path)]),
        ("line", ["drl_ber/split_digits", "--set", "lam=1e-2"]),
    ):
        command = ["run", *words, "--smoke", "--no-baselines", "--out", str(tmp_path / name)]
        assert main(command) == 0
    matrices = [
        json.loads((folder / "seed_0" / "result.json").read_text())["accuracy_matrix"]
        for folder in (tmp_path / "file", tmp_path / "line", out)
    ]
    assert matrices[0] == matrices[1] != matrices[2]


def test_a_reader_that_has_seen_enough_is_no_error():
    import subprocess
    import sys

    code = "from avalanche_ext.cli.main import main; raise SystemExit(main(['list']))"
    done = subprocess.run(
        f'{sys.executable} -c "{code}" | head -n 1; echo ${{PIPESTATUS[0]}}',
        shell=True, executable="/bin/bash", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""
