"""Reports: their numbers are those that one gets by hand, and an unfinished sweep is told as what it is."""

from __future__ import annotations

import math
import re

import matplotlib.image
import nbformat
import numpy as np
import pandas as pd
import pytest

from prunelab.__main__ import main
from prunelab.experiments.figures.sweeps import looks, pareto, ranking
from prunelab.experiments.shootout.compare import bootstrap, mean_ranks, pareto_front
from prunelab.experiments.sweeping import analysis, explore, records
from prunelab.experiments.sweeping.report import findings, report
from tests.sweeps import write_sweep

SHARES, SEEDS = (0.5, 0.3), (0, 1)
ACCURACY = {  # method -> accuracy at 50 % (seeds 0 and 1), at 30 %
    ("magnitude", False): ((0.80, 0.82), (0.50, 0.54)),
    ("taylor", False): ((0.84, 0.82), (0.60, 0.56)),
    ("taylor", True): ((0.90, 0.88), (0.70, 0.74)),
}
VARIED = ["criterion", "compensate", "share", "seed"]
PUBLISHED = [
    {"match": {"criterion": "taylor", "compensate": True, "share": 0.5}, "accuracy": 0.91, "source": "A 2020, table 1"},
    {"match": {"criterion": "obd"}, "accuracy": 0.5, "source": "B 2021, table 2"},
]


def jobs() -> list:
    found = []
    for (criterion, compensate), by_share in ACCURACY.items():
        for share, values in zip(SHARES, by_share, strict=True):
            for seed, accuracy in zip(SEEDS, values, strict=True):
                given = {"criterion": criterion, "compensate": compensate, "share": share, "seed": seed}
                given |= {"model": "resnet20", "dataset": "mini"}
                row = {"accuracy": accuracy, "loss": 1 - accuracy, "flops_kept": share - 0.01, "params_kept": share / 2}
                found.append((given, row))
    return found


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path / "s", jobs(), varied=VARIED, published=PUBLISHED)


def test_the_table_has_every_job_with_its_parameters_result_and_state(tmp_path):
    listed = jobs()
    listed[1], listed[2] = (listed[1][0], "OSError: no disk"), (listed[2][0], None)
    table = records.table(write_sweep(tmp_path / "s", listed, varied=VARIED))
    assert list(table["status"][:4]) == ["done", "failed", "missing", "done"]
    assert table["error"][1] == "OSError: no disk"
    assert table["accuracy"][0] == 0.80 and math.isnan(table["accuracy"][1]) and math.isnan(table["accuracy"][2])
    assert list(table["seed"][:4]) == [0, 1, 0, 1]
    assert list(table.columns[:7]) == ["job", "criterion", "compensate", "share", "seed", "model", "dataset"]


def test_methods_are_told_apart_by_what_was_varied_and_cases_by_the_budget(sweep):
    rows = analysis.compared(records.table(sweep), VARIED)
    assert list(dict.fromkeys(rows["method"])) == ["magnitude", "taylor", "taylor, compensate"]
    assert list(dict.fromkeys(rows["case"])) == ["mini, resnet20 | share 0.5", "mini, resnet20 | share 0.3"]


def test_a_parameter_that_follows_from_the_criterion_or_network_is_no_method_of_its_own():
    rows = [
        {"criterion": criterion, "per": per, "model": model, "lr": lr, "seed": 0, "status": "done", "options": "{}"}
        for criterion, per in (("magnitude", "unit"), ("obd", "flops"))
        for model, lr in (("a", 0.1), ("b", 0.01))
    ]
    varied = ["criterion", "per", "model", "lr"]
    assert set(analysis.compared(pd.DataFrame(rows), varied)["method"]) == {"magnitude", "obd"}
    rows.append(rows[0] | {"criterion": "obd", "options": '{"fisher": "mc"}', "per": "flops"})
    assert "obd, fisher=mc" in set(analysis.compared(pd.DataFrame(rows), [*varied, "options"])["method"])


def test_means_and_ranks_are_those_by_hand(sweep):
    found = findings(sweep)
    means = found.means.set_index(["method", "setting"])
    assert means.loc[("magnitude", "share 0.5"), "accuracy"] == pytest.approx(0.81)
    assert means.loc[("magnitude", "share 0.3"), "std"] == pytest.approx(0.04 / 2**0.5)
    assert means.loc[("taylor", "share 0.3"), "flops_kept"] == pytest.approx(0.29)
    # Blocks: (50 %, 0): 3, 2, 1; (50 %, 1): 2.5, 2.5, 1, a tie; (30 %, 0): 3, 2, 1; (30 %, 1): 3, 2, 1.
    ranked = found.ranking.set_index("method")
    assert list(ranked.index) == ["taylor, compensate", "taylor", "magnitude"]
    assert ranked["mean_rank"].tolist() == pytest.approx([1.0, 8.5 / 4, 11.5 / 4])
    assert ranked["first"].tolist() == [1.0, 0.0, 0.0]
    assert (ranked["blocks"] == 4).all()
    assert ranked.loc["taylor, compensate", ["low", "high"]].tolist() == [1.0, 1.0]
    # Drawn: cases {50, 50}, {50, 30} twice, {30, 30}; the mean of taylor's ranks at 50 % is 2 to 2.5.
    assert 2.0 <= ranked.loc["taylor", "low"] < 8.5 / 4 < ranked.loc["taylor", "high"] <= 2.5
    assert ranked.loc["magnitude", "accuracy"] == pytest.approx((0.80 + 0.82 + 0.50 + 0.54) / 4)


def test_a_loss_is_better_when_it_is_low(sweep):
    assert list(findings(sweep, "loss").ranking["method"]) == ["taylor, compensate", "taylor", "magnitude"]


def test_a_method_that_is_missing_often_is_not_ranked_and_blocks_that_lack_one_are_left_out(tmp_path):
    listed = [(given, None if given["compensate"] and given["share"] == 0.3 else row) for given, row in jobs()]
    rows = analysis.compared(records.table(write_sweep(tmp_path / "half", listed, varied=VARIED)), VARIED)
    assert len(analysis.blocks(rows, "accuracy")) == 2, "in half of the blocks it is there"
    listed = [
        (given, row if not given["compensate"] or given["seed"] + given["share"] == 0.5 else None)
        for given, row in jobs()
    ]
    rows = analysis.compared(records.table(write_sweep(tmp_path / "quarter", listed, varied=VARIED)), VARIED)
    assert list(analysis.blocks(rows, "accuracy")) == ["magnitude", "taylor"]
    assert len(analysis.blocks(rows, "accuracy")) == 4


def test_published_numbers_stand_beside_the_mean_of_the_runs_that_match(sweep):
    ours = findings(sweep).published
    assert ours["ours"][0] == pytest.approx(0.89)
    assert ours["difference"][0] == pytest.approx(-0.02)
    assert (ours["runs"].tolist(), ours["source"][1]) == ([2, 0], "B 2021, table 2")
    assert math.isnan(ours["ours"][1])


def test_the_bootstrap_covers_the_mean_of_what_varies_and_nothing_else():
    numbers = np.column_stack([np.arange(8.0), np.full(8, 3.0)])
    low, high = bootstrap(numbers, ["a"] * 4 + ["b"] * 4, draws=4000)
    assert low[1] == high[1] == 3.0
    assert low[0] < 3.5 < high[0]
    # One case: its four seeds are drawn; the mean of 4 draws from 0…3 has deviation √(1.25 / 4) = 0.56.
    low, high = bootstrap(numbers[:4], ["a"] * 4, draws=4000)
    assert low[0] == pytest.approx(1.5 - 1.96 * 0.56, abs=0.15)
    assert high[0] == pytest.approx(1.5 + 1.96 * 0.56, abs=0.15)
    # Two cases, far apart: the cases' own spread counts, and not the seeds' alone.
    low, high = bootstrap([[0.0], [0.1], [9.0], [9.1]], ["a", "a", "b", "b"], draws=2000)
    assert (low[0] < 0.2, high[0] > 8.9) == (True, True)


def test_ranks_and_fronts_with_ties():
    assert mean_ranks([[1.0, 1.0, 1.0]]).tolist() == [2.0, 2.0, 2.0]
    assert mean_ranks([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0]]).tolist() == [1.0, 2.5, 2.5]
    assert pareto_front([1, 1, 2], [5, 5, 5]).tolist() == [True, True, False]


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_files_are_written_and_agree(sweep):
    written = {path.name: path for path in report(sweep)}
    assert {path.parent for path in written.values()} == {sweep / "report"}
    parquet = pd.read_parquet(written["table.parquet"])
    pd.testing.assert_frame_equal(parquet, pd.read_csv(written["table.csv"], keep_default_na=False), check_dtype=False)
    assert len(parquet) == 12
    assert set(pd.read_csv(written["history.csv"])["stage"]) == {"before"}
    for name in ("accuracy-flops_kept.png", "accuracy-params_kept.png", "ranking.png"):
        assert matplotlib.image.imread(written[name]).shape[1] > 600
    page = written["report.html"].read_text()
    for said in (
        "12 of 12 jobs are done.",
        "taylor, compensate",
        "A 2020, table 1",
        "python -m prunelab sweep g.yaml",
        "commit abc",
    ):
        assert said in page
    assert not re.search(r"(src|href)=\"(?!data:)", page), "it stands on its own"
    summary = written["summary.md"].read_text()
    assert "| taylor, compensate | 89.0 ± 1.4 | 72.0 ± 2.8 |" in summary
    assert "| taylor, compensate | 1.00 [1.00, 1.00] |" in summary
    again = explore.of_table(written["compared.csv"])
    assert analysis.ranking(again, "accuracy")["mean_rank"].tolist() == pytest.approx([1.0, 8.5 / 4, 11.5 / 4])


def test_an_unfinished_sweep_is_told_as_what_it_is(tmp_path, capsys):
    listed = jobs()
    listed[1], listed[2] = (listed[1][0], "OSError: <no> disk"), (listed[2][0], None)
    folder = write_sweep(tmp_path / "s", listed, varied=VARIED)
    assert main(["report", str(folder), "--out", str(tmp_path / "elsewhere")]) == 0
    page = (tmp_path / "elsewhere" / "report.html").read_text()
    assert "10 of 12 jobs are done" in page
    assert "OSError: &lt;no&gt; disk" in page
    assert 'href="../s/jobs/job-1/notebook.ipynb"' in page
    assert "job-2" in page
    nothing = write_sweep(tmp_path / "n", [(given, None) for given, _ in jobs()], varied=VARIED)
    assert main(["report", str(nothing)]) == 0
    assert "0 of 12 jobs are done" in (nothing / "report" / "report.html").read_text()


def test_a_folder_or_metric_that_is_not_there_is_named(sweep, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "is not the folder of a sweep" in capsys.readouterr().err
    assert main(["report", str(sweep), "--metric", "acuracy"]) == 1
    assert "have no numbers called 'acuracy'; they have" in capsys.readouterr().err


def test_a_result_of_other_code_is_missing(sweep):
    path = sweep / "jobs" / "job-0" / "job.json"
    path.write_text(path.read_text().replace('"package": "0+p"', '"package": "0+other"'))
    assert records.table(sweep)["status"][0] == "missing"
    manifest = sweep / "sweep.json"
    manifest.write_text(manifest.read_text().replace("0+p", "0"))
    assert records.table(sweep)["status"][0] == "done", "the sweep asked for the version alone"


def test_the_notebook_of_a_report_runs(sweep, monkeypatch):
    pytest.importorskip("ipywidgets")
    report(sweep)
    monkeypatch.chdir(sweep / "report")
    names: dict = {}
    for cell in nbformat.read("report.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
    widget = explore.explorer(names["rows"])
    before = widget.image.value
    widget.controls["criterion"].value = "magnitude"
    assert "4 runs of 1 methods" in widget.caption.value
    assert widget.image.value != before
    widget.controls["left"].value = "params_kept"
    assert "25% of the parameters" in widget.caption.value


# ── figures ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lines_are_means_over_seeds_in_a_band_from_worst_to_best(sweep):
    rows = analysis.compared(records.table(sweep), VARIED)
    axes = pareto(rows, "flops_kept", "accuracy", mark=(0.4, 0.6)).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["magnitude"].get_xydata() == pytest.approx(np.array([[29.0, 52.0], [49.0, 81.0]]))
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (pytest.approx(50), pytest.approx(82))
    assert sorted(lines["not beaten"].get_ydata()) == [pytest.approx(72), pytest.approx(89)], "both of the best method"
    assert lines["this run"].get_xydata().tolist() == [[40, 60]]
    assert axes.get_xlabel() == "FLOPs kept (%)"


def test_variants_of_a_criterion_share_its_colour_and_differ_in_marks_and_lines():
    one, two, other = looks(["obd", "obd, compensate", "taylor"])
    assert one[1:3] == two[1:3] != other[1:3]
    assert (one[3:], two[4]) != (two[3:], one[4])


def test_ranks_are_drawn_with_their_intervals():
    table = pd.DataFrame({"method": ["obd", "taylor"], "mean_rank": [1.8, 1.2], "low": [1.5, 1.0], "high": [2.0, 1.5]})
    axes = ranking(table).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["taylor", "obd"]
    assert [list(line.get_xdata()) for line in axes.lines[::2]] == [[1.0, 1.5], [1.5, 2.0]]
    assert axes.yaxis_inverted()
