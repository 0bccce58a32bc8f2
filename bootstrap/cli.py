"""The options of quickstart.py and the order of its steps."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from batch_jobs import MAX_SEED
from diagonal_sampler.disk import remove_file
from diagonal_sampler.frames import TIME_FACTOR

from . import OUTPUT, ROOT, host, packages, server
from .processes import CHILDREN, STATUS, Interrupted, Problem, explain_disk, runtime_environment, shorten

WORKFLOW = ROOT / "workflows" / "api" / "demo.json"
COMPARISON = ROOT / "workflows" / "api" / "compare.json"
MAX_LENGTH = 1021  # the last 4*n + 1 below Empty AR Video Latent's limit of 1024 frames
LOST_CONNECTION = 3  # bootstrap/job.py's exit code; this Python cannot import that file
JOB_BYTES = 200 * 2**20  # room for a video, its contact sheet and ComfyUI's temporary files


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; a wrong one ends the process with code 2 and a message."""
    parser = argparse.ArgumentParser(
        prog="quickstart.py",
        description="Set up ComfyUI with this pack and make the demo video. The first run downloads about 3 GB.",
        epilog="Results: output/*.mp4, each with a contact sheet beside it. COMFYUI_DIR=FOLDER uses an existing "
        "ComfyUI, in which nothing is written but a link in its custom_nodes.",
    )
    parser.add_argument("--prompt", type=_prompt, help="what the video shows (default: the workflow's)")
    parser.add_argument("--seed", type=_seed, help="seed of the noise, 0 to 2^64-1 (default: the workflow's)")
    parser.add_argument("--length", type=_length, help="pixel frames, 4*n+1 (default: the workflow's)")
    parser.add_argument(
        "--compare", action="store_true", help="teacher, uniform and diagonal side by side with their times"
    )
    gpu = "auto uses a GPU where torch finds one (default); on insists; off uses the CPU"
    parser.add_argument("--gpu", choices=("auto", "on", "off"), default="auto", nargs="?", const="on", help=gpu)
    parser.add_argument("--port", type=_port, help="the server's port on loopback (default: a free one)")
    parser.add_argument("--serve", action="store_true", help="keep the server running after the video, until Ctrl-C")
    parser.add_argument("--no-job", action="store_true", help="with --serve: make no video")
    parser.add_argument("--test", action="store_true", help="run all tests instead; further arguments go to pytest")
    options, rest = parser.parse_known_args(argv)
    if rest and not options.test:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.no_job and not options.serve:
        parser.error("--no-job goes with --serve")
    job_options = (options.prompt, options.seed, options.length)
    if (options.test or options.no_job) and job_options != (None, None, None):
        parser.error("--prompt, --seed and --length are for a video; leave them out with --test and --no-job")
    if options.compare and (options.test or options.no_job):
        parser.error("--compare makes a video; leave it out with --test and --no-job")
    if options.test and options.serve:
        parser.error("--test and --serve do not go together")
    options.pytest_arguments = [argument for argument in rest if argument != "--"]
    return options


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; say what the video shows")
    return text


def _whole(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"it is {text!r}; give a whole number from {low} to {high}")
    return value


def _seed(text: str) -> int:
    return _whole(text, 0, MAX_SEED)


def _port(text: str) -> int:
    return _whole(text, 1, 65535)


def _length(text: str) -> int:
    frames = _whole(text, 1, MAX_LENGTH)
    low = frames - (frames - 1) % TIME_FACTOR
    if frames != low:
        rule = f"the model makes 4*n+1 frames, so give {low} or {low + TIME_FACTOR}"
        raise argparse.ArgumentTypeError(f"it is {frames} pixel frames; {rule}")
    return frames


def require_demo() -> None:
    """Raise Problem where the demo's files are not in this clone."""
    for workflow in (WORKFLOW, COMPARISON):
        if not workflow.is_file():
            raise Problem(f"this clone has no {shorten(workflow)}: it is not whole. Clone the repository again.")
    if not list((ROOT / "demo").glob("*.safetensors")):
        raise Problem("this clone has no demo/*.safetensors, the demo model. Clone the repository again.")


def run_job(comfy: server.Server, options: argparse.Namespace) -> None:
    """Make the video through the running server. Where that fails, nothing half written stays in `output`."""
    packages.require_space(JOB_BYTES, "a video", OUTPUT)
    prefix = time.strftime(f"{'compare' if options.compare else 'demo'}_%Y%m%d-%H%M%S")
    workflow = COMPARISON if options.compare else WORKFLOW
    command = [packages.PYTHON, "-m", "bootstrap.job", "--url", comfy.url, "--workflow", workflow]
    command += ["--output", OUTPUT, "--prefix", prefix, *(["--compare"] if options.compare else [])]
    for name in ("prompt", "seed", "length"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}={value}"]
    before = set(OUTPUT.glob(f"{prefix}*"))
    done = False
    try:
        job = CHILDREN.start(command, stdin=subprocess.DEVNULL, cwd=ROOT, env=runtime_environment())
        while job.poll() is None:
            comfy.require_alive()
            time.sleep(0.1)
        CHILDREN.stop(job)
        if job.returncode == LOST_CONNECTION:
            time.sleep(1.0)  # a dying server closes its connections first
            comfy.require_alive()
            raise Problem(f"the connection to ComfyUI was lost. {comfy.log_end()}")
        if job.returncode < 0:
            raise Problem(f"the process that follows the run was ended by signal {-job.returncode}.")
        if job.returncode != 0:
            raise Problem("", job.returncode)  # the job has said why
        done = True
    finally:
        if not done:
            CHILDREN.stop_all()  # none may go on writing what is deleted next
            _delete(set(OUTPUT.glob(f"{prefix}*")) - before)
    # Only now: who reads this line and stops the server at once keeps the files.
    for path in sorted(set(OUTPUT.glob(f"{prefix}*")) - before):
        STATUS.step(f"{'Video' if path.suffix == '.mp4' else 'Contact sheet'}: {shorten(path)}")


def _delete(paths: set[Path]) -> None:
    for path in paths:
        remove_file(path)


def run_tests(comfyui: Path, arguments: list[str]) -> int:
    """Run pytest over tests/ in `.venv` and return its exit code."""
    command = [packages.PYTHON, "-m", "pytest", *arguments]
    process = CHILDREN.start(command, cwd=ROOT, env=runtime_environment(COMFYUI_DIR=str(comfyui)))
    while process.poll() is None:
        time.sleep(0.2)
    CHILDREN.stop(process)
    return process.returncode


def run(options: argparse.Namespace) -> int:
    """Do what the options ask and return the exit code."""
    makes_video = not (options.test or options.no_job)
    packages.check_machine()
    if makes_video:
        require_demo()
    if options.port is not None:
        server.require_port(options.port)  # before the minutes of a first set-up
    comfyui = host.find_host()
    with packages.setup_lock():
        if not packages.STAMP.exists():
            packages.require_space(packages.INSTALL_BYTES, "the installation")
        packages.make_venv()
        if comfyui == host.FETCHED and not host.fetched():
            host.fetch()
        host.check_version(comfyui)
        packages.install(comfyui, test=options.test)
    tools = packages.missing_build_tools()
    if tools is not None:
        print(f"quickstart: warning: {tools}: torch.compile cannot work here.", file=sys.stderr)
    if options.test:
        return run_tests(comfyui, options.pytest_arguments)
    comfy = server.start(comfyui, port=options.port, gpu=server.choose_gpu(options.gpu))
    if options.serve:
        STATUS.step(f"ComfyUI is ready at {comfy.url} (Ctrl-C ends it)")
    if makes_video:
        run_job(comfy, options)
    while options.serve:
        comfy.require_alive()
        time.sleep(0.2)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run and return the exit code; no process that was started is left behind."""
    options = parse_arguments(argv)
    # SIGINT even where a shell had it ignored for what runs in the background; SIGHUP not under nohup.
    endings = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        endings.append(signal.SIGHUP)

    def interrupt(signum, frame):
        raise Interrupted(signum)

    for signum in endings:
        signal.signal(signum, interrupt)
    code, message = 1, ""
    try:
        code = run(options)
    except Problem as problem:
        code, message = problem.code, str(problem)
    except Interrupted as stop:
        code, message = 128 + stop.signum, "stopped."
    except OSError as error:
        message = explain_disk(error)
    finally:
        for signum in endings:
            signal.signal(signum, signal.SIG_IGN)  # a second Ctrl-C may not leave half of them running
        CHILDREN.stop_all()
        STATUS.clear()
    if message:
        print(f"quickstart: {message}", file=sys.stderr, flush=True)
    return code
