// Forward of the EBR step: encode, normalise, mix, decode, discriminate; absent rows are neither read nor computed.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>

#include "step.h"

namespace mmc::ebr {
namespace {

constexpr float kLayerNormEps = 1e-5f;

template <class T>
void linear(const Layer<T>& layer, View<T> x, int64_t rows, bool relu, T* out, const Workers& pool) {
  Finish<T> finish;
  finish.bias = layer.bias, finish.relu = relu;
  product(rows, layer.out, layer.in, x, transposed<T>(layer.weight, layer.in), out, finish, static_cast<T*>(nullptr), pool);
}

template <class T>
void clear_tail(T* rows, int64_t used, int64_t all, int64_t width) {
  std::memset(static_cast<void*>(rows + used * width), 0, (all - used) * width * sizeof(T));
}

template <class T>
void layer_norm(T* rows, int64_t count, int64_t k, float* rstd, const Pool& pool) {
  each_row(pool, count, 4 * k, [&](int64_t r) {
    T* g = rows + r * k;
    double sum = 0, squares = 0;
    for (int64_t c = 0; c < k; ++c) sum += static_cast<float>(g[c]);
    const double mean = sum / k;
    for (int64_t c = 0; c < k; ++c) {
      const double centred = static_cast<float>(g[c]) - mean;
      squares += centred * centred;
    }
    const float scale = static_cast<float>(1.0 / std::sqrt(squares / k + kLayerNormEps));
    for (int64_t c = 0; c < k; ++c) g[c] = static_cast<T>(static_cast<float>(static_cast<float>(g[c]) - mean) * scale);
    if (rstd) rstd[r] = scale;
  });
}

template <class T>
void encode(const Step<T>& step, Kept<T>& kept, T* latents, Arena& arena) {
  const Plan& plan = step.plan;
  const int64_t k = step.latent;
  for (int64_t i = 0; i < step.m(); ++i) {
    const Arena::Scope scratch(arena);
    const RowList& rows = plan.encoded[i];
    const Layer<T>&first = step.encode1[i], &second = step.encode2[i];
    T* hidden = kept.encoder_hidden[i];
    if (hidden) {
      clear_tail(hidden, rows.count, step.batch(), first.out);
    } else {
      hidden = arena.take<T>(rows.count * first.out);
    }
    T* g = latents + plan.offset[i] * k;
    linear(first, gather(step.features[i], rows, first.in, arena, step.pool), rows.count, true, hidden, step.pool);
    linear(second, dense<T>(hidden, first.out), rows.count, false, g, step.pool);
    float* rstd = kept.rstd ? kept.rstd + i * step.batch() : nullptr;
    if (step.normalize) layer_norm(g, rows.count, k, rstd, step.pool);
    if (rstd) clear_tail(rstd, rows.count, step.batch(), 1);
  }
}

// out = decoded (+ target); returns the squared error
template <class T>
float finish_element(T decoded, T target, bool residual, T& out) {
  const float value = static_cast<float>(decoded), wanted = static_cast<float>(target), error = value - wanted;
  out = residual ? static_cast<T>(value + wanted) : decoded;
  return error * error;
}

// recovered = decoded (+ x); returns the sum of the squared errors of the rows that count, each over its width
template <class T>
double finish_target(const Step<T>& step, int64_t i, const T* decoded, T* recovered) {
  const Plan& plan = step.plan;
  const RowList& rows = plan.decoded[i];
  const int64_t d = step.width(i), batch = step.batch();
  const Given<T>& x = step.features[i];
  std::vector<float> errors(batch, 0.0f);
  std::vector<int32_t> row_of;
  if (!rows.all) {
    row_of.assign(batch, -1);
    for (int64_t r = 0; r < rows.count; ++r) row_of[rows[r]] = static_cast<int32_t>(r);
  }
  each_row(step.pool, batch, 3 * d, [&](int64_t b) {
    const int64_t r = rows.all ? b : row_of[b];
    const bool present = plan.is_present(b, i);
    T* out = recovered + b * d;
    const T* in = x.data + b * x.row;
    if (r < 0) {
      for (int64_t c = 0; c < d; ++c) out[c] = step.residual && present ? in[c * x.col] : static_cast<T>(0.0f);
      return;
    }
    const T* y = decoded + r * d;
    if (!present) {
      if (out != y) std::memcpy(static_cast<void*>(out), y, d * sizeof(T));
      return;
    }
    float part[8] = {};
    int64_t c = 0;
    if (x.col == 1) {
      for (; c + 8 <= d; c += 8)
        for (int64_t l = 0; l < 8; ++l) part[l] += finish_element(y[c + l], in[c + l], step.residual, out[c + l]);
    } else {  // the same order of sums: a layout changes no bit
      for (; c + 8 <= d; c += 8)
        for (int64_t l = 0; l < 8; ++l) part[l] += finish_element(y[c + l], in[(c + l) * x.col], step.residual, out[c + l]);
    }
    for (; c < d; ++c) part[0] += finish_element(y[c], in[c * x.col], step.residual, out[c]);
    errors[b] = ((part[0] + part[1]) + (part[2] + part[3]) + ((part[4] + part[5]) + (part[6] + part[7]))) / static_cast<float>(d);
  });
  double sum = 0;
  for (float e : errors) sum += e;
  return sum;
}

template <class T>
double decode(const Step<T>& step, Kept<T>& kept, const T* latents, const std::vector<T*>& recovered, Arena& arena) {
  const Plan& plan = step.plan;
  double sum = 0;
  for (int64_t i = 0; i < step.m(); ++i) {
    const Arena::Scope scratch(arena);
    const RowList& rows = plan.decoded[i];
    const Layer<T>&first = step.decode1[i], &second = step.decode2[i];
    T* hidden = kept.decoder_hidden[i];
    if (hidden) {
      clear_tail(hidden, rows.count, step.batch(), first.out);
    } else {
      hidden = arena.take<T>(rows.count * first.out);
    }
    linear(first, mix(step, i, latents, arena), rows.count, true, hidden, step.pool);
    T* decoded = rows.all ? recovered[i] : arena.take<T>(rows.count * second.out);
    linear(second, dense<T>(hidden, first.out), rows.count, false, decoded, step.pool);
    sum += finish_target(step, i, decoded, recovered[i]);
  }
  return sum;
}

// Sum of the cross entropies of rows of modality i with label i; softmax - onehot into d_logits if given.
template <class T>
double cross_entropy(const Step<T>& step, const float* logits, float* d_logits) {
  const Plan& plan = step.plan;
  const int64_t m = step.m();
  std::vector<float> losses(plan.rows());
  for (int64_t i = 0; i < m; ++i)
    each_row(step.pool, plan.encoded[i].count, 16 * m, [&](int64_t r) {
      const int64_t row = plan.offset[i] + r;
      const float* z = logits + row * m;
      float top = z[0], sum = 0;
      for (int64_t c = 1; c < m; ++c) top = z[c] > top ? z[c] : top;
      for (int64_t c = 0; c < m; ++c) sum += std::exp(z[c] - top);
      losses[row] = std::log(sum) - (z[i] - top);
      if (d_logits)
        for (int64_t c = 0; c < m; ++c) d_logits[row * m + c] = std::exp(z[c] - top) / sum - (c == i ? 1.0f : 0.0f);
    });
  double total = 0;
  for (float loss : losses) total += loss;
  return total;
}

template <class T>
double discriminate(const Step<T>& step, Kept<T>* kept, const T* latents, Arena& arena) {
  const Plan& plan = step.plan;
  const int64_t rows = plan.rows(), all = step.m() * step.batch();
  const auto last = static_cast<int64_t>(step.psi.size()) - 1;
  const T* act = latents;
  for (int64_t n = 0; n < last; ++n) {
    const Layer<T>& layer = step.psi[n];
    T* out = kept && n < last - 1 ? kept->psi_hidden[n] : arena.take<T>(rows * layer.out);
    linear(layer, dense<T>(act, layer.in), rows, true, out, step.pool);
    if (kept && n < last - 1) clear_tail(out, rows, all, layer.out);
    act = out;
  }
  const Layer<T>& layer = step.psi[last];
  const int64_t p = layer.in, m = layer.out;
  if (kept && kept->psi_gate) {
    uint8_t* gate = kept->psi_gate;
    each_row(step.pool, rows, p, [&](int64_t r) {
      for (int64_t c = 0; c < p; ++c) gate[r * p + c] = static_cast<float>(act[r * p + c]) > 0 ? 1 : 0;
    });
    clear_tail(gate, rows, all, p);
  }
  const float* in = widened(act, rows * p, arena, step.pool);
  float* logits = arena.take<float>(rows * m);
  Finish<float> finish;
  finish.bias = widened(layer.bias, m, arena, step.pool);
  product(rows, m, p, dense<float>(in, p), transposed<float>(widened(layer.weight, m * p, arena, step.pool), p), logits, finish,
          nullptr, step.pool);
  const double loss = cross_entropy(step, logits, kept ? kept->d_logits : nullptr);
  if (kept) {
    clear_tail(kept->d_logits, rows, all, m);
    product(m, p, rows, transposed<float>(kept->d_logits, m), dense<float>(in, p), kept->d_last_weight, {}, nullptr, step.pool);
    // The rows of probabilities minus labels nearly cancel in their sum, so it is taken in double precision.
    for (int64_t c = 0; c < m; ++c) {
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) sum += kept->d_logits[r * m + c];
      kept->d_last_bias[c] = static_cast<float>(sum);
    }
  }
  return loss;
}

}  // namespace

template <class T>
void forward(const Step<T>& step, Kept<T>* given, Outputs<T>& out) {
  const Plan& plan = step.plan;
  const int64_t m = step.m(), batch = step.batch(), k = step.latent;
  Kept<T> nothing;
  nothing.encoder_hidden.resize(m), nothing.decoder_hidden.resize(m);
  Kept<T>& kept = given ? *given : nothing;
  Arena arena;
  const bool compact = plan.rows() < m * batch;
  T* latents = compact ? arena.take<T>(plan.rows() * k) : out.latents;
  encode(step, kept, latents, arena);
  if (compact)
    for (int64_t i = 0; i < m; ++i)
      scatter(latents + plan.offset[i] * k, plan.encoded[i], batch, k, out.latents + i * batch * k, step.pool);
  out.reconstruction = static_cast<float>(decode(step, kept, latents, out.recovered, arena) / step.reconstruction_count);
  out.discrimination = static_cast<float>(discriminate(step, given, latents, arena) / step.discrimination_count);
}

template void forward(const Step<float>&, Kept<float>*, Outputs<float>&);
template void forward(const Step<c10::BFloat16>&, Kept<c10::BFloat16>*, Outputs<c10::BFloat16>&);
template void forward(const Step<c10::Half>&, Kept<c10::Half>*, Outputs<c10::Half>&);

}  // namespace mmc::ebr
