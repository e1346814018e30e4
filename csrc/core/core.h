// The torch-free core: AGOP primitives on pointers and sizes. Exact co-activation counts from packed signs, Gram matrices of
// activation derivatives, and the final product. Nothing here throws except std::bad_alloc.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernel_table.h"

#if defined(_WIN32)
#define MMC_API
#else
#define MMC_API __attribute__((visibility("default")))
#endif

namespace mmc {

// A float32 matrix with any strides, in elements.
struct Matrix {
  const float* data;
  int64_t rows, cols, row_stride, col_stride;
};

// A thread pool of the caller: run(begin, end, grain, body, context) calls body(context, b, e) on ranges that cover [begin, end).
struct Pool {
  void (*run)(int64_t begin, int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
  int threads;
};
MMC_API Pool serial_pool();

// Instruction sets. select_isa(nullptr) takes the best that the processor has; an empty return value means success, anything
// else is one line that says what was wrong.
MMC_API std::vector<std::string> compiled_isas();
MMC_API std::vector<std::string> supported_isas();
MMC_API std::string select_isa(const char* name);
MMC_API const char* current_isa();
MMC_API int64_t split_depth();  // the least depth of products that go through matrix tiles here; 0: none do

// Calls so far of each primitive on each instruction set, as "primitive/isa": the proof of what ran.
struct Count {
  std::string name;
  int64_t calls;
};
MMC_API std::vector<Count> dispatch_counts();
MMC_API void reset_dispatch_counts();

// counts[i * ld + j] += #{n : z_ni > 0 and z_nj > 0} for j >= i, z = x weight^T + bias as exact real numbers; entries below the
// diagonal are left alone. Returns whether a pre-activation was not finite: it depends on a NaN or infinity, or rounds to
// infinity. chunk = 0: chosen here; rounded up to a multiple of 64 otherwise.
MMC_API bool relu_coactivation_update(const Matrix& x, const Matrix& weight, const float* bias, int64_t* counts, int64_t ld,
                                      int64_t chunk, const Pool& pool);

// z [weight.rows, x.rows] (rows ldz apart) = weight times the transpose of x in float32, in any order of summation, fused or not;
// false: not now, as where the operands would be rounded. Given by a library above that has a BLAS; may be null. Called from the
// threads of the pool for blocks of samples where ways.h names the BLAS; counts do not depend on it.
using PreactivationProduct = bool (*)(const Matrix& weight, const Matrix& x, float* z, int64_t ldz);
MMC_API void set_preactivation_product(PreactivationProduct product);

// gram[i * ld + j] += sum_n s'(z_ni) s'(z_nj) for j >= i and total[i] += sum_n s'(z_ni), float64; total may be null.
// alpha, beta: slope of LeakyReLU; alpha of ELU; beta and threshold of softplus. Returns whether a z was not finite.
MMC_API bool derivative_gram_update(const Matrix& x, const Matrix& weight, const float* bias, Activation activation,
                                    float alpha, float beta, double* gram, int64_t ld, double* total, int64_t chunk,
                                    const Pool& pool);

// gram[i * ld + j] += sum_r rows[r, i] rows[r, j] for j >= i
MMC_API void syrk_update(const Matrix& rows, double* gram, int64_t ld, int64_t chunk, const Pool& pool);

// out [d, d] = weight^T S weight with weight [h, d] and S_ij = (outer^T outer)_ij * inner_ij (outer [C, h]; S = inner without
// it). Only the upper triangle of inner is read. Exactly one of inner_counts, inner_gram is not null.
MMC_API void agop_finalise(const Matrix& weight, const Matrix* outer, const int64_t* inner_counts, const double* inner_gram,
                           int64_t ld, float* out, const Pool& pool);

}  // namespace mmc
