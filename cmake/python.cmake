# The operator library and the Python module, with torch, pybind11 and Python given as folders: no find_package(Torch),
# which fails with a CUDA torch where no full toolkit is installed.
foreach(name MMC_TORCH_DIR MMC_PYBIND11_DIR MMC_PYTHON_INCLUDE)
  if(NOT EXISTS "${${name}}")
    message(FATAL_ERROR "${name}='${${name}}' does not exist; pass -D${name}=FOLDER")
  endif()
endforeach()

# LibTorch stable ABI: one binary for torch 2.10 and newer
add_library(mmc_ops MODULE csrc/ops/agop/op.cpp)
target_include_directories(mmc_ops SYSTEM PRIVATE ${MMC_TORCH_DIR}/include)
target_compile_definitions(mmc_ops PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
target_compile_options(mmc_ops PRIVATE -Wall -Wextra)
target_link_directories(mmc_ops PRIVATE ${MMC_TORCH_DIR}/lib)
target_link_libraries(mmc_ops PRIVATE mmc_core torch_cpu)

# the EBR step uses ATen and C++ autograd, which are stable within one release only: the file name carries that release
file(STRINGS "${MMC_TORCH_DIR}/version.py" line REGEX "^__version__")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" MMC_TORCH_RELEASE "${line}")
add_library(mmc_ebr MODULE csrc/ops/ebr/op.cpp csrc/ops/ebr/autograd.cpp csrc/ops/ebr/plan.cpp csrc/ops/ebr/product.cpp csrc/ops/ebr/timer.cpp
                           csrc/ops/ebr/preactivations.cpp
                           csrc/ops/ebr/forward.cpp csrc/ops/ebr/backward.cpp)
set_target_properties(mmc_ebr PROPERTIES OUTPUT_NAME "mmc_ebr-${MMC_TORCH_RELEASE}" CXX_STANDARD 20)
target_include_directories(mmc_ebr SYSTEM PRIVATE ${MMC_TORCH_DIR}/include)
target_compile_options(mmc_ebr PRIVATE -Wall -Wextra -O3 -fno-math-errno -fno-trapping-math)
target_link_directories(mmc_ebr PRIVATE ${MMC_TORCH_DIR}/lib)
target_link_libraries(mmc_ebr PRIVATE mmc_core torch_cpu c10)

add_library(_C MODULE csrc/python/module.cpp)
target_include_directories(_C SYSTEM PRIVATE ${MMC_PYBIND11_DIR} ${MMC_PYTHON_INCLUDE})
target_compile_definitions(_C PRIVATE MMC_VERSION="${MMC_VERSION}")
target_compile_options(_C PRIVATE -Wall -Wextra)
target_link_libraries(_C PRIVATE mmc_core)
set_target_properties(_C PROPERTIES PREFIX "" SUFFIX "${MMC_MODULE_SUFFIX}")

# the core lies beside them in the package; torch is loaded before, and found by its name
set_target_properties(mmc_ops mmc_ebr _C PROPERTIES SKIP_BUILD_RPATH ON INSTALL_RPATH "$ORIGIN")
install(TARGETS mmc_core mmc_ops mmc_ebr _C LIBRARY DESTINATION .)
if(MMC_CUDA)
  install(TARGETS mmc_cuda LIBRARY DESTINATION .)
endif()
