// Which CPU variant of the kernels runs here.
#pragma once
#include "cpu/divergence_rows.h"

namespace kdfast {

struct Variant {
  const char* name;
  const VariantKernels* kernels;
};

// The widest variant this processor has, or the one that KDFAST_CPU_VARIANT names.
const Variant& cpu_variant();

}  // namespace kdfast
