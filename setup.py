"""Builds r1kernels/_C.abi3.so: one extension over PyTorch's stable ABI for every Python >= 3.10 and torch >= 2.10.

The vocabulary kernels are compiled once per instruction set; the widest one the processor has is chosen at run
time. CUDA kernels are added where there is nvcc (csrc/cuda/nvcc.py): R1KERNELS_CUDA=0 leaves them out, 1 asks for
them. No network, no torch.utils.cpp_extension: torch only lends its headers and libraries.
"""

import hashlib
import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.extend(str(Path(__file__).resolve().parent / folder) for folder in ("csrc", "csrc/cuda"))
import glibc
import nvcc

TORCH = Path(torch.__file__).parent
COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-Icsrc", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMMON_FLAGS += ["-ffp-contract=off", "-isystem", str(TORCH / "include")]  # sources fuse products and sums themselves
COMMON_FLAGS += (EXTRA_FLAGS := os.environ.get("R1KERNELS_CXXFLAGS", "").split())  # `make sanitize` sets it
MACROS = [
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # 2.10
    ("Py_LIMITED_API", "0x030a0000"),
]
# GCC 12 warns of its own AVX-512 intrinsics headers.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c", *QUIET],
    "avx512": [*AVX512, *QUIET],
    "avx512_bf16": [*AVX512, "-mavx512bf16", *QUIET],
    "amx_bf16": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", *QUIET],
}
PER_ISA = [f"csrc/cpu/{name}.cpp" for name in ("accumulate", "divergence", "gemm", "support", "token_stats", "top_k")]
USE_BF16 = [f"csrc/cpu/{name}.cpp" for name in ("gemm", "support", "token_stats")]
WITH_BF16 = {"avx512_bf16": USE_BF16, "amx_bf16": USE_BF16[:1]}
# Without the instruction sets a build takes a fifth of the time: benchmarks/mutation.py makes many.
IS_X86 = platform.machine().lower() in ("x86_64", "amd64") and os.environ.get("R1KERNELS_PORTABLE") != "1"
CUDA_BINDINGS = ["csrc/bindings_cuda.cpp", "csrc/bindings_cuda_pointwise.cpp", "csrc/bindings_cuda_policy.cpp"]
CUDA_BINDINGS += ["csrc/bindings_cuda_step.cpp"]


class BuildExt(build_ext):
    """Compiles the sources of `PER_ISA` for each instruction set, the other sources, and the CUDA kernels, in parallel.

    Objects stay in build/, named by what they are made of, so that the next build compiles only what has changed.
    """

    def build_extension(self, ext: Extension) -> None:
        compiler, missing = nvcc.available()
        if compiler is None:
            print(f"r1kernels is built without CUDA: {missing}", file=sys.stderr)
            ext.define_macros.append(("R1K_WITHOUT_CUDA", f'"{missing}"'))
        else:
            ext.define_macros.append(("R1K_CUDA", None))
            ext.sources += CUDA_BINDINGS
            ext.extra_link_args += [str(nvcc.runtime_library(compiler))]
        stubs = glibc.stubs(Path("build/glibc"), self.compiler.compiler_so[0])
        ext.extra_link_args += [*stubs, "-lrt", "-lpthread", "-ldl"]
        if IS_X86:
            ext.define_macros.append(("R1K_X86", None))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = [pool.submit(self.compile_once, source, ext.define_macros, []) for source in ext.sources]
            for isa, flags in X86_ISAS.items() if IS_X86 else ():
                macros = [*ext.define_macros, ("R1K_ISA", isa)]
                for source in WITH_BF16.get(isa, PER_ISA):
                    parts.append(pool.submit(self.compile_once, source, macros, flags))
            ext.extra_objects += [part.result() for part in parts]
        if compiler is not None:
            ext.extra_objects += [str(kernel.path) for kernel in nvcc.compile_all(compiler)]
        # Always link, which takes a second: objects of an earlier build may be older than the library of the last one.
        ext.sources, self.force, self.compiler.force = [], True, True
        super().build_extension(ext)

    def compile_once(self, source: str, macros: list[tuple[str, str | None]], flags: list[str]) -> str:
        """The object of a source. That of an earlier build is taken if nothing that it is made of has changed."""
        flags = [*COMMON_FLAGS, *flags]
        made_of = [self.compiler.compiler_so, sys.version, torch.__version__, macros, flags]
        made_of += [path.read_bytes() for path in sorted(nvcc.included(Path(source).resolve()))]
        name = f"{Path(source).stem}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}"
        target = Path("build/cpu", f"{name}.o")
        if not target.exists():
            [made] = self.compiler.compile([source], output_dir=os.path.join(self.build_temp, name), macros=macros,
                                           include_dirs=self.include_dirs, extra_postargs=flags)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, target)
        return str(target)


extension = Extension(
    "r1kernels._C",
    sources=[
        "csrc/bindings_accumulate.cpp",
        "csrc/bindings_cpu.cpp",
        "csrc/bindings_divergence.cpp",
        "csrc/bindings_gemm.cpp",
        "csrc/bindings_top_k.cpp",
        "csrc/bindings_support.cpp",
        "csrc/compatibility.cpp",
        "csrc/cuda_methods.cpp",
        *(f"csrc/cpu/{name}.cpp" for name in ("group_advantages", "policy_loss")),
        *PER_ISA,
    ],
    library_dirs=[str(TORCH / "lib")],
    # The linker would drop libtorch_cpu, whose symbols only the headers' inline functions use. Nothing but PyInit__C is
    # exported: torch may have brought another CUDA runtime.
    extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed",
                     "-Wl,--version-script=csrc/exports.map", *EXTRA_FLAGS],
    define_macros=list(MACROS),
    py_limited_api=True,
    language="c++",  # what links it
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
