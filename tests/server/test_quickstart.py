"""quickstart.py: options, set-up, faults in one line, no process left behind, the job's progress and contact sheet."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from bootstrap import cli, host, job, packages, processes, server
from bootstrap.processes import Problem

ROOT = Path(__file__).resolve().parents[2]

# Runs the command line against the ComfyUI folder argv[1], with this test's Python in the place of `.venv` and all
# that quickstart writes below argv[2].
DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from bootstrap import cli, host, packages, processes, server
comfyui, home = Path(sys.argv[1]), Path(sys.argv[2])
packages.PYTHON = server.PYTHON = sys.executable
packages.make_venv = lambda: None
packages.install = lambda comfyui, *, test: None
packages.HOST = home
packages.STAMP = comfyui / "main.py"
host.FETCHED = server.FETCHED = comfyui
host.fetched = lambda: True
server.BASE, server.LOGS = home / "base", home
cli.OUTPUT = server.OUTPUT = home / "output"
cli.OUTPUT.mkdir(parents=True, exist_ok=True)
sys.exit(cli.main(sys.argv[3:]))
"""

# Prints its options, answers every GET with JSON, starts a process of its own, and does not care about polite signals.
STUBBORN_SERVER = """
import http.server, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(sys.argv, flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"it": "runs"}')
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def fake_comfyui(folder: Path, main: str, version: str = "99.0.0") -> Path:
    folder.mkdir()
    (folder / "main.py").write_text(main)
    (folder / "nodes.py").touch()
    (folder / "requirements.txt").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended after some seconds; a zombie only waits for a parent that asks of it."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    give_up = time.monotonic() + 10
    while (left := list(filter(runs, processes))) and time.monotonic() < give_up:
        time.sleep(0.05)
    return left


def start_driver(comfyui: Path, home: Path, *arguments: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "COMFYUI_DIR"}
    # As in a terminal, also where the tests run under nohup, which quickstart would honour.
    reset = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n" if os.name != "nt" else ""
    command = [sys.executable, "-c", reset + DRIVER.format(root=str(ROOT)), str(comfyui), str(home), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=environment, **pipes)


def quickstart(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "quickstart.py"), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=ROOT)


def one_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if "warning:" not in line]
    assert len(lines) == 1 and lines[0].startswith("quickstart: "), stderr
    return lines[0]


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--length", "80"], "give 77 or 81"),
        (["--length", "0"], "from 1 to 1021"),
        (["--length", "many"], "'many'"),
        (["--seed", "-1"], "from 0 to 18446744073709551615"),
        (["--port", "65536"], "from 1 to 65535"),
        (["--prompt", "  "], "it is empty"),
        (["--gpu", "maybe"], "invalid choice"),
        (["--wat"], "unrecognized arguments: --wat"),
        (["--no-job"], "goes with --serve"),
        (["--test", "--seed", "1"], "leave them out"),
        (["--test", "--serve"], "do not go together"),
    ],
)
def test_wrong_options_end_with_a_message(arguments, says, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.parse_arguments(arguments)
    assert exit_info.value.code == 2
    assert says in capsys.readouterr().err


def test_options():
    options = cli.parse_arguments(["--prompt", "a", "--seed", "0", "--length", "81", "--gpu", "off", "--port", "8190"])
    assert (options.prompt, options.seed, options.length, options.gpu, options.port) == ("a", 0, 81, "off", 8190)
    assert cli.parse_arguments(["--gpu"]).gpu == "on"
    assert cli.parse_arguments([]).gpu == "auto"
    assert cli.parse_arguments(["--test", "-k", "x", "tests/core"]).pytest_arguments == ["-k", "x", "tests/core"]
    assert cli.parse_arguments(["--test", "--", "-x"]).pytest_arguments == ["-x"]


@pytest.mark.parametrize("version", [(2, 7), (3, 9), (3, 15)])
def test_an_unsupported_python_is_told_which_it_needs(version, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / "quickstart.py"), run_name="__main__")
    assert exit_info.value.code == 1
    assert "need 3.10 to 3.14" in one_line(capsys.readouterr().err)


def test_a_python_without_venv_is_told_what_to_do(monkeypatch, capsys):
    """As that of ComfyUI's portable build for Windows."""
    monkeypatch.setitem(sys.modules, "venv", None)
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / "quickstart.py"), run_name="__main__")
    assert exit_info.value.code == 1
    line = one_line(capsys.readouterr().err)
    assert "has no venv" in line and "python.org" in line and "install the pack into your ComfyUI" in line


def test_an_old_python_can_read_the_file_that_tells_it():
    source = (ROOT / "quickstart.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 4))
    assert not any(isinstance(node, (ast.JoinedStr, ast.AnnAssign)) for node in ast.walk(ast.parse(source)))


# ------------------------------------------------------------------------------------------------ faults


def test_a_taken_port_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = quickstart("--serve", "--no-job", "--port", port)
    assert result.returncode == 1
    assert f"port {port} is taken" in one_line(result.stderr)


class ReservedPort(socket.socket):
    def bind(self, address) -> None:
        raise PermissionError(13, "access forbidden")


@pytest.mark.parametrize(("system", "says"), [("nt", "is reserved or taken"), ("posix", "Give one above 1023")])
def test_a_port_that_is_not_given_out_is_one_line(system, says, monkeypatch):
    """On Windows any number may be: Hyper-V and WSL keep ranges for themselves."""
    with monkeypatch.context() as patch:
        patch.setattr(server.socket, "socket", ReservedPort)
        patch.setattr(server.os, "name", system)
        with pytest.raises(Problem) as problem:
            server.require_port(50000)
    assert "port 50000 " in str(problem.value) and says in str(problem.value)


@pytest.mark.parametrize(
    ("system", "built_for", "machine", "kernel", "says"),
    [
        ("win32", "win-arm64", "ARM64", "10.0.26100", "use an x64 Python"),
        ("win32", "win-amd64", "ARM64", "10.0.26100", None),
        ("darwin", "macosx-11.0-universal2", "x86_64", "xnu-11215.1.9~22/RELEASE_ARM64_T6031", "use an arm64 Python"),
        ("darwin", "macosx-11.0-universal2", "x86_64", "xnu-11215.1.9~22/RELEASE_X86_64", "no build for Intel Macs"),
        ("darwin", "macosx-11.0-universal2", "arm64", "xnu-11215.1.9~22/RELEASE_ARM64_T6031", None),
    ],
)
def test_a_machine_without_a_torch_is_told_what_it_needs(system, built_for, machine, kernel, says, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(packages.sys, "platform", system)
        patch.setattr(packages.sysconfig, "get_platform", lambda: built_for)
        for name, value in (("machine", machine), ("version", kernel), ("mac_ver", ("15.0", ("", "", ""), machine))):
            patch.setattr(packages.platform, name, lambda value=value: value)
        try:
            packages.check_machine()
            problem = None
        except Problem as error:
            problem = str(error)
    assert problem is None if says is None else says in problem


def test_a_gpu_that_is_asked_for_must_be_there(monkeypatch):
    monkeypatch.setattr(server.sys, "platform", "linux")
    monkeypatch.setattr(server, "succeeds", lambda command: False)
    with pytest.raises(Problem, match="torch finds no CUDA GPU"):
        server.choose_gpu("on")
    assert server.choose_gpu("off") is False and server.choose_gpu("auto") is False
    monkeypatch.setattr(server.sys, "platform", "win32")
    with pytest.raises(Problem, match="on Windows has no CUDA: use the pack in a ComfyUI of your own"):
        server.choose_gpu("on")


@pytest.mark.parametrize("runs", [True, False])
def test_a_gpu_on_which_no_kernel_runs_is_none(runs, monkeypatch, tmp_path, capsys):
    kernel = "lambda *given, **named: Number()" if runs else "None  # of a build without kernels for an older GPU"
    (tmp_path / "torch.py").write_text(
        "class cuda:\n    is_available = staticmethod(lambda: True)\n"
        "class Number:\n    __add__ = lambda self, other: self\n    item = lambda self: 2.0\n"
        f"ones = {kernel}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "PYTHON", sys.executable)
    monkeypatch.setattr(server.sys, "platform", "linux")
    monkeypatch.setattr(server.os.path, "exists", lambda path: True)
    assert server.choose_gpu("auto") is runs
    if runs:
        assert server.choose_gpu("on") and capsys.readouterr().err == ""
        return
    says = "GPU of AMD or Intel, or one of NVIDIA's that is older than .* use the pack in a ComfyUI of your own.*driver"
    assert re.search(f"warning: torch cannot use this machine's GPU; using the CPU. .*{says}", capsys.readouterr().err)
    with pytest.raises(Problem, match=f"no CUDA GPU that it can use. .*{says}, or leave --gpu out"):
        server.choose_gpu("on")


def test_a_wrong_comfyui_dir_is_one_line(tmp_path):
    result = quickstart("--serve", "--no-job", COMFYUI_DIR=str(tmp_path))
    assert result.returncode == 1
    assert "has no main.py" in one_line(result.stderr)


def test_a_comfyui_too_old_is_told_the_version_it_needs(tmp_path):
    comfyui = fake_comfyui(tmp_path / "old", "", version="0.3.10")
    with pytest.raises(Problem, match=r"is ComfyUI 0\.3\.10; this pack needs \d+\.\d+\.\d+ or newer"):
        host.check_version(comfyui)
    (comfyui / "comfyui_version.py").unlink()
    with pytest.raises(Problem, match="a ComfyUI without a version"):
        host.check_version(comfyui)


def test_a_server_that_dies_is_one_line_with_its_reason(tmp_path):
    comfyui = fake_comfyui(tmp_path / "ComfyUI", "raise ImportError('libsomething is missing')")
    _, errors = (process := start_driver(comfyui, tmp_path / "home", "--serve", "--no-job")).communicate(timeout=60)
    assert process.returncode == 1
    assert "ended with code 1" in one_line(errors) and "ImportError: libsomething is missing" in errors


@pytest.mark.parametrize("asked", [True, False])
def test_two_servers_at_once_share_no_log_temporary_folder_or_database(asked, tmp_path):
    home = tmp_path / "home"
    stays = fake_comfyui(tmp_path / "stays", STUBBORN_SERVER)
    dies = fake_comfyui(tmp_path / "dies", "import sys\nprint(sys.argv)\nraise ImportError('of the second')")
    ports = [["--port", str(server.free_port())] if asked else [] for _ in range(2)]
    first = start_driver(stays, home, "--serve", "--no-job", *ports[0])
    try:
        while "is ready at" not in (line := first.stdout.readline()):
            assert line, first.stderr.read()
        (log,) = home.glob("*.log")
        said = log.read_text()
        _, errors = start_driver(dies, home, "--serve", "--no-job", *ports[1]).communicate(timeout=60)
    finally:
        for one in (*psutil.Process(first.pid).children(recursive=True), first):
            one.kill()
        first.communicate(timeout=60)
    (other,) = set(home.glob("*.log")) - {log}
    assert log.read_text() == said, "the second left it alone"
    assert "ImportError: of the second" in one_line(errors) and errors.rstrip().endswith(f"{other})")
    if asked:
        assert [log.name, other.name] == [f"server-{port}.log" for _, port in ports]
    options = [ast.literal_eval(path.read_text().splitlines()[0]) for path in (log, other)]
    for name, differs in (("--temp-directory", True), ("--database-url", True), ("--user-directory", False)):
        values = [each[each.index(name) + 1] for each in options]
        assert (values[0] != values[1]) == differs, name


@pytest.mark.parametrize("asked", [True, False])
def test_the_log_of_the_run_before_is_kept(asked, tmp_path):
    comfyui = fake_comfyui(tmp_path / "ComfyUI", "import os\nraise ImportError(f'in process {os.getpid()}')")
    port = ["--port", str(server.free_port())] if asked else []
    home = tmp_path / "home"
    said = []
    for _ in range(3):
        _, errors = start_driver(comfyui, home, "--serve", "--no-job", *port).communicate(timeout=60)
        said.append(re.search(r"in process \d+", one_line(errors))[0])
    name = f"server-{port[1]}.log" if asked else "server.log"
    assert sorted(path.name for path in home.glob("*.log*")) == [name, f"{name}.1"]
    assert said[2] in (home / name).read_text() and said[1] in (home / f"{name}.1").read_text()


def test_a_log_that_an_older_server_has_open_is_left_to_it(tmp_path, monkeypatch):
    """On Windows, where one outlives a quickstart that was killed."""

    def busy(source, target) -> None:
        raise PermissionError(13, "Access is denied")

    for name, value in (("LOGS", tmp_path), ("_LOCKS", []), ("replace_file", busy)):
        monkeypatch.setattr(server, name, value)
    (tmp_path / "server.log").write_text("of the older one")
    assert server.claim_log(8189, asked=False) == ("-8189", tmp_path / "server-8189.log")
    assert (tmp_path / "server.log").read_text() == "of the older one"


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(Problem, match="the disk is full: a video needs 1073741824.0 GiB and"):
        packages.require_space(2**60, "a video")
    assert "the disk is full" in str(
        processes.explain("x", "error: write failed: No space left on device (os error 28)")
    )
    comfyui = fake_comfyui(tmp_path / "ComfyUI", "raise OSError(28, 'No space left on device')")
    _, errors = start_driver(comfyui, tmp_path / "home", "--serve", "--no-job").communicate(timeout=60)
    assert "The disk is full" in one_line(errors)


@pytest.mark.parametrize(
    "output",
    [
        "error: Failed to fetch: `x`\n  Caused by: error sending request\n  Caused by: dns error: failed to lookup",
        "WARNING: Retrying: NewConnectionError: Failed to establish a new connection\nERROR: No matching version",
    ],
)
def test_no_network_says_so(output):
    assert "the package registry cannot be reached" in str(processes.explain("Installing", output))


def test_any_other_failure_shows_the_last_error_and_the_log():
    text = str(processes.explain("Installing", "note\nerror: No solution found\n  hint: x"))
    assert "error: No solution found" in text and "setup.log" in text


# ------------------------------------------------------------------------------------------------ set-up


def make_archive(path: Path, members: dict[str, bytes | None], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def test_only_the_wanted_folder_is_extracted(tmp_path):
    archive = make_archive(
        tmp_path / "a.tar.gz",
        {"p-1/v/C/main.py": b"x", "p-1/v/C/sub": None, "p-1/v/C/sub/y.py": b"yy", "p-1/other.py": b"", "../out": b""},
    )
    host.extract_folder(archive, "p-1/v/C", tmp_path / "C")
    found = {str(path.relative_to(tmp_path / "C")) for path in (tmp_path / "C").rglob("*") if path.is_file()}
    assert found == {"main.py", os.path.join("sub", "y.py")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["C", "a.tar.gz"]
    with pytest.raises(Problem, match="holds no p-2"):
        host.extract_folder(archive, "p-2", tmp_path / "D")


@pytest.fixture
def held_files(monkeypatch) -> set:
    """Every file and folder cannot be moved at its first try, as where a scanner has it open; those it was so for."""
    replace, held = os.replace, set()

    def busy(source, target) -> None:
        if source not in held:
            held.add(source)
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, busy)
    return held


def test_the_set_up_waits_for_files_that_a_scanner_has_open(held_files, tmp_path, monkeypatch):
    def download(command, what):
        make_archive(Path(command[-1]) / "a.tar.gz", {f"{host.FOLDER_INSIDE}/main.py": b"new"})
        (archive,) = Path(command[-1]).glob("*.tar.gz")
        monkeypatch.setattr(host, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
        return 0, ""

    for name, value in (("HOST", tmp_path), ("FETCHED", tmp_path / "ComfyUI"), ("find_pip", lambda: ["pip"])):
        monkeypatch.setattr(host, name, value)
    monkeypatch.setattr(host, "run_logged", download)
    fake_comfyui(host.FETCHED, "old")
    host.fetch()
    assert (host.FETCHED / "main.py").read_text() == "new" and host.fetched()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ComfyUI", "ComfyUI.sha256"]
    assert len(held_files) == 3, "the folder of before, the new one and the stamp"


def test_a_file_that_stays_open_elsewhere_is_explained():
    error = PermissionError(13, "Access is denied")
    assert processes.explain_disk(error) == str(error)
    error.winerror = 5
    assert "another program has it, or a file in it, open" in processes.explain_disk(error)
    assert "the disk is full" in processes.explain_disk(OSError(28, "No space left on device"))


def test_on_windows_uv_copies_its_cache(monkeypatch):
    """Its hard links fail in a folder of OneDrive."""
    with monkeypatch.context() as patch:
        patch.setattr(processes.os, "name", "nt")
        assert processes.child_environment()["UV_LINK_MODE"] == "copy"
        patch.setattr(processes.os, "name", "posix")
        patch.delenv("UV_LINK_MODE", raising=False)
        assert "UV_LINK_MODE" not in processes.child_environment()


def test_the_tests_can_be_imported_on_windows():
    """None uses a module or a signal that is not there outside of a function."""
    absent = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
    signals = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}
    found = []

    def look(node: ast.AST, file: Path) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module}
            found.extend((file.name, name) for name in names & absent)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "signal":
            if node.attr.startswith("SIG") and node.attr not in signals:
                found.append((file.name, node.attr))
        inside = [*node.decorator_list, node.args] if isinstance(node, ast.FunctionDef) else ast.iter_child_nodes(node)
        for child in inside:
            look(child, file)

    for file in (ROOT / "tests").rglob("*.py"):
        look(ast.parse(file.read_text(encoding="utf-8")), file)
    assert not found


@pytest.mark.parametrize("name", ["p/C/../../../escape", "p/C/..\\escape", "p/C/c:evil"])
def test_an_archive_cannot_write_outside(name, tmp_path):
    archive = make_archive(tmp_path / "a.tar.gz", {name: b"x"})
    with pytest.raises(Problem, match="refused"):
        host.extract_folder(archive, "p/C", tmp_path / "deep" / "C")
    assert not list(tmp_path.rglob("*escape*"))


def test_an_archive_cannot_bring_links(tmp_path):
    archive = make_archive(tmp_path / "a.tar.gz", {"p/C/a": b""}, links={"p/C/b": "/etc"})
    with pytest.raises(Problem, match="no plain file"):
        host.extract_folder(archive, "p/C", tmp_path / "C")


def test_the_stamp_says_done_only_for_the_same_pins_and_host(tmp_path, monkeypatch):
    comfyui = fake_comfyui(tmp_path / "ComfyUI", "")
    lock, test_lock = tmp_path / "lock.txt", tmp_path / "test-lock.txt"
    lock.write_text("torch==1\n")
    test_lock.write_text("pytest==1\n")
    for name, value in (("LOCK", lock), ("TEST_LOCK", test_lock), ("STAMP", tmp_path / "stamp.json")):
        monkeypatch.setattr(packages, name, value)
    monkeypatch.setattr(packages, "PYTHON", Path(sys.executable))
    assert not packages.installed(comfyui, test=False)
    packages.write_whole(packages.STAMP, json.dumps({"run": packages.stamp_key(comfyui, test=False)}))
    assert packages.installed(comfyui, test=False) and not packages.installed(comfyui, test=True)
    lock.write_bytes(b"torch==1\r\n")
    assert packages.installed(comfyui, test=False), "line ends are no difference"
    (comfyui / "requirements.txt").write_text("av>=99\n")
    assert not packages.installed(comfyui, test=False)
    (comfyui / "requirements.txt").write_text("")
    monkeypatch.setattr(packages, "PYTHON", tmp_path / "gone")
    assert not packages.installed(comfyui, test=False)
    packages.STAMP.write_text("half writ")
    assert packages.read_stamp() == {}


def test_a_half_made_environment_is_made_again_and_a_whole_one_is_kept(held_files, tmp_path, monkeypatch):
    folder = tmp_path / ".venv"
    for name, value in (
        ("VENV", folder),
        ("UNFINISHED", folder / "unfinished"),
        ("HOST", tmp_path),
        ("PYTHON", folder / packages.PYTHON.relative_to(packages.VENV)),
    ):
        monkeypatch.setattr(packages, name, value)
    packages.make_venv()
    assert packages.succeeds([packages.PYTHON, "-c", "import sys; sys.exit(sys.prefix == sys.base_prefix)"])
    (folder / "leftover").touch()
    packages.make_venv()
    assert not (folder / "leftover").exists(), "no install had finished in it"
    packages.UNFINISHED.unlink()
    (folder / "kept").touch()
    packages.make_venv()
    assert (folder / "kept").exists()


@pytest.fixture
def setup_folder(tmp_path, monkeypatch) -> Path:
    """A `.venv` that is whole, for which no package has been installed but by `packages._install`."""
    folder = tmp_path / ".venv"
    folder.mkdir()
    (tmp_path / "lock.txt").write_text("torch==1\n")
    for name, value in (
        ("VENV", folder),
        ("STAMP", folder / "stamp.json"),
        ("UNFINISHED", folder / "unfinished"),
        ("HOST", tmp_path),
        ("PYTHON", Path(sys.executable)),
        ("LOCK", tmp_path / "lock.txt"),
        ("TEST_LOCK", tmp_path / "lock.txt"),
    ):
        monkeypatch.setattr(packages, name, value)
    return folder


@pytest.mark.parametrize("error", [Problem("no network"), OSError(28, "No space left on device")])
def test_an_install_that_fails_leaves_a_whole_environment_in_use(error, setup_folder, tmp_path, monkeypatch):
    comfyui = fake_comfyui(tmp_path / "ComfyUI", "")

    def fail(arguments, what):
        assert packages.UNFINISHED.exists(), "a kill now would leave it half made"
        raise error

    works = lambda arguments, what: None  # noqa: E731
    monkeypatch.setattr(packages, "_install", fail)
    with pytest.raises(type(error)):
        packages.install(comfyui, test=False)
    assert packages.UNFINISHED.exists(), "a first install was never whole"
    monkeypatch.setattr(packages, "_install", works)
    packages.install(comfyui, test=False)
    monkeypatch.setattr(packages, "_install", fail)
    for _ in range(2):
        with pytest.raises(type(error)):
            packages.install(comfyui, test=True)
        assert not packages.UNFINISHED.exists() and packages.installed(comfyui, test=False)
    packages.make_venv()
    assert packages.STAMP.exists(), "the next plain run uses it"
    packages.UNFINISHED.touch()
    with pytest.raises(type(error)):
        packages.install(comfyui, test=True)
    assert packages.UNFINISHED.exists(), "killed before: not whole"


@pytest.mark.skipif(os.name == "nt", reason="makes a script for uv")
def test_without_pip_the_reason_of_uv_is_told(setup_folder, tmp_path, monkeypatch):
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "error: no version of av==99"; exit 2; }\n')
    uv.chmod(0o755)
    monkeypatch.setattr(packages.shutil, "which", lambda name: str(uv))
    monkeypatch.setattr(packages, "find_pip", lambda: None)
    with pytest.raises(Problem, match="what failed: error: no version of av==99"):
        packages._install(["av==99"], "what")


def test_a_half_changed_environment_is_not_taken_for_that_of_another_host(setup_folder, tmp_path, monkeypatch):
    first, second = fake_comfyui(tmp_path / "A", ""), fake_comfyui(tmp_path / "B", "")
    (second / "requirements.txt").write_text("av>=99\n")
    monkeypatch.setattr(packages, "_install", lambda arguments, what: None)
    packages.install(first, test=False)

    def fail_later(arguments, what):
        if "--no-deps" not in arguments:
            raise Problem("no network")

    monkeypatch.setattr(packages, "_install", fail_later)
    with pytest.raises(Problem):
        packages.install(second, test=False)
    assert not packages.UNFINISHED.exists() and not packages.installed(first, test=False)


def test_linking_the_pack(tmp_path):
    nodes = tmp_path / "custom_nodes"
    assert host.link_pack(nodes) == host.PACK_LINK
    assert (nodes / host.PACK_LINK / "pyproject.toml").samefile(ROOT / "pyproject.toml")
    assert host.link_pack(nodes) == host.PACK_LINK and len(list(nodes.iterdir())) == 1
    (nodes / host.PACK_LINK).rename(nodes / "by-hand")
    assert host.link_pack(nodes) == "by-hand", "a pack that is there already is not linked twice"


@pytest.mark.skipif(os.name == "nt", reason="makes a symbolic link, which needs rights on Windows")
def test_a_link_to_another_clone_is_pointed_here_and_a_folder_is_kept(tmp_path):
    nodes, other = tmp_path / "custom_nodes", tmp_path / "other"
    other.mkdir()
    nodes.mkdir()
    (nodes / host.PACK_LINK).symlink_to(other)
    host.link_pack(nodes)
    assert (nodes / host.PACK_LINK).resolve() == ROOT and other.is_dir()
    (nodes / host.PACK_LINK).unlink()
    (nodes / host.PACK_LINK).symlink_to(tmp_path / "gone")
    host.link_pack(nodes)
    assert (nodes / host.PACK_LINK).resolve() == ROOT
    (nodes / host.PACK_LINK).unlink()
    (nodes / host.PACK_LINK).mkdir()
    with pytest.raises(Problem, match="is a folder"):
        host.link_pack(nodes)


def test_the_requirements_are_written_once_and_pin_nothing():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"(.+?)"', re.search(r"^dependencies = \[(.*?)\]", project, re.MULTILINE | re.DOTALL).group(1))
    assert listed == (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert all(re.fullmatch(r"[\w-]+(>=[\d.]+)?", name) for name in listed)


def test_the_pack_says_of_no_kind_of_gpu_that_it_needs_it():
    """ComfyUI-Manager would list it as conflicting on every machine whose GPU it does not name, to the letter."""
    assert "Environment :: GPU" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_lock_pins_everything_and_names_no_registry():
    for path in (packages.LOCK, packages.TEST_LOCK):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert all(re.match(r"[\w.-]+==[\w.]+( ; |$)", line) for line in lines)
    assert "torch==2.11.0" in packages.LOCK.read_text(encoding="utf-8").splitlines()


def test_comfyui_reads_our_metadata(comfyui_dir):
    from comfy_config.config_parser import extract_node_configuration

    config = extract_node_configuration(str(ROOT))
    assert config.project.name == "diagonal-distillation" and "comfyui" not in config.project.name.lower()
    assert config.project.supported_comfyui_version.startswith(">=")
    assert config.project.supported_os == ["OS Independent"]
    assert config.tool_comfy.publisher_id and config.tool_comfy.display_name == "Diagonal Distillation"
    assert config.tool_comfy.web is None, "WEB_DIRECTORY alone names the web folder"
    assert f"git clone {config.project.urls.repository} " in (ROOT / "README.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ no process left


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("signum", ENDINGS)
def test_a_signal_leaves_no_process_behind(signum, tmp_path):
    comfyui = fake_comfyui(tmp_path / "ComfyUI", STUBBORN_SERVER)
    process = start_driver(comfyui, tmp_path / "home", "--serve", "--no-job")
    while "is ready at" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2, "the server and the process that it started"
    process.send_signal(signum)
    time.sleep(0.2)
    process.send_signal(signum)  # an impatient second one changes nothing
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert one_line(errors) == "quickstart: stopped."
    assert not still_running(family)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses Linux's parent-death signal")
def test_the_server_ends_with_quickstart_even_when_that_is_killed(tmp_path):
    comfyui = fake_comfyui(tmp_path / "ComfyUI", STUBBORN_SERVER)
    process = start_driver(comfyui, tmp_path / "home", "--serve", "--no-job")
    while "is ready at" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    started, *rest = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=30)
    assert not still_running([started])
    for child in rest:
        child.kill()  # what the server itself started is beyond the kernel's promise


def test_a_real_server_makes_the_video_and_ends_on_ctrl_c(comfyui_dir, tmp_path):
    words = ["--prompt", "a red circle moves right", "--seed", "3", "--length", "9"]
    process = start_driver(comfyui_dir, tmp_path, "--serve", "--gpu", "off", *words)
    lines = []
    while not (lines and lines[-1].startswith("Contact sheet:")):
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines) + process.stderr.read()
    url = next(line for line in lines if "is ready at" in line).split()[4]
    assert json.load(urllib.request.urlopen(url + "/history")), "it goes on serving"
    family = psutil.Process(process.pid).children(recursive=True)
    if os.name == "nt":  # Ctrl-C would reach the tests too
        for one in (process, *family):
            one.kill()
    else:
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert family and not still_running(family)
    assert any(re.match(r"done · forwards (\d+)/\1 · chunk 1/1 · [\d.]+ frames/s", line) for line in lines)
    (video,) = (tmp_path / "output").glob("*.mp4")
    assert len(job.read_frames(video, 99)[0]) == 9
    assert [path.name for path in (tmp_path / "output").glob("*.png")] == [video.stem + ".png"]


def test_a_word_that_the_demo_does_not_know_is_one_line_and_leaves_nothing(comfyui_dir, tmp_path):
    process = start_driver(comfyui_dir, tmp_path, "--gpu", "off", "--prompt", "a red zebra moves right")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "zebra" in one_line(errors) and "triangle" in errors, "the known words are listed"
    assert not [path for path in (tmp_path / "output").rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------------ the job


def demo_graph() -> dict:
    return {
        "1": {"class_type": "DiagonalDemoLoader", "inputs": {"weights": "student"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle moves right", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 64, "length": 81}},
        "5": {
            "class_type": "DiagonalChunkSampler",
            "inputs": {"positive": ["3", 0], "negative": ["2", 0], "latent": ["4", 0], "seed": 7},
        },
        "6": {"class_type": "SaveVideo", "inputs": {"video": ["5", 0], "filename_prefix": "video/demo"}},
    }


def test_the_options_reach_the_graph():
    graph = demo_graph()
    job.edit_graph(graph, prompt="a green triangle", seed=0, length=33, prefix="demo_1")
    assert graph["3"]["inputs"]["text"] == "a green triangle" and graph["2"]["inputs"]["text"] == ""
    assert graph["5"]["inputs"]["seed"] == 0 and graph["4"]["inputs"]["length"] == 33
    assert graph["6"]["inputs"]["filename_prefix"] == "demo_1"
    untouched = demo_graph()
    job.edit_graph(untouched, prompt=None, seed=None, length=None, prefix="video/demo")
    assert untouched == demo_graph()


def test_the_prompt_goes_through_nodes_between_and_the_name_to_every_file():
    graph = demo_graph()
    graph["7"] = {"class_type": "ConditioningSetArea", "inputs": {"conditioning": ["3", 0], "width": 64}}
    graph["5"]["inputs"] |= {"positive": ["7", 0], "add_noise": True}
    graph["8"] = {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "picture"}}
    job.edit_graph(graph, prompt="a green triangle", seed=None, length=None, prefix="demo_1")
    assert graph["3"]["inputs"]["text"] == "a green triangle"
    assert [graph[node]["inputs"]["filename_prefix"] for node in "68"] == ["demo_1", "demo_1"]
    graph["5"]["inputs"]["seed"] = True  # a switch is no seed
    with pytest.raises(job.JobError, match="--seed: no node"):
        job.edit_graph(graph, prompt=None, seed=1, length=None, prefix="demo_1")


@pytest.mark.parametrize(
    ("gone", "says"), [("3", "--prompt: the workflow has no"), ("4", "--length: no node"), ("6", "saves no file")]
)
def test_a_graph_that_lacks_an_input_is_refused(gone, says):
    graph = demo_graph()
    del graph[gone]
    with pytest.raises(job.JobError, match=says):
        job.edit_graph(graph, prompt="x", seed=1, length=5, prefix="p")


def test_the_progress_line_counts_forwards_chunks_eta_and_speed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: now[0])
    progress = job.Progress({"5"}, frames=81)
    assert progress.line() == "queued"
    progress.event("executing", {"node": "1"})
    assert progress.line() == "preparing"
    progress.event("executing", {"node": "5"})
    progress.event("progress_state", {"nodes": {"5": {"value": 0, "max": 1}}})
    assert progress.line() == "sampling", "before the first forward ComfyUI's total is a placeholder"
    now[0] += 4.0
    progress.event("progress_state", {"nodes": {"5": {"value": 4, "max": 20}, "6": {"value": 1, "max": 9}}})
    assert progress.line() == "sampling · forwards 4/20 · ETA 16 s · 4.0 frames/s"
    progress.event(job.EVENT, {"node": "5", "chunk": 2, "chunks": 7, "forwards": 7, "made": 7, "total": 20})
    assert progress.line() == "sampling · forwards 7/20 · chunk 2/7 · ETA 7 s · 7.1 frames/s"
    progress.event("progress", {"node": "5", "value": 6, "max": 20})
    assert "forwards 7/20" in progress.line(), "a late message does not turn the count back"
    now[0] += 3.0
    progress.event(job.EVENT, {"node": "5", "chunk": 7, "chunks": 7, "forwards": 19, "made": 19, "total": 20})
    progress.event("progress", {"node": "5", "value": 20, "max": 20})
    progress.event("executing", {"node": "6"})
    now[0] += 50.0
    assert progress.line() == "decoding and saving · forwards 20/20 · chunk 7/7 · 11.6 frames/s"


def test_forwards_of_an_earlier_run_do_not_shorten_the_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: now[0])
    progress = job.Progress({"5"}, frames=400)
    progress.event("executing", {"node": "5"})
    now[0] += 4.0
    progress.event(job.EVENT, {"node": "5", "chunk": 46, "chunks": 50, "forwards": 82, "made": 2, "total": 100})
    assert progress.line() == "sampling · forwards 82/100 · chunk 46/50 · ETA 36 s · 2.0 frames/s"


def test_a_run_of_one_forward_has_a_speed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: now[0])
    progress = job.Progress({"5"}, frames=9)
    progress.event("executing", {"node": "5"})
    now[0] += 2.0
    progress.event("progress", {"node": "5", "value": 1, "max": 1})
    assert progress.line() == "sampling · forwards 1/1 · 4.5 frames/s"


def test_the_prompt_is_found_as_in_a_batch():
    graph = demo_graph()
    graph["3"]["inputs"]["text"] = ["9", 0]
    graph["9"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a red circle"}}
    job.edit_graph(graph, prompt="a green triangle", seed=None, length=None, prefix="p")
    assert graph["9"]["inputs"]["value"] == "a green triangle" and graph["3"]["inputs"]["text"] == ["9", 0]
    graph["9"]["inputs"] = {"words": "x"}
    with pytest.raises(job.JobError, match="--prompt: the workflow has no CLIPTextEncode on its sampler's positive"):
        job.edit_graph(graph, prompt="x", seed=None, length=None, prefix="p")
    assert graph["2"]["inputs"]["text"] == ""


def test_forwards_of_several_samplers_add_up_and_each_node_is_timed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: now[0])
    progress = job.Progress({"5", "9"}, frames=81)
    for node, forwards in (("5", 8), ("7", 3), ("9", 4)):
        progress.event("executing", {"node": node})
        now[0] += 2.0
        progress.event("progress", {"node": node, "value": forwards, "max": 8})
    progress.event("executing", {"node": None})
    line = progress.line()
    assert "forwards 12/16" in line and line.endswith("10.1 frames/s"), "12 of 16 forwards in 6 seconds"
    now[0] += 50.0
    progress.event("progress", {"node": "5", "value": 8, "max": 8})
    assert progress.line() == line, "said again when it was long done"
    assert progress.node_seconds == {"5": 2.0, "7": 2.0, "9": 2.0}
    graph = {
        "9": {"class_type": "DiagonalChunkSampler", "inputs": {}, "_meta": {"title": "B"}},
        "5": {"class_type": "DiagonalChunkSampler", "inputs": {}, "_meta": {"title": "A"}},
        "7": {"class_type": "VAEDecode", "inputs": {}},
    }
    assert job.lanes(graph, progress.node_seconds) == ["A: 2.00 s", "B: 2.00 s"]


def test_a_seed_that_feeds_several_samplers_is_set_at_its_source():
    graph = demo_graph()
    graph["9"] = {"class_type": "PrimitiveInt", "inputs": {"value": 3}}
    graph["5"]["inputs"]["seed"] = ["9", 0]
    job.edit_graph(graph, prompt=None, seed=11, length=None, prefix="p")
    assert graph["9"]["inputs"]["value"] == 11 and graph["5"]["inputs"]["seed"] == ["9", 0]


def test_labels_stand_above_a_comparison_and_leave_its_frames(held_files, tmp_path):
    video = write_video(tmp_path / "a.mp4", 5)
    job.add_labels(video, ["one: 1.00 s", "two: 2.00 s"])
    frames, count = job.read_frames(video, 5)
    assert count == 5 and [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    picture = np.asarray(frames[-1][1].convert("L"), np.float32)
    assert picture.shape == (8 * 64 + 22, 512)
    assert picture[:22, :256].min() < 120 and picture[:22, 256:].min() < 120, "a line above each picture"
    assert picture[30:].mean() > 240 and np.asarray(frames[0][1].convert("L"))[30:].mean() < 15


def write_video(path: Path, count: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for k in range(count):
            picture = np.full((64, 64, 3), 255 * k // max(1, count - 1), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("count", [1, 5, 81])
def test_the_contact_sheet_shows_frames_in_order(count, held_files, tmp_path):
    video, sheet = write_video(tmp_path / "a.mp4", count), tmp_path / "a.png"
    job.make_contact_sheet(video, sheet, "a grey fade")
    tiles = min(count, 12)
    picture = np.asarray(Image.open(sheet).convert("L"), np.float32)
    size, rows = 256, -(-tiles // 4)
    assert picture.shape == (16 + rows * (size + 22) + 6, 4 * (size + 6) + 6)
    at = [(16 + 6 + k // 4 * (size + 22) + size // 2, 6 + k % 4 * (size + 6) + size // 2) for k in range(tiles)]
    expected = [255 * frame // max(1, count - 1) for frame in job.pick_frames(count, 12)]
    assert np.allclose([picture[y, x] for y, x in at], expected, atol=6)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.mp4", "a.png"]


def test_frames_are_spread_evenly_first_and_last_included():
    assert job.pick_frames(81, 12)[0] == 0 and job.pick_frames(81, 12)[-1] == 80
    assert np.ptp(np.diff(job.pick_frames(81, 12))) <= 1
    assert job.pick_frames(3, 12) == [0, 1, 2]


def test_only_videos_in_the_output_folder_are_taken(tmp_path):
    video = write_video(tmp_path / "a.mp4", 1)
    item = {"filename": "a.mp4", "subfolder": "", "type": "output"}
    assert job.find_videos({"6": {"images": [item], "animated": [True]}}, tmp_path) == [video]
    for bad in ({**item, "subfolder": ".."}, {**item, "filename": "b.mp4"}, {**item, "type": "temp"}):
        with pytest.raises(job.JobError, match=r"left no \.mp4"):
            job.find_videos({"6": {"images": [bad]}}, tmp_path)
