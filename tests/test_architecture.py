"""The tree is what src/noria/README.md says it is: rooms, what imports what, and which libraries are used where."""

import ast
import re
import subprocess
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "noria"
# From the bottom up; a module imports modules of its own level or below, a folder none of the other folders of its level.
LEVELS = [
    {
        "errors",
        "limits",
        "arrays",
        "model",
        "bundle",
        "pieces",
        "blocks",
        "step",
        "masks",
        "order",
        "batch_copies",
        "borders",
        "streams",
        "communicator",
    },
    {"tools", "kernels", "kinds"},
    {"sampling", "structured", "template_kwargs", "names"},
    {"models", "attention", "encodings", "tiers", "transports", "schedules", "readers"},
    {"config", "job"},
    {"checkpoint", "output", "rows", "plan", "ring"},
    {"engine", "launch", "desk", "report"},
    {"run"},
    {"commands"},
    {"__main__"},
]
# Who may import `config`, beside what lies above them: others take InputError and Sampling from where they stand.
READS_CONFIG = {"plan", "launch", "desk", "run", "commands"}
ALLOWED = {
    "mpi4py": {"launch/mpi.py", "transports/mpi_device.py", "transports/mpi_host.py"},
    "h5py": {"tools/", "checkpoint/", "output/", "readers/hdf5.py"},
    "triton": {
        "kernels/attend.py",
        "kernels/items.py",
        "kernels/experts.py",
        "kernels/mix.py",
        "kernels/routing.py",
        "kernels/stored_",
        "kernels/decode_",
        "kernels/encode_",
        "kernels/norm.py",
        "kernels/rotary.py",
        "kernels/gated.py",
        "kernels/rounded.py",
        "kernels/sampling.py",
        "kernels/products.py",
        "kernels/products_fp8.py",
        "kernels/products_stored.py",
    },  # imported where there is a GPU
    "torch": {
        "streams.py",
        "batch_copies.py",
        "models/",
        "attention/",
        "encodings/",
        "transports/",
        "tiers/",
        "tools/pinned.py",
        "checkpoint/",
        "ring/",
        "engine/",
        "kernels/attend.py",
        "kernels/expert_layer.py",
        "kernels/mix.py",
        "kernels/shared_memory.py",
        "kernels/trying.py",
        "kernels/routing.py",
        "kernels/stored.py",
        "kernels/placed.py",
        "kernels/coded.py",
        "kernels/scoring.py",
        "kernels/decode_",
        "kernels/encode_",
        "kernels/norm.py",
        "kernels/rotary.py",
        "kernels/gated.py",
        "kernels/rounded.py",
        "kernels/drawing.py",
        "kernels/products.py",
        "kernels/products_fp8.py",
        "kernels/products_stored.py",
        "kernels/as_stored.py",
        "kernels/in_order.py",
        "kernels/fp8.py",
        "launch/building.py",
        "launch/choosing.py",
        "launch/cores.py",
        "launch/copies.py",
        "launch/exact.py",
        "launch/few_rows.py",
        "launch/here.py",
        "launch/launcher.py",
        "launch/node.py",
        "launch/probe.py",
    },
}


def imported(path):
    """The dotted names that a file imports; the bare package, which holds the version alone, is none."""
    return {name for _, name in imports(ast.parse(path.read_text()))} - {"noria"}


def modules():
    return sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.name != "__init__.py")


def name_of(path):
    relative = path.relative_to(SOURCE).with_suffix("")
    parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
    return ".".join(("noria", *parts))


def imports(tree):
    """(node, dotted name) of every import; `from noria import x` counts as noria.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node, node.module
            if node.module.startswith("noria"):
                yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def level(module):
    return next((number for number, rooms in enumerate(LEVELS) if room(module) in rooms), None)


def room(module):
    return module.split(".")[1] if "." in module else None


def is_folder(room):
    return (SOURCE / room).is_dir()


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_downward(path):
    own, known = level(name_of(path)), {name_of(module) for module in modules()}
    assert own is not None, f"{path} is in no level: say in this test where it belongs"
    for name in imported(path) & known:
        assert level(name) <= own, f"{name_of(path)} imports {name}, which is above it"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_folders_of_one_level_do_not_import_each_other(path):
    own, known = room(name_of(path)), {name_of(module) for module in modules()}
    for name in imported(path) & known:
        other = room(name)
        beside = other != own and level(name) == level(name_of(path)) and is_folder(other) and is_folder(own)
        assert not beside, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_config_is_read_above_the_rooms_that_need_no_run_file(path):
    reads = "noria.config" in imported(path)
    assert not reads or room(name_of(path)) in READS_CONFIG, f"{name_of(path)} imports noria.config"


def test_no_modules_import_each_other_in_a_circle():
    known = {name_of(path) for path in modules()}
    graph = {
        name_of(path): {name for _, name in imports(ast.parse(path.read_text())) if name in known - {"noria"}}
        - {name_of(path)}
        for path in modules()
    }
    for (
        path
    ) in modules():  # a package's own __init__ is imported with each of its modules, and imports none of them first
        graph[name_of(path)] -= {name_of(path).rpartition(".")[0]}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("library", ALLOWED)
def test_a_library_is_imported_only_where_it_belongs(library):
    for path in modules():
        used = any(name.split(".")[0] == library for _, name in imports(ast.parse(path.read_text())))
        relative = str(path.relative_to(SOURCE))
        assert not used or any(relative.startswith(place) for place in ALLOWED[library]), (
            f"{relative} imports {library}"
        )


def test_imports_stand_at_the_top_of_their_file():
    optional = {
        "launch/mpi.py": {"mpi4py", "libucx"},
        "readers/parquet.py": {"pyarrow"},
        "readers/_zstd.py": {"zstandard"},
        "output/export_tables.py": {"pyarrow"},
        "output/opened.py": {"pandas", "pyarrow"},
        "rows/constraints.py": {"llguidance"},
    }
    for path in modules():
        tree = ast.parse(path.read_text())
        allowed = optional.get(str(path.relative_to(SOURCE)), set())
        hidden = [
            name
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for _, name in imports(function)
            if name.split(".")[0] not in allowed
        ]
        assert not hidden, f"{path} imports {hidden} inside a function"


def test_only_streams_names_a_cuda_stream():
    for path in modules():
        if path.name != "streams.py":
            assert "cuda.Stream(" not in path.read_text() and "current_stream" not in path.read_text(), path


def test_the_levels_in_the_readme_are_those_of_this_test():
    block = re.search(r"```levels\n(.*?)```", (SOURCE / "README.md").read_text(), re.DOTALL)
    assert block, "src/noria/README.md has no levels (a ```levels block)"
    told = [set(re.split(r"\s{2,}", line)[0].split()) for line in block[1].splitlines()]
    assert told == LEVELS


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    block = re.search(r"```text\n(noria/\n.*?)```", (SOURCE / "README.md").read_text(), re.DOTALL)
    assert block, "src/noria/README.md has no annotated tree (a ```text block that begins with noria/)"
    told, folders = set(), []
    for line in block[1].splitlines()[1:]:
        indent, entry = re.match(r"( *)(\S+)", line).groups()
        depth = len(indent) // 2 - 1
        folders = [*folders[:depth], entry]
        told.add("".join(folders))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    on_disk = {file for file in tracked if not file.endswith("__init__.py") and not file.startswith(".")}
    shown = {entry for entry in told if not entry.endswith("/")}
    collapsed = tuple(
        entry for entry in told if entry.endswith("/") and not any(e != entry and e.startswith(entry) for e in told)
    )
    missing = {file for file in on_disk - shown if not file.startswith(collapsed)}
    assert not missing and not shown - on_disk, (
        f"not in src/noria/README.md: {sorted(missing)}; not on disk: {sorted(shown - on_disk)}"
    )
    assert all(any(file.startswith(entry) for file in on_disk) for entry in told if entry.endswith("/"))


# What the tests that follow let pass, to be emptied: a line goes when its reason does.
TWINS: set[str] = set()
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
MANY_ARGUMENTS: set[str] = set()


def definitions(kind):
    """(file, node) of every definition of this kind of node."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kind):
                yield str(path.relative_to(SOURCE)), node


def compare(found, known, what):
    found = set(found)
    new, gone = sorted(found - known), sorted(known - found)
    assert not new, f"{what}: {new}"
    assert not gone, f"take these out of the list above, they are no more so: {gone}"


def test_no_two_classes_have_one_name():
    files = defaultdict(set)
    for file, node in definitions(ast.ClassDef):
        files[node.name.lstrip("_")].add(file)
    compare((name for name, where in files.items() if len(where) > 1), TWINS, "two classes of one name")


def test_no_file_has_more_than_300_lines():
    lines = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in modules()}
    compare((file for file, count in lines.items() if count > 300), LONG_FILES, "more than 300 lines")


def test_no_function_has_more_than_50_lines():
    long = (
        f"{file}: {node.name}"
        for file, node in definitions(ast.FunctionDef)
        if node.end_lineno - node.lineno >= 50  # the line of its name and its last one count
    )
    compare(long, LONG_FUNCTIONS, "more than 50 lines")


def test_no_function_has_more_than_seven_arguments():
    def arguments(node):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return [one for one in given if one.arg not in ("self", "cls")]

    def is_kernel(node):  # of Triton: each tensor, number and size is an argument of its own
        return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)

    functions = (found for found in definitions(ast.FunctionDef) if not is_kernel(found[1]))
    many = (f"{file}: {node.name}" for file, node in functions if len(arguments(node)) > 7)
    compare(many, MANY_ARGUMENTS, "more than seven arguments")
