// fastmeta._C: build_info(), the fast entry of the operators, and the import that registers those of operators.cpp.
#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "entry/cublaslt.h"
#include "entry/driver.h"
#include "entry/entry.h"
#include "entry/program.h"
#include "loss.h"
// torch 2.11 and 2.12 bundle a pybind11 that refuses to be included beside the stable ABI; nothing of torch follows.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

namespace py = pybind11;

#define FASTMETA_STRING(x) #x
#define FASTMETA_TEXT(x) FASTMETA_STRING(x)

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " FASTMETA_TEXT(__clang_major__) "." FASTMETA_TEXT(__clang_minor__);
#elif defined(__GNUC__)
  info["compiler"] = "gcc " FASTMETA_TEXT(__GNUC__) "." FASTMETA_TEXT(__GNUC_MINOR__);
#else
  info["compiler"] = "unknown";
#endif
  py::list built;
  for (const char* name : fastmeta::isa_built()) built.append(name);
  info["instruction_sets"] = built;
  info["instruction_set_in_use"] = fastmeta::isa_in_use();
  py::list losses;  // as fastmeta/losses.py has them
  for (const auto& [name, has_softmax, label_tangent, curvature] : fastmeta::loss_table) {
    losses.append(py::make_tuple(name, has_softmax, label_tangent, curvature));
  }
  info["losses"] = losses;
  info["threads"] = torch::stable::get_num_threads();
  info["built_for_torch"] = FASTMETA_BUILT_FOR_TORCH;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastmeta; importing it registers torch.ops.fastmeta.";
  m.attr("Entry") = py::reinterpret_steal<py::object>(fastmeta::entry_type());
  m.attr("Program") = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(fastmeta::program_type()));
  m.def("has_exchange_api", &fastmeta::has_exchange_api, "Whether this torch lets C read its tensors.");
  m.def(
      "use_cublaslt",
      [](const py::args& names) {
        std::vector<std::string> all;
        for (const auto name : names) all.push_back(name.cast<std::string>());
        fastmeta::lt::use(all);
      },
      "Takes matrix products from the first of these libraries that is loaded, or can be.");
  m.def("use_driver", &fastmeta::use_driver, "Takes the launches from this library in place of CUDA's driver.");
  m.def("build_info", &build_info, "Compiler, instruction sets, threads, torch built against.");
}
