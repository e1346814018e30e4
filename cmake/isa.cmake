# One object library per instruction set; the dispatcher itself is compiled without flags, and nothing with -march=native.
function(mmc_isa_unit target isa lanes rows flags sources)
  add_library(mmc_isa_${isa} OBJECT ${sources})
  target_compile_definitions(mmc_isa_${isa} PRIVATE MMC_ISA=${isa} MMC_LANES=${lanes} MMC_ROWS=${rows})
  # traps and errno would keep the compiler from vectorising comparisons;
  # GCC takes the undefined operands in its own intrinsics for a mistake
  target_compile_options(mmc_isa_${isa} PRIVATE -Wall -Wextra -O3 -fno-math-errno -fno-trapping-math
                         "$<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized;-Wno-uninitialized>" ${flags})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:mmc_isa_${isa}>)
endfunction()

function(mmc_add_instruction_sets target)
  set(dir csrc/core/isa)
  mmc_isa_unit(${target} base 8 4 "" "${dir}/base.cpp;${dir}/elementwise.cpp;${dir}/sgemm.cpp;${dir}/lowp.cpp")
  mmc_isa_unit(${target} amx_emulated 8 4 "-DMMC_EMULATED" "${dir}/amx.cpp")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|amd64|AMD64")
    set(avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
    mmc_isa_unit(${target} avx2 16 6 "-mavx2;-mfma;-mf16c" "${dir}/avx2.cpp;${dir}/elementwise.cpp;${dir}/sgemm.cpp;${dir}/lowp.cpp")
    mmc_isa_unit(${target} avx512 32 12 "${avx512}" "${dir}/avx512.cpp;${dir}/elementwise.cpp;${dir}/sgemm.cpp;${dir}/lowp.cpp")
    mmc_isa_unit(${target} avx512_vpopcntdq 32 12 "${avx512};-mavx512vpopcntdq" "${dir}/avx512_vpopcntdq.cpp")
    target_compile_definitions(${target} PRIVATE MMC_X86)
    include(CheckCXXCompilerFlag)
    check_cxx_compiler_flag("-mamx-tile -mamx-bf16 -mamx-int8" MMC_HAS_AMX_FLAGS)
    if(MMC_HAS_AMX_FLAGS AND CMAKE_SYSTEM_NAME STREQUAL Linux)
      mmc_isa_unit(${target} amx 32 12 "${avx512};-mamx-tile;-mamx-bf16;-mamx-int8" "${dir}/amx.cpp")
      target_compile_definitions(${target} PRIVATE MMC_AMX)
    endif()
  endif()
endfunction()
