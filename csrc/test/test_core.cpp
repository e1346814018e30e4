// Tests of the torch-free core: every instruction set of this machine against plain loops in float64, and its counts bit by bit
// against those of every other. Prints the first mismatch and the seed; exits 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "exact.h"
#include "lowp.h"
#include "sgemm.h"
#include "ways.h"

namespace {

int failures = 0;

void expect(bool ok, const char* what, unsigned seed, int64_t n, int64_t d, int64_t h) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s on %s: seed %u, N %lld, d %lld, h %lld\n", what, mmc::current_isa(), seed, static_cast<long long>(n),
              static_cast<long long>(d), static_cast<long long>(h));
}

struct Problem {
  int64_t n, d, h, outputs = 3;
  std::vector<float> x, w, b, v;
  Problem(int64_t n_, int64_t d_, int64_t h_, unsigned seed) : n(n_), d(d_), h(h_), x(n * d), w(h * d), b(h), v(outputs * h) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    for (auto* values : {&x, &w, &b, &v})
      for (auto& value : *values) value = normal(engine);
  }
  mmc::Matrix inputs() const { return {x.data(), n, d, d, 1}; }
  mmc::Matrix weights() const { return {w.data(), h, d, d, 1}; }
  mmc::Matrix outer() const { return {v.data(), outputs, h, h, 1}; }
};

double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) error += (a[i] - b[i]) * (a[i] - b[i]), norm += b[i] * b[i];
  return std::sqrt(error / std::max(norm, 1e-300));
}

// Ranges that begin and end anywhere, more of them than threads.
void run_in_pieces(int64_t begin, int64_t end, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  for (int64_t b = begin, size = 1; b < end; b += size, size = size % 7 + 2) body(context, b, std::min(end, b + size));
}

void check(int64_t n, int64_t d, int64_t h, unsigned seed, std::vector<int64_t>& reference) {
  const Problem p(n, d, h, seed);
  const mmc::Pool pool = mmc::serial_pool();
  std::vector<double> z(n * h);
  for (int64_t s = 0; s < n; ++s)
    for (int64_t i = 0; i < h; ++i) {
      double sum = p.b[i];
      for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(p.x[s * d + k]) * p.w[i * d + k];
      z[s * h + i] = sum;
    }

  // counts: those of exact signs, on every instruction set and for every chunk
  std::vector<int64_t> counts(h * h, 0), chunked(h * h, 0);
  const bool bad = mmc::relu_coactivation_update(p.inputs(), p.weights(), p.b.data(), counts.data(), h, 0, pool);
  mmc::relu_coactivation_update(p.inputs(), p.weights(), p.b.data(), chunked.data(), h, 64, pool);
  expect(!bad, "finite pre-activations", seed, n, d, h);
  expect(counts == chunked, "counts do not depend on the chunk", seed, n, d, h);
  std::vector<int64_t> pieces(h * h, 0);
  mmc::relu_coactivation_update(p.inputs(), p.weights(), p.b.data(), pieces.data(), h, 0, {run_in_pieces, 3});
  expect(counts == pieces, "counts do not depend on the threads", seed, n, d, h);
  if (reference.empty()) reference = counts;
  expect(counts == reference, "counts do not depend on the instruction set", seed, n, d, h);
  bool right = true;
  std::vector<char> active(n * h);
  for (int64_t s = 0; s < n; ++s)
    for (int64_t i = 0; i < h; ++i) {
      const int sign = mmc::exact_sign(p.x.data() + s * d, 1, p.w.data() + i * d, 1, d, p.b[i]);
      active[s * h + i] = sign > 0;
      right &= std::fabs(z[s * h + i]) < 1e-9 || (sign > 0) == (z[s * h + i] > 0);
    }
  expect(right, "exact signs against float64", seed, n, d, h);
  for (int64_t i = 0; i < h; ++i)
    for (int64_t j = 0; j < h; ++j) {
      int64_t both = 0;
      for (int64_t s = 0; s < n && j >= i; ++s) both += active[s * h + i] && active[s * h + j];
      right &= both == counts[i * h + j];
    }
  expect(right, "counts of exact signs", seed, n, d, h);

  std::vector<float> zf(z.begin(), z.end());

  // Gram of derivatives and of rows; total
  std::vector<double> gram(h * h, 0), total(h, 0), gram_truth(h * h, 0), total_truth(h, 0);
  mmc::derivative_gram_update(p.inputs(), p.weights(), p.b.data(), mmc::Activation::kTanh, 0, 0, gram.data(), h, total.data(), 100,
                              pool);
  for (int64_t s = 0; s < n; ++s)
    for (int64_t i = 0; i < h; ++i) {
      const double a = 1 - std::tanh(z[s * h + i]) * std::tanh(z[s * h + i]);
      total_truth[i] += a;
      for (int64_t j = i; j < h; ++j)
        gram_truth[i * h + j] += a * (1 - std::tanh(z[s * h + j]) * std::tanh(z[s * h + j]));
    }
  expect(distance(gram, gram_truth) < 5e-6, "Gram of derivatives", seed, n, d, h);
  expect(distance(total, total_truth) < 5e-6, "column sums of derivatives", seed, n, d, h);
  std::vector<double> syrk(h * h, 0), syrk_truth(h * h, 0);
  mmc::syrk_update({zf.data(), n, h, h, 1}, syrk.data(), h, 0, pool);
  for (int64_t s = 0; s < n; ++s)
    for (int64_t i = 0; i < h; ++i)
      for (int64_t j = i; j < h; ++j) syrk_truth[i * h + j] += static_cast<double>(zf[s * h + i]) * zf[s * h + j];
  expect(distance(syrk, syrk_truth) < 2e-6, "Gram of rows", seed, n, d, h);

  // final product
  std::vector<float> out(d * d);
  const mmc::Matrix outer = p.outer();
  mmc::agop_finalise(p.weights(), &outer, counts.data(), nullptr, h, out.data(), pool);
  std::vector<float> out_pieces(d * d);
  mmc::agop_finalise(p.weights(), &outer, counts.data(), nullptr, h, out_pieces.data(), {run_in_pieces, 3});
  expect(out == out_pieces, "final product does not depend on the threads", seed, n, d, h);
  std::vector<double> s_matrix(h * h), left(d * h, 0), truth(d * d, 0);
  for (int64_t i = 0; i < h; ++i)
    for (int64_t j = 0; j < h; ++j) {
      double sum = 0;
      for (int64_t c = 0; c < p.outputs; ++c) sum += static_cast<double>(p.v[c * h + i]) * p.v[c * h + j];
      s_matrix[i * h + j] = sum * counts[std::min(i, j) * h + std::max(i, j)];
    }
  for (int64_t a = 0; a < d; ++a)
    for (int64_t j = 0; j < h; ++j)
      for (int64_t i = 0; i < h; ++i) left[a * h + j] += p.w[i * d + a] * s_matrix[i * h + j];
  for (int64_t a = 0; a < d; ++a)
    for (int64_t c = 0; c < d; ++c)
      for (int64_t j = 0; j < h; ++j) truth[a * d + c] += left[a * h + j] * p.w[j * d + c];
  expect(distance({out.begin(), out.end()}, truth) < 5e-6, "final product", seed, n, d, h);
  bool symmetric = true;
  for (int64_t a = 0; a < d; ++a)
    for (int64_t c = 0; c < d; ++c) symmetric &= out[a * d + c] == out[c * d + a];
  expect(symmetric, "final product is symmetric", seed, n, d, h);
}

// c = relu(scale * a b + bias + c), zero where the gate is not positive; then the parts of it that follow a BLAS; float32 against float64.
void check_product(int64_t m, int64_t n, int64_t k, bool a_across, bool b_across, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  const auto drawn = [&](int64_t count) {
    std::vector<float> values(count);
    for (auto& v : values) v = normal(engine);
    return values;
  };
  const std::vector<float> a = drawn(m * k), b = drawn(k * n), bias = drawn(n), gate = drawn(m * n), before = drawn(m * n);
  const mmc::Strided left{a.data(), a_across ? 1 : k, a_across ? m : 1}, right{b.data(), b_across ? 1 : n, b_across ? k : 1};
  std::vector<double> product(m * n, 0.0), sums(m, 0.0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t l = 0; l < k; ++l) {
      const double value = left.data[i * left.row + l * left.col];
      sums[i] += value;
      for (int64_t j = 0; j < n; ++j) product[i * n + j] += value * right.data[l * right.row + j * right.col];
    }
  const auto close = [&](const std::vector<float>& got, const std::vector<double>& want, double size, const char* what) {
    for (size_t i = 0; i < got.size(); ++i)
      if (!(std::fabs(got[i] - want[i]) <= 2e-7 * size)) return expect(false, what, seed, m, n, k);
  };
  const double size = 8.0 * (k + 4);
  for (int kind = 0; kind < 4; ++kind) {
    const bool add = kind & 1, after = kind & 2;
    mmc::Epilogue epilogue;
    epilogue.bias = bias.data(), epilogue.relu = after, epilogue.scale = -0.5f, epilogue.add = add;
    epilogue.gate = after ? nullptr : gate.data(), epilogue.gate_row = n;
    std::vector<double> want(m * n);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double value = -0.5 * product[i * n + j] + bias[j] + (add ? before[i * n + j] : 0.0f);
        if (after ? value < 0 : gate[i * n + j] <= 0) value = 0;
        want[i * n + j] = value;
      }
    std::vector<float> c = before, row_sums(m);
    mmc::sgemm(m, n, k, left, right, c.data(), n, epilogue, a_across ? row_sums.data() : nullptr, {run_in_pieces, 2});
    close(c, want, size, "sgemm");
    if (a_across) close(row_sums, sums, size, "row sums of sgemm");
    if (add) continue;
    for (int64_t i = 0; i < m * n; ++i) c[i] = static_cast<float>(product[i]);
    mmc::finish_product(m, n, c.data(), n, epilogue);
    close(c, want, size, "finish_product");
  }
  std::vector<float> columns(n, 1.0f);
  std::vector<double> want(n, 1.0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) want[j] += gate[i * n + j];
  mmc::add_product_rows(m, n, gate.data(), n, columns.data());
  close(columns, want, 8.0 * (m + 4), "add_product_rows");

  for (const mmc::Low type : {mmc::Low::bfloat16, mmc::Low::float16}) {
    std::vector<uint16_t> low(k * n);
    std::vector<float> wide(k * n);
    mmc::narrow(type, b.data(), low.data(), k * n);
    mmc::widen(type, low.data(), wide.data(), k * n);
    const float step = type == mmc::Low::bfloat16 ? 0x1p-8f : 0x1p-11f;
    for (int64_t i = 0; i < k * n; ++i)
      if (!(std::fabs(wide[i] - b[i]) <= step * std::fabs(b[i]) + 0x1p-24f)) return expect(false, "narrow and widen", seed, m, n, k);
  }
}

// in an order of its own, as a BLAS has; refuses some blocks
bool multiply(const mmc::Matrix& weight, const mmc::Matrix& x, float* z, int64_t ldz) {
  for (int64_t i = 0; i < weight.rows; ++i)
    for (int64_t s = 0; s < x.rows; ++s) {
      float sum = 0;
      for (int64_t k = x.cols; k-- > 0;)
        sum += weight.data[i * weight.row_stride + k * weight.col_stride] * x.data[s * x.row_stride + k * x.col_stride];
      z[i * ldz + s] = sum;
    }
  return x.rows % 3 != 0;
}

}  // namespace

int main() {
  const unsigned first = std::random_device{}();
  std::printf("instruction sets:");
  for (const auto& isa : mmc::supported_isas()) std::printf(" %s", isa.c_str());
  std::printf("\n");
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 2, 5}, {64, 7, 12}, {65, 16, 24}, {63, 17, 25}, {200, 33, 49}, {513, 40, 97}, {150, 70, 401}};
  for (const auto& shape : shapes) {
    std::vector<int64_t> reference;
    for (const auto& isa : mmc::supported_isas()) {
      const std::string error = mmc::select_isa(isa.c_str());
      if (!error.empty()) std::printf("FAILED %s\n", error.c_str()), ++failures;
      check(shape[0], shape[1], shape[2], first, reference);
      mmc::set_preactivation_product(multiply);
      mmc::pin_ways("blas");
      check(shape[0], shape[1], shape[2], first, reference);
      mmc::pin_ways("tiles");
      mmc::set_preactivation_product(nullptr);
    }
  }
  const int64_t products[][3] = {{1, 1, 1}, {3, 70, 5}, {4, 33, 300}, {5, 7, 3}, {13, 65, 40}, {40, 31, 1100}, {97, 130, 64}};
  for (const auto& isa : mmc::supported_isas()) {
    mmc::select_isa(isa.c_str());
    for (const auto& shape : products)
      for (int order = 0; order < 4; ++order) check_product(shape[0], shape[1], shape[2], order & 1, order & 2, first);
    check_product(140, 260, 1024, true, false, first);  // blocks of rows that share packed panels, in two slabs
    check_product(1321, 33, 1000, false, true, first);  // the last block is one row
  }
  expect(!mmc::select_isa("pentium").empty(), "an unknown instruction set is refused", first, 0, 0, 0);
  for (const auto& isa : mmc::supported_isas()) {  // a pre-activation that is not finite is reported, wherever it stands
    mmc::select_isa(isa.c_str());
    for (const float value : {INFINITY, -INFINITY, NAN}) {
      Problem p(130, 5, 30, first);
      p.x[129 * 5 + 4] = value;
      std::vector<int64_t> counts(30 * 30, 0);
      expect(mmc::relu_coactivation_update(p.inputs(), p.weights(), p.b.data(), counts.data(), 30, 0, mmc::serial_pool()),
             "a non-finite pre-activation is reported", first, 130, 5, 30);
    }
  }
  for (const auto& isa : mmc::supported_isas()) {  // every sign unsure: orthogonal rows, then numbers whose squares overflow
    mmc::select_isa(isa.c_str());
    for (const float scale : {1.0f, 0x1p100f}) {
      Problem p(70, 6, 13, first);
      for (auto& value : p.w) value = 1.0f;
      for (auto& value : p.b) value = 0.0f;
      for (size_t k = 0; k < p.x.size(); ++k) p.x[k] = k % 2 ? -p.x[k - 1] : p.x[k] * scale;
      std::vector<int64_t> counts(13 * 13, 0);
      expect(!mmc::relu_coactivation_update(p.inputs(), p.weights(), nullptr, counts.data(), 13, 0, mmc::serial_pool()) &&
                 counts == std::vector<int64_t>(13 * 13, 0),
             "zeros are off", first, 70, 6, 13);
    }
  }
  std::printf(failures ? "%d checks failed\n" : "all checks passed (%d failures)\n", failures);
  return failures ? 1 : 0;
}
