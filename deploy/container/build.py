"""Builds `parchgrad:cpu` or `parchgrad:gpu`: the bento, then its image, with Docker or else with podman.

    python deploy/container/build.py cpu                  # base image from a registry
    python deploy/container/build.py cpu --debootstrap    # no registry of images: base from Debian's packages; root

The Python that runs this needs the project (`pip install -e '.[export,service]'`): it exports the bundled model's graph
and runs `bentoml build`. Podman gets the packages as wheels, fetched here with this machine's own pip and mounted into
the build: neither an index nor a certificate enters the image. With Docker pip runs in the build.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
BENTOFILES = {"cpu": "bentofile.yaml", "gpu": "bentofile.gpu.yaml"}
PACKED = ("parchgrad", "service", "scenes", "models", "selection_tables", "deploy/container", "README.md")
MODEL = "scenes"  # the one that is bundled
SUITE, SUITE_PYTHON = "bookworm", "3.11"
BASE = f"localhost/parchgrad-base:{SUITE}"
# What the builder stage is given room for: without it, podman asks for more than a container may have.
LIMITS = ("nofile=4096:4096", "nproc=4096:4096")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("variant", choices=BENTOFILES)
    parser.add_argument("--tag", help="of the image; parchgrad:cpu or parchgrad:gpu by default")
    parser.add_argument("--engine", choices=("docker", "podman"), help="by default docker where it runs, else podman")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base", help=f"image with Python {SUITE_PYTHON} to take it from; by default the bentofile's")
    base.add_argument("--debootstrap", action="store_true", help=f"make the base ({BASE}) of Debian's packages")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for podman; what is missing is fetched into it")
    given = parser.parse_args()
    engine = given.engine or available_engine()
    if given.debootstrap and engine != "podman":
        sys.exit("build.py: --debootstrap needs --engine podman")
    tag = given.tag or f"parchgrad:{given.variant}"
    with tempfile.TemporaryDirectory(prefix="parchgrad-build-") as folder:
        scratch = Path(folder)
        if given.debootstrap:
            make_base(scratch)
        bento = build_bento(given.variant, scratch)
        options = [f"build-arg=BASE={BASE if given.debootstrap else given.base}"]
        options = options if given.debootstrap or given.base else []
        if engine == "podman":
            wheels = fetch_wheels(given.variant, given.wheels or scratch / "wheels")
            options += [f"volume={wheels.resolve()}:/wheels:ro", "isolation=chroot", "network=host"]
            options += [f"ulimit={limit}" for limit in LIMITS]
        containerize(bento, engine, tag, options, scratch)
    print_sizes(engine, tag)


def available_engine() -> str:
    """docker where its daemon answers, else podman. Ends the program where there is neither."""
    for name, probe in (("docker", "info"), ("podman", "--version")):
        if shutil.which(name) and subprocess.run([name, probe], capture_output=True, check=False).returncode == 0:
            return name
    sys.exit("build.py: expected a running docker, or podman; found neither")


def build_bento(variant: str, scratch: Path) -> str:
    """`bentoml build` of a copy of what is packed, so that the checkout stays as it is; the bento's tag.

    The CPU's bento has the graph of the bundled model, exported and compared with PyTorch by `parchgrad export`.
    """
    context = scratch / "context"
    unpacked = shutil.ignore_patterns("__pycache__")
    for name in PACKED:
        source = PROJECT_ROOT / name
        if source.is_dir():
            shutil.copytree(source, context / name, ignore=unpacked)
        else:
            shutil.copy(source, context / name)
    shutil.copy(PROJECT_ROOT / BENTOFILES[variant], context)
    if variant == "cpu":
        said(f"Exporting the graph of '{MODEL}'.")
        program = "from parchgrad.cli import main; main()"
        run(sys.executable, "-c", program, "export", MODEL, "--format", "triton", folder=context)
    said(f"bentoml build -f {BENTOFILES[variant]}")
    command = [sys.executable, "-m", "bentoml", "build", "-f", BENTOFILES[variant], "--output", "tag", str(context)]
    answer = run(*command, folder=context, environment=bento_environment(scratch), capture=True)
    found = re.search(r"__tag__:(\S+)", answer)
    if found is None:
        sys.exit(f"build.py: expected '__tag__:NAME:VERSION' of bentoml build, found {answer!r}")
    return found[1]


def bento_environment(scratch: Path) -> dict[str, str]:
    """This process's environment with a store of bentos in `scratch`, and images that can hold a health check."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("PARCHGRAD_", "BENTOML_"))}
    return kept | {"BENTOML_HOME": str(scratch / "bentoml"), "BENTOML_DO_NOT_TRACK": "1", "BUILDAH_FORMAT": "docker"}


def make_base(scratch: Path) -> None:
    """Debian's smallest system with Python, imported as an image. Needs root, debootstrap, and a mirror in apt's lists.

    No container runs at this step and no image is fetched.
    """
    if os.geteuid() or not shutil.which("debootstrap"):
        sys.exit("build.py: --debootstrap needs root and the program debootstrap")
    said(f"debootstrap {SUITE}")
    folder, archive = scratch / "base", scratch / "base.tar"
    command = ["debootstrap", "--variant=minbase", "--include=python3,ca-certificates", SUITE, str(folder), mirror()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"build.py: debootstrap failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    skipped = [f"--exclude=./{name}" for name in ("dev/*", "proc/*", "var/cache/apt/*", "var/lib/apt/lists/*")]
    run("tar", "-C", str(folder), *skipped, "-cf", str(archive), ".")
    shutil.rmtree(folder)
    run("podman", "import", "--quiet", str(archive), BASE)
    archive.unlink()


def mirror() -> str:
    """The first mirror in this machine's own apt lists."""
    lists = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for path in lists:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        found = re.search(r"^(?:URIs:|deb\s+(?:\[[^]]*\]\s+)?)\s*(https?://\S+)", text, re.MULTILINE)
        if found:
            return found[1]
    sys.exit("build.py: expected a mirror of Debian in apt's lists (/etc/apt/sources.list, sources.list.d), found none")


def fetch_wheels(variant: str, folder: Path) -> Path:
    """The wheels of requirements.{variant}.txt and of pip itself, for the base's Python, from wherever pip has them."""
    said(f"Fetching the wheels of requirements.{variant}.txt.")
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if sys.version_info[:2] != tuple(map(int, SUITE_PYTHON.split("."))):
        machine = platform.machine()
        pip += ["--python-version", SUITE_PYTHON, "--implementation", "cp"]
        for minor in range(36, 4, -1):
            pip += ["--platform", f"manylinux_2_{minor}_{machine}"]
        pip += ["--platform", f"manylinux2014_{machine}", "--platform", f"manylinux2010_{machine}"]
    run(*pip, "pip", "--requirement", str(PROJECT_ROOT / "deploy" / "container" / f"requirements.{variant}.txt"))
    return folder


def containerize(bento: str, engine: str, tag: str, options: Sequence[str], scratch: Path) -> None:
    """`bentoml containerize`, its own template in the place of BentoML's.

    BentoML 1.4.39 unpacks a bento in a temporary folder and refuses the template there as "outside of current working
    directory", unless the one is in the other.
    """
    said(f"bentoml containerize --backend {engine} --image-tag {tag}")
    command = [sys.executable, "-m", "bentoml", "containerize", bento, "--backend", engine, "--image-tag", tag]
    command += [part for option in options for part in ("--opt", option)]
    run(*command, folder=scratch, environment=bento_environment(scratch) | {"TMPDIR": str(scratch)})
    if subprocess.run([engine, "image", "inspect", tag], capture_output=True, check=False).returncode:
        sys.exit(f"build.py: bentoml containerize made no image {tag}; its output above says why")


def print_sizes(engine: str, tag: str) -> None:
    """Size of the image and of each of its layers, as the engine counts them."""
    print(f"{tag}: {megabytes(int(run(engine, 'image', 'inspect', '--format', '{{.Size}}', tag, capture=True)))}")
    for size, made_by in layers(engine, tag):
        if size > 10_000:
            print(f"  {megabytes(size):>10}  {made_by.removeprefix('/bin/sh -c #(nop) ')[:90].strip()}")


def layers(engine: str, tag: str) -> Iterator[tuple[int, str]]:
    """Bytes, and the instruction that made them, the last one first."""
    if engine == "podman":
        for layer in json.loads(run(engine, "history", "--format", "json", tag, capture=True)):
            yield layer["size"], layer["CreatedBy"]
        return
    lines = run(
        engine, "history", "--human=false", "--no-trunc", "--format", "{{.Size}}\t{{.CreatedBy}}", tag, capture=True
    )
    for line in lines.splitlines():
        size, _, made_by = line.partition("\t")
        yield int(size), made_by


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def said(text: str) -> None:
    print(f"== {text}", flush=True)


def run(
    *command: str, folder: Path | None = None, environment: dict[str, str] | None = None, capture: bool = False
) -> str:
    """Run to the end; what it printed, where that is captured. Ends the program where the command fails."""
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE if capture else None, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"build.py: {' '.join(command[:4])} ... ended with {done.returncode}\n{done.stdout or ''}")
    return done.stdout or ""


if __name__ == "__main__":
    main()
