"""Imports flow one way, and nothing in the pack runs code from data, reaches out, or changes global state.

Read from the source, so that a rule holds for code that no test runs. Every rule is first shown to bite.
"""

from __future__ import annotations

import ast
import builtins
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("nodes", "model_patches", "diagonal_sampler", "distillation")
# What each may import of the others. __init__ -> nodes -> model_patches -> diagonal_sampler <- distillation.
ARROWS = {
    "__init__": {"nodes"},
    "nodes": {"nodes", "model_patches", "diagonal_sampler"},
    "model_patches": {"model_patches", "diagonal_sampler"},
    "diagonal_sampler": {"diagonal_sampler"},
    "distillation": {"distillation", "diagonal_sampler"},
}
CORE_LIBRARIES = {"torch", "einops", "safetensors"}
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_config",
    "comfy_execution",
    "comfy_extras",
    "comfyui_version",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "server",
    "utils",
}
# The root checks ComfyUI's version; benchmarks measure ours against ComfyUI's own.
KNOW_COMFYUI = ("__init__", "nodes", "model_patches", "benchmarks")
# The pack: what ComfyUI loads. Trainer and command lines may print, and start processes.
PACK = [ROOT / "__init__.py", *(path for name in PACKAGES[:3] for path in sorted((ROOT / name).rglob("*.py")))]
REPOSITORY = [
    *PACK,
    *sorted(ROOT.glob("[!_]*.py")),
    *(path for name in ("distillation", "bootstrap", "benchmarks") for path in sorted((ROOT / name).rglob("*.py"))),
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.Module, module: tuple[str, ...], is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports, also inside functions; relative ones resolved from the repository root."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                base: tuple[str, ...] = tuple((node.module or "").split("."))
            else:
                up = node.level - (1 if is_package else 0)
                assert up <= len(module), f"{'.'.join(module)} imports from above the repository"
                base = module[: len(module) - up] + tuple((node.module or "").split(".") if node.module else ())
            # `from .. import x` names modules; `from .x import y` may.
            yield from (".".join((*base, alias.name)) for alias in node.names)


def imports_of(path: Path) -> list[str]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = parts[:-1] if is_package else parts
    return list(imported(ast.parse(path.read_text(encoding="utf-8")), module, is_package))


# Arrows


@pytest.mark.parametrize(
    ("source", "module", "is_package", "names"),
    [
        ("import comfy.sd", ("nodes", "a"), False, ["comfy.sd"]),
        ("from comfy import sd", ("nodes", "a"), False, ["comfy.sd"]),
        ("from ..diagonal_sampler.cache import KVCache", ("nodes", "a"), False, ["diagonal_sampler.cache.KVCache"]),
        ("from .. import model_patches", ("diagonal_sampler", "a"), False, ["model_patches"]),
        ("from .a import b", ("nodes",), True, ["nodes.a.b"]),
        ("from .nodes import b", (), True, ["nodes.b"]),
        ("def f():\n    from ..nodes import b", ("distillation", "a"), False, ["nodes.b"]),
    ],
)
def test_imports_are_read(source, module, is_package, names):
    assert list(imported(ast.parse(source), module, is_package)) == names


def test_there_is_something_to_check():
    assert {package_of(path) for path in PACK} == {"__init__", *PACKAGES[:3]}
    assert len(REPOSITORY) > len(PACK) + 3


@pytest.mark.parametrize("path", [p for p in REPOSITORY if package_of(p) in ARROWS], ids=name_of)
def test_imports_flow_one_way(path):
    # `nodes` as an absolute name is ComfyUI's: it belongs to the host like `comfy`.
    ours = {name.split(".")[0] for name in imports_of(path)} & set(PACKAGES)
    assert ours <= ARROWS[package_of(path)]


@pytest.mark.parametrize("path", [p for p in REPOSITORY if package_of(p) == "diagonal_sampler"], ids=name_of)
def test_the_core_needs_torch_einops_and_safetensors_only(path):
    tops = {name.split(".")[0] for name in imports_of(path)}
    assert tops <= {"diagonal_sampler"} | CORE_LIBRARIES | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [p for p in REPOSITORY if package_of(p) not in KNOW_COMFYUI], ids=name_of)
def test_only_nodes_and_model_patches_know_comfyui(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & HOST_MODULES


# What a person drags turns widgets into one call: how tensors are computed with is of the packages below.
TENSOR_MATHS = ("torch.nn", "torch.fft", "torch.linalg", "torch.special", "einops", "numpy")


def tensor_maths(tree: ast.Module) -> set[str]:
    """The names of TENSOR_MATHS that a module imports or reaches through `torch`."""
    used = {*imported(tree, ("nodes", "a"), False)}
    used |= {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in TENSOR_MATHS if any(f"{found}.".startswith(f"{name}.") for found in used)}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from torch.nn.functional import interpolate", {"torch.nn"}),
        ("import torch.nn.functional as F", {"torch.nn"}),
        ("import torch\ntorch.nn.functional.pad(x, (1, 1))", {"torch.nn"}),
        ("from torch import linalg", {"torch.linalg"}),
        ("from einops import rearrange", {"einops"}),
        ("import torch\n@torch.inference_mode()\ndef f(x: torch.Tensor): ...", set()),
        ("from .numpy import x", set()),
    ],
)
def test_tensor_maths_is_found(source, found):
    assert tensor_maths(ast.parse(source)) == found


@pytest.mark.parametrize("path", [p for p in REPOSITORY if package_of(p) == "nodes"], ids=name_of)
def test_nodes_leave_tensor_maths_to_the_packages_below(path):
    assert not tensor_maths(ast.parse(path.read_text(encoding="utf-8")))


def test_no_module_imports_itself_through_others():
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    edges: dict[str, set[str]] = {}
    for module, path in files.items():
        names = imports_of(path)
        found = {name for name in names if name in files} | {name.rpartition(".")[0] for name in names} & set(files)
        edges[module] = found - {module}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join((*trail, module))}"
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())


# What code may do

CODE_FROM_DATA = {"eval", "exec", "__import__"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# The exceptions of pickle may be caught.
PICKLE_ERRORS = {"UnpicklingError", "PickleError", "PicklingError"}
# What unpickles a checkpoint's metadata, unless it is given a reader of ours.
CHECKPOINT_READERS = {"FileSystemReader", "_FileSystemReader"}
REACHING_OUT = {"aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "pip", "requests", "socket", "subprocess"}
REACHING_OUT |= {"urllib", "webbrowser"}
# ComfyUI's, which without a client send to every open page.
SENDS = {"send", "send_bytes", "send_image", "send_json", "send_sync", "send_progress_text"}
GLOBAL_STATE = {
    "torch.manual_seed",
    "torch.seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.random.manual_seed",
    "torch.set_default_device",
    "torch.set_default_dtype",
    "torch.set_default_tensor_type",
    "torch.set_grad_enabled",
    "torch.set_rng_state",
    "torch.set_float32_matmul_precision",
    "torch.set_num_threads",
    "torch.use_deterministic_algorithms",
    "random.seed",
    "np.random.seed",
    "numpy.random.seed",
    "os.chdir",
    "os.system",
}
GLOBAL_OBJECTS = ("torch.backends.", "os.environ", "sys.path")


def dotted(node: ast.AST) -> str:
    """`torch.backends.x` of an attribute chain on a name, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return ""


def truth(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


def unsafe(source: str) -> list[str]:
    """What breaks a rule for every file: code from data, unsafe unpickling, an except that catches everything."""
    found = []
    tree = ast.parse(source)
    # An unpickler that decides itself what is made.
    chosen = {
        base
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(isinstance(inner, ast.FunctionDef) and inner.name == "find_class" for inner in node.body)
        for base in node.bases
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            # An except that raises again lost nothing; interrupts must never be swallowed.
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if node.type is None or ("BaseException" in map(dotted, filter(None, caught)) and not raises):
                found.append(f"line {node.lineno}: a bare except")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in UNPICKLERS:
            if {alias.name for alias in node.names} - PICKLE_ERRORS:
                found.append(f"line {node.lineno}: from {node.module}")
        elif isinstance(node, ast.Import):
            unpicklers = {alias.name.split(".")[0] for alias in node.names} & (UNPICKLERS - {"pickle"})
            if unpicklers or any(alias.name == "pickle" and alias.asname for alias in node.names):
                found.append(f"line {node.lineno}: imports an unpickler")
        elif isinstance(node, ast.Attribute) and dotted(node.value) == "pickle" and node.attr not in PICKLE_ERRORS:
            if node not in chosen:
                found.append(f"line {node.lineno}: pickle.{node.attr}")
        elif isinstance(node, ast.Name) and node.id in CODE_FROM_DATA:
            found.append(f"line {node.lineno}: {node.id}")
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name == "compile":  # as a bare word it is a good name for an option, too
                found.append(f"line {node.lineno}: compile")
            if name == "torch.load" and not truth(node, "weights_only"):
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
            if truth(node, "allow_pickle"):
                found.append(f"line {node.lineno}: allow_pickle=True")
            if name.rpartition(".")[2] in CHECKPOINT_READERS:
                found.append(f"line {node.lineno}: {name}")
            reads = name in ("dcp.load", "torch.distributed.checkpoint.load")
            if reads and not any(each.arg == "storage_reader" for each in node.keywords):
                found.append(f"line {node.lineno}: {name} without a storage_reader")
    return found


def unfit_for_the_pack(source: str) -> list[str]:
    """What breaks a rule of the pack alone: printing, reaching out, sending to pages, and global state."""
    found = []
    for node in ast.walk(ast.parse(source)):
        tops: set[str] = set()
        if isinstance(node, ast.Import):
            tops = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            tops = {(node.module or "").split(".")[0]}
        found += [f"line {node.lineno}: imports {top}" for top in sorted(tops & REACHING_OUT)]  # type: ignore[attr-defined]
        if isinstance(node, ast.Name) and node.id == "print":
            found.append(f"line {node.lineno}: print")
        if isinstance(node, ast.Attribute) and node.attr in SENDS:
            found.append(f"line {node.lineno}: sends")
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = dotted(node)
            stored = isinstance(node.ctx, (ast.Store, ast.Del)) and name.startswith(GLOBAL_OBJECTS)
            if name in GLOBAL_STATE or stored:
                found.append(f"line {node.lineno}: {name}")
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if dotted(node.value).startswith(GLOBAL_OBJECTS):
                found.append(f"line {node.lineno}: {dotted(node.value)}[...] =")
        if isinstance(node, ast.Call) and dotted(node.func).startswith(("sys.path.", "os.environ.")):
            if not dotted(node.func).endswith(".get"):
                found.append(f"line {node.lineno}: {dotted(node.func)}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "run = eval",
        "__import__(name)",
        "import pickle\npickle.loads(data)",
        "import pickle\nload = pickle.Unpickler",
        "class Reader(pickle.Unpickler):\n    def persistent_load(self, key): ...",
        "class Reader(pickle.Pickler, Base):\n    pass",
        "dcp.load(tensors, checkpoint_id=path)",
        "dcp.FileSystemReader(path).read_metadata()",
        "import pickle as p",
        "from pickle import load",
        "import dill",
        "import shelve",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept BaseException:\n    pass",
        "try:\n    f()\nexcept (OSError, BaseException):\n    pass",
    ],
)
def test_unsafe_code_is_found(source):
    assert len(unsafe(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.compile(model)",
        "re.compile('x')",
        "if options.compile and compile:\n    pass",
        "torch.load(path, map_location='cpu', weights_only=True)",
        "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    pass",
        "from pickle import UnpicklingError",
        "class Reader(pickle.Unpickler):\n    def find_class(self, module, name): ...",
        "class Reader(dcp.FileSystemReader):\n    pass",
        "dcp.load(tensors, storage_reader=TensorReader(path))",
        "try:\n    f()\nexcept Exception as error:\n    raise ValueError from error",
        "try:\n    f()\nexcept BaseException:\n    g()\n    raise",
    ],
)
def test_safe_code_is_let_through(source):
    assert unsafe(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "print(1)",
        "import subprocess",
        "def f():\n    from urllib.request import urlopen",
        "import requests",
        "torch.manual_seed(0)",
        "random.seed(0)",
        "torch.set_num_threads(1)",
        "torch.backends.cudnn.benchmark = True",
        "os.environ['A'] = '1'",
        "del os.environ['A']",
        "os.environ.setdefault('A', '1')",
        "sys.path.insert(0, here)",
        "sys.path += [here]",
        "os.system('ls')",
        "server.send_sync('event', {}, server.client_id)",
        "PromptServer.instance.send_progress_text('text', '5')",
    ],
)
def test_code_unfit_for_the_pack_is_found(source):
    assert len(unfit_for_the_pack(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "log.info(1)",
        "send('event', {})",
        "generator.manual_seed(0)",
        "os.environ.get('A')",
        "torch.no_grad()",
        "from .http import x",
    ],
)
def test_code_fit_for_the_pack_is_let_through(source):
    assert unfit_for_the_pack(source) == []


@pytest.mark.parametrize("path", REPOSITORY, ids=name_of)
def test_nothing_runs_code_from_data_or_swallows_everything(path):
    assert unsafe(path.read_text(encoding="utf-8")) == []


def test_sources_are_readable_in_the_usual_encoding_of_windows():
    """A rule of `comfy-test lint`: tools there name no encoding. Text in other languages lies in data files."""
    unreadable = []
    for path in [*REPOSITORY, *(ROOT / "tests").rglob("*.py")]:
        try:
            path.read_text(encoding="utf-8").encode("cp1252")
        except UnicodeEncodeError as error:
            unreadable.append(f"{name_of(path)}: {error}")
    assert unreadable == []


# Routes of ComfyUI's own server are aiohttp's; a video is encoded by imageio-ffmpeg's program; one module asks whether
# there is a client.
ALLOWED = {
    "nodes/client.py": "sends",
    "nodes/finishing.py": "imports aiohttp",
    "nodes/live_runs.py": "imports aiohttp",
    "nodes/memory.py": "imports aiohttp",
    "nodes/routes.py": "imports aiohttp",
    "nodes/steering.py": "imports aiohttp",
    "model_patches/video_writer.py": "imports subprocess",
}


@pytest.mark.parametrize("path", PACK, ids=name_of)
def test_the_pack_keeps_to_itself(path):
    found = {line.partition(": ")[2] for line in unfit_for_the_pack(path.read_text(encoding="utf-8"))}
    assert found == ({ALLOWED[name_of(path)]} if name_of(path) in ALLOWED else set())


def test_whoever_answers_the_network_only_answers():
    for name in ALLOWED:
        source = (ROOT / name).read_text(encoding="utf-8")
        assert "ClientSession" not in source and "shell=True" not in source, name


def test_the_builtins_named_here_exist():
    """A typing mistake in a list of forbidden names would forbid nothing."""
    assert all(hasattr(builtins, name) for name in CODE_FROM_DATA)


def test_what_the_registry_publishes_runs_by_itself():
    """`.comfyignore` leaves out what users of the nodes do not need; what stays must not import it."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached"]
    tracked, left_out = (
        set(subprocess.run([*git, *more], capture_output=True, check=True).stdout.decode().split("\0")) - {""}
        for more in ((), ("--ignored", "--exclude-from=.comfyignore"))
    )
    published = tracked - left_out
    gone = {"tests", "bootstrap", "benchmarks", "distillation", ".ci"}
    assert gone == {name.split("/")[0] for name in left_out if "/" in name} - {"docs"}
    wanted = {"__init__.py", "queue_batch.py", "demo/demo_student.safetensors", "workflows/demo.json", "README.md"}
    assert published >= wanted and "quickstart.py" in left_out
    for name in sorted(name for name in published if name.endswith(".py")):
        assert not gone & {imported_name.split(".")[0] for imported_name in imports_of(ROOT / name)}, name
