// AGOP primitives as torch operators on the CPU: checks, data pointers, torch's thread pool; the work is in csrc/core.
// Schemas and fake implementations stand in mmc_fast/ops/agop/op.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "exact.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void run_in_torch(int64_t begin, int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { body(context, b, e); });
}

mmc::Pool torch_pool() { return {run_in_torch, static_cast<int>(torch::stable::get_num_threads())}; }

// what the Python wrappers promise; a direct call of the operator gets an error instead of a crash
void check(const Tensor& t, const char* name, int64_t dim, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == dim && t.scalar_type() == type, name,
                  ": wrong device, number of dimensions or dtype; call it through mmc_fast.ops.agop.op");
}

mmc::Matrix matrix(const Tensor& t, const char* name) {
  check(t, name, 2, ScalarType::Float);
  return {t.const_data_ptr<float>(), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// x [N, d], weight [h, d], bias [h] and the accumulator [h, h] fit each other
void check_layer(const mmc::Matrix& x, const mmc::Matrix& weight, const std::optional<Tensor>& bias, const Tensor& sums) {
  const int64_t units = weight.rows;
  STD_TORCH_CHECK(x.cols == weight.cols, "weight: its columns differ from those of x");
  STD_TORCH_CHECK(sums.size(0) == units && sums.size(1) == units && sums.is_contiguous(),
                  "counts or gram: not a contiguous [h, h] with h the rows of weight");
  if (bias) {
    check(*bias, "bias", 1, ScalarType::Float);
    STD_TORCH_CHECK(bias->size(0) == units && (units == 0 || bias->stride(0) == 1), "bias: not a contiguous [h]");
  }
}

const float* data_or_null(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

void raise_flag(Tensor& nonfinite, bool bad) {
  if (bad) nonfinite.mutable_data_ptr<int64_t>()[0] += 1;
}

void relu_coactivation_update(const Tensor x, const Tensor weight, const std::optional<Tensor> bias, Tensor counts, Tensor nonfinite,
                              int64_t chunk) {
  const mmc::Matrix inputs = matrix(x, "x"), layer = matrix(weight, "weight");
  check(counts, "counts", 2, ScalarType::Long);
  check(nonfinite, "nonfinite", 1, ScalarType::Long);
  check_layer(inputs, layer, bias, counts);
  raise_flag(nonfinite, mmc::relu_coactivation_update(inputs, layer, data_or_null(bias), counts.mutable_data_ptr<int64_t>(),
                                                      layer.rows, chunk, torch_pool()));
}

void derivative_gram_update(const Tensor x, const Tensor weight, const std::optional<Tensor> bias, int64_t activation, double alpha,
                            double beta, Tensor gram, Tensor total, Tensor nonfinite, int64_t chunk) {
  const mmc::Matrix inputs = matrix(x, "x"), layer = matrix(weight, "weight");
  check(gram, "gram", 2, ScalarType::Double);
  check(total, "total", 1, ScalarType::Double);
  check(nonfinite, "nonfinite", 1, ScalarType::Long);
  check_layer(inputs, layer, bias, gram);
  STD_TORCH_CHECK(total.size(0) == layer.rows && total.is_contiguous(), "total: not a contiguous [h]");
  STD_TORCH_CHECK(activation >= 0 && activation < mmc::kActivations, "activation: unknown code");
  raise_flag(nonfinite, mmc::derivative_gram_update(inputs, layer, data_or_null(bias), static_cast<mmc::Activation>(activation),
                                                    static_cast<float>(alpha), static_cast<float>(beta),
                                                    gram.mutable_data_ptr<double>(), layer.rows,
                                                    total.mutable_data_ptr<double>(), chunk, torch_pool()));
}

void syrk_update(const Tensor rows, Tensor gram) {
  const mmc::Matrix inputs = matrix(rows, "rows");
  check(gram, "gram", 2, ScalarType::Double);
  STD_TORCH_CHECK(gram.size(0) == inputs.cols && gram.size(1) == inputs.cols && gram.is_contiguous(),
                  "gram: not a contiguous [h, h] with h the columns of rows");
  mmc::syrk_update(inputs, gram.mutable_data_ptr<double>(), inputs.cols, 0, torch_pool());
}

Tensor agop_finalise(const Tensor weight, const std::optional<Tensor> outer, const Tensor inner) {
  const mmc::Matrix layer = matrix(weight, "weight");
  const bool counts = inner.scalar_type() == ScalarType::Long;
  check(inner, "inner", 2, counts ? ScalarType::Long : ScalarType::Double);
  STD_TORCH_CHECK(inner.size(0) == layer.rows && inner.size(1) == layer.rows && inner.is_contiguous(),
                  "inner: not a contiguous [h, h] with h the rows of weight");
  mmc::Matrix left{};
  if (outer) {
    left = matrix(*outer, "outer");
    STD_TORCH_CHECK(left.cols == layer.rows, "outer: its columns differ from the rows of weight");
  }
  Tensor out = torch::stable::new_empty(weight, {layer.cols, layer.cols});
  mmc::agop_finalise(layer, outer ? &left : nullptr, counts ? inner.const_data_ptr<int64_t>() : nullptr,
                     counts ? nullptr : inner.const_data_ptr<double>(), layer.rows, out.mutable_data_ptr<float>(), torch_pool());
  return out;
}

template <class T>
void exact_signs_of(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& rows, const Tensor& units, Tensor& out) {
  const T *samples = x.const_data_ptr<T>(), *layer = weight.const_data_ptr<T>(), *offsets = bias.const_data_ptr<T>();
  const int64_t *n = rows.const_data_ptr<int64_t>(), *j = units.const_data_ptr<int64_t>();
  int8_t* signs = out.mutable_data_ptr<int8_t>();
  const auto each = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      signs[k] = static_cast<int8_t>(mmc::exact_sign(samples + n[k] * x.stride(0), x.stride(1), layer + j[k] * weight.stride(0),
                                                     weight.stride(1), x.size(1), offsets[j[k] * bias.stride(0)]));
  };
  torch::stable::parallel_for(0, rows.size(0), 64, each);
}

Tensor exact_signs(const Tensor x, const Tensor weight, const Tensor bias, const Tensor rows, const Tensor units) {
  const ScalarType type = x.scalar_type();
  check(x, "x", 2, type), check(weight, "weight", 2, type), check(bias, "bias", 1, type);
  check(rows, "rows", 1, ScalarType::Long), check(units, "units", 1, ScalarType::Long);
  STD_TORCH_CHECK(x.size(1) == weight.size(1) && weight.size(0) == bias.size(0) && rows.size(0) == units.size(0) &&
                      rows.is_contiguous() && units.is_contiguous(),
                  "exact_signs: shapes do not fit");
  for (int64_t k = 0; k < rows.size(0); ++k) {
    const int64_t n = rows.const_data_ptr<int64_t>()[k], j = units.const_data_ptr<int64_t>()[k];
    STD_TORCH_CHECK(0 <= n && n < x.size(0) && 0 <= j && j < weight.size(0), "exact_signs: an index is out of range");
  }
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "exact_signs: pass float32 or float64");
  Tensor out = torch::stable::new_empty(rows, {rows.size(0)}, ScalarType::Char);
  if (type == ScalarType::Float) {
    exact_signs_of<float>(x, weight, bias, rows, units, out);
  } else {
    exact_signs_of<double>(x, weight, bias, rows, units, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmc_fast, CPU, m) {
  m.impl("relu_coactivation_update", TORCH_BOX(&relu_coactivation_update));
  m.impl("derivative_gram_update", TORCH_BOX(&derivative_gram_update));
  m.impl("syrk_update", TORCH_BOX(&syrk_update));
  m.impl("agop_finalise", TORCH_BOX(&agop_finalise));
  m.impl("exact_signs", TORCH_BOX(&exact_signs));
}
