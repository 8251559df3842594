#!/usr/bin/env python3
"""Runs in the builder stage of the image: what of the base image, the packages and the bento goes into the image.

    assemble.py packages   /app/venv: requirements.txt from /wheels where that is mounted, else from pip's index
    assemble.py system     /build/system: Python's library, the shared libraries that it and the packages link to
    assemble.py bento      /build/bento: without what the installed packages cannot run; byte code

Needs the base's Python and, for lists of packages, dpkg where the base has it. Written for nothing but its standard
library, as nothing else is installed yet.
"""

import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from py_compile import PycInvalidationMode

BUILD, VENV, WHEELS = Path("/build"), Path("/app/venv"), Path("/wheels")
SYSTEM, BENTO = BUILD / "system", BUILD / "bento"
OWNER = 10001

# Of the packages: their own tests, headers and stubs. None of it is imported by the service.
UNUSED_FOLDERS = ("tests", "test", "include")
UNUSED_FILES = ("*.pyi", "*.pxd", "*.pyx", "*.a", "*.h", "*.c", "*.f90")
KEPT = ("numpy/_core/tests/_natype.py",)  # numpy.testing imports it
# Of Python's library: programs, and what only they use.
UNUSED_LIBRARY = (
    "__pycache__", "config-*", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "sitecustomize.py", "test", "tkinter", "turtledemo", "_curses*.so", "_dbm.*.so", "_gdbm.*.so", "_tkinter.*.so",
    "nis.*.so", "readline.*.so",
)  # fmt: skip
SHOWN_FOLDERS = ("samples", "exemplars")

# What starts the service, and what its worker imports later, when it loads a model, answers or draws.
LOADED = [
    "_bentoml_impl.server.serving",
    "_bentoml_impl.worker.service",
    "bentoml_cli.cli",
    "httptools",
    "service.service",
]
LOADED += ["parchgrad.render", "service.protocols.grpc_calls", "uvicorn.protocols.http.httptools_impl", "uvloop"]
ALWAYS = ("libgcc_s.so.1",)  # glibc opens it by name where a thread ends


def packages() -> None:
    """Install the pinned requirements into a virtual environment without pip, and take out what nobody imports."""
    run(Path(sys.executable).resolve(), "-m", "venv", "--without-pip", VENV)
    source = ["--no-index", "--find-links", str(WHEELS)] if WHEELS.is_dir() else []
    run(*pip(), "--python", VENV / "bin" / "python", "install", "--no-cache-dir", "--only-binary=:all:",
        "--no-compile", *source, "--requirement", BUILD / "requirements.txt")  # fmt: skip
    run(*pip(), "--python", VENV / "bin" / "python", "check")
    site = site_packages()
    for folder in sorted(site.rglob("*")):
        if folder.is_dir() and folder.name in UNUSED_FOLDERS:
            kept = {path: (site / path).read_bytes() for path in KEPT if (site / path).is_relative_to(folder)}
            shutil.rmtree(folder)
            for path, content in kept.items():
                (site / path).parent.mkdir(parents=True)
                (site / path).write_bytes(content)
    for pattern in UNUSED_FILES:
        for file in site.rglob(pattern):
            file.unlink()
    for program in (VENV / "bin").iterdir():
        if not program.name.startswith("python"):
            program.unlink()
    shutil.rmtree(VENV / "include", ignore_errors=True)


def system() -> None:
    """A root file system with Python and what it needs; nothing else of the base is in it."""
    library = Path(sysconfig.get_path("stdlib"))
    python = Path(sys.executable).resolve()
    taken = [copied(python)]
    shutil.copytree(library, SYSTEM / library.relative_to("/"), ignore=shutil.ignore_patterns(*UNUSED_LIBRARY))
    for alias in ("lib", "lib64", "bin"):
        (SYSTEM / "usr" / alias).mkdir(parents=True, exist_ok=True)
        (SYSTEM / alias).symlink_to(f"usr/{alias}")
    wanted = [
        python,
        *(SYSTEM / library.relative_to("/") / "lib-dynload").glob("*.so"),
        *site_packages().rglob("*.so*"),
    ]
    taken += [copied(path) for path in linked(wanted)]
    taken += [copied(path) for path in map(Path, ("/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/openssl.cnf",
              "/etc/os-release", "/etc/ld.so.conf")) if path.exists()]  # fmt: skip
    if Path("/etc/ld.so.conf.d").is_dir():
        shutil.copytree("/etc/ld.so.conf.d", SYSTEM / "etc/ld.so.conf.d")
    run("ldconfig", "-r", SYSTEM)
    shutil.rmtree(SYSTEM / "var/cache", ignore_errors=True)
    (SYSTEM / "etc/passwd").write_text(f"root:x:0:0:root:/:/none\nparchgrad:x:{OWNER}:{OWNER}::/tmp:/none\n")
    (SYSTEM / "etc/group").write_text(f"root:x:0:\nparchgrad:x:{OWNER}:\n")
    (SYSTEM / "etc/nsswitch.conf").write_text("hosts: files dns\n")
    for name in ("app", "data", "dev", "proc", "sys", "run", "tmp"):
        (SYSTEM / name).mkdir()
    (SYSTEM / "tmp").chmod(0o1777)
    list_packages([library / "os.py", *taken])


def bento() -> None:
    """Without torch a model package and its table run nowhere, only exported graphs do; what the page shows beside
    them, sample pictures and class graphs, stays."""
    source = BENTO / "src"
    has_torch = (site_packages() / "torch").is_dir()
    if not has_torch:
        shutil.rmtree(source / "scenes", ignore_errors=True)
        for path in (*source.glob("models/**/*"), *source.glob("selection_tables/**/*")):
            if path.is_file() and not (path.parent.name in SHOWN_FOLDERS or path.name.startswith("class_graph.")):
                path.unlink()
    for path in (BENTO, *BENTO.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    byte_code([*loaded(source, [*LOADED, "service.torch_engine" if has_torch else "service.onnx_engine"]),
               *source.rglob("*.py")])  # fmt: skip


def loaded(source: Path, modules: list[str]) -> list[Path]:
    """The files, of the packages and of Python's library, that importing `modules` reads."""
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "print(*(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)), sep='\\n')"
    command = [str(VENV / "bin" / "python"), "-B", "-c", code, *modules]
    environment = {"BENTOML_HOME": str(BUILD / "home"), "BENTOML_DO_NOT_TRACK": "true", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=source, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    files = {Path(line) for line in done.stdout.splitlines() if line.endswith(".py")}
    return sorted(path if path.is_relative_to(VENV) else SYSTEM / path.relative_to("/") for path in files)


def pip() -> list[str]:
    """The base's pip, or the wheel of one beside the other wheels: a zip file that Python runs."""
    wheels = sorted(WHEELS.glob("pip-*.whl"))
    if wheels:
        return [sys.executable, f"{wheels[-1]}/pip"]
    if find_spec("pip") is None:
        sys.exit(f"assemble: no pip: expected one in the base image, or a pip-*.whl in {WHEELS}")
    return [sys.executable, "-m", "pip"]


def site_packages() -> Path:
    (folder,) = (VENV / "lib").glob("python3.*/site-packages")
    return folder


def linked(files: list[Path]) -> list[Path]:
    """Shared libraries outside the virtual environment that `files` link to, and theirs."""
    found = {Path(path) for name in ALWAYS for path in search(name)}
    texts = [str(path) for path in [*files, *found]]
    for start in range(0, len(texts), 100):
        answer = subprocess.run(["ldd", *texts[start : start + 100]], capture_output=True, text=True, check=False)
        found |= {Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", answer.stdout, re.MULTILINE)}
    return sorted(path for path in found if not path.is_relative_to(VENV))


def search(name: str) -> list[str]:
    """Where the dynamic linker finds a library."""
    listing = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    return re.findall(rf"^\s+{re.escape(name)} .*=> (\S+)$", listing, re.MULTILINE)


def copied(path: Path) -> Path:
    """Copy a file of the base to where its folder really is, under its own name; `path` as it is there."""
    target = path.parent.resolve() / path.name
    (SYSTEM / target.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, SYSTEM / target.relative_to("/"))
    return path


def list_packages(files: list[Path]) -> None:
    """What a scanner reads, as in the distroless images: the packages of the base that files are of; their licences."""
    if not shutil.which("dpkg"):
        return
    names = set()
    for path in files:
        real = path.resolve()
        for spelling in {path, real, Path("/") / real.relative_to("/usr") if real.is_relative_to("/usr") else real}:
            owner = subprocess.run(["dpkg", "-S", spelling], capture_output=True, text=True, check=False).stdout
            names |= set(re.findall(r"^([a-z0-9.+-]+)(?::[a-z0-9]+)?: ", owner, re.MULTILINE))
    for name in sorted(names):
        entry = subprocess.run(["dpkg-query", "--status", name], capture_output=True, text=True, check=True).stdout
        (SYSTEM / "var/lib/dpkg/status.d").mkdir(parents=True, exist_ok=True)
        (SYSTEM / "var/lib/dpkg/status.d" / name).write_text(entry)
        terms = Path("/usr/share/doc") / name / "copyright"
        if terms.exists():
            copied(terms)


def byte_code(files: list[Path]) -> None:
    """Byte code that is taken without a look at the source: both are of one image, which is read-only.

    Only of what is loaded at start: of every module it would take some 60 MB, most of it never read.
    """
    for path in files:
        if not path.is_file():
            continue
        root = next((root for root in (SYSTEM, BUILD) if path.is_relative_to(root)), None)
        there = path if root is None else Path("/app" if root == BUILD else "/") / path.relative_to(root)
        py_compile.compile(
            str(path), dfile=str(there), doraise=True, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH
        )


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    {"packages": packages, "system": system, "bento": bento}[sys.argv[1]]()
