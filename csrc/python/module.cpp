// mmc_fast._C: what was built and which instruction set runs.
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and instruction sets";
  m.def("build_info", &build_info);
  m.def("compiled_isas", &mmc::compiled_isas);
  m.def("supported_isas", &mmc::supported_isas);
  m.def("current_isa", [] { return std::string(mmc::current_isa()); });
  m.def("select_isa", &select_isa, py::arg("name"), "Force an instruction set; '' takes the best one. ValueError if it cannot run.");
  m.def("dispatch_counts", &dispatch_counts, "Calls so far as {'primitive/isa': number}");
  m.def("reset_dispatch_counts", &mmc::reset_dispatch_counts);
}
