// One EBR step on pointers: everything that forward and backward share.
#pragma once
#include <optional>

#include "plan.h"
#include "product.h"

namespace mmc::ebr {

template <class T>
struct Layer {
  const T* weight;  // [out, in]
  const T* bias;    // [out]
  int64_t in, out;
};

// A matrix of the caller with any strides, or none.
template <class T>
struct Given {
  const T* data = nullptr;
  int64_t row = 0, col = 0;
  explicit operator bool() const { return data != nullptr; }
};

template <class T>
struct Step {
  const Plan& plan;
  int64_t latent;
  bool residual, normalize;
  std::vector<Given<T>> features;  // [B, d_i]
  std::vector<Layer<T>> encode1, encode2, decode1, decode2, psi;
  float discrimination_count, reconstruction_count;  // the denominators of the losses
  Workers pool;

  int64_t m() const { return plan.m; }
  int64_t batch() const { return plan.batch; }
  int64_t width(int64_t i) const { return encode1[i].in; }
};

// What backward needs beside inputs, latents and recovered features. Rows are compact and zero beyond those that are computed.
template <class T>
struct Kept {
  std::vector<T*> encoder_hidden, decoder_hidden;  // [B, h] after ReLU
  std::vector<T*> psi_hidden;                      // [m B, p] after ReLU, all hidden layers but the last
  uint8_t* psi_gate = nullptr;                     // [m B, p]: the last hidden layer is positive
  // the discriminator's last layer for the loss summed instead of averaged: its gradient needs no later input than the loss
  float* d_logits = nullptr;       // [m B, m]
  float* d_last_weight = nullptr;  // [m, p]
  float* d_last_bias = nullptr;    // [m]
  float* rstd = nullptr;           // [m, B], with normalize
};

template <class T>
struct Outputs {
  std::vector<T*> recovered;  // [B, d_i]
  T* latents;                 // [m, B, k]
  float discrimination, reconstruction;
};

// Gradients of the outputs; absent ones are zero.
template <class T>
struct Incoming {
  std::vector<Given<T>> recovered;
  const T* latents = nullptr;
  int64_t latents_stride[3] = {0, 0, 0};
  std::optional<float> discrimination, reconstruction;
  float reversal = 1;
};

// Gradients to compute; a null pointer is one that nobody asked for.
template <class T>
struct Outgoing {
  std::vector<T*> features;
  float* source = nullptr;    // [B, m, m]
  std::vector<T*> encoders, decoders;  // four a head: W1, b1, W2, b2
  std::vector<T*> psi;                 // two a layer
};

template <class T>
void forward(const Step<T>& step, Kept<T>* kept, Outputs<T>& out);
template <class T>
void backward(const Step<T>& step, const Kept<T>& kept, const std::vector<const T*>& recovered, const T* latents,
              const Incoming<T>& in, const Outgoing<T>& out);

// body(r) for rows [0, count) in torch's pool; `cost`: elements of a row
template <class F>
void each_row(const Pool& pool, int64_t count, int64_t cost, F&& body) {
  parallel_for(pool, count, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cost)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) body(r);
  });
}

template <class T>
void copy_row(const Given<T>& from, int64_t b, T* to, int64_t width) {
  const T* src = from.data + b * from.row;
  if (from.col == 1) {
    std::memcpy(to, src, width * sizeof(T));
  } else {
    for (int64_t c = 0; c < width; ++c) to[c] = src[c * from.col];
  }
}

// Rows `rows` of a caller's matrix, one after the other: in place where they lie so already.
template <class T>
View<T> gather(const Given<T>& from, const RowList& rows, int64_t width, Arena& arena, const Pool& pool) {
  if (rows.all && (from.col == 1 || width == 1)) return {from.data, from.row, 1};
  T* out = arena.take<T>(rows.count * width);
  each_row(pool, rows.count, width, [&](int64_t r) { copy_row(from, rows[r], out + r * width, width); });
  return dense<T>(out, width);
}

// The inverse: compact rows to their places, zeros elsewhere.
template <class T>
void scatter(const T* from, const RowList& rows, int64_t batch, int64_t width, T* to, const Pool& pool) {
  std::vector<int32_t> row_of(batch, -1);
  for (int64_t r = 0; r < rows.count; ++r) row_of[rows[r]] = static_cast<int32_t>(r);
  each_row(pool, batch, width, [&](int64_t b) {
    if (row_of[b] < 0) {
      std::memset(static_cast<void*>(to + b * width), 0, width * sizeof(T));
    } else {
      std::memcpy(static_cast<void*>(to + b * width), from + row_of[b] * width, width * sizeof(T));
    }
  });
}

// The mixed latents of target modality i, [decoded rows, k]: in place under identity routing.
template <class T>
View<T> mix(const Step<T>& step, int64_t i, const T* latents, Arena& arena) {
  const Plan& plan = step.plan;
  const int64_t k = step.latent;
  if (plan.own()) return dense<T>(latents + plan.offset[i] * k, k);
  const RowList& rows = plan.decoded[i];
  T* out = arena.take<T>(rows.count * k);
  each_row(step.pool, rows.count, plan.index ? k : k * plan.m, [&](int64_t r) {
    const int64_t b = rows[r];
    T* u = out + r * k;
    if (plan.index) {
      std::memcpy(static_cast<void*>(u), latents + plan.latent(plan.index(b, i), b) * k, k * sizeof(T));
      return;
    }
    float sum[256];
    for (int64_t c0 = 0; c0 < k; c0 += 256) {
      const int64_t size = std::min<int64_t>(256, k - c0);
      std::fill_n(sum, size, 0.0f);
      for (int64_t j = 0; j < plan.m; ++j) {
        const float w = plan.weight(b, i, j);
        if (w == 0 || !plan.is_present(b, j)) continue;  // weight zero: not even a NaN gets through
        const T* g = latents + plan.latent(j, b) * k + c0;
        for (int64_t c = 0; c < size; ++c) sum[c] += w * static_cast<float>(g[c]);
      }
      for (int64_t c = 0; c < size; ++c) u[c0 + c] = static_cast<T>(sum[c]);
    }
  });
  return dense<T>(out, k);
}

}  // namespace mmc::ebr
