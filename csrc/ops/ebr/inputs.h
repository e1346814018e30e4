// The arguments of mmc_fast::ebr_step and its backward as values, in the order of the schema in mmc_fast/ops/ebr/op.py, and the two
// operators themselves. Nothing else in C++ spells the arguments one by one.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string_view>

namespace mmc::ebr {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<std::optional<Tensor>>;
using Forward = std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, std::vector<Tensor>>;
using Gradients = std::tuple<std::vector<Tensor>, Tensor, std::vector<Tensor>>;

struct Inputs {
  TensorList features;
  const OptionalTensor &present, &source;
  const Tensor& reversal;
  const OptionalTensor& normalizer;
  TensorList params;
  bool residual, normalize, recompute;
  std::string_view backend;

  template <class F>
  decltype(auto) spread(F&& f) const {
    return f(features, present, source, reversal, normalizer, params, residual, normalize, recompute, backend);
  }
};

// Gradients of the outputs.
struct Upstream {
  const OptionalTensors& recovered;
  const OptionalTensor &latents, &discrimination, &reconstruction;
};

// What forward returned, empty with recompute.
struct Computed {
  TensorList recovered;
  const OptionalTensor& latents;
  TensorList saved;
};

template <class... A>  // the types of Inputs
struct Operators {
  using Step = Forward(A...);
  using Backward = Gradients(const OptionalTensors&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, A...,
                             TensorList, const OptionalTensor&, TensorList, at::IntArrayRef);

  // kernels for the dispatcher from functions of the structs
  template <Forward (*run)(const Inputs&)>
  static Forward step(A... a) {
    return run(Inputs{a...});
  }
  template <Gradients (*run)(const Upstream&, const Inputs&, const Computed&, at::IntArrayRef)>
  static Gradients backward(const OptionalTensors& d_recovered, const OptionalTensor& d_latents, const OptionalTensor& d_discrimination,
                            const OptionalTensor& d_reconstruction, A... a, TensorList recovered, const OptionalTensor& latents,
                            TensorList saved, at::IntArrayRef needs) {
    return run({d_recovered, d_latents, d_discrimination, d_reconstruction}, Inputs{a...}, {recovered, latents, saved}, needs);
  }
};
using Op = Operators<TensorList, const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, TensorList, bool,
                     bool, bool, std::string_view>;

template <class Schema>
c10::TypedOperatorHandle<Schema> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

// Call the operators: through the whole dispatcher, or with `keys` the kernel of exactly those.
inline Forward call_step(const Inputs& in, std::optional<c10::DispatchKeySet> keys = std::nullopt) {
  static const auto op = find<Op::Step>("mmc_fast::ebr_step");
  return in.spread([&](auto&&... a) { return keys ? op.redispatch(*keys, a...) : op.call(a...); });
}
inline Gradients call_backward(const Upstream& up, const Inputs& in, const Computed& computed, at::IntArrayRef needs,
                               std::optional<c10::DispatchKeySet> keys = std::nullopt) {
  static const auto op = find<Op::Backward>("mmc_fast::ebr_step_backward");
  return in.spread([&](auto&&... a) {
    const auto run = [&](auto&&... all) { return keys ? op.redispatch(*keys, all...) : op.call(all...); };
    return run(up.recovered, up.latents, up.discrimination, up.reconstruction, a..., computed.recovered, computed.latents,
               computed.saved, needs);
  });
}

}  // namespace mmc::ebr
