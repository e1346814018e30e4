// Autograd of mmc_fast::ebr_step on the CPU. A wrapper in Python costs more than the step itself at small widths; for other
// devices mmc_fast/ops/ebr/op.py registers the same in Python.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace mmc::ebr {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<std::optional<Tensor>>;
using Forward = std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, std::vector<Tensor>>;
using Gradients = std::tuple<std::vector<Tensor>, Tensor, std::vector<Tensor>>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using StepSchema = Forward(TensorList, const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, TensorList,
                           bool, bool, bool);
using BackwardSchema = Gradients(const OptionalTensors&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                 TensorList, const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                                 TensorList, TensorList, const OptionalTensor&, TensorList, bool, bool, at::IntArrayRef);

template <class Schema>
c10::TypedOperatorHandle<Schema> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}
const c10::TypedOperatorHandle<StepSchema>& step_op() {
  static const auto op = find<StepSchema>("mmc_fast::ebr_step");
  return op;
}
const c10::TypedOperatorHandle<BackwardSchema>& backward_op() {
  static const auto op = find<BackwardSchema>("mmc_fast::ebr_step_backward");
  return op;
}

// everything that is not differentiable
struct Call {
  const OptionalTensor &present, &source, &normalizer;
  const Tensor& reversal;
  int64_t modalities;
  bool residual, normalize, recompute;
};

Tensor or_undefined(const OptionalTensor& t) { return t.has_value() ? *t : Tensor(); }
OptionalTensor or_none(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

bool differentiable_source(const OptionalTensor& source) {
  return source.has_value() && source->defined() && source->is_floating_point();
}

// Saved: present, source, reversal, normalizer, features, parameters, then latents, recovered and the forward's own.
struct EbrStep : torch::autograd::Function<EbrStep> {
  // inputs: features, parameters, and the source where it is differentiable
  static variable_list forward(AutogradContext* ctx, TensorList inputs, Call* call) {
    at::AutoDispatchBelowAutograd guard;
    const int64_t m = call->modalities;
    const auto params = static_cast<int64_t>(inputs.size()) - m - (differentiable_source(call->source) ? 1 : 0);
    auto [recovered, latents, discrimination, reconstruction, saved] =
        step_op().call(inputs.slice(0, m), call->present, call->source, call->reversal, call->normalizer, inputs.slice(m, params),
                       call->residual, call->normalize, call->recompute);
    variable_list keep{or_undefined(call->present), or_undefined(call->source), call->reversal, or_undefined(call->normalizer)};
    keep.reserve(4 + inputs.size() + 1 + m + saved.size());
    keep.insert(keep.end(), inputs.begin(), inputs.begin() + m + params);
    if (!call->recompute) {
      keep.push_back(latents);
      keep.insert(keep.end(), recovered.begin(), recovered.end());
      keep.insert(keep.end(), saved.begin(), saved.end());
    }
    ctx->save_for_backward(std::move(keep));
    ctx->set_materialize_grads(false);
    ctx->saved_data["sizes"] = std::vector<int64_t>{m, params, call->residual, call->normalize, call->recompute};
    variable_list outputs = std::move(recovered);
    outputs.push_back(std::move(latents));
    outputs.push_back(std::move(discrimination));
    outputs.push_back(std::move(reconstruction));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto sizes = ctx->saved_data["sizes"].toIntVector();
    const int64_t m = sizes[0], params = sizes[1];
    const variable_list kept = ctx->get_saved_variables();
    const TensorList all(kept);
    const OptionalTensor source = or_none(kept[1]);
    const bool with_source = differentiable_source(source);
    std::vector<int64_t> needs(m + 1 + params, 0);
    for (int64_t i = 0; i < m; ++i) needs[i] = ctx->needs_input_grad(i);
    if (with_source) needs[m] = ctx->needs_input_grad(m + params);
    for (int64_t n = 0; n < params; ++n) needs[m + 1 + n] = ctx->needs_input_grad(m + n);

    OptionalTensors d_recovered;
    d_recovered.reserve(m);
    for (int64_t i = 0; i < m; ++i) d_recovered.push_back(or_none(grads[i]));
    const int64_t outputs = 4 + m + params;  // the first kept output
    const bool recompute = sizes[4] != 0;
    auto [d_features, d_source, d_params] = backward_op().call(
        d_recovered, or_none(grads[m]), or_none(grads[m + 1]), or_none(grads[m + 2]), all.slice(4, m), or_none(kept[0]), source,
        kept[2], or_none(kept[3]), all.slice(4 + m, params), recompute ? TensorList() : all.slice(outputs + 1, m),
        recompute ? std::nullopt : OptionalTensor(kept[outputs]), recompute ? TensorList() : all.slice(outputs + 1 + m), sizes[2] != 0,
        sizes[3] != 0, needs);

    variable_list result;
    result.reserve(m + params + 2);
    for (int64_t i = 0; i < m; ++i) result.push_back(needs[i] ? d_features[i] : Tensor());
    for (int64_t n = 0; n < params; ++n) result.push_back(needs[m + 1 + n] ? d_params[n] : Tensor());
    if (with_source) result.push_back(needs[m] ? d_source : Tensor());
    result.emplace_back();  // the call
    return result;
  }
};

Forward ebr_step(TensorList features, const OptionalTensor& present, const OptionalTensor& source, const Tensor& reversal,
                 const OptionalTensor& normalizer, TensorList params, bool residual, bool normalize, bool recompute) {
  const bool with_source = differentiable_source(source);
  const auto wants = [](const Tensor& t) { return t.requires_grad(); };
  const bool any = at::GradMode::is_enabled() && (std::any_of(features.begin(), features.end(), wants) ||
                                                  std::any_of(params.begin(), params.end(), wants) || (with_source && wants(*source)));
  if (!any) {
    at::AutoDispatchBelowAutograd guard;
    return step_op().call(features, present, source, reversal, normalizer, params, residual, normalize, recompute);
  }
  const auto m = static_cast<int64_t>(features.size());
  std::vector<Tensor> inputs;
  inputs.reserve(features.size() + params.size() + 1);
  inputs.insert(inputs.end(), features.begin(), features.end());
  inputs.insert(inputs.end(), params.begin(), params.end());
  if (with_source) inputs.push_back(*source);
  Call call{present, source, normalizer, reversal, m, residual, normalize, recompute};
  variable_list outputs = EbrStep::apply(TensorList(inputs), &call);
  std::vector<Tensor> recovered(outputs.begin(), outputs.begin() + m);
  // the saved tensors stay with the graph: nobody above needs them, and each would become a Python object
  return {std::move(recovered), outputs[m], outputs[m + 1], outputs[m + 2], {}};
}

constexpr const char* kNoDoubleBackward =
    "ebr_step: the fused backward cannot be differentiated again; use backend='torch' for double backward";

// Gives the gradients a history that raises when somebody differentiates them.
struct NoDoubleBackward : torch::autograd::Function<NoDoubleBackward> {
  static variable_list forward(AutogradContext*, TensorList, const variable_list& gradients) { return gradients; }
  static variable_list backward(AutogradContext*, const variable_list&) { TORCH_CHECK(false, kNoDoubleBackward); }
};

Gradients ebr_step_backward(const OptionalTensors& d_recovered, const OptionalTensor& d_latents,
                            const OptionalTensor& d_discrimination, const OptionalTensor& d_reconstruction, TensorList features,
                            const OptionalTensor& present, const OptionalTensor& source, const Tensor& reversal,
                            const OptionalTensor& normalizer, TensorList params, TensorList recovered, const OptionalTensor& latents,
                            TensorList saved, bool residual, bool normalize, at::IntArrayRef needs) {
  Gradients result;
  {
    at::AutoDispatchBelowAutograd guard;
    result = backward_op().call(d_recovered, d_latents, d_discrimination, d_reconstruction, features, present, source, reversal,
                                normalizer, params, recovered, latents, saved, residual, normalize, needs);
  }
  if (!at::GradMode::is_enabled()) return result;
  std::vector<Tensor> inputs(features.begin(), features.end());
  inputs.insert(inputs.end(), params.begin(), params.end());
  for (const OptionalTensor& t : {d_latents, d_discrimination, d_reconstruction, source})
    if (t.has_value() && t->defined() && t->is_floating_point()) inputs.push_back(*t);
  for (size_t i = 0; i < d_recovered.size(); ++i)
    if (const OptionalTensor t = d_recovered.get(i); t.has_value() && t->defined()) inputs.push_back(*t);
  if (std::none_of(inputs.begin(), inputs.end(), [](const Tensor& t) { return t.requires_grad(); })) return result;
  auto& [d_features, d_source, d_params] = result;
  variable_list gradients(d_features.begin(), d_features.end());
  gradients.push_back(d_source);
  gradients.insert(gradients.end(), d_params.begin(), d_params.end());
  gradients = NoDoubleBackward::apply(TensorList(inputs), gradients);
  const auto m = static_cast<int64_t>(features.size());
  return {std::vector<Tensor>(gradients.begin(), gradients.begin() + m), gradients[m],
          std::vector<Tensor>(gradients.begin() + m + 1, gradients.end())};
}

TORCH_LIBRARY_IMPL(mmc_fast, AutogradCPU, library) {
  library.impl("ebr_step", TORCH_FN(ebr_step));
  library.impl("ebr_step_backward", TORCH_FN(ebr_step_backward));
}

}  // namespace
}  // namespace mmc::ebr
