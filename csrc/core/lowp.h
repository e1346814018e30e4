// bfloat16 and float16 rows: conversion, and the epilogue of a product in those dtypes. Values are the 16 bits. No torch in here.
#pragma once
#include "core.h"
#include "lowp_rows.h"

namespace mmc {

MMC_API void widen(Low type, const uint16_t* src, float* dst, int64_t count);
MMC_API void narrow(Low type, const float* src, uint16_t* dst, int64_t count);
// out[l] = epilogue(c[l]), l < n; c may be out. Exactly one of c, wide_c is not null.
MMC_API void finish_low_row(Low type, const LowRow& row);
// sums[l] += row[l]
MMC_API void add_low_row(Low type, const uint16_t* row, float* sums, int64_t count);

}  // namespace mmc
