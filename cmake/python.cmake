# The operator library and the Python module, with torch, pybind11 and Python given as folders: no find_package(Torch),
# which fails with a CUDA torch where no full toolkit is installed.
foreach(name MMC_TORCH_DIR MMC_PYBIND11_DIR MMC_PYTHON_INCLUDE)
  if(NOT EXISTS "${${name}}")
    message(FATAL_ERROR "${name}='${${name}}' does not exist; pass -D${name}=FOLDER")
  endif()
endforeach()

# LibTorch stable ABI: one binary for torch 2.10 and newer
add_library(mmc_ops MODULE csrc/ops/agop.cpp)
target_include_directories(mmc_ops SYSTEM PRIVATE ${MMC_TORCH_DIR}/include)
target_compile_definitions(mmc_ops PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
target_compile_options(mmc_ops PRIVATE -Wall -Wextra)
target_link_directories(mmc_ops PRIVATE ${MMC_TORCH_DIR}/lib)
target_link_libraries(mmc_ops PRIVATE mmc_core torch_cpu)

add_library(_C MODULE csrc/python/module.cpp)
target_include_directories(_C SYSTEM PRIVATE ${MMC_PYBIND11_DIR} ${MMC_PYTHON_INCLUDE})
target_compile_definitions(_C PRIVATE MMC_VERSION="${MMC_VERSION}")
target_compile_options(_C PRIVATE -Wall -Wextra)
target_link_libraries(_C PRIVATE mmc_core)
set_target_properties(_C PROPERTIES PREFIX "" SUFFIX "${MMC_MODULE_SUFFIX}")

# the core lies beside them in the package; torch is loaded before, and found by its name
set_target_properties(mmc_ops _C PROPERTIES SKIP_BUILD_RPATH ON INSTALL_RPATH "$ORIGIN")
install(TARGETS mmc_core mmc_ops _C LIBRARY DESTINATION .)
