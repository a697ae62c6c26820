"""Builds ulmfit_fast/_C.abi3.so: every .cpp (for CUDA also .cu) below csrc/, on the libtorch stable ABI.

Editable and in-place builds get `_kernels` as well: the torch-free kernels for numpy (tests, benchmarks).
"""

import os
import sys
import sysconfig

import setuptools

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools"))
# `pip install .` isolates the build from the very torch the package will run with: look where that one is
sys.path += [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
import build_plan  # noqa: E402  (what to build, for which architectures, and why not the rest)

plan = build_plan.make(os.path.dirname(os.path.abspath(__file__)))
from torch.utils import cpp_extension  # noqa: E402  (after the plan: it reads CUDA_HOME when imported)

FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wno-psabi"]
# GCC 12 on its own headers: its bugs 105593, 105651
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-restrict"]
NVCC = ["-O3", "-std=c++20", "--resource-usage"]  # into the build log: registers, spills
ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10: the floor; nothing newer is used
LINK = ["-Wl,--as-needed", "-ltorch_cpu", "-lc10"]  # in this order, or as-needed comes too late to matter
if plan.cuda:
    ABI.append("-DUSE_CUDA")  # asks torch's stable headers for the CUDA stream function
    # A CUDA wheel imports under a CPU torch: cudart is inside, and libtorch_cuda is reached through libtorch,
    # which every torch has and which loads it where it is; csrc/cuda declares what it takes there as weak
    LINK = ["-Wl,--no-as-needed", "-ltorch", *LINK, "-lcudart_static"]


class Build(cpp_extension.BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        self.build_temp = "build/objects"  # also for pip's builds: only what changed is compiled again
        if self.inplace:
            self.build_lib = "build/inplace"
        else:  # a wheel carries only what runs under every Python
            self.extensions = [e for e in self.extensions if e.py_limited_api]

    def build_extension(self, ext):
        if not ext.py_limited_api:  # same objects as the op library: nothing is compiled twice
            ext.extra_objects = [os.path.join(self.build_temp, s[:-4] + ".o") for s in plan.kernel_sources]
        super().build_extension(ext)

    def run(self):
        print(plan.line, file=sys.stderr, flush=True)
        super().run()
        where = "ulmfit_fast" if self.inplace else os.path.join(self.build_lib, "ulmfit_fast")
        plan.write_build_info(os.path.join(where, "_build_info.py"))


def extension(name, sources, link, abi, **more):
    return setuptools.Extension(
        f"ulmfit_fast.{name}", sources, language="c++", extra_link_args=link,
        include_dirs=[os.path.abspath("csrc"), *cpp_extension.include_paths("cuda" if plan.cuda else "cpu")],
        library_dirs=cpp_extension.library_paths("cuda" if plan.cuda else "cpu"),
        extra_compile_args={"cxx": FLAGS + abi, "nvcc": NVCC + abi}, **more,
    )  # fmt: skip


setuptools.setup(
    ext_modules=[
        extension("_C", plan.sources, LINK, ABI, py_limited_api=True),
        extension("_kernels", [build_plan.NUMPY_MODULE], [], []),  # torch's pybind11 refuses the stable ABI
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
