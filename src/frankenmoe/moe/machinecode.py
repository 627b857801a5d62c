"""Where kernels lie in memory: numba compiles one once for a CPU, later processes load it without numba.

Needs llvmlite, which numba brings along. Does not know what a kernel computes.
"""

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

SOURCES = ("kernels.py", "numbers.py", "machinecode.py")
CHECK = 32  # bytes of a SHA-256
BESIDE = ("NUMBA_CACHE", "NUMBA_CUDA", "NUMBA_NUM_THREADS", "NUMBA_THREADING")  # settings that shape no code
# what numba's code calls after something was raised, which kernels never do: here it ends the process
NEVER = frozenset(
    {
        *("NRT_Free", "NRT_MemInfo_call_dtor", "numba_do_raise", "numba_gil_ensure", "numba_gil_release"),
        *("numba_runtime_build_excinfo_struct", "numba_unpickle", "Py_DecRef", "PyBytes_FromStringAndSize"),
        *("PyErr_Clear", "PyErr_SetNone", "PyErr_SetString", "PyErr_WriteUnraisable", "PyUnicode_FromString"),
    }
)
CALLED = frozenset({"malloc", "free", "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"})  # of C and OpenMP
NOWHERE = (OSError, RuntimeError)  # no folder to keep a file in, or not even a home

_lock = threading.Lock()
_addresses: dict[str, int] = {}
_engines: list[Any] = []  # the memory of code goes with its engine


def address(name: str) -> int:
    """Of the kernel called `name` in kernels.py: code that takes the address of a task and gives nothing back."""
    with _lock:  # two threads would compile the same
        if name not in _addresses:
            _addresses[name] = _load(_kept(name) or _made(name), name)
        return _addresses[name]


def check() -> None:
    """Raises ImportError where kernels cannot be had: nothing was compiled before, and numba cannot do it."""
    with suppress(*NOWHERE):
        if any(_folder().glob(f"*-{_key()}.o")):
            return
    import numba

    if numba.config.DISABLE_JIT:
        raise ImportError("numba is told to compile nothing")


def _folder() -> Path:
    """`frankenmoe/kernels` in the user's cache; a relative one is none, as XDG has it: code from here would run."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache_home if cache_home.is_absolute() else Path.home() / ".cache") / "frankenmoe" / "kernels"


def _kept(name: str) -> bytes | None:
    """The object file of a kernel, if it was made before and is whole."""
    with suppress(*NOWHERE):
        stored = (_folder() / f"{name}-{_key()}.o").read_bytes()
        if hashlib.sha256(stored[CHECK:]).digest() == stored[:CHECK]:
            return stored[CHECK:]
    return None


def _made(name: str) -> bytes:
    """The same compiled, and kept; where there is no folder for that, every process compiles."""
    from frankenmoe.moe import kernels, numbers

    code = object_file(getattr(kernels, name), numbers.PLAIN)
    with suppress(*NOWHERE):
        _folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_folder()) as work:
            part = Path(work) / name
            part.write_bytes(hashlib.sha256(code).digest() + code)
            part.replace(_folder() / f"{name}-{_key()}.o")
    return code


@cache
def _key() -> str:
    """Of everything that machine code depends on: its source, what compiles it and how, and the CPU."""
    sources = (Path(__file__).with_name(name).read_bytes() for name in SOURCES)
    try:
        compilers = [f"{name} {version(name)}" for name in ("numba", "numpy", "llvmlite")]
    except PackageNotFoundError as error:
        raise ImportError("numba is not installed") from error
    settings = (f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("NUMBA_"))
    shaping = [each for each in settings if not each.startswith(BESIDE)]
    machine = llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    facts = (each.encode(errors="surrogateescape") for each in (*compilers, *shaping, *machine))
    return hashlib.sha256(b"\0".join((*sources, *facts))).hexdigest()[:20]


def object_file(kernel: Callable[[Any], None], options: dict[str, Any]) -> bytes:
    """What numba makes of a kernel under its own name, as a file that needs nothing of numba or Python.

    ValueError: it calls what only numba has, such as memory for a new array.
    """
    from numba import cfunc, types

    made = cfunc(types.void(types.CPointer(types.voidptr)), **options)(kernel)
    module = llvm.parse_assembly(made.inspect_llvm())
    module.get_function(made.native_name).name = kernel.__name__
    called = {each.name for each in module.functions if each.is_declaration and not each.name.startswith("llvm.")}
    if foreign := called - NEVER - CALLED:
        raise ValueError(f"{kernel.__name__} calls {', '.join(sorted(foreign))}, which is there within numba alone")
    ends = (f"define void @{name}() {{ call void @llvm.trap() unreachable }}" for name in sorted(called & NEVER))
    module.link_in(llvm.parse_assembly("\n".join(("declare void @llvm.trap()", *ends))))
    code: bytes = _machine().emit_object(module)
    return code


def _load(code: bytes, name: str) -> int:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    found: int = engine.get_function_address(name)
    return found


def _machine() -> Any:
    """This CPU, described to LLVM as numba does it; each engine wants a description of its own."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="default",
        codemodel="jitdefault",
        jit=True,
    )
