// mmc_fast._C: what was built, which instruction set runs, and the torch-free core on numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = MMC_VERSION;
  info["compiler"] = __VERSION__;
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  info["torch_abi"] = "2.10 (stable)";
  info["instruction_sets"] = mmc::compiled_isas();
  return info;
}

void select_isa(const std::string& name) {
  const std::string error = mmc::select_isa(name.c_str());
  if (!error.empty()) throw py::value_error(error);
}

py::dict dispatch_counts() {
  py::dict out;
  for (const auto& count : mmc::dispatch_counts()) out[py::str(count.name)] = count.calls;
  return out;
}

py::array_t<int64_t> pack_signs(const py::array_t<float, py::array::forcecast>& z) {
  if (z.ndim() != 2) throw py::value_error("pack_signs: z has " + std::to_string(z.ndim()) + " dimensions; pass [samples, units]");
  const int64_t samples = z.shape(0), units = z.shape(1), size = sizeof(float);
  py::array_t<int64_t> words({units, (samples + 63) / 64});
  mmc::pack_signs({z.data(), samples, units, z.strides(0) / size, z.strides(1) / size},
                  reinterpret_cast<uint64_t*>(words.mutable_data()), mmc::serial_pool());
  return words;
}

py::array_t<int64_t> coactivation_counts(const py::array_t<int64_t, py::array::c_style>& words) {
  if (words.ndim() != 2)
    throw py::value_error("coactivation_counts: words has " + std::to_string(words.ndim()) + " dimensions; pass [units, words]");
  py::array_t<int64_t> counts({words.shape(0), words.shape(0)});
  mmc::coactivation_counts(reinterpret_cast<const uint64_t*>(words.data()), words.shape(0), words.shape(1), counts.mutable_data(),
                           mmc::serial_pool());
  return counts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, instruction sets, and the torch-free core on numpy arrays";
  m.def("build_info", &build_info);
  m.def("compiled_isas", &mmc::compiled_isas);
  m.def("supported_isas", &mmc::supported_isas);
  m.def("current_isa", [] { return std::string(mmc::current_isa()); });
  m.def("select_isa", &select_isa, py::arg("name"), "Force an instruction set; '' takes the best one. ValueError if it cannot run.");
  m.def("dispatch_counts", &dispatch_counts, "Calls so far as {'primitive/isa': number}");
  m.def("reset_dispatch_counts", &mmc::reset_dispatch_counts);
  m.def("register_only_rate", &mmc::register_only_rate, "Bit multiply-adds per second of the counting loop on registers alone");
  m.def("coactivation_kernel_rate", &mmc::coactivation_kernel_rate, py::arg("units"), py::arg("words_per_unit"),
        "Bit multiply-adds per second of the counting kernel on packed words that lie ready");
  m.def("pack_signs", &pack_signs, py::arg("z"), "float [N, h] to int64 [h, ceil(N / 64)]");
  m.def("coactivation_counts", &coactivation_counts, py::arg("words"), "int64 [h, W] to int64 [h, h]");
}
