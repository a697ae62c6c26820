"""The build's choices and sentences, and the library's promises: stable ABI alone, nothing heavy imported."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pytest

import ulmfit_fast

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.cpu_only("the build"),
]


@pytest.fixture
def build_plan(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    for name in ("ULMFIT_FAST_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.setenv(name, "")  # so that what a plan sets is undone after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    import build_plan

    return build_plan


def torch_like(version="2.11.0", cuda=None, cards=()):
    namespace = types.SimpleNamespace
    visible = namespace(device_count=lambda: len(cards), get_device_capability=lambda i: cards[i])
    return namespace(__version__=version, version=namespace(cuda=cuda), cuda=visible)


@pytest.fixture
def tree(tmp_path):
    """A source tree with one file of each kind."""
    names = (
        "library.cpp",
        "kernels_module.cpp",
        "cpu/a.cpp",
        "cuda/a.cpp",
        "kernels/cpu/a.cpp",
        "kernels/cuda/a.cu",
    )
    for name in names:
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    return str(tmp_path)


def with_nvcc(monkeypatch, build_plan, release):
    monkeypatch.setattr(build_plan, "find_nvcc", lambda: "nvcc")
    says = f"Cuda compilation tools, release {release}, V{release}.88"
    monkeypatch.setattr(build_plan, "output", lambda *command, cwd=None: says)


def test_every_source_is_compiled_and_cuda_ones_only_for_cuda(build_plan, tree):
    cpu = ["csrc/cpu/a.cpp", "csrc/kernels/cpu/a.cpp", "csrc/library.cpp"]
    assert build_plan.find_sources(tree, cuda=False) == cpu
    assert build_plan.find_sources(tree, cuda=True) == sorted(
        [*cpu, "csrc/cuda/a.cpp", "csrc/kernels/cuda/a.cu"]
    )


@pytest.mark.parametrize(
    "torch, wish, nvcc, expected",
    [
        (torch_like(cuda="13.0"), "", "13.0", ("13.0", "13.0 for 8.0;9.0+PTX")),
        (torch_like(cuda="13.0", cards=[(9, 0)]), "1", "13.0", ("13.0", "13.0 for 9.0+PTX")),
        (torch_like(cuda="13.0"), "", "13.1", ("13.1", "13.1 for 8.0;9.0+PTX, warning: torch has CUDA 13.0")),
        (torch_like(cuda="13.0"), "0", "13.0", ("", "no (ULMFIT_FAST_CUDA=0)")),
        (torch_like(cuda=None), "", "13.0", ("", "no (torch 2.11.0 is a CPU build)")),
        (torch_like(cuda="13.0"), "", None, ("", "no (no nvcc: set CUDA_HOME to the CUDA toolkit)")),
    ],
)
def test_cuda_is_built_where_it_can_be(build_plan, monkeypatch, tree, torch, wish, nvcc, expected):
    if nvcc:
        with_nvcc(monkeypatch, build_plan, nvcc)
    else:
        monkeypatch.setattr(build_plan, "find_nvcc", lambda: None)
    monkeypatch.setenv("ULMFIT_FAST_CUDA", wish)
    assert build_plan.plan_cuda(tree, torch) == expected


@pytest.mark.parametrize(
    "torch, wish, message",
    [
        (torch_like(cuda="13.0"), "", "nvcc is CUDA 12.8 but torch 2.11.0 was built with CUDA 13.0: set"),
        (torch_like(cuda=None), "1", "CUDA code cannot be built: torch 2.11.0 is a CPU build"),
        (torch_like(cuda="13.0"), "yes", "ULMFIT_FAST_CUDA=yes is neither"),
    ],
)
def test_what_cannot_be_built_stops_with_a_sentence(build_plan, monkeypatch, tree, torch, wish, message):
    with_nvcc(monkeypatch, build_plan, "12.8")
    monkeypatch.setenv("ULMFIT_FAST_CUDA", wish)
    with pytest.raises(SystemExit, match=message):
        build_plan.plan_cuda(tree, torch)


def test_no_cuda_sources_is_said(build_plan, tree):
    shutil.rmtree(f"{tree}/csrc/kernels/cuda")
    plan = build_plan.plan_cuda(tree, torch_like(cuda="13.0"))
    assert plan == ("", "no (this version has no CUDA kernels)")


def test_architectures_and_jobs_can_be_set(build_plan, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    monkeypatch.setenv("MAX_JOBS", "5")
    assert build_plan.architectures(torch_like(cards=[(9, 0)])) == "7.5"
    assert build_plan.plan_jobs() == "5"


@pytest.mark.parametrize(
    "words, expected",
    [
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("8.0 9.0+PTX", ["8.0", "9.0+PTX"]),
        ("9.0a;12.0", ["12.0", "9.0a"]),
        ("Ampere", ["8.0", "8.6+PTX"]),
        ("Turing Hopper", ["7.5+PTX", "9.0+PTX"]),
    ],
)
def test_architectures_are_what_torch_makes_of_the_variable(build_plan, monkeypatch, words, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", words)
    assert sorted(build_plan.compiled_for()) == expected


def test_an_architecture_that_torch_does_not_know_stops_the_build(build_plan, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;sm90")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST=8.0;sm90: Unknown CUDA arch \(sm90\)"):
        build_plan.compiled_for()


@pytest.mark.parametrize(
    "macros, message",
    [
        ("#define __GNUC__ 10", "`c\\+\\+` is GCC 10, and >= 11 is needed"),
        ("", "the C\\+\\+ compiler `c\\+\\+` does not run"),
        ("#define __GNUC__ 11", None),
        ("#define __GNUC__ 4\n#define __clang__ 1", None),
    ],
)
def test_compilers_too_old_are_named(build_plan, monkeypatch, macros, message):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build_plan, "output", lambda *command: macros)
    if message is None:
        assert build_plan.find_compiler() == macros.split("\n")[0]
    else:
        with pytest.raises(SystemExit, match=message):
            build_plan.find_compiler()


def test_jobs_follow_memory(build_plan, monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": (3 << 30) // 4096}  # 3 GB: one job of 2 GB
    monkeypatch.setattr(build_plan.os, "sysconf", pages.__getitem__)
    assert build_plan.plan_jobs() == "1"


def test_without_torch_one_sentence_and_no_traceback():
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build_ext']; "
    code += "runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.startswith("ulmfit_fast: the build needs torch: type `pip install torch`")
    assert done.stderr.count("\n") == 1


CPP = {".cpp", ".cu", ".h", ".inl"}
ROOT_FILES = ("Makefile", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py")
ROOT_FILES += ("README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", ".clang-format")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source archive, unpacked; beside it, in `lib`, what of the package is no compiled code."""
    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        pytest.skip("setup.py looks for a compiler")
    out = tmp_path_factory.mktemp("archive")
    steps = f"egg_info --egg-base {out} sdist --dist-dir {out} build_py --build-lib {out}/lib"
    command = [sys.executable, "setup.py", "-q", *steps.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(next(out.glob("*.tar.gz")), out)
    return next(path for path in out.glob("ulmfit_fast-*") if path.is_dir())


def test_type_checkers_are_told_of_the_annotations(archive):
    assert (archive.parent / "lib" / "ulmfit_fast" / "py.typed").is_file()
    assert (archive / "ulmfit_fast" / "py.typed").is_file()


def test_source_archive_has_what_the_make_targets_need(archive):
    """And what the tests and the pages read; the pictures, which `make readme` makes anew, are left out."""
    kinds = {".py", ".sh", ".md", ".json", ".txt", *CPP}
    folders = ("csrc", "ulmfit_fast", "tests", "benchmarks", "tools", "docs")
    sources = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds]
    sources += [ROOT / name for name in ROOT_FILES]
    missing = [name for p in sources if not (archive / (name := p.relative_to(ROOT))).exists()]
    assert not missing
    assert not list(archive.rglob("*.png"))
    assert (archive / "tools" / "cuda_check.sh").stat().st_mode & 0o100  # make calls it


@pytest.mark.parametrize(
    "command",
    [
        ["make", "-n", "bench", "readme", "cuda-check", "USE_ACTIVE=1", "PYTHON=python3"],
        [sys.executable, "-m", "benchmarks.lstm", "--help"],
        [sys.executable, "tools/readme_numbers.py"],
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_benchmarks.py"],
    ],
    ids=["make", "bench", "readme", "tests"],
)
def test_source_archive_works(archive, command):
    """Once it is built, and without git."""
    if "tools/readme_numbers.py" in command:
        pytest.importorskip("matplotlib")
    library = pathlib.Path(ulmfit_fast.__file__).parent / "_C.abi3.so"
    shutil.copy(library, archive / "ulmfit_fast")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=archive, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint_reads_every_source():
    command = ["make", "-n", "lint", "USE_ACTIVE=1", "PYTHON=python3"]
    recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    read = tuple(f"{folder}/" for folder in re.search(r"find (.*?) -name", recipe)[1].split())
    folders = ("csrc", "tests", "benchmarks", "tools", "ulmfit_fast")
    sources = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in CPP]
    assert sources and not [p for p in sources if not str(p.relative_to(ROOT)).startswith(read)]


def test_versions_agree():
    for file, line in (("CITATION.cff", "version: {}\n"), ("CHANGELOG.md", "## [{}] - ")):
        assert line.format(ulmfit_fast.__version__) in (ROOT / file).read_text(encoding="utf-8"), file


def test_import_brings_in_no_extra():
    code = "import sys, torch; old = set(sys.modules); import ulmfit_fast; print(*set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "ulmfit_fast.ops" in done.stdout.split()
    extras = {"tokenizers", "safetensors", "tqdm", "matplotlib", "pytest"}
    assert not (extras | {"triton", "torch.utils.flop_counter"}) & set(done.stdout.split())


def library(*command):
    path = pathlib.Path(ulmfit_fast.__file__).parent / "_C.abi3.so"
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]}")
    return subprocess.run([*command, path], capture_output=True, text=True, check=True).stdout


def test_library_takes_nothing_from_torch_but_its_stable_abi():
    undefined = re.findall(r" U (\S+)", library("nm", "-D", "--undefined-only"))
    assert undefined
    # C++ symbols of torch's namespaces change from release to release: at::, c10::, torch::
    assert not [name for name in undefined if re.match(r"_ZNK?(2at|3c10|5torch)", name)]
    # of Python's, what every version since 3.2 has
    assert [name for name in undefined if name.startswith("Py")] == ["PyModule_Create2"]


def test_library_needs_no_more_than_torch_and_the_c_library():
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", library("readelf", "-d"))
    assert needed
    cuda = "|torch_cuda|c10_cuda|cudart" if ulmfit_fast.info().cuda_built else ""
    allowed = rf"lib(torch|torch_cpu|c10|stdc\+\+|gcc_s|c|m|pthread|dl|rt{cuda})\.so|ld-linux"
    assert not [name for name in needed if not re.match(allowed, name)]


@pytest.mark.parametrize("mode, made", [("USE_ACTIVE=1", "build/active"), ("TORCH=torch==2.12.0", ".venv")])
def test_make_test_installs_before_it_tests(mode, made):
    """What `make` would do from nothing: the stamp of torch, the package, then pytest."""
    done = subprocess.run(
        ["make", "-n", "-B", "test", mode, "PYTHON=python3"], cwd=ROOT, capture_output=True, text=True
    )
    steps = [f"{made}/", "pip install -v --no-build-isolation -e", f"touch {made}/built", "-m pytest"]
    places = [done.stdout.find(step) for step in steps]
    assert -1 not in places and places == sorted(places), done.stdout + done.stderr
