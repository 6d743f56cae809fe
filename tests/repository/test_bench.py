"""The bench beside the peers: it imports without them, its numbers are what they say, and a small run goes through."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.peers import TABLES, command, growth, libraries, moments, quality, their_pruner, tracing
from bench.peers.footprint import available, grown
from bench.peers.growth import exponent
from bench.peers.libraries import MissingPeerError
from bench.peers.page import Ratio, markdown, pivot, ratio_lines, seconds, summary, table, times
from bench.peers.problems import classifier
from bench.peers.setting import Setting
from bench.peers.timing import interleaved, within

ROOT = Path(__file__).resolve().parents[2]


# ── importing ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_table_imports_without_the_peers_and_without_them_the_package_does_too():
    code = (
        "import sys, importlib\n"
        "for name in ('torch_pruning', 'curvlinops', 'backpack', 'timm'): sys.modules[name] = None\n"
        "import prunelab\n"
        "from bench.peers import TABLES\n"
        "modules = [importlib.import_module(f'bench.peers.{name}') for name in TABLES]\n"
        "assert all(m.TITLE and m.about and m.rows and m.markdown and m.ratios for m in modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_peer_that_is_missing_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingPeerError, match=r"torch-pruning is not installed: `pip install -e '\.\[bench\]'`"):
        libraries.peer("torch_pruning")
    found = interleaved({"ours": lambda: None, "theirs": lambda: libraries.peer("torch_pruning")}, 1)
    assert "cpu" in found["ours"] and found["theirs"]["error"].startswith("MissingPeerError: torch-pruning")


def test_the_peers_of_the_extra_are_those_that_the_bench_knows():
    tomllib = pytest.importorskip("tomllib", reason="part of Python since 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    listed = {line.split(">")[0] for line in extras["bench"]}
    assert set(libraries.EXTRA.values()) <= listed


# ── timing and memory ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="there are no alarms on this system")
def test_what_is_not_done_in_time_is_ended_and_what_is_done_is_left_alone():
    with pytest.raises(TimeoutError, match="not done within 1 s"), within(1):
        while True:
            pass
    with within(1):
        pass
    assert signal.alarm(0) == 0, "no alarm is left"


def test_contestants_take_turns_after_a_round_that_warms_up():
    calls: list[str] = []
    found = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert "".join(calls) == "abababab"
    assert {name: row["rounds"] for name, row in found.items()} == {"a": 3, "b": 3}


def test_slow_ones_are_called_less_and_failing_ones_once():
    calls: list[str] = []

    def fails() -> None:
        calls.append("f")
        raise ValueError("first line\nsecond line")

    found = interleaved({"slow": lambda: calls.append("s"), "fails": fails}, 7, slow=["slow"])
    assert calls.count("s") == found["slow"]["rounds"] == 2
    assert calls.count("f") == 1 and found["fails"] == {"error": "ValueError: first line"}


def test_what_prepares_a_call_is_not_timed_and_gives_its_arguments():
    given: list[int] = []

    def prepare() -> tuple[int]:
        time.sleep(0.05)
        return (7,)

    found = interleaved({"one": given.append}, 2, prepare={"one": prepare})
    assert given == [7, 7, 7] and found["one"]["wall"] < 0.05


@pytest.mark.skipif(not available(), reason="memory is read from /proc, on Linux")
def test_memory_is_that_of_a_child():
    code = (
        "import torch; from bench.peers.footprint import grown\n"
        "print(grown(lambda: torch.ones(50 * 2**18).sum())['megabytes'])"  # 50 MB
    )
    # In a process of its own: this one may hold as much memory back that it has freed.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 45 < float(done.stdout) < 80
    assert grown(lambda: 1 / 0) == {"error": "ZeroDivisionError: division by zero"}


def test_the_exponent_of_a_power_is_its_power():
    assert exponent([(size, 3 * size**1.5) for size in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert exponent([(4, 1.0)]) != exponent([(4, 1.0)])  # one size says nothing


def test_growth_is_drawn_and_its_exponents_are_those_of_the_rows(tmp_path):
    rows = [
        {"grows": what, "size": size, "step": step, "cpu": 1e-3 * size**power, "megabytes": 2.0 * size}
        for what, sizes in growth.GROWN.items()
        for size in sizes
        for power, step in enumerate(growth.STEPS)
    ]
    page = "\n".join(growth.markdown(rows))
    assert "| moments | 2.0 (1.0) | 2.0 (1.0) | 2.0 (1.0) | 2.0 (1.0) |" in page and "](peers-growth.png)" in page
    assert not list(tmp_path.iterdir()), "a page is made without touching anything"
    growth.finish([row for row in rows if row["size"] == 8], tmp_path)
    assert not list(tmp_path.iterdir()), "a quick run has too few sizes for a figure"
    growth.finish(rows, tmp_path)
    assert (tmp_path / growth.FIGURE).stat().st_size > 5000


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("value", "text"), [(1.284, "1.28×"), (0.5, "0.50×"), (3.14, "3.1×"), (41.4, "41×")])
def test_ratios_have_the_digits_that_matter(value, text):
    assert times(value) == text


def test_numbers_that_are_missing_are_dashes():
    assert times(None) == times(float("nan")) == seconds(None) == "–"
    assert (seconds(0.01234), seconds(12.34)) == ("12.3 ms", "12.3 s")


def test_a_table_keeps_its_columns():
    lines = list(table(["name", "a|b"], [["x|y", 1]]))
    assert lines == ["| name | a|b |", "|---|---:|", "| x\\|y | 1 |"]


def test_a_pivot_shows_multiples_of_the_floor_and_failures():
    rows = [
        {"network": "n", "method": "floor", "cpu": 2.0},
        {"network": "n", "method": "ours", "cpu": 3.0},
        {"network": "n", "method": "theirs", "error": "ValueError: no"},
    ]
    assert list(pivot(rows, "network", "method", "floor"))[-1] == "| n | 2 s | 1.50× | fails |"


def trace_rows() -> list[dict]:
    rows = []
    for model, ours, theirs in (("a", 1.0, 2.0), ("b", 1.0, 6.0), ("c", 2.0, None)):
        rows.append({"model": model, "method": "prunelab", "cut": "yes", "params": 1, "cpu": ours})
        their = {"cpu": theirs, "cut": "yes"} if theirs else {"error": "ValueError: x", "cut": "ValueError: x"}
        rows.append({"model": model, "method": "Torch-Pruning", "params": 1} | their)
    return rows


def test_a_model_that_a_peer_cannot_trace_counts_for_neither_side_in_the_median_and_is_named():
    (ratio,) = tracing.ratios(trace_rows())
    assert ratio.value == 4.0 and ratio.met
    assert "2 models that both trace; traced 3 and 2, cut 3 and 2 of 3" in ratio.over
    page = "\n".join(tracing.markdown(trace_rows()))
    assert "- Torch-Pruning, c: `ValueError: x`" in page and "| c | 2000 ms | fails | – | yes | ValueError |" in page


def test_quality_compares_the_best_of_each_side_and_says_when_it_is_behind():
    base = {"network": "n", "test images": 10, "accuracy": 0.9, "loss": 0.3, "who": "–", "criterion": "", "how": "–"}
    rows = [base | {"share": 1.0}]
    for who, criterion, how, accuracy in (
        ("prunelab", "gate", "compensated", 0.6),
        ("prunelab", "gate", "cut", 0.2),
        ("Torch-Pruning", "Taylor", "cut", 0.8),
    ):
        rows.append(base | {"who": who, "criterion": criterion, "how": how, "accuracy": accuracy, "share": 0.5})
    (ratio,) = quality.ratios(rows)
    assert ratio.value == pytest.approx(0.75) and not ratio.met
    assert ratio.over == "60.0 % (gate, compensated) and 80.0 % (Taylor)"
    assert "**80.0** (0.30)" in "\n".join(quality.markdown(rows))
    assert list(quality.best(rows))[2:] == [
        "| n | prunelab, compensated | 60.0 (gate) |",
        "| n | prunelab, as cut | 20.0 (gate) |",
        "| n | Torch-Pruning, as cut | 80.0 (Taylor) |",
    ]


def test_batch_norms_are_re_estimated_on_what_is_given_and_the_cut_network_is_ready_for_a_test():
    torch.manual_seed(0)
    batches = [(5 + 3 * torch.randn(8, 2, 4, 4), torch.zeros(8).long()) for _ in range(3)]
    small = quality._re_estimated(lambda share: nn.Sequential(nn.BatchNorm2d(2)), batches)(0.5)
    (norm,) = small
    assert not norm.training
    torch.testing.assert_close(norm.running_mean, torch.cat([x for x, _ in batches]).mean((0, 2, 3)))


def test_goals_that_are_missed_are_printed_as_well(monkeypatch):
    monkeypatch.setattr(tracing, "ratios", lambda rows: [Ratio("trace", "them", 0.5, "≥ 2×", False, "1 model")])
    lines = ratio_lines({"rows": [{"table": "tracing"}]})
    assert lines[-1] == "| trace | them | 0.50× | 1 model | ≥ 2×: missed |"


# ── small runs ────────────────────────────────────────────────────────────────────────────────────────────────────


def kept_after(monkeypatch, tmp_path, rows, names=("tracing",)) -> dict:
    monkeypatch.setattr(tracing, "rows", lambda setting: iter(rows))
    kept, failed = command.run(names, Setting(quick=True), tmp_path / "peers.json")
    assert not failed
    return kept


def test_a_table_that_is_measured_again_replaces_its_rows_and_no_others(monkeypatch, tmp_path):
    out = tmp_path / "peers.json"
    other = {"table": "growth", "grows": "width", "size": 8, "step": "trace", "cpu": 1.0}
    out.write_text(json.dumps({"machine": {}, "versions": {}, "runs": {}, "rows": [other, {"table": "tracing"}]}))
    threads = torch.get_num_threads()
    try:
        kept = kept_after(monkeypatch, tmp_path, trace_rows())
    finally:
        torch.set_num_threads(threads)
    assert json.loads(out.read_text()) == json.loads(json.dumps(kept))
    assert other in kept["rows"] and len(kept["rows"]) == 1 + len(trace_rows())
    page = out.with_suffix(".md").read_text()
    assert page == markdown(kept) and "python -m bench.peers.tracing --quick" in page


def test_a_run_that_was_cut_short_goes_on_where_it_was(monkeypatch, tmp_path):
    seen: list[int] = []
    stopped: list[bool] = []

    def rows(setting):
        for number in range(3):
            row = {"network": "n", "share": number}
            if setting.find(row) is None:
                seen.append(number)
            yield setting.find(row) or row
            if len(seen) == 2 and not stopped:
                stopped.append(True)
                raise KeyboardInterrupt

    for name, what in {"rows": rows, "markdown": lambda rows: [], "ratios": lambda rows: []}.items():
        monkeypatch.setattr(quality, name, what)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(KeyboardInterrupt):
            command.run(["quality"], Setting(), tmp_path / "peers.json")
        kept, _ = command.run(["quality"], Setting(), tmp_path / "peers.json")
        assert seen == [0, 1, 2] and len(kept["rows"]) == 3 and kept["runs"]["quality"]["finished"]
        command.run(["quality"], Setting(), tmp_path / "peers.json")
        assert seen == [0, 1, 2, 0, 1, 2], "a run that ended is done anew"
    finally:
        torch.set_num_threads(threads)


def test_a_table_that_fails_is_named_and_the_others_are_kept(monkeypatch, tmp_path, capsys):
    def rows(setting):
        yield {"grows": "width"}
        raise ValueError("no such thing")

    monkeypatch.setattr("bench.peers.growth.rows", rows)
    monkeypatch.setattr(tracing, "rows", lambda setting: iter(trace_rows()))
    threads = torch.get_num_threads()
    try:
        kept, failed = command.run(["growth", "tracing"], Setting(), tmp_path / "peers.json")
    finally:
        torch.set_num_threads(threads)
    assert failed == ["growth"] and "no such thing" in capsys.readouterr().err
    assert {row["table"] for row in kept["rows"]} == {"tracing"}


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()


def test_ours_and_backpack_find_the_moments_of_autograd_and_the_published_loop_does_not():
    pytest.importorskip("backpack")
    pytest.importorskip("torch_pruning")
    model = small_network()
    batches = [(torch.randn(n, 3, 8, 8), torch.arange(n) % 4) for n in (5, 3)]
    wanted = moments.exact(model, batches)
    assert moments.distance(moments.ours(model, batches), wanted) < 1e-5
    with pytest.warns(UserWarning, match="Full backward hook"):
        found = moments.backpack(moments.extended(model), batches)
    assert moments.distance(found, wanted) < 1e-5
    last = moments.exact(model, [(batches[1][0][-1:], batches[1][1][-1:])])
    own = moments.torch_pruning(small_network(), batches)
    assert moments.distance(own, last) < 1e-5, "the last sample is all it keeps; if that is mended, say so on the page"
    assert moments.distance(own, wanted) > 0.1


def test_their_pruner_is_given_the_flops_that_were_asked_for():
    pytest.importorskip("torch_pruning")
    import prunelab as pl

    model = pl.zoo.load("resnet20")
    scored = their_pruner.IMPORTANCES["magnitude, L2"](model, [])
    small = their_pruner.at_flops(model, scored, 0.5, False)
    share = pl.count(small, their_pruner.INPUTS).flops / pl.count(model, their_pruner.INPUTS).flops
    assert 0.48 < share <= 0.5
    assert classifier(small).out_features == 10
    assert pl.count(model, their_pruner.INPUTS).params == 272_474, "the model itself is left alone"


def test_the_readme_shows_what_was_measured():
    path = ROOT / "bench" / "peers.json"
    if not path.is_file():
        pytest.skip("not measured yet")
    lines = "\n".join(summary(json.loads(path.read_text(encoding="utf-8"))))
    assert lines in (ROOT / "README.md").read_text(encoding="utf-8"), "run `python -m bench.peers --readme`"


def test_the_summary_goes_between_its_marks_and_nothing_else_changes(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{command.MARKS[0]}\nold\n{command.MARKS[1]}\n\nafter\n")
    kept = {"rows": [{"table": "tracing"} | row for row in trace_rows()]}
    for _ in range(2):
        command.show(kept, page)
        text = page.read_text()
        assert text.startswith("before\n\n<!--") and text.endswith("-->\n\nafter\n") and "old" not in text
        assert "\n".join(summary(kept)) in text and "| trace |" in text
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="README.md has no"):
        command.show(kept, page)


def test_the_page_is_what_the_rows_say():
    path = ROOT / "bench" / "peers.json"
    if not path.is_file():
        pytest.skip("not measured yet")
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert {row["table"] for row in kept["rows"]} <= set(TABLES)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(kept)


def test_every_table_says_what_it_compares():
    for name in TABLES:
        module = importlib.import_module(f"bench.peers.{name}")
        assert all(line.strip() for line in module.about())
