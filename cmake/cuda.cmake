# The CUDA library: no torch, static runtime, so that it loads on machines without CUDA and says what is missing.
# MMC_WITH_CUDA: auto builds it where nvcc is found, 1 fails without nvcc, 0 leaves it out.
set(MMC_WITH_CUDA "auto" CACHE STRING "build the CUDA library: auto, 0 or 1")
set(MMC_CUDA_ARCHITECTURES "" CACHE STRING "compute capabilities to build for; empty: all that this nvcc knows")
if(NOT MMC_WITH_CUDA MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "MMC_WITH_CUDA=${MMC_WITH_CUDA}; allowed are auto, 0 and 1")
endif()

set(MMC_CUDA FALSE)
if(NOT MMC_WITH_CUDA STREQUAL "0")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(MMC_CUDA TRUE)
  elseif(MMC_WITH_CUDA STREQUAL "1")
    message(FATAL_ERROR "MMC_WITH_CUDA=1 but no nvcc was found; put it on the PATH or set CUDACXX")
  endif()
endif()

if(MMC_CUDA)
  set(CMAKE_CUDA_ARCHITECTURES 80)
  enable_language(CUDA)
  set(architectures ${MMC_CUDA_ARCHITECTURES})
  if(NOT architectures)
    set(architectures 80-real 86-real)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 11.8)
      list(APPEND architectures 89-real 90-real)
    endif()
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND architectures 100-real 120-real)
    endif()
    list(APPEND architectures 80-virtual)  # newer ones compile this when they load it
  endif()
  add_library(mmc_cuda SHARED csrc/ops/agop/cuda/coactivation.cu)
  set_target_properties(mmc_cuda PROPERTIES CUDA_STANDARD 17 CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden
                                            CUDA_ARCHITECTURES "${architectures}" SKIP_BUILD_RPATH ON)
  # a register spill is a warning of ptxas, and warnings are errors
  target_compile_options(mmc_cuda PRIVATE --threads 2 -Werror all-warnings -Xcompiler=-Wall,-Wextra
                                          "SHELL:-Xptxas --warn-on-spills,--warning-as-error")
endif()
