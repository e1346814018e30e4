// mmc_fast::ebr_step and its backward as CPU operators: checks, data pointers, outputs. The arithmetic is in forward.cpp and
// backward.cpp, the schema in mmc_fast/ops/ebr/op.py. Uses ATen's C++ interface, so this library belongs to one torch release.
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include "inputs.h"
#include "step.h"

namespace mmc::ebr {
namespace {

// The ways of a step in T: float32 serves every dtype, bfloat16 only its own.
template <class T>
Workers workers() {
  const Pool pool = torch_pool();
  const bool fixed = at::globalContext().deterministicAlgorithms();
  const auto of = [&](Number number) { return ways(number, pool.threads, fixed); };
  return {pool, {of(Number::float32), std::is_same_v<T, at::BFloat16> ? of(Number::bfloat16) : Ways{0}}};
}

Tensor empty(at::IntArrayRef sizes, at::ScalarType type) { return Tensor(at::detail::empty_cpu(sizes, type)); }

bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

void check_inputs(const Inputs& in) {
  const auto m = static_cast<int64_t>(in.features.size());
  const auto count = static_cast<int64_t>(in.params.size());
  TORCH_CHECK_VALUE(m > 0 && count >= 8 * m + 2 && (count - 8 * m) % 2 == 0, "ebr_step: got ", count, " parameters for ", m,
                    " features; pass four per encoder and decoder and two per layer of the discriminator");
  const auto type = in.features[0].scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "ebr_step: features[0] is ", type,
                   "; the native kernel computes float32, bfloat16 and float16; use backend='reference'");
  const int64_t batch = in.features[0].dim() == 2 ? in.features[0].size(0) : -1;
  for (int64_t i = 0; i < m; ++i) {
    const Tensor& f = in.features[i];
    TORCH_CHECK_VALUE(f.dim() == 2 && f.size(0) == batch && f.scalar_type() == type && f.is_cpu(), "ebr_step: features[", i,
                      "] does not fit features[0]; pass [", batch, ", width] tensors of one dtype on the CPU");
  }
  const auto fits = [&](int64_t n, int64_t inputs, int64_t outputs) {
    const Tensor &w = in.params[n], &b = in.params[n + 1];
    for (const Tensor* p : {&w, &b})
      TORCH_CHECK_TYPE(p->scalar_type() == type && p->is_cpu(), "ebr_step: parameter ", p == &w ? n : n + 1, " is ",
                       p->scalar_type(), " on ", p->device(), " but features[0] is ", type,
                       " on cpu; cast the model or use torch.autocast");
    TORCH_CHECK_VALUE(w.dim() == 2 && b.dim() == 1 && w.size(1) == inputs && (outputs < 0 || w.size(0) == outputs) &&
                          b.size(0) == w.size(0),
                      "ebr_step: params[", n, "] has shape ", w.sizes(), " and params[", n + 1, "] ", b.sizes(), "; expected ",
                      inputs, " columns and one bias per row");
    return w.size(0);
  };
  int64_t latent = -1;
  for (int64_t i = 0; i < m; ++i) latent = fits(4 * i + 2, fits(4 * i, in.features[i].size(1), -1), latent);
  for (int64_t i = m; i < 2 * m; ++i) fits(4 * i + 2, fits(4 * i, latent, -1), in.features[i - m].size(1));
  int64_t width = latent;
  for (int64_t n = 8 * m; n < count; n += 2) width = fits(n, width, n + 2 == count ? m : -1);
  if (given(in.present))
    TORCH_CHECK_VALUE(in.present->scalar_type() == at::kBool && in.present->dim() == 2 && in.present->size(0) == batch &&
                          in.present->size(1) == m && in.present->is_cpu(),
                      "ebr_step: present is ", in.present->scalar_type(), " ", in.present->sizes(), "; expected bool [", batch, ", ",
                      m, "]");
  if (given(in.source)) {
    const Tensor& s = *in.source;
    const bool weights = s.is_floating_point();
    TORCH_CHECK_VALUE(s.is_cpu() && (weights || s.scalar_type() == at::kLong) && s.dim() == (weights ? 3 : 2) && s.size(0) == batch &&
                          s.size(1) == m && (!weights || s.size(2) == m),
                      "ebr_step: source is ", s.scalar_type(), " ", s.sizes(), "; expected int64 [", batch, ", ", m, "] or floats [",
                      batch, ", ", m, ", ", m, "]");
  }
  TORCH_CHECK_VALUE(in.reversal.numel() == 1 && in.reversal.is_cpu(), "ebr_step: reversal must be one number on the CPU");
  TORCH_CHECK_VALUE(!given(in.normalizer) || in.normalizer->numel() == 1 || in.normalizer->numel() == 2,
                    "ebr_step: normalizer must be a tensor of one element, or of two (#present, #rows)");
}

float denominator(const OptionalTensor& normalizer, int64_t position, int64_t rows) {
  float n = static_cast<float>(rows);
  if (given(normalizer)) {
    const Tensor flat = normalizer->reshape({-1}).to(at::kFloat);
    n = flat[std::min<int64_t>(position, flat.size(0) - 1)].item<float>();
  }
  return n == 0 ? 1.0f : n;
}

// The arguments as pointers, and what keeps them alive.
template <class T>
struct Bound {
  std::vector<Tensor> keep;
  Plan plan;
  Step<T> step;

  explicit Bound(const Inputs& in)
      : plan(make_plan(in)), step{plan, in.params[2].size(0), in.residual, in.normalize, {}, {}, {}, {}, {}, {}, 1, 1, workers<T>()} {
    TORCH_CHECK_VALUE(plan.error.empty(), plan.error);
    const auto m = static_cast<int64_t>(in.features.size());
    keep.reserve(in.params.size() + 1);
    step.features.reserve(m);
    for (auto* layers : {&step.encode1, &step.encode2, &step.decode1, &step.decode2}) layers->reserve(m);
    step.psi.reserve(in.params.size() / 2 - 4 * m);
    for (const Tensor& f : in.features) step.features.push_back({pointer<T>(f), f.stride(0), f.stride(1)});
    for (int64_t i = 0; i < m; ++i) {
      step.encode1.push_back(layer(in.params, 4 * i));
      step.encode2.push_back(layer(in.params, 4 * i + 2));
      step.decode1.push_back(layer(in.params, 4 * (m + i)));
      step.decode2.push_back(layer(in.params, 4 * (m + i) + 2));
    }
    for (int64_t n = 8 * m; n < static_cast<int64_t>(in.params.size()); n += 2) step.psi.push_back(layer(in.params, n));
    step.discrimination_count = denominator(in.normalizer, 0, plan.rows());
    step.reconstruction_count = denominator(in.normalizer, 1, plan.loss_rows);
  }

 private:
  Plan make_plan(const Inputs& in) {
    Table<bool> present;
    Table<int64_t> index;
    const float* weights = nullptr;
    if (given(in.present)) present = {pointer<bool>(*in.present), in.present->stride(0), in.present->stride(1)};
    if (given(in.source) && in.source->is_floating_point()) {
      keep.push_back(in.source->to(at::kFloat).contiguous());
      weights = pointer<float>(keep.back());
    } else if (given(in.source)) {
      index = {pointer<int64_t>(*in.source), in.source->stride(0), in.source->stride(1)};
    }
    return Plan(static_cast<int64_t>(in.features.size()), in.features[0].size(0), present, index, weights);
  }

  const T* dense_pointer(const Tensor& t) {
    if (t.is_contiguous()) return pointer<T>(t);
    keep.push_back(t.contiguous());
    return pointer<T>(keep.back());
  }
  Layer<T> layer(TensorList params, int64_t n) {
    return {dense_pointer(params[n]), dense_pointer(params[n + 1]), params[n].size(1), params[n].size(0)};
  }
};

// The tensors of Kept, in the order of Saved in mmc_fast/ops/ebr/eager.py.
template <class T>
std::vector<Tensor> allocate_kept(const Step<T>& step, at::ScalarType type) {
  std::vector<Tensor> saved;
  const int64_t m = step.m(), batch = step.batch();
  for (const auto& layer : step.encode1) saved.push_back(empty({batch, layer.out}, type));
  for (const auto& layer : step.decode1) saved.push_back(empty({batch, layer.out}, type));
  const auto last = step.psi.size() - 1;
  for (size_t n = 0; n + 1 < last; ++n) saved.push_back(empty({m * batch, step.psi[n].out}, type));
  if (last > 0) saved.push_back(empty({m * batch, step.psi[last].in}, at::kByte));
  saved.push_back(empty({m * batch, m}, at::kFloat));
  saved.push_back(empty({m, step.psi[last].in}, at::kFloat));
  saved.push_back(empty({m}, at::kFloat));
  if (step.normalize) saved.push_back(empty({m, batch}, at::kFloat));
  return saved;
}

template <class T>
Kept<T> bind_kept(const Step<T>& step, TensorList saved) {
  Kept<T> kept;
  const int64_t m = step.m();
  const auto last = static_cast<int64_t>(step.psi.size()) - 1;
  const int64_t expected = 2 * m + last + 3 + (step.normalize ? 1 : 0);
  TORCH_CHECK(static_cast<int64_t>(saved.size()) == expected, "ebr_step_backward: got ", saved.size(), " saved tensors, expected ",
              expected, "; forward and backward must run on the same backend");
  auto next = saved.begin();
  for (int64_t i = 0; i < m; ++i) kept.encoder_hidden.push_back(pointer<T>(*next++));
  for (int64_t i = 0; i < m; ++i) kept.decoder_hidden.push_back(pointer<T>(*next++));
  for (int64_t n = 0; n + 1 < last; ++n) kept.psi_hidden.push_back(pointer<T>(*next++));
  if (last > 0) kept.psi_gate = pointer<uint8_t>(*next++);
  kept.d_logits = pointer<float>(*next++);
  kept.d_last_weight = pointer<float>(*next++);
  kept.d_last_bias = pointer<float>(*next++);
  if (step.normalize) kept.rstd = pointer<float>(*next++);
  return kept;
}

Tensor scalar(float value) {
  Tensor t = empty({}, at::kFloat);
  *pointer<float>(t) = value;
  return t;
}

template <class T>
Forward run_forward(const Step<T>& step, at::ScalarType type, bool keep) {
  std::vector<Tensor> recovered, saved;
  Outputs<T> out{};
  for (int64_t i = 0; i < step.m(); ++i) {
    recovered.push_back(empty({step.batch(), step.width(i)}, type));
    out.recovered.push_back(pointer<T>(recovered.back()));
  }
  Tensor latents = empty({step.m(), step.batch(), step.latent}, type);
  out.latents = pointer<T>(latents);
  Kept<T> kept;
  if (keep) {
    saved = allocate_kept(step, type);
    kept = bind_kept(step, saved);
  }
  forward(step, keep ? &kept : nullptr, out);
  return {std::move(recovered), std::move(latents), scalar(out.discrimination), scalar(out.reconstruction), std::move(saved)};
}

template <class F>
auto with_dtype(at::ScalarType type, F&& f) {
  if (type == at::kFloat) return f(float{});
  if (type == at::kBFloat16) return f(at::BFloat16{});
  return f(at::Half{});
}

// Another backend was asked for: the kernel of no key is the one that every device without its own falls back to, in Python.
bool elsewhere(const Inputs& in) { return in.backend != "cpp"; }
constexpr c10::DispatchKeySet kFallback;

Forward ebr_step(const Inputs& in) {
  if (elsewhere(in)) return call_step(in, kFallback);
  check_inputs(in);
  count_ebr_step(false);
  const at::ScalarType type = in.features[0].scalar_type();
  return with_dtype(type, [&](auto tag) {
    const Bound<decltype(tag)> bound(in);
    return run_forward(bound.step, type, !in.recompute);
  });
}

template <class T>
Gradients run_backward(const Upstream& up, const Inputs& in, const Computed& computed, at::IntArrayRef needs) {
  const Bound<T> bound(in);
  const Step<T>& step = bound.step;
  const int64_t m = step.m();
  const at::ScalarType type = in.features[0].scalar_type();

  Forward again;
  const bool nothing_saved = computed.saved.empty();
  if (nothing_saved) again = run_forward(step, type, true);
  const TensorList values = nothing_saved ? TensorList(std::get<0>(again)) : computed.recovered;
  const TensorList tensors = nothing_saved ? TensorList(std::get<4>(again)) : computed.saved;
  TORCH_CHECK(nothing_saved || given(computed.latents), "ebr_step_backward: latents are missing beside the saved tensors");
  const Tensor g = (nothing_saved ? std::get<1>(again) : *computed.latents).contiguous();
  const Kept<T> kept = bind_kept(step, tensors);
  std::vector<Tensor> dense_values;
  std::vector<const T*> value_pointers;
  for (const Tensor& t : values) {
    dense_values.push_back(t.contiguous());
    value_pointers.push_back(pointer<T>(dense_values.back()));
  }

  Incoming<T> incoming;
  std::vector<Tensor> held;
  for (int64_t i = 0; i < m; ++i) {
    const OptionalTensor t = up.recovered.get(i);
    Given<T> matrix;
    if (given(t)) {
      held.push_back(*t);
      matrix = {pointer<T>(*t), t->stride(0), t->stride(1)};
      if (step.batch() * step.width(i) == 0) matrix = {};
    }
    incoming.recovered.push_back(matrix);
  }
  if (given(up.latents)) {
    incoming.latents = pointer<T>(*up.latents);
    for (int n = 0; n < 3; ++n) incoming.latents_stride[n] = up.latents->stride(n);
  }
  if (given(up.discrimination)) incoming.discrimination = up.discrimination->item<float>();
  if (given(up.reconstruction)) incoming.reconstruction = up.reconstruction->item<float>();
  incoming.reversal = in.reversal.item<float>();

  const auto count = static_cast<int64_t>(in.params.size());
  TORCH_CHECK(static_cast<int64_t>(needs.size()) == m + 1 + count, "ebr_step_backward: needs has ", needs.size(),
              " entries, expected ", m + 1 + count, " (features, source, parameters)");
  Outgoing<T> outgoing;
  std::vector<Tensor> d_features, d_params;
  const auto like = [&](const Tensor& t, int64_t need, std::vector<Tensor>& list) -> T* {
    list.push_back(need ? empty(t.sizes(), type) : empty({0}, type));
    return need ? pointer<T>(list.back()) : nullptr;
  };
  for (int64_t i = 0; i < m; ++i) outgoing.features.push_back(like(in.features[i], needs[i], d_features));
  const bool need_source = needs[m] != 0 && given(in.source);
  Tensor d_source = need_source ? empty(in.source->sizes(), at::kFloat) : empty({0}, type);
  if (need_source) outgoing.source = pointer<float>(d_source);
  for (int64_t n = 0; n < count; ++n) {
    std::vector<T*>& group = n < 4 * m ? outgoing.encoders : n < 8 * m ? outgoing.decoders : outgoing.psi;
    group.push_back(like(in.params[n], needs[m + 1 + n], d_params));
  }
  backward(step, kept, value_pointers, pointer<T>(g), incoming, outgoing);
  if (need_source) d_source = d_source.to(in.source->scalar_type());
  return {std::move(d_features), std::move(d_source), std::move(d_params)};
}

Gradients ebr_step_backward(const Upstream& up, const Inputs& in, const Computed& computed, at::IntArrayRef needs) {
  if (elsewhere(in)) return call_backward(up, in, computed, needs, kFallback);
  check_inputs(in);
  count_ebr_step(true);
  return with_dtype(in.features[0].scalar_type(), [&](auto tag) { return run_backward<decltype(tag)>(up, in, computed, needs); });
}

TORCH_LIBRARY_IMPL(mmc_fast, CPU, library) {
  library.impl("ebr_step", TORCH_FN(Op::step<ebr_step>));
  library.impl("ebr_step_backward", TORCH_FN(Op::backward<ebr_step_backward>));
}

}  // namespace
}  // namespace mmc::ebr
