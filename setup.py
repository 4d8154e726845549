"""Builds r1kernels/_C.abi3.so: one extension over PyTorch's stable ABI for every Python >= 3.10 and torch >= 2.10.

The vocabulary kernels are compiled once per instruction set; the widest one the processor has is chosen at run
time. CUDA kernels are added where there is nvcc (csrc/cuda/nvcc.py): R1KERNELS_CUDA=0 leaves them out, 1 asks for
them. No network, no torch.utils.cpp_extension: torch only lends its headers and libraries.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc" / "cuda"))
import nvcc

TORCH = Path(torch.__file__).parent
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-Icsrc", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMMON_FLAGS += ["-isystem", str(TORCH / "include")]  # system headers: their warnings are not ours
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
PER_ISA = ["csrc/cpu/divergence.cpp", "csrc/cpu/gemm.cpp", "csrc/cpu/token_stats.cpp"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
CUDA_BINDINGS = [
    "csrc/bindings_cuda.cpp",
    "csrc/bindings_cuda_pointwise.cpp",
    "csrc/bindings_cuda_policy.cpp",
    "csrc/bindings_cuda_step.cpp",
]


class BuildExt(build_ext):
    """Links further objects in: the sources of `PER_ISA` for each instruction set, and the CUDA kernels."""

    def build_extension(self, ext: Extension) -> None:
        compiler, missing = nvcc.available()
        if compiler is None:
            print(f"r1kernels is built without CUDA: {missing}", file=sys.stderr)
            ext.define_macros.append(("R1K_WITHOUT_CUDA", f'"{missing}"'))
            self.compile_per_isa(ext)
        else:
            ext.define_macros.append(("R1K_CUDA", None))
            ext.sources += CUDA_BINDINGS
            # Calls of the runtime are its own: torch may have brought another.
            ext.extra_link_args += [str(nvcc.runtime_library(compiler)), "-Wl,--exclude-libs,ALL"]
            ext.extra_link_args += ["-lrt", "-lpthread", "-ldl"]
            with ThreadPoolExecutor(1) as pool:
                kernels = pool.submit(nvcc.compile_all, compiler)
                self.compile_per_isa(ext)
                ext.extra_objects += [str(kernel.path) for kernel in kernels.result()]
        self.note_parts(ext)
        super().build_extension(ext)

    def compile_per_isa(self, ext: Extension) -> None:
        if not IS_X86:
            return
        ext.define_macros.append(("R1K_X86", None))
        for isa, flags in X86_ISAS.items():
            ext.extra_objects += self.compiler.compile(
                ["csrc/cpu/gemm.cpp"] if "bf16" in isa else PER_ISA,  # nothing else multiplies bf16
                output_dir=os.path.join(self.build_temp, isa),
                macros=[*ext.define_macros, ("R1K_ISA", isa)],
                extra_postargs=[*COMMON_FLAGS, *flags],
                depends=HEADERS,
            )

    def note_parts(self, ext: Extension) -> None:
        """A file that is newer than the extension when it was made of something else, or otherwise."""
        parts = (ext.sources, ext.extra_objects, ext.define_macros, ext.extra_compile_args, ext.extra_link_args)
        note, text = Path("build/parts.txt"), "".join(f"{part}\n" for part in parts)
        note.parent.mkdir(exist_ok=True)
        if not note.exists() or note.read_text() != text:
            note.write_text(text)
        ext.depends.append(str(note))


extension = Extension(
    "r1kernels._C",
    sources=[
        "csrc/bindings_cpu.cpp",
        "csrc/bindings_divergence.cpp",
        "csrc/bindings_gemm.cpp",
        "csrc/cuda_methods.cpp",
        "csrc/cpu/group_advantages.cpp",
        "csrc/cpu/policy_loss.cpp",
        *PER_ISA,
    ],
    depends=HEADERS,
    library_dirs=[str(TORCH / "lib")],
    # The linker would drop libtorch_cpu, whose symbols only the headers' inline functions use.
    extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"],
    define_macros=list(MACROS),
    extra_compile_args=COMMON_FLAGS,
    py_limited_api=True,
    language="c++",
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
