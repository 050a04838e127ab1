"""Compiles `cpu_kernels.c` with the machine's C compiler, once for each kind of processor, and finds it again.

python -m services.worker.engine.kernels.compile DIRECTORY    # all kinds, for an image without a compiler
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu_kernels.c")
COMPILER = "cc"
# Without errno and traps a loop may be vectorised; nothing here lets the compiler change the order of sums.
OPTIONS = ("-std=gnu11", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
KINDS = {
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3",),
    "DEFAULT": (),
}
"""Compiler options by what `torch.backends.cpu.get_cpu_capability()` says; others are compiled for the machine."""


class NoCompilerError(Exception):
    """There is no compiled library for this machine and no C compiler to make one."""


def library_name(kind: str) -> str:
    """Return the file's name: it changes with the source and with the options."""
    options = KINDS.get(kind, ("-march=native",))
    content = SOURCE.read_bytes() + " ".join((*OPTIONS, *options)).encode()
    return f"cpu_kernels-{kind.lower()}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def find_library(kind: str) -> Path:
    """Return the library for this kind of processor, compiled now if nobody did before; raises NoCompilerError."""
    for directory in _directories():
        if (directory / library_name(kind)).exists():
            return directory / library_name(kind)
    return compile_kernels(kind, _directories()[-1])


def compile_kernels(kind: str, directory: Path) -> Path:
    """Compile into `directory` and return the library's path; several processes may do so at once."""
    if shutil.which(COMPILER) is None:
        raise NoCompilerError(f"there is no C compiler ({COMPILER})")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / library_name(kind)
    with tempfile.NamedTemporaryFile(dir=directory, suffix=".so", delete=False) as file:
        partial = Path(file.name)
    try:
        # GNU's OpenMP is left unlinked on purpose: torch has brought its own, and a second one would mean a second
        # pool of threads on the same cores.
        options = KINDS.get(kind, ("-march=native",))
        object_file = partial.with_suffix(".o")
        subprocess.run([COMPILER, *OPTIONS, *options, "-c", SOURCE, "-o", object_file], check=True, capture_output=True)
        subprocess.run([COMPILER, "-shared", object_file, "-o", partial, "-lm"], check=True, capture_output=True)
        object_file.unlink()
        partial.chmod(0o755)  # other accounts load it too
        partial.replace(path)
    except subprocess.CalledProcessError as error:
        partial.unlink(missing_ok=True)
        raise NoCompilerError(f"{COMPILER} failed: {error.stderr.decode(errors='replace')[:2000]}") from error
    return path


def _directories() -> list[Path]:
    """Where libraries are looked for; the last is where they are written."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    shipped = os.environ.get("LAMPLIGHTER_KERNELS")
    return [*([Path(shipped)] if shipped else []), Path(cache) / "lamplighter" / "kernels"]


if __name__ == "__main__":
    for each in KINDS:
        print(compile_kernels(each, Path(sys.argv[1])))
