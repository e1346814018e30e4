#include "product.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include "lowp.h"

namespace mmc::ebr {
namespace {

template <class T>
constexpr Low low = std::is_same_v<T, c10::BFloat16> ? Low::bfloat16 : Low::float16;

template <class T>
const uint16_t* bits(const T* p) {
  return reinterpret_cast<const uint16_t*>(p);
}
template <class T>
uint16_t* bits(T* p) {
  return reinterpret_cast<uint16_t*>(p);
}

template <class T>
at::Tensor tensor(View<T> view, int64_t rows, int64_t columns) {
  return at::from_blob(const_cast<T*>(view.data), {rows, columns}, {view.row, view.col},
                       at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
}

template <class F>
void each_block(int64_t count, const Pool& pool, F&& body) {
  parallel_for(pool, count, 32768, body);
}

// the elements of a view in its own memory order; `out` has the same strides without gaps
template <class T>
View<float> widen_view(View<T> view, int64_t rows, int64_t columns, float* out, const Pool& pool) {
  const bool along_rows = view.col == 1 || (view.row != 1 && columns > 1);
  const int64_t outer = along_rows ? rows : columns, inner = along_rows ? columns : rows;
  const int64_t step = along_rows ? view.row : view.col, gap = along_rows ? view.col : view.row;
  if (gap == 1 && step == inner) {
    widen(view.data, out, rows * columns, pool);
  } else {
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = 0; i < inner; ++i) out[o * inner + i] = static_cast<float>(view.data[o * step + i * gap]);
  }
  return along_rows ? View<float>{out, columns, 1} : View<float>{out, 1, rows};
}

// out = finish(c) row by row; exactly one of c, wide_c is given, with the shape of out
template <class T>
void finish_rows(const T* c, const float* wide_c, T* out, int64_t m, int64_t n, const Finish<T>& finish, Arena& arena,
                 const Pool& pool) {
  const float* bias = finish.bias ? widened(finish.bias, n, arena, pool) : nullptr;
  parallel_for(pool, m, std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      LowRow row{};
      row.c = c ? bits(c + r * n) : nullptr;
      row.wide_c = wide_c ? wide_c + r * n : nullptr;
      row.out = bits(out + r * n);
      row.count = n;
      row.bias = bias;
      row.gate = finish.gate ? bits(finish.gate + r * n) : nullptr;
      row.scale = finish.scale, row.relu = finish.relu, row.add = finish.add;
      finish_low_row(low<T>, row);
    }
  });
}

// sums[i] = sum_j a(i, j): the gradient of a bias, a being the transpose of a dense matrix
template <class T>
void sum_rows(View<T> a, int64_t m, int64_t k, T* sums, Arena& arena) {
  float* total = arena.take<float>(m);
  std::fill_n(total, m, 0.0f);
  for (int64_t j = 0; j < k; ++j) add_low_row(low<T>, bits(a.data + j * a.col), total, m);
  narrow(low<T>, total, bits(sums), m);
}

template <class T>
bool by_blas(Number number, int64_t m, int64_t n, int64_t k, View<T> a, View<T> b, const Workers& workers) {
  const Order order = a.col != 1 ? Order::weight_gradient : b.col != 1 ? Order::forward : Order::input_gradient;
  return workers.ways[static_cast<int>(number)] >> product_class(order, m, n, k) & 1;
}

constexpr int64_t kFinishBytes = 2 << 20;  // of a result that is still in cache when its epilogue passes over it
constexpr int64_t kFinishRows = 256;       // fewer rows, and the BLAS packs its other operand too often
constexpr int64_t kSumRows = 256;          // longest float32 sum of a bias gradient

void sum_float_rows(int64_t m, int64_t k, View<float> a, float* row_sums, const Pool& pool) {
  parallel_for(pool, m, std::max<int64_t>(64, 32768 / std::max<int64_t>(1, k)), [&](int64_t begin, int64_t end) {
    std::fill(row_sums + begin, row_sums + end, 0.0f);
    for (int64_t j = 0; j < k; j += kSumRows)
      add_product_rows(std::min(kSumRows, k - j), end - begin, a.data + j * a.col + begin, a.col, row_sums + begin);
  });
}

// The bfloat16 parts of a float32 number that torch's setting for products on the CPU allows, by whichever interface it was made:
// two for "high" (tf32), one for "medium" (bf16), 0 for float32 itself. Only where there are matrix tiles.
int allowed_parts() {
  if (split_depth() == 0) return 0;
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::BF16 ? 1 : precision == at::Float32Precision::TF32 ? 2 : 0;
}

bool by_parts(int64_t m, int64_t n, int64_t k, View<float> a, View<float> b, float* c, const Finish<float>& finish,
              float* row_sums, const Pool& pool) {
  const int parts = finish.add ? 0 : allowed_parts();
  if (parts == 0 || !split_product(m, n, k, {a.data, a.row, a.col}, {b.data, b.row, b.col}, parts, c, n, pool)) return false;
  if (row_sums) sum_float_rows(m, k, a, row_sums, pool);
  parallel_for(pool, m, std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end) {
    Epilogue epilogue;
    epilogue.bias = finish.bias, epilogue.relu = finish.relu, epilogue.scale = finish.scale, epilogue.gate_row = n;
    epilogue.gate = finish.gate ? finish.gate + begin * n : nullptr;
    finish_product(end - begin, n, c + begin * n, n, epilogue);
  });
  return true;
}

void blas_product(int64_t m, int64_t n, int64_t k, View<float> a, View<float> b, float* c, const Finish<float>& finish,
                  float* row_sums, const Pool& pool) {
  if (row_sums) sum_float_rows(m, k, a, row_sums, pool);
  const bool pass = finish.bias || finish.gate || finish.relu;
  const int64_t block = pass ? std::max(kFinishRows, kFinishBytes / (4 * n)) : m;
  for (int64_t i = 0; i < m; i += block) {
    const int64_t rows = std::min(block, m - i);
    at::Tensor result = tensor<float>(dense<float>(c + i * n, n), rows, n);
    const at::Tensor left = tensor<float>({a.data + i * a.row, a.row, a.col}, rows, k), right = tensor<float>(b, k, n);
    if (finish.add || finish.scale != 1) {
      at::cpu::addmm_out(result, result, left, right, finish.add ? 1 : 0, finish.scale);
    } else {
      at::cpu::mm_out(result, left, right);
    }
    if (!pass) continue;
    parallel_for(pool, rows, std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end) {
      Epilogue epilogue;
      epilogue.bias = finish.bias, epilogue.relu = finish.relu, epilogue.gate_row = n;
      epilogue.gate = finish.gate ? finish.gate + (i + begin) * n : nullptr;
      finish_product(end - begin, n, c + (i + begin) * n, n, epilogue);
    });
  }
}

void float_product(int64_t m, int64_t n, int64_t k, View<float> a, View<float> b, float* c, const Finish<float>& finish,
                   float* row_sums, const Workers& workers) {
  if (m > 0 && n > 0 && k > 0 && by_blas(Number::float32, m, n, k, a, b, workers)) {
    blas_product(m, n, k, a, b, c, finish, row_sums, workers);
    return;
  }
  Epilogue epilogue;
  epilogue.bias = finish.bias, epilogue.gate = finish.gate, epilogue.gate_row = n;
  epilogue.scale = finish.scale, epilogue.relu = finish.relu, epilogue.add = finish.add;
  sgemm(m, n, k, {a.data, a.row, a.col}, {b.data, b.row, b.col}, c, n, epilogue, row_sums, workers);
}

}  // namespace

void product(int64_t m, int64_t n, int64_t k, View<float> a, View<float> b, float* c, const Finish<float>& finish,
             float* row_sums, const Workers& workers) {
  if (!by_parts(m, n, k, a, b, c, finish, row_sums, workers)) float_product(m, n, k, a, b, c, finish, row_sums, workers);
}

template <class T>
void product(int64_t m, int64_t n, int64_t k, View<T> a, View<T> b, T* c, const Finish<T>& finish, T* row_sums,
             const Workers& workers) {
  Arena arena;
  if (row_sums) sum_rows(a, m, k, row_sums, arena);
  if (m == 0 || n == 0) return;
  if (std::is_same_v<T, c10::BFloat16> && by_blas(Number::bfloat16, m, n, k, a, b, workers)) {
    const bool plain = !finish.bias && !finish.gate && !finish.relu && !finish.add && finish.scale == 1;
    T* direct = finish.add ? arena.take<T>(m * n) : c;
    at::Tensor result = tensor<T>(dense<T>(direct, n), m, n);
    at::cpu::mm_out(result, tensor(a, m, k), tensor(b, k, n));
    if (!plain) finish_rows<T>(direct, nullptr, c, m, n, finish, arena, workers);
    return;
  }
  const View<float> wide_a = widen_view(a, m, k, arena.take<float>(m * k), workers);
  const View<float> wide_b = widen_view(b, k, n, arena.take<float>(k * n), workers);
  float* wide_c = arena.take<float>(m * n);
  float_product(m, n, k, wide_a, wide_b, wide_c, {}, nullptr, workers);
  finish_rows<T>(nullptr, wide_c, c, m, n, finish, arena, workers);
}

template <class T>
void widen(const T* src, float* dst, int64_t count, const Pool& pool) {
  each_block(count, pool, [&](int64_t begin, int64_t end) { widen(low<T>, bits(src + begin), dst + begin, end - begin); });
}

template <class T>
void narrow(const float* src, T* dst, int64_t count, const Pool& pool) {
  each_block(count, pool, [&](int64_t begin, int64_t end) { narrow(low<T>, src + begin, bits(dst + begin), end - begin); });
}
template <>
void narrow(const float* src, float* dst, int64_t count, const Pool&) {
  std::memcpy(dst, src, count * sizeof(float));
}

#define MMC_PRODUCT(T)                                                                                             \
  template void product(int64_t, int64_t, int64_t, View<T>, View<T>, T*, const Finish<T>&, T*, const Workers&);    \
  template void widen(const T*, float*, int64_t, const Pool&);                                                     \
  template void narrow(const float*, T*, int64_t, const Pool&);
MMC_PRODUCT(c10::BFloat16)
MMC_PRODUCT(c10::Half)

}  // namespace mmc::ebr
