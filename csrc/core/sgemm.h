// float32 matrix products with what follows them done before the result leaves the registers. No torch in here.
#pragma once
#include "core.h"

namespace mmc {

// Element (i, j) of a float32 matrix at data + i * row + j * col.
struct Strided {
  const float* data;
  int64_t row, col;
};

// c = relu(scale * product + bias + (add ? c : 0)), then zero where gate <= 0 (a NaN gate lets pass, as torch's backward of ReLU).
struct Epilogue {
  const float* bias = nullptr;  // [n]
  const float* gate = nullptr;  // [m, n], rows gate_row apart
  int64_t gate_row = 0;
  float scale = 1;
  bool relu = false;
  bool add = false;
};

// c [m, n] (rows ldc apart) = epilogue(a [m, k] times b [k, n]); row_sums [m], if given, takes sum_k a[i, k].
// Every element is one chain of fused multiply-adds per block of at most 1024 along k, in the order of k: its bits do not depend
// on m, n, threads or the place in the matrix.
MMC_API void sgemm(int64_t m, int64_t n, int64_t k, const Strided& a, const Strided& b, float* c, int64_t ldc,
                   const Epilogue& epilogue, float* row_sums, const Pool& pool);

// c = a times b from 1 or 2 bfloat16 parts of each operand (split.h): 1 or 3 products, float32 sums. False where there are no matrix
// tiles or they do not pay; nothing was written then.
MMC_API bool split_product(int64_t m, int64_t n, int64_t k, const Strided& a, const Strided& b, int parts, float* c, int64_t ldc,
                           const Pool& pool);

// The epilogue, but for `add`, on rows of a product that lie in c, and sums[l] += sum_r a[r * row + l]: for products of a BLAS.
// The gate's first row belongs to c's.
MMC_API void finish_product(int64_t rows, int64_t n, float* c, int64_t ldc, const Epilogue& epilogue);
MMC_API void add_product_rows(int64_t rows, int64_t n, const float* a, int64_t row, float* sums);

// Count a call of the EBR step for dispatch_counts().
MMC_API void count_ebr_step(bool backward);

}  // namespace mmc
