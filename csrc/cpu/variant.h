// Which CPU variant of the kernels runs here.
#pragma once
#include "cpu/block_rows.h"
#include "cpu/column_rows.h"
#include "cpu/divergence_rows.h"
#include "cpu/layer_rows.h"
#include "cpu/matmul_rows.h"
#include "cpu/part_rows.h"
#include "cpu/qk_rows.h"

namespace kdfast {

struct VariantKernels {
  const DivergenceKernels* divergence;  // by Divergence
  const LayerKernels* layers;
  const QkKernels* qk[2];  // by QkLoss
  const PartKernels* parts;
  const ColumnSums* columns;       // of bfloat16, float16
  const BlockKernels* blocks;      // by Element
  const ProductKernels* products;  // by Operands
  // y[i] = 2^x[i] and log2(x[i]): the vector functions on their own, for their tests.
  void (*exp2)(const float* x, float* y, int64_t count);
  void (*log2)(const float* x, float* y, int64_t count);
};

namespace portable {
extern const VariantKernels kKernels;
}
namespace avx2 {
extern const VariantKernels kKernels;
}
namespace avx512 {
extern const VariantKernels kKernels;
}
namespace avx512_bf16 {
extern const VariantKernels kKernels, kPairKernels, kAmxKernels;
}

struct Variant {
  const char* name;
  const VariantKernels* kernels;
  bool avx512, bf16;  // of its products: vectors of 512 bits, bfloat16 as it is
};

// The best variant this processor has, or the one that KDFAST_CPU_VARIANT names.
const Variant& cpu_variant();

}  // namespace kdfast
