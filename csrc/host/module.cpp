// kdfast._C: what was built and what runs here. The operators themselves are torch.ops.kdfast.*.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/build_info.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of kdfast's native library.";
  m.attr("version") = KDFAST_VERSION;
  m.attr("compiler") = KDFAST_COMPILER;
  m.def("cpu_variants", &kdfast::cpu_variants, "CPU variants that this processor runs, narrowest first.");
  m.def("cpu_variant", &kdfast::cpu_variant_name, "The CPU variant in use.");
  m.def("set_cpu_variant", &kdfast::set_cpu_variant, py::arg("name"), "Switches the CPU variant (for tests).");
  m.def(
      "vector_exp2",
      [](const std::vector<float>& x) {
        std::vector<float> y(x.size());
        kdfast::vector_exp2(x.data(), y.data(), int64_t(x.size()));
        return y;
      },
      py::arg("x"), "2^x by the vector exponential of the CPU variant in use (for its test).");
}
