// Autograd of mmc_fast::ebr_step on every device: a wrapper in Python costs more than the step itself at small widths.
// Where this library was not built, mmc_fast/ops/ebr/op.py registers the same in Python.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "inputs.h"

namespace mmc::ebr {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor or_undefined(const OptionalTensor& t) { return t.has_value() ? *t : Tensor(); }
OptionalTensor or_none(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

bool differentiable(const OptionalTensor& source) { return source.has_value() && source->defined() && source->is_floating_point(); }

// Saved: present, source, reversal, normalizer, features, parameters, then latents, recovered and the forward's own.
struct EbrStep : torch::autograd::Function<EbrStep> {
  // inputs: features, parameters, and the source where it is differentiable: what a gradient goes to
  static variable_list forward(AutogradContext* ctx, TensorList inputs, const Inputs* in) {
    at::AutoDispatchBelowAutograd guard;
    auto [recovered, latents, discrimination, reconstruction, saved] = call_step(*in);
    variable_list keep{or_undefined(in->present), or_undefined(in->source), in->reversal, or_undefined(in->normalizer)};
    keep.reserve(4 + inputs.size() + 1 + recovered.size() + saved.size());
    keep.insert(keep.end(), in->features.begin(), in->features.end());
    keep.insert(keep.end(), in->params.begin(), in->params.end());
    if (!in->recompute) {
      keep.push_back(latents);
      keep.insert(keep.end(), recovered.begin(), recovered.end());
      keep.insert(keep.end(), saved.begin(), saved.end());
    }
    ctx->save_for_backward(std::move(keep));
    ctx->set_materialize_grads(false);
    ctx->saved_data["call"] = std::vector<int64_t>{static_cast<int64_t>(in->features.size()), static_cast<int64_t>(in->params.size()),
                                                   in->residual, in->normalize, in->recompute};
    if (in->backend != "cpp") ctx->saved_data["backend"] = std::string(in->backend);
    variable_list outputs = std::move(recovered);
    outputs.push_back(std::move(latents));
    outputs.push_back(std::move(discrimination));
    outputs.push_back(std::move(reconstruction));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto call = ctx->saved_data["call"].toIntVector();
    const int64_t m = call[0], params = call[1];
    const variable_list kept = ctx->get_saved_variables();
    const TensorList all(kept);
    const OptionalTensor present = or_none(kept[0]), source = or_none(kept[1]), normalizer = or_none(kept[3]);
    const auto backend = ctx->saved_data.find("backend");
    const Inputs in{all.slice(4, m), present, source, kept[2], normalizer, all.slice(4 + m, params), call[2] != 0, call[3] != 0,
                    call[4] != 0, backend == ctx->saved_data.end() ? "cpp" : backend->second.toStringView()};
    const bool with_source = differentiable(source);
    std::vector<int64_t> needs(m + 1 + params, 0);
    for (int64_t i = 0; i < m; ++i) needs[i] = ctx->needs_input_grad(i);
    if (with_source) needs[m] = ctx->needs_input_grad(m + params);
    for (int64_t n = 0; n < params; ++n) needs[m + 1 + n] = ctx->needs_input_grad(m + n);

    OptionalTensors d_recovered;
    d_recovered.reserve(m);
    for (int64_t i = 0; i < m; ++i) d_recovered.push_back(or_none(grads[i]));
    const OptionalTensor d_latents = or_none(grads[m]), d_discrimination = or_none(grads[m + 1]), d_reconstruction = or_none(grads[m + 2]);
    const int64_t outputs = 4 + m + params;  // the first kept output
    const OptionalTensor latents = in.recompute ? std::nullopt : OptionalTensor(kept[outputs]);
    const Computed computed{in.recompute ? TensorList() : all.slice(outputs + 1, m), latents,
                            in.recompute ? TensorList() : all.slice(outputs + 1 + m)};
    auto [d_features, d_source, d_params] =
        call_backward({d_recovered, d_latents, d_discrimination, d_reconstruction}, in, computed, needs);

    variable_list result;
    result.reserve(m + params + 2);
    for (int64_t i = 0; i < m; ++i) result.push_back(needs[i] ? d_features[i] : Tensor());
    for (int64_t n = 0; n < params; ++n) result.push_back(needs[m + 1 + n] ? d_params[n] : Tensor());
    if (with_source) result.push_back(needs[m] ? d_source : Tensor());
    result.emplace_back();  // the call
    return result;
  }
};

Forward ebr_step(const Inputs& in) {
  const bool with_source = differentiable(in.source);
  const auto wants = [](const Tensor& t) { return t.requires_grad(); };
  const bool any = at::GradMode::is_enabled() &&
                   (std::any_of(in.features.begin(), in.features.end(), wants) ||
                    std::any_of(in.params.begin(), in.params.end(), wants) || (with_source && wants(*in.source)));
  if (!any) {
    at::AutoDispatchBelowAutograd guard;
    return call_step(in);
  }
  const auto m = static_cast<int64_t>(in.features.size());
  std::vector<Tensor> inputs;
  inputs.reserve(in.features.size() + in.params.size() + 1);
  inputs.insert(inputs.end(), in.features.begin(), in.features.end());
  inputs.insert(inputs.end(), in.params.begin(), in.params.end());
  if (with_source) inputs.push_back(*in.source);
  variable_list outputs = EbrStep::apply(TensorList(inputs), &in);
  std::vector<Tensor> recovered(outputs.begin(), outputs.begin() + m);
  // the saved tensors stay with the graph: nobody above needs them, and each would become a Python object
  return {std::move(recovered), outputs[m], outputs[m + 1], outputs[m + 2], {}};
}

constexpr const char* kNoDoubleBackward =
    "ebr_step: the fused backward cannot be differentiated again; use backend='reference' for double backward";

// Gives the gradients a history that raises when somebody differentiates them.
struct NoDoubleBackward : torch::autograd::Function<NoDoubleBackward> {
  static variable_list forward(AutogradContext*, TensorList, const variable_list& gradients) { return gradients; }
  static variable_list backward(AutogradContext*, const variable_list&) { TORCH_CHECK(false, kNoDoubleBackward); }
};

Gradients ebr_step_backward(const Upstream& up, const Inputs& in, const Computed& computed, at::IntArrayRef needs) {
  Gradients result;
  {
    at::AutoDispatchBelowAutograd guard;
    result = call_backward(up, in, computed, needs);
  }
  if (!at::GradMode::is_enabled()) return result;
  std::vector<Tensor> inputs(in.features.begin(), in.features.end());
  inputs.insert(inputs.end(), in.params.begin(), in.params.end());
  for (const OptionalTensor& t : {up.latents, up.discrimination, up.reconstruction, in.source})
    if (t.has_value() && t->defined() && t->is_floating_point()) inputs.push_back(*t);
  for (size_t i = 0; i < up.recovered.size(); ++i)
    if (const OptionalTensor t = up.recovered.get(i); t.has_value() && t->defined()) inputs.push_back(*t);
  if (std::none_of(inputs.begin(), inputs.end(), [](const Tensor& t) { return t.requires_grad(); })) return result;
  auto& [d_features, d_source, d_params] = result;
  variable_list gradients(d_features.begin(), d_features.end());
  gradients.push_back(d_source);
  gradients.insert(gradients.end(), d_params.begin(), d_params.end());
  gradients = NoDoubleBackward::apply(TensorList(inputs), gradients);
  const auto m = static_cast<int64_t>(in.features.size());
  return {std::vector<Tensor>(gradients.begin(), gradients.begin() + m), gradients[m],
          std::vector<Tensor>(gradients.begin() + m + 1, gradients.end())};
}

TORCH_LIBRARY_IMPL(mmc_fast, Autograd, library) {
  library.impl("ebr_step", TORCH_FN(Op::step<ebr_step>));
  library.impl("ebr_step_backward", TORCH_FN(Op::backward<ebr_step_backward>));
}

}  // namespace
}  // namespace mmc::ebr
