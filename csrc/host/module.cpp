// kdfast._C: what was built and what runs here. The operators themselves are torch.ops.kdfast.*.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/divergence_facts.h"
#include "common/divergence_schema.h"
#include "common/indices.h"
#include "cuda/block_sparse.h"
#include "cuda/plan.h"
#include "host/build_info.h"

namespace py = pybind11;

namespace {

// As a call of its own: a handful of torch's take longer than a product of few rows may.
bool is_sorted_once(uintptr_t data, int64_t count, int64_t below) {
  return kdfast::sorted_once((const int64_t*)data, count, below) == count;
}

// `room`: the largest cluster that the device has room for.
py::dict plan_of(const kdfast::cuda::RowCase& c, const kdfast::cuda::DeviceLimits& device, int room) {
  const char* names[] = {"registers", "on_chip", "two_reads", "any_layout"};
  auto has_room = [&](const kdfast::cuda::RowPlan& plan) { return plan.cluster <= room; };
  const kdfast::cuda::RowPlan plan = kdfast::cuda::plan_rows(c, device, has_room);
  py::dict d;
  d["kernel"] = names[int(plan.kernel)];
  d["threads"] = plan.threads;
  d["blocks"] = plan.blocks;
  d["cluster"] = plan.cluster;
  d["lanes"] = plan.lanes;
  d["held"] = plan.held;
  d["vectors"] = plan.vectors;
  d["shared"] = plan.shared;
  d["widened"] = plan.widened;
  return d;
}

void define_blocks(py::module_& m) {
  m.def(
      "cuda_block_plan",
      [](int64_t rows, int64_t outer, int64_t all, int64_t live, int width, int depth, int element_size, bool turned,
         bool of_weight, bool apart, bool wgmma, int multiprocessors) {
        const kdfast::cuda::BlockPlan plan =
            kdfast::cuda::plan_blocks({rows, outer, all, live, width, depth, element_size, turned, of_weight, apart},
                                      {multiprocessors, 0, 0, 1, wgmma});
        return py::dict(py::arg("wgmma") = plan.wgmma, py::arg("threads") = plan.threads,
                        py::arg("tile_rows") = plan.tile_rows, py::arg("stages") = plan.stages,
                        py::arg("shared") = plan.shared, py::arg("blocks") = plan.blocks,
                        py::arg("dense") = plan.dense);
      },
      py::kw_only(), py::arg("rows"), py::arg("outer"), py::arg("all"), py::arg("live"), py::arg("width"),
      py::arg("depth"), py::arg("element_size"), py::arg("turned") = false, py::arg("of_weight") = false,
      py::arg("apart") = true, py::arg("wgmma") = false, py::arg("multiprocessors") = 132,
      "The kernel and shape of a block-sparse product on a GPU (csrc/cuda/block_sparse.h).");
  m.attr("cuda_block_rows") = kdfast::cuda::kLeastBlockRows;  // fewer are multiplied by a dense weight
  m.def("cuda_block_density", &kdfast::cuda::most_block_density, py::arg("element_size"), py::arg("narrowest"),
        "The share of live blocks beyond which dense products win on a GPU.");
}

void define_cuda(py::module_& m) {
  const kdfast::CudaBuild* build = kdfast::cuda_build();
  m.attr("cuda") =
      build ? py::object(py::dict(py::arg("toolkit") = build->toolkit, py::arg("architectures") = build->architectures))
            : py::none();
  m.def(
      "cuda_plan",
      [](int64_t rows, int64_t columns, int element_size, bool same_elements, bool alike, bool aligned, bool again,
         bool given, bool topk, bool widened, int multiprocessors, int64_t shared_per_block,
         int64_t shared_per_multiprocessor, int max_cluster, int room) {
        return plan_of({rows, columns, element_size, same_elements, alike, aligned, again, given, topk, widened},
                       {multiprocessors, shared_per_block, shared_per_multiprocessor, max_cluster}, room);
      },
      py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("element_size"), py::arg("same_elements"),
      py::arg("alike"), py::arg("aligned"), py::arg("again"), py::arg("given"), py::arg("topk") = false,
      py::arg("widened") = false, py::arg("multiprocessors"), py::arg("shared_per_block"),
      py::arg("shared_per_multiprocessor"), py::arg("max_cluster"), py::arg("room") = 16,
      "The kernel and shape that a row operator would take on such a device (csrc/cuda/plan.h).");
  define_blocks(m);
  if (!build) return;
  m.def(
      "cuda_kernels",
      [build] {
        py::list kernels;
        for (const kdfast::CudaKernel& k : build->kernels()) {
          kernels.append(py::dict(py::arg("name") = k.name, py::arg("registers") = k.registers,
                                  py::arg("local_bytes") = k.local_bytes, py::arg("max_threads") = k.max_threads,
                                  py::arg("binary_version") = k.binary_version));
        }
        return kernels;
      },
      "Attributes of the CUDA kernels as the driver loaded them; needs a device.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of kdfast's native library.";
  m.attr("version") = KDFAST_VERSION;
  m.attr("compiler") = KDFAST_COMPILER;
  // The oldest torch that the library runs on, in the form of TORCH_TARGET_VERSION: a byte each of major and minor.
  m.attr("torch") = std::to_string(KDFAST_TORCH_TARGET >> 56) + "." + std::to_string(KDFAST_TORCH_TARGET >> 48 & 0xff);
  m.def("cpu_variants", &kdfast::cpu_variants, "CPU variants that this processor runs, narrowest first.");
  m.def("cpu_variant", &kdfast::cpu_variant_name, "The CPU variant in use.");
  m.def("set_cpu_variant", &kdfast::set_cpu_variant, py::arg("name"), "Switches the CPU variant (for tests).");
  m.def("own_products", &kdfast::own_products, py::arg("bf16"),
        "Whether kdfast::matmul_ is faster here than torch's library: in float32, or of bfloat16 into float32.");
  m.def("is_sorted_once", &is_sorted_once, py::arg("data"), py::arg("count"), py::arg("below"),
        "Whether int64 indices that lie side by side are sorted, each once, from 0 to below a number.");
  using VectorFunction = void (*)(const float*, float*, int64_t);
  auto define_vector = [&](const char* name, VectorFunction function, const char* doc) {
    auto all = [function](const std::vector<float>& x) {
      std::vector<float> y(x.size());
      function(x.data(), y.data(), int64_t(x.size()));
      return y;
    };
    m.def(name, all, py::arg("x"), doc);
  };
  define_vector("vector_exp2", &kdfast::vector_exp2, "2^x as the CPU variant in use makes it (for its test).");
  define_vector("vector_log2", &kdfast::vector_log2, "log2(x) as the CPU variant in use makes it (for its test).");
  py::list divergences;
  for (int kind = 0; kind < int(kdfast::Divergence::count); ++kind) {
    const kdfast::DivergenceFacts& facts = kdfast::facts_of(kdfast::Divergence(kind));
    auto name = [&](kdfast::Divergence end) {
      return end == kdfast::Divergence::count ? facts.name : kdfast::facts_of(end).name;
    };
    divergences.append(py::make_tuple(facts.name, facts.topk, facts.second_look, facts.mixing, name(facts.at_zero),
                                      name(facts.at_one)));
  }
  // By number: name, of a top-k teacher, takes a second look, what it is mixed by, what it is where that is 0, where 1.
  m.attr("divergences") = py::tuple(divergences);
  m.attr("divergence_arguments") = kdfast::divergence_arguments();  // of their schemas, after student and teacher
  define_cuda(m);
}
