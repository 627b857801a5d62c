"""The benchmarks run and keep what they promise; how fast anything is, is not a test's business."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import forks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MERGEKIT = find_spec("mergekit") is not None
REAL_PARENTS = (BENCHMARKS.parents[1] / "shared" / "models").is_dir()


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch):
    """benchmarks/common.py, imported as the scripts beside it do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import common

    return common


def run_script(name: str, folder: Path, *more: str) -> dict:
    """The JSON that a script writes at the smallest scale; its work folder must be empty again afterwards."""
    out, work = folder / "result.json", folder / "work"
    work.mkdir()
    options = ["--scale", "smoke", "--rounds", "1", "--work", str(work), "--out", str(out), *more]
    done = subprocess.run([sys.executable, str(BENCHMARKS / name), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80  # the last line names a file
    assert list(work.iterdir()) == []
    return json.loads(out.read_text())


def check(result: dict, *, rows: int) -> None:
    """The shape of a result: its circumstances, and rows whose verdict follows from value and limit."""
    assert {"benchmark", "scale", "rounds", "finished", "revision", "machine", "versions", "rows"} == result.keys()
    assert result["machine"]["cores"] >= 1
    assert result["versions"]["torch"]
    assert len(result["rows"]) == rows
    for row in result["rows"]:
        value, limit, least = row["value"], row["limit"], row.get("at_least")
        within = [value <= limit] if None not in (value, limit) else []
        within += [value >= least] if None not in (value, least) else []
        assert row["reached"] == (all(within) if within else None)
        assert all(samples for samples in row["samples"].values())


def test_plan_imports_no_torch(tmp_path: Path) -> None:
    result = run_script("plan.py", tmp_path)
    check(result, rows=3)
    assert result["rows"][1]["value"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "rows"),
    [
        ("load.py", 18),
        ("build.py", 26),
        ("experts.py", 30),
        ("compose.py", 4),
        ("audit.py", 4 if REAL_PARENTS else 2),
        ("export.py", 16 if REAL_PARENTS else 5),
        ("gpu.py", 30),
        ("train_speed.py", 15),
        ("serve.py", 7),
        ("batching.py", 36),
        ("playground.py", 2),
    ],
)
def test_scripts_keep_their_rows(script: str, rows: int, tmp_path: Path) -> None:
    result = run_script(script, tmp_path)
    check(result, rows=rows)
    if script == "gpu.py":  # whose parts may fail on a card too small for them, but not here
        assert all(row["value"] is not None for row in result["rows"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_script_says_that_there_is_none(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    script = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu; gpu.main()"
    done = forks.run(script, "--out", out)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "benchmarks/gpu.py at scale small needs a CUDA GPU, found none; --scale smoke runs on a CPU"
    ]
    assert not out.exists()


def test_the_gpu_floors_are_those_worked_out_by_hand(common) -> None:
    """26 layers of 3200 and 8640 with 16 experts at 4.8 TB/s and 989 TFLOP/s."""
    import gpu

    assert gpu.floor("decode", "full", gpu.H200) == pytest.approx(2.28e-3, rel=0.01)
    assert gpu.floor("prefill", "full", gpu.H200) == pytest.approx(14.8e-3, rel=0.01)
    assert 8 * 2048 / gpu.floor("large", "full", gpu.H200) == pytest.approx(92e3, rel=0.01)


@pytest.mark.parametrize("form", ["dense", "distinct", "adapters", "eager"])
def test_the_gpu_script_knows_how_large_its_models_are(form: str, common) -> None:
    import gpu
    import gpu_once

    model = gpu_once.make(form, gpu.SHAPES["smoke"], torch.device("cpu"))
    small = ("norm.weight", "router.weight", "mlp.gate.weight", ".a", ".b")
    sizes = [tensor.nbytes for name, tensor in model.named_parameters() if not name.endswith(small)]
    assert gpu.weights(form, "smoke") == sum(sizes)
    assert gpu.weights("distinct", "full") == pytest.approx(71.6e9, rel=0.01)


def test_the_gpu_script_says_what_does_not_fit(common, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_once

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (24 * 10**9, 24 * 10**9))
    gpu_once.check_room("adapters", "full", torch.device("cuda"))
    with pytest.raises(SystemExit, match="distinct at scale full has 72 GB of weights, the GPU 24 GB free"):
        gpu_once.check_room("distinct", "full", torch.device("cuda"))


def test_a_kind_of_work_that_no_stock_form_can_do_leaves_the_others(common) -> None:
    import gpu

    able = dict.fromkeys(gpu.WORDS, 1.0)
    found = {form: [able] for form in ("dense", *gpu.OURS)}
    found |= {form: [{kind: 1.0 for kind in able if kind != "layers"}] for form in gpu.STOCK}
    rows = gpu.table(found | {"floors": [{"bytes": 1e12, "operations": 1e15}]}, "small")
    missing = [row.what for row in rows if row.value is None]
    assert missing == [
        "a token, blocks as graph: stock's best (none)",
        "a token, blocks as graph: distinct against stock",
    ]


@pytest.mark.slow
@pytest.mark.skipif(not REAL_PARENTS, reason="../shared/models is not there: these need parents trained on real text")
@pytest.mark.parametrize(("script", "rows"), [("routers.py", 33 if MERGEKIT else 27), ("routers_train.py", 27)])
def test_scripts_over_real_parents_keep_their_rows(script: str, rows: int, tmp_path: Path) -> None:
    own = ["--runs", str(tmp_path / "runs")] if script == "routers_train.py" else []
    check(run_script(script, tmp_path, *own), rows=rows)


def test_measure_sees_the_memory_of_children(common) -> None:
    hold = "import time; held = bytearray(b'x') * 50_000_000; time.sleep(0.5); print('done')"
    run = common.measure(["sh", "-c", f'"{sys.executable}" -c "{hold}"; true'])
    assert 50 * common.MB < run.anon < 100 * common.MB
    assert run.seconds >= 0.5
    assert run.stdout == "done\n"


def test_measure_tells_why_a_command_failed(common) -> None:
    with pytest.raises(RuntimeError, match="no such luck"):
        common.measure(["sh", "-c", "echo no such luck >&2; exit 3"])


def test_rounds_alternate(common) -> None:
    order: list[str] = []
    found = common.interleave({name: lambda name=name: order.append(name) or name for name in "ab"}, rounds=3)
    assert "".join(order) == "abbaab"
    assert found == {"a": ["a"] * 3, "b": ["b"] * 3}


def test_a_ratio_is_one_of_medians(common) -> None:
    assert common.ratio({"ours": [3.0, 900.0, 4.0], "cp": [2.0, 2.0, 0.1]}, "ours", to="cp") == 2.0


def test_workspace_is_gone_after_an_error(common, tmp_path: Path) -> None:
    def fail() -> None:
        with common.workspace(tmp_path) as work:
            (work / "file").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_readme_shows_the_kept_results(common) -> None:
    import table

    shown = table.split(table.README.read_text())[1]
    assert shown == table.markdown(sorted(common.RESULTS.glob("*-full.json"))), "run python benchmarks/table.py"
