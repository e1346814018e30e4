// Backward of the EBR step. Only what is asked for is computed; the reversal is the scale of the product that meets the latents.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "step.h"

namespace mmc::ebr {
namespace {

template <class T>
void fill_zero(T* data, int64_t count) {
  if (data) std::memset(static_cast<void*>(data), 0, count * sizeof(T));
}

template <class T>
void zero_layer(const Layer<T>& layer, T* d_weight, T* d_bias) {
  fill_zero(d_weight, layer.in * layer.out);
  fill_zero(d_bias, layer.out);
}

template <class T>
class Backward {
 public:
  Backward(const Step<T>& step, const Kept<T>& kept, const std::vector<const T*>& recovered, const T* latents,
           const Incoming<T>& in, const Outgoing<T>& out)
      : step_(step),
        plan_(step.plan),
        kept_(kept),
        recovered_(recovered),
        in_(in),
        out_(out),
        k_(step.latent),
        latents_(compact_latents(latents)),
        filled_(step.m(), false) {
    for (int64_t i = 0; i < step.m(); ++i)
      if (out.features[i] || wants(out.encoders, i, 4)) need_latents_ = true;
    if (need_latents_) d_latents_ = arena_.template take<T>(plan_.rows() * k_);
  }

  void run() {
    fill_zero(out_.source, out_.source ? step_.batch() * step_.m() * step_.m() : 0);
    {
      const Arena::Scope scratch(arena_);
      discriminator();
    }
    for (int64_t i = 0; i < step_.m(); ++i) {
      const Arena::Scope scratch(arena_);
      decoder(i);
    }
    for (int64_t i = 0; i < step_.m(); ++i) {
      const Arena::Scope scratch(arena_);
      encoder(i);
    }
  }

 private:
  static bool wants(const std::vector<T*>& grads, int64_t i, int64_t per_head) {
    for (int64_t n = 0; n < per_head; ++n)
      if (grads[per_head * i + n]) return true;
    return false;
  }

  // present rows of all modalities, one after the other
  const T* compact_latents(const T* latents) {
    const int64_t batch = step_.batch();
    if (plan_.rows() == step_.m() * batch) return latents;
    T* out = arena_.template take<T>(plan_.rows() * k_);
    for (int64_t i = 0; i < step_.m(); ++i) {
      const RowList& rows = plan_.encoded[i];
      const Given<T> from{latents + i * batch * k_, k_, 1};
      T* to = out + plan_.offset[i] * k_;
      each_row(step_.pool, rows.count, k_, [&](int64_t r) { copy_row(from, rows[r], to + r * k_, k_); });
    }
    return out;
  }

  // d_weight = d_out^T x, d_bias = sums of d_out
  void weight_gradient(const Layer<T>& layer, const T* d_out, View<T> x, int64_t rows, T* d_weight, T* d_bias) {
    if (d_weight) {
      product(layer.out, layer.in, rows, transposed<T>(d_out, layer.out), x, d_weight, {}, d_bias, step_.pool);
    } else if (d_bias) {
      std::vector<double> sums(layer.out, 0.0);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < layer.out; ++c) sums[c] += static_cast<float>(d_out[r * layer.out + c]);
      for (int64_t c = 0; c < layer.out; ++c) d_bias[c] = static_cast<T>(static_cast<float>(sums[c]));
    }
  }

  // d_in = d_out W, zero where the gate is not positive
  void input_gradient(const Layer<T>& layer, const T* d_out, int64_t rows, T* d_in, const T* gate, float scale = 1,
                      bool add = false) {
    Finish<T> finish;
    finish.gate = gate, finish.scale = scale, finish.add = add;
    product(rows, layer.in, layer.out, dense<T>(d_out, layer.out), dense<T>(layer.weight, layer.in), d_in, finish,
            static_cast<T*>(nullptr), step_.pool);
  }

  void discriminator() {
    const auto last = static_cast<int64_t>(step_.psi.size()) - 1;
    if (!in_.discrimination || plan_.rows() == 0) {
      for (int64_t n = 0; n <= last; ++n) zero_layer(step_.psi[n], out_.psi[2 * n], out_.psi[2 * n + 1]);
      return;
    }
    const int64_t rows = plan_.rows();
    const Layer<T>& top = step_.psi[last];
    const float scale = *in_.discrimination / step_.discrimination_count;
    for (int64_t c = 0; out_.psi[2 * last] && c < top.in * top.out; ++c)
      out_.psi[2 * last][c] = static_cast<T>(scale * kept_.d_last_weight[c]);
    for (int64_t c = 0; out_.psi[2 * last + 1] && c < top.out; ++c)
      out_.psi[2 * last + 1][c] = static_cast<T>(scale * kept_.d_last_bias[c]);

    // strength zero cuts the branch instead of multiplying it, so that 0 * inf never becomes NaN
    const bool reach = need_latents_ && in_.reversal != 0;
    int64_t lowest = last;  // the lowest layer whose own gradient somebody wants
    for (int64_t n = last - 1; n >= 0; --n)
      if (out_.psi[2 * n] || out_.psi[2 * n + 1]) lowest = n;
    if (!reach && lowest == last) return;

    const float* weight = widened(top.weight, top.in * top.out, arena_, step_.pool);
    Finish<float> finish;
    finish.scale = last == 0 ? -in_.reversal * scale : scale;
    float* first = arena_.template take<float>(rows * top.in);
    product(rows, top.in, top.out, dense<float>(kept_.d_logits, top.out), dense<float>(weight, top.in), first, finish, nullptr,
            step_.pool);
    if (last == 0) {
      narrow(first, d_latents_, rows * k_, step_.pool);
      filled_.assign(filled_.size(), true);
      return;
    }
    each_row(step_.pool, rows, top.in, [&](int64_t r) {
      for (int64_t c = r * top.in; c < (r + 1) * top.in; ++c) first[c] = kept_.psi_gate[c] ? first[c] : 0.0f;
    });
    const T* d = narrowed(first, rows * top.in);
    for (int64_t n = last - 1; n >= 0; --n) {
      const Layer<T>& layer = step_.psi[n];
      const T* act = n == 0 ? latents_ : kept_.psi_hidden[n - 1];
      weight_gradient(layer, d, dense<T>(act, layer.in), rows, out_.psi[2 * n], out_.psi[2 * n + 1]);
      if (n > 0) {
        if (!reach && n == lowest) return;
        T* next = arena_.template take<T>(rows * layer.in);
        input_gradient(layer, d, rows, next, act);
        d = next;
      } else if (reach) {
        input_gradient(layer, d, rows, d_latents_, nullptr, -in_.reversal);
        filled_.assign(filled_.size(), true);
      }
    }
  }

  const float* narrowed_impl(const float* src, int64_t, const float*) { return src; }
  template <class U>
  const U* narrowed_impl(const float* src, int64_t count, const U*) {
    U* out = arena_.template take<U>(count);
    narrow(src, out, count, step_.pool);
    return out;
  }
  const T* narrowed(const float* src, int64_t count) { return narrowed_impl(src, count, static_cast<const T*>(nullptr)); }

  // gradient of target i's decoder output: from the recovered features and from the reconstruction loss
  const T* output_gradient(int64_t i) {
    const RowList& rows = plan_.decoded[i];
    const int64_t d = step_.width(i);
    const Given<T>&grad = in_.recovered[i], &x = step_.features[i];
    const bool loss = in_.reconstruction.has_value();
    if (rows.all && grad && !loss && grad.col == 1 && grad.row == d) return grad.data;
    const float scale = loss ? 2.0f / static_cast<float>(d) * (*in_.reconstruction / step_.reconstruction_count) : 0.0f;
    T* out = arena_.template take<T>(rows.count * d);
    each_row(step_.pool, rows.count, 3 * d, [&](int64_t r) {
      const int64_t b = rows[r];
      T* to = out + r * d;
      if (grad) {
        copy_row(grad, b, to, d);
      } else {
        std::memset(static_cast<void*>(to), 0, d * sizeof(T));
      }
      if (!loss || !plan_.is_present(b, i)) return;
      const T *value = recovered_[i] + b * d, *in = x.data + b * x.row;
      for (int64_t c = 0; c < d; ++c) {
        const float target = static_cast<float>(in[c * x.col]);
        const float decoded = step_.residual ? static_cast<float>(value[c]) - target : static_cast<float>(value[c]);
        to[c] = static_cast<T>(static_cast<float>(to[c]) + (decoded - target) * scale);
      }
    });
    return out;
  }

  void decoder(int64_t i) {
    const RowList& rows = plan_.decoded[i];
    const Layer<T>&first = step_.decode1[i], &second = step_.decode2[i];
    T* const* grads = &out_.decoders[4 * i];
    const bool flows = in_.recovered[i] || in_.reconstruction;
    if (!flows || rows.count == 0) {
      zero_layer(first, grads[0], grads[1]);
      zero_layer(second, grads[2], grads[3]);
      return;
    }
    const bool need_mixed = need_latents_ || out_.source;
    if (!need_mixed && !wants(out_.decoders, i, 4)) return;
    const T* d = output_gradient(i);
    weight_gradient(second, d, dense<T>(kept_.decoder_hidden[i], first.out), rows.count, grads[2], grads[3]);
    if (!need_mixed && !grads[0] && !grads[1]) return;
    T* d_hidden = arena_.template take<T>(rows.count * first.out);
    input_gradient(second, d, rows.count, d_hidden, kept_.decoder_hidden[i]);
    weight_gradient(first, d_hidden, mix(step_, i, latents_, arena_), rows.count, grads[0], grads[1]);
    if (!need_mixed) return;
    if (plan_.own()) {
      input_gradient(first, d_hidden, rows.count, d_latents_ + plan_.offset[i] * k_, nullptr, 1, filled_[i]);
      filled_[i] = true;
      return;
    }
    T* d_mixed = arena_.template take<T>(rows.count * k_);
    input_gradient(first, d_hidden, rows.count, d_mixed, nullptr);
    adjoint(i, d_mixed);
  }

  void fill(int64_t i) {
    if (!filled_[i]) fill_zero(d_latents_ + plan_.offset[i] * k_, plan_.encoded[i].count * k_);
    filled_[i] = true;
  }

  // the gradient of target i's mixed latents into the latents and the weights; each row of a target goes to latents of its own
  void adjoint(int64_t i, const T* d_mixed) {
    const RowList& rows = plan_.decoded[i];
    const int64_t m = plan_.m;
    if (need_latents_)
      for (int64_t j = 0; j < m; ++j) fill(j);
    each_row(step_.pool, rows.count, plan_.index ? k_ : 2 * k_ * m, [&](int64_t r) {
      const int64_t b = rows[r];
      const T* d = d_mixed + r * k_;
      if (plan_.index) {
        if (need_latents_) add_row(d_latents_ + plan_.latent(plan_.index(b, i), b) * k_, d, 1.0f);
        return;
      }
      for (int64_t j = 0; j < m; ++j) {
        if (!plan_.is_present(b, j)) continue;
        const float w = plan_.weight(b, i, j);
        const int64_t row = plan_.latent(j, b);
        if (need_latents_ && w != 0) add_row(d_latents_ + row * k_, d, w);
        if (out_.source) out_.source[(b * m + i) * m + j] = inner(d, latents_ + row * k_, w != 0);
      }
    });
  }

  void add_row(T* to, const T* from, float weight) const {
    for (int64_t c = 0; c < k_; ++c) to[c] = static_cast<T>(static_cast<float>(to[c]) + weight * static_cast<float>(from[c]));
  }

  // an unused latent that is not finite counts as zero
  float inner(const T* d, const T* g, bool used) const {
    double sum = 0;
    bool finite = true;
    for (int64_t c = 0; c < k_; ++c) {
      const auto value = static_cast<float>(g[c]);
      finite &= value - value == 0;
      sum += static_cast<double>(static_cast<float>(d[c])) * value;
    }
    return used || finite ? static_cast<float>(sum) : 0.0f;
  }

  void encoder(int64_t i) {
    const RowList& rows = plan_.encoded[i];
    const Layer<T>&first = step_.encode1[i], &second = step_.encode2[i];
    T* const* grads = &out_.encoders[4 * i];
    T* d_x = out_.features[i];
    if (!d_x && !wants(out_.encoders, i, 4)) return;
    if (in_.latents && rows.count > 0) add_latent_gradient(i);
    if (!filled_[i] || rows.count == 0) {  // nothing came down to these latents
      zero_layer(first, grads[0], grads[1]);
      zero_layer(second, grads[2], grads[3]);
      fill_zero(d_x, d_x ? step_.batch() * first.in : 0);
    } else {
      T* d = d_latents_ + plan_.offset[i] * k_;
      if (step_.normalize) layer_norm_gradient(i, d);
      weight_gradient(second, d, dense<T>(kept_.encoder_hidden[i], first.out), rows.count, grads[2], grads[3]);
      if (!d_x && !grads[0] && !grads[1]) return;
      T* d_hidden = arena_.template take<T>(rows.count * first.out);
      input_gradient(second, d, rows.count, d_hidden, kept_.encoder_hidden[i]);
      if (grads[0] || grads[1])
        weight_gradient(first, d_hidden, gather(step_.features[i], rows, first.in, arena_, step_.pool), rows.count, grads[0],
                        grads[1]);
      if (!d_x) return;
      T* compact = rows.all ? d_x : arena_.template take<T>(rows.count * first.in);
      input_gradient(first, d_hidden, rows.count, compact, nullptr);
      if (!rows.all) scatter(compact, rows, step_.batch(), first.in, d_x, step_.pool);
    }
    const Given<T>& grad = in_.recovered[i];
    if (!d_x || !step_.residual || !grad) return;
    each_row(step_.pool, rows.count, first.in, [&](int64_t r) {
      const int64_t b = rows[r];
      T* to = d_x + b * first.in;
      for (int64_t c = 0; c < first.in; ++c)
        to[c] = static_cast<T>(static_cast<float>(to[c]) + static_cast<float>(grad.data[b * grad.row + c * grad.col]));
    });
  }

  void add_latent_gradient(int64_t i) {
    const RowList& rows = plan_.encoded[i];
    fill(i);
    const T* base = in_.latents + i * in_.latents_stride[0];
    each_row(step_.pool, rows.count, k_, [&](int64_t r) {
      const T* from = base + rows[r] * in_.latents_stride[1];
      T* to = d_latents_ + (plan_.offset[i] + r) * k_;
      for (int64_t c = 0; c < k_; ++c)
        to[c] = static_cast<T>(static_cast<float>(to[c]) + static_cast<float>(from[c * in_.latents_stride[2]]));
    });
  }

  // d = rstd (d - mean(d) - y mean(d y)), in place
  void layer_norm_gradient(int64_t i, T* rows) {
    each_row(step_.pool, plan_.encoded[i].count, 4 * k_, [&](int64_t r) {
      const T* y = latents_ + (plan_.offset[i] + r) * k_;
      T* d = rows + r * k_;
      double sum = 0, along = 0;
      for (int64_t c = 0; c < k_; ++c) {
        sum += static_cast<float>(d[c]);
        along += static_cast<double>(static_cast<float>(d[c])) * static_cast<float>(y[c]);
      }
      const float mean = static_cast<float>(sum / k_), slope = static_cast<float>(along / k_);
      const float rstd = kept_.rstd[i * step_.batch() + r];
      for (int64_t c = 0; c < k_; ++c)
        d[c] = static_cast<T>((static_cast<float>(d[c]) - mean - static_cast<float>(y[c]) * slope) * rstd);
    });
  }

  const Step<T>& step_;
  const Plan& plan_;
  const Kept<T>& kept_;
  const std::vector<const T*>& recovered_;
  const Incoming<T>& in_;
  const Outgoing<T>& out_;
  const int64_t k_;
  Arena arena_;
  const T* latents_;
  T* d_latents_ = nullptr;     // [present rows, k]
  std::vector<bool> filled_;   // whether the rows of a modality in d_latents_ have been written
  bool need_latents_ = false;
};

}  // namespace

template <class T>
void backward(const Step<T>& step, const Kept<T>& kept, const std::vector<const T*>& recovered, const T* latents,
              const Incoming<T>& in, const Outgoing<T>& out) {
  Backward<T>(step, kept, recovered, latents, in, out).run();
}

#define MMC_BACKWARD(T)                                                                                              \
  template void backward(const Step<T>&, const Kept<T>&, const std::vector<const T*>&, const T*, const Incoming<T>&, \
                         const Outgoing<T>&);
MMC_BACKWARD(float)
MMC_BACKWARD(c10::BFloat16)
MMC_BACKWARD(c10::Half)

}  // namespace mmc::ebr
