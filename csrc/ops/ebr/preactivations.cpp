// The pre-activations that AGOP takes signs of, by the BLAS: registered where this library is loaded, used where a measurement says
// that the BLAS multiplies faster than the tiles of csrc/core.
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include "core.h"

namespace mmc::ebr {
namespace {

at::Tensor view(const Matrix& m) {
  return at::from_blob(const_cast<float*>(m.data), {m.rows, m.cols}, {m.row_stride, m.col_stride}, at::kFloat);
}

bool multiply(const Matrix& weight, const Matrix& x, float* z, int64_t ldz) {
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  if (precision == at::Float32Precision::BF16 || precision == at::Float32Precision::TF32) return false;
  const at::NoGradGuard no_grad;
  at::Tensor result = view({z, weight.rows, x.rows, ldz, 1});
  at::cpu::mm_out(result, view(weight), view(x).t());
  return true;
}

[[maybe_unused]] const bool registered = (set_preactivation_product(multiply), true);

}  // namespace
}  // namespace mmc::ebr
