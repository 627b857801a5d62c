"""Without Linux's own calls, every stage does the same: a child Python in which our package does not find them."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

import gguftools
from frankenmoe import system
from frankenmoe.artifact.folder import STATISTICS

WITHOUT = Path(__file__).parent / "elsewhere_system"
# what is written, in the order of `commands`; records name times, versions and folders
VARIES = {"frankenmoe.json", "run.json", "build.json", "run.log"}


def environment_without() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(WITHOUT), os.environ.get("PYTHONPATH", "")])}


def cli(*words: object, cwd: Path, without: bool) -> "subprocess.CompletedProcess[str]":
    """A command; `without` Linux's calls if asked."""
    environment = environment_without() if without else dict(os.environ)
    environment |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache")}
    flags = ["-X", "warn_default_encoding"] if without else []
    command = [sys.executable, *flags, "-m", "frankenmoe", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", env=environment)


def files(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file below a folder, but those that name times; of statistics, of their numbers."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(
            b"".join(tensor.tobytes() for tensor in load_file(file).values())
            if file.name == STATISTICS  # its metadata name the texts' folders
            else file.read_bytes()
        ).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in VARIES
    }


COMMANDS = (
    "plan recipe.yml",
    "build recipe.yml built",
    "build recipe.yml virtual --virtual",
    "verify built",
    "verify virtual",
    "fit virtual --data con=text.txt --data A=other.txt --data a=text.txt --method ridge --keep-anyway",
    "chat virtual --prompt fox --max-new-tokens 4",
    "export virtual gguf --types q8_0 --no-check",
    "extract virtual dense --expert A",
    "train virtual trained --data con=text.txt --data A=other.txt --data a=text.txt --what adapters "
    "--steps 1 --batch 1 --block 16 --rank 2",
    "card virtual",
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders with the same parents, texts and recipe: one for Linux, one for a system without its calls."""
    made = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("place") / "work"
        folder.mkdir()
        gguftools.parents(folder, "llama", count=2)
        (folder / "text.txt").write_text(gguftools.WORDS * 4, encoding="utf-8")
        (folder / "other.txt").write_text(gguftools.WORDS[::-1] * 4, encoding="utf-8")
        experts = [
            {"source_model": f"llama{at % 2}", "name": expert, "noise_relative": 0.01}
            for at, expert in enumerate(("con", "A", "a"))
        ]
        recipe = {"base_model": "llama0", "gate_mode": "random", "dtype": "float32", "experts": experts}
        (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
        made.append(folder)
    return made[0], made[1]


@pytest.mark.slow
def test_every_stage_writes_and_says_the_same_without_linux(places: tuple[Path, Path]) -> None:
    linux, elsewhere = places
    for words in COMMANDS:
        said = []
        for folder in places:
            done = cli(*words.split(), cwd=folder, without=folder is elsewhere)
            assert done.returncode == 0, (words, done.stderr)
            plain = done.stdout.replace(str(folder.parent), "").replace(str(folder), "")
            said.append(re.sub(r"[\d.]+ (s|seconds|tokens/s|GiB free)\b", "", plain))
        assert said[0] == said[1], words
    for name in ("built", "virtual", "gguf", "dense", "trained"):
        ours, theirs = files(linux / name), files(elsewhere / name)
        assert ours, name
        assert {file: digest for file, digest in ours.items() if not file.endswith((".md", ".json"))} == {
            file: digest for file, digest in theirs.items() if not file.endswith((".md", ".json"))
        }
        assert ours.keys() == theirs.keys()
    assert not [file for file in elsewhere.rglob("*") if file.name.endswith((".lock", ".partial"))]


def test_a_build_without_linux_gives_the_same_bytes(places: tuple[Path, Path], tmp_path: Path) -> None:
    _, elsewhere = places
    outs = []
    for folder in places:
        out = tmp_path / folder.parent.name
        done = cli("build", "recipe.yml", out, cwd=folder, without=folder is elsewhere)
        assert done.returncode == 0, done.stderr
        outs.append(files(out))
    assert outs[0] == outs[1]
    assert len(outs[0]) > 5


def test_the_fixture_takes_the_calls_away() -> None:
    """Else the tests above would prove nothing."""
    code = (
        "import os, json\n"
        "from frankenmoe import system\n"
        "from frankenmoe.checkpoint import direct\n"
        "found = {'direct': system.DIRECT, 'nowait': system.NOWAIT, 'moves': system.moves_open_files()}\n"
        "found |= {'pwrite': hasattr(os, 'pwrite'), 'maps': hasattr(direct.mmap, 'MAP_PRIVATE')}\n"
        "found['cores'] = system.cores()\n"
        'exec(\'try:\\n    open("/proc/meminfo")\\nexcept OSError as error:\\n    found["proc"] = str(error)\')\n'
        "found['memory'] = system.free_memory()\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment_without())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("memory") > 2**20
    assert found.pop("cores") == os.cpu_count()
    assert found.pop("proc").startswith("[Errno 2]")
    assert found == {"direct": 0, "nowait": 0, "moves": False, "pwrite": False, "maps": False}


def test_two_builds_do_not_meet_without_linux(places: tuple[Path, Path], tmp_path: Path) -> None:
    """The lock is beside the folder there, which could not be renamed with an open file in it."""
    out = tmp_path / "out"
    code = (
        "import sys, frankenmoe as fm\n"
        "from frankenmoe.artifact.folder import growing\n"
        "from pathlib import Path\n"
        "with growing(Path(sys.argv[1]), digest='x'):\n"
        "    try:\n"
        "        fm.build(sys.argv[2], sys.argv[1])\n"
        "    except fm.FrankenMoEError as error:\n"
        "        print(error.message)\n"
    )
    command = [sys.executable, "-c", code, str(out), str(places[1] / "recipe.yml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_without())
    assert done.stdout == f"another process is building {out}, or has just done so\n", done.stderr


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["maths", "law"], ["maths", "law"]),
        (["CON", "nul", "aux.txt", "com1.tar.gz", "LPT³"], ["_CON", "_nul", "_aux.txt", "_com1.tar.gz", "_LPT³"]),
        (["conrad", "auxiliary", "com10"], ["conrad", "auxiliary", "com10"]),
        (["a", "A", "a-2"], ["a", "A-2", "a-2-2"]),
        (["ends.", "ends ", "..", "", "/"], ["ends", "ends-2", "x", "x-2", "x-3"]),
        (["a/b", "a\\b", "a:b", 'a"b', "a\nb"], ["a-b", "a-b-2", "a-b-3", "a-b-4", "a-b-5"]),
        (["e\u0301te\u0301", "\u00e9t\u00e9"], ["\u00e9t\u00e9", "\u00e9t\u00e9-2"]),
        (["x" * 5000], ["x" * 60]),
    ],
)
def test_names_become_file_names_that_every_system_takes(texts: list[str], names: list[str]) -> None:
    assert system.file_names(texts, default="x") == names
