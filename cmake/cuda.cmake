# The CUDA side, for the architectures in MXT_CUDA_ARCHS (80;90a;100a;120a ...). Needs nvcc, never a GPU.
# Architectures become real code only ("90a-real"): what a build has is what mxtrain.env lists.
list(TRANSFORM MXT_CUDA_ARCHS APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
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
# No kernel spills registers where the speed floors are measured: there a spill is an error.
if(MXT_CUDA_ARCHS STREQUAL "90a")
  list(APPEND MXT_CUDA_FLAGS -Xptxas=-Werror)
endif()

set(MXT_CUDA_SOURCES
  csrc/cuda/quantize_rows.cu csrc/cuda/quantize_columns.cu csrc/cuda/quantize_dual.cu
  csrc/cuda/quantize_strips.cu csrc/cuda/quantize_pairs.cu
  csrc/cuda/requantize.cu csrc/cuda/dequantize.cu csrc/cuda/elementwise.cu csrc/cuda/column_sum.cu
  csrc/cuda/fold.cu csrc/cuda/optimizer.cu csrc/cuda/statistics.cu
  csrc/cuda/int8_quantize.cu csrc/cuda/int8_gemm.cu
  csrc/cuda/rms_norm.cu csrc/cuda/swiglu.cu)
add_library(mxt_cuda_portable OBJECT ${MXT_CUDA_SOURCES})
target_include_directories(mxt_cuda_portable PRIVATE csrc)
target_compile_options(mxt_cuda_portable PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${MXT_CUDA_FLAGS}>)
set_target_properties(mxt_cuda_portable PROPERTIES CUDA_VISIBILITY_PRESET hidden)

target_sources(mxtrain PRIVATE csrc/dispatch.cpp
  csrc/ops/cuda_quantize.cpp csrc/ops/cuda_convert.cpp csrc/ops/cuda_gemm.cpp csrc/ops/cuda_optimizer.cpp csrc/ops/cuda_statistics.cpp
  csrc/ops/cuda_int8.cpp csrc/ops/cuda_context.cpp $<TARGET_OBJECTS:mxt_cuda_portable>)

# What needs one architecture's instructions: its folder, for that architecture only; dispatch.cpp knows by MXT_HAVE_*.
# mma.sync's FP8 serves 8.9; 9.0 has it for comparison.
set(MXT_SM89_ARCHS ${MXT_CUDA_ARCHS})
list(FILTER MXT_SM89_ARCHS INCLUDE REGEX "^(89|90a)$")
if(MXT_SM89_ARCHS)
  list(TRANSFORM MXT_SM89_ARCHS APPEND "-real")
  add_library(mxt_cuda_sm89 OBJECT csrc/cuda/sm89/gemm_e5m2.cu)
  target_include_directories(mxt_cuda_sm89 PRIVATE csrc)
  target_compile_options(mxt_cuda_sm89 PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${MXT_CUDA_FLAGS}>)
  set_target_properties(mxt_cuda_sm89 PROPERTIES CUDA_ARCHITECTURES "${MXT_SM89_ARCHS}" CUDA_VISIBILITY_PRESET hidden)
  target_sources(mxtrain PRIVATE $<TARGET_OBJECTS:mxt_cuda_sm89>)
  target_compile_definitions(mxtrain PRIVATE MXT_HAVE_SM89)
endif()
if("90a" IN_LIST MXT_CUDA_ARCHS)
  add_library(mxt_cuda_sm90 OBJECT csrc/cuda/sm90/gemm_e5m2.cu csrc/cuda/sm90/gemm_packed.cu csrc/cuda/sm90/gemm_int8.cu)
  target_include_directories(mxt_cuda_sm90 PRIVATE csrc)
  target_compile_options(mxt_cuda_sm90 PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${MXT_CUDA_FLAGS}>)
  set_target_properties(mxt_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real CUDA_VISIBILITY_PRESET hidden)
  target_sources(mxtrain PRIVATE $<TARGET_OBJECTS:mxt_cuda_sm90>)
  target_compile_definitions(mxtrain PRIVATE MXT_HAVE_SM90)
endif()
string(REPLACE ";" "\\;" MXT_CUDA_ARCHS_TEXT "${MXT_CUDA_ARCHS}")
target_compile_definitions(mxtrain PRIVATE MXT_WITH_CUDA USE_CUDA
  "MXT_CUDA_ARCHS=\"${MXT_CUDA_ARCHS_TEXT}\"" MXT_CUDA_COMPILER="${CMAKE_CUDA_COMPILER_VERSION}")
target_include_directories(mxtrain SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(mxtrain PRIVATE CUDA::cudart_static)
set_target_properties(mxtrain PROPERTIES CUDA_RUNTIME_LIBRARY Static)
