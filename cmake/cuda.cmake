# The CUDA side, for the architectures in MXT_CUDA_ARCHS (80;90a;100a;120a ...). Needs nvcc, never a GPU.
# Architectures become real code only, by mxt_set_archs: what a build has is what mxtrain.env lists.
set(CMAKE_CUDA_ARCHITECTURES OFF)
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "MXTRAIN_CUDA_ARCHS asks for CUDA (${MXT_CUDA_ARCHS}), but no working nvcc was found. "
    "Put nvcc on the PATH or set CUDACXX; or unset MXTRAIN_CUDA_ARCHS for a CPU build.")
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
# -fmad=false keeps the rounding contract, as -ffp-contract=off does on the host.
set(MXT_CUDA_FLAGS -O3 -lineinfo -fmad=false --expt-relaxed-constexpr -Xptxas=-warn-spills)
# No kernel spills registers where the speed floors are measured, nor any of sm120, whose registers are counted out
# (gemm_traits.cuh): in a strict build, which CI makes, a spill is an error there. Another nvcc may still build what it likes.
option(MXT_STRICT "spilled registers are errors" OFF)
set(MXT_NO_SPILLS $<$<BOOL:${MXT_STRICT}>:-Xptxas=-Werror>)
if(MXT_CUDA_ARCHS STREQUAL "90a")
  list(APPEND MXT_CUDA_FLAGS ${MXT_NO_SPILLS})
endif()

set(MXT_CUDA_SOURCES
  csrc/cuda/quantize_rows.cu csrc/cuda/quantize_columns.cu csrc/cuda/quantize_dual.cu
  csrc/cuda/quantize_strips.cu csrc/cuda/quantize_pairs.cu
  csrc/cuda/requantize.cu csrc/cuda/requantize_codes.cu csrc/cuda/dequantize.cu csrc/cuda/elementwise.cu csrc/cuda/column_sum.cu
  csrc/cuda/fold.cu csrc/cuda/optimizer.cu csrc/cuda/statistics.cu
  csrc/cuda/int8_quantize.cu csrc/cuda/int8_gemm.cu csrc/cuda/int8_pool.cu
  csrc/cuda/rms_norm.cu csrc/cuda/swiglu.cu)
# A library for many GPUs holds its code compressed, a thirteenth of the room, and unpacks what a kernel's first launch needs.
list(LENGTH MXT_CUDA_ARCHS MXT_CUDA_ARCH_COUNT)
if(MXT_CUDA_ARCH_COUNT GREATER 1 AND CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.9)
  list(APPEND MXT_CUDA_FLAGS --compress-mode=size)
endif()

# An object library's architectures; CMake's own property knows family code (100f) only since late.
function(mxt_set_archs target)
  foreach(arch ${ARGN})
    target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--generate-code=arch=compute_${arch},code=[sm_${arch}]>")
  endforeach()
  set_target_properties(${target} PROPERTIES CUDA_VISIBILITY_PRESET hidden)
endfunction()
# From 10.0 on, code with the suffix f runs on every minor version of its major one: 100a and 103a are one object, 120a and 121a.
set(MXT_FAMILY_ARCHS ${MXT_CUDA_ARCHS})
list(TRANSFORM MXT_FAMILY_ARCHS REPLACE "^1([0-9])[0-9][af]$" "1\\10f")
list(REMOVE_DUPLICATES MXT_FAMILY_ARCHS)
if(MXT_FAMILY_ARCHS MATCHES "f" AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.9)
  message(FATAL_ERROR "MXTRAIN_CUDA_ARCHS names ${MXT_CUDA_ARCHS}, which needs CUDA 12.9 or newer, got ${CMAKE_CUDA_COMPILER_VERSION}.")
endif()
add_library(mxt_cuda_portable OBJECT ${MXT_CUDA_SOURCES})
target_include_directories(mxt_cuda_portable PRIVATE csrc)
target_compile_options(mxt_cuda_portable PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${MXT_CUDA_FLAGS}>)
mxt_set_archs(mxt_cuda_portable ${MXT_FAMILY_ARCHS})

target_sources(mxtrain PRIVATE csrc/dispatch.cpp
  csrc/ops/cuda_quantize.cpp csrc/ops/cuda_convert.cpp csrc/ops/cuda_gemm.cpp csrc/ops/cuda_matmul.cpp csrc/ops/cuda_optimizer.cpp csrc/ops/cuda_statistics.cpp
  csrc/ops/cuda_int8.cpp csrc/ops/cuda_context.cpp $<TARGET_OBJECTS:mxt_cuda_portable>)

# What needs one architecture's instructions: its folder, for that architecture only; dispatch.cpp knows by MXT_HAVE_*.
# mma.sync's FP8 serves 8.9; 9.0 has it for comparison.
set(MXT_SM89_ARCHS ${MXT_CUDA_ARCHS})
list(FILTER MXT_SM89_ARCHS INCLUDE REGEX "^(89|90a)$")
if(MXT_SM89_ARCHS)
  add_library(mxt_cuda_sm89 OBJECT csrc/cuda/sm89/gemm_e5m2.cu)
  target_include_directories(mxt_cuda_sm89 PRIVATE csrc)
  target_compile_options(mxt_cuda_sm89 PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${MXT_CUDA_FLAGS}>)
  mxt_set_archs(mxt_cuda_sm89 ${MXT_SM89_ARCHS})
  target_sources(mxtrain PRIVATE $<TARGET_OBJECTS:mxt_cuda_sm89>)
  target_compile_definitions(mxtrain PRIVATE MXT_HAVE_SM89)
endif()
if("90a" IN_LIST MXT_CUDA_ARCHS)
  add_library(mxt_cuda_sm90 OBJECT csrc/cuda/sm90/gemm_e5m2.cu csrc/cuda/sm90/gemm_packed.cu csrc/cuda/sm90/gemm_int8.cu)
  target_include_directories(mxt_cuda_sm90 PRIVATE csrc)
  target_compile_options(mxt_cuda_sm90 PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${MXT_CUDA_FLAGS}>)
  mxt_set_archs(mxt_cuda_sm90 90a)
  target_sources(mxtrain PRIVATE $<TARGET_OBJECTS:mxt_cuda_sm90>)
  target_compile_definitions(mxtrain PRIVATE MXT_HAVE_SM90)
endif()
# Block-scaled mma.sync; 90a has the same kernels with that one instruction emulated, which is how they are tested there.
set(MXT_SM120_ARCHS ${MXT_CUDA_ARCHS})
list(FILTER MXT_SM120_ARCHS INCLUDE REGEX "^(90a|12[01][af])$")
if(MXT_SM120_ARCHS)
  add_library(mxt_cuda_sm120 OBJECT csrc/cuda/sm120/gemm_mxfp4.cu csrc/cuda/sm120/gemm_nvfp4.cu
    csrc/cuda/sm120/gemm_mxfp8_e4m3.cu csrc/cuda/sm120/gemm_mxfp8_e5m2.cu csrc/cuda/sm120/mma_probe.cu)
  target_include_directories(mxt_cuda_sm120 PRIVATE csrc)
  target_compile_options(mxt_cuda_sm120 PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${MXT_CUDA_FLAGS} ${MXT_NO_SPILLS}>)
  mxt_set_archs(mxt_cuda_sm120 ${MXT_SM120_ARCHS})
  target_sources(mxtrain PRIVATE $<TARGET_OBJECTS:mxt_cuda_sm120>)
  target_compile_definitions(mxtrain PRIVATE MXT_HAVE_SM120)
endif()
# tcgen05 through CUTLASS, whose headers third_party/cutlass.lock pins; without them everything else is built.
if("100f" IN_LIST MXT_FAMILY_ARCHS)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/third_party/fetch_cutlass.py ${CMAKE_SOURCE_DIR}/build/third_party
    RESULT_VARIABLE MXT_CUTLASS_FAILED OUTPUT_VARIABLE MXT_CUTLASS_INCLUDE ERROR_VARIABLE MXT_CUTLASS_REASON
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  if(MXT_CUTLASS_FAILED)
    message(WARNING "without CUTLASS: sm100 GEMM absent (${MXT_CUTLASS_REASON}). See third_party/README.md.")
  else()
    file(STRINGS ${MXT_CUTLASS_INCLUDE}/cutlass/version.h MXT_CUTLASS_VERSION REGEX "define CUTLASS_(MAJOR|MINOR|PATCH) ")
    string(REGEX REPLACE "[^0-9;]" "" MXT_CUTLASS_VERSION "${MXT_CUTLASS_VERSION}")
    string(REPLACE ";" "." MXT_CUTLASS_VERSION "${MXT_CUTLASS_VERSION}")
    add_library(mxt_cuda_sm100 OBJECT csrc/cuda/sm100/gemm.cpp
      csrc/cuda/sm100/gemm_mxfp4_pair.cu csrc/cuda/sm100/gemm_mxfp4_single.cu
      csrc/cuda/sm100/gemm_nvfp4_pair.cu csrc/cuda/sm100/gemm_nvfp4_single.cu
      csrc/cuda/sm100/gemm_mxfp8_pair.cu csrc/cuda/sm100/gemm_mxfp8_single.cu)
    target_include_directories(mxt_cuda_sm100 PRIVATE csrc)
    target_include_directories(mxt_cuda_sm100 SYSTEM PRIVATE ${MXT_CUTLASS_INCLUDE} ${CUDAToolkit_INCLUDE_DIRS})
    # Line numbers of CUTLASS's templates would take more room than the code, which is small.
    list(REMOVE_ITEM MXT_CUDA_FLAGS -lineinfo --compress-mode=size)
    target_compile_options(mxt_cuda_sm100 PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${MXT_CUDA_FLAGS}>)
    target_compile_definitions(mxt_cuda_sm100 PRIVATE NDEBUG)
    mxt_set_archs(mxt_cuda_sm100 100f)
    # A file takes 5.5 GB to compile (setup.py counts).
    set_property(GLOBAL PROPERTY JOB_POOLS cutlass=${MXT_CUTLASS_JOBS})
    set_target_properties(mxt_cuda_sm100 PROPERTIES JOB_POOL_COMPILE cutlass)
    target_sources(mxtrain PRIVATE $<TARGET_OBJECTS:mxt_cuda_sm100>)
    target_compile_definitions(mxtrain PRIVATE MXT_HAVE_SM100 MXT_CUTLASS="${MXT_CUTLASS_VERSION}")
  endif()
endif()
string(REPLACE ";" "\\;" MXT_CUDA_ARCHS_TEXT "${MXT_CUDA_ARCHS}")
target_compile_definitions(mxtrain PRIVATE MXT_WITH_CUDA USE_CUDA
  "MXT_CUDA_ARCHS=\"${MXT_CUDA_ARCHS_TEXT}\"" MXT_CUDA_COMPILER="${CMAKE_CUDA_COMPILER_VERSION}")
target_include_directories(mxtrain SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(mxtrain PRIVATE CUDA::cudart_static)
set_target_properties(mxtrain PROPERTIES CUDA_RUNTIME_LIBRARY Static)
