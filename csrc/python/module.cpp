// mmc_fast._C: what was built and which instruction set runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core.h"
#include "ways.h"

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

// Python's source of ways; never freed, because threads of torch may outlive the interpreter's modules.
py::object* ways_source = nullptr;

void ask_python(mmc::Number number, int threads) {
  if (!Py_IsInitialized()) return;
  const py::gil_scoped_acquire gil;
  try {
    (*ways_source)(static_cast<int>(number), threads);
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("mmc_fast: measuring how to multiply");
  }
}

void set_ways_source(py::object source) {
  delete ways_source;
  ways_source = new py::object(std::move(source));
  mmc::set_ways_source(ask_python);
}

void pin_ways(const std::string& name) {
  const std::string error = mmc::pin_ways(name);
  if (!error.empty()) throw py::value_error(error);
}

double time_product(int number, int order, int64_t m, int64_t n, int64_t k, bool blas) {
  const auto timer = mmc::product_timer();
  if (!timer) throw std::runtime_error("the EBR operators are not loaded");
  const py::gil_scoped_release unlocked;
  return timer(static_cast<mmc::Number>(number), static_cast<mmc::Order>(order), m, n, k, blas);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and instruction sets";
  m.def("build_info", &build_info);
  m.def("compiled_isas", &mmc::compiled_isas);
  m.def("supported_isas", &mmc::supported_isas);
  m.def("current_isa", [] { return std::string(mmc::current_isa()); });
  m.def("split_depth", &mmc::split_depth, "Least depth of products that go through matrix tiles here; 0: none do.");
  m.def("select_isa", &select_isa, py::arg("name"), "Force an instruction set; '' takes the best one. ValueError if it cannot run.");
  m.def("dispatch_counts", &dispatch_counts, "Calls so far as {'primitive/isa': number}");
  m.def("reset_dispatch_counts", &mmc::reset_dispatch_counts);

  // how products are multiplied (csrc/core/ways.h); numbers and orders are the integers of its enumerations
  m.def("product_class", [](int order, int64_t m_, int64_t n, int64_t k) {
    return mmc::product_class(static_cast<mmc::Order>(order), m_, n, k);
  });
  m.def("ways", [](int number, int threads, bool fixed) {
    const py::gil_scoped_release unlocked;  // the source takes it
    return mmc::ways(static_cast<mmc::Number>(number), threads, fixed);
  });
  m.def("set_ways", [](int number, int threads, mmc::Ways w) { mmc::set_ways(static_cast<mmc::Number>(number), threads, w); });
  m.def("has_ways", [](int number, int threads) { return mmc::has_ways(static_cast<mmc::Number>(number), threads); });
  m.def("forget_ways", &mmc::forget_ways);
  m.def("pin_ways", &pin_ways, "'auto', 'tiles' or 'blas'; ValueError for another name.");
  m.def("pinned_ways", [] { return std::string(mmc::pinned_ways()); });
  m.def("set_ways_source", &set_ways_source, "f(number, threads), which calls set_ways.");
  m.def("time_product", &time_product, "Seconds of one product, the best of a few samples.");
}
